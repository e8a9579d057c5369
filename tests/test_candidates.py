"""Passages that answer one by one: which of them may, which answer is given, and that every way of asking agrees."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_segmented_bank import cut_prior, fill
from use_cases import ask, returned

from regrad_cli.adaptation import Adaptation, Dense
from regrad_cli.answer import Answerer, AskOptions
from regrad_cli.candidates import LEAST_CHANCE, MOST, ways
from regrad_cli.errors import UsageProblem
from regrad_cli.evaluate import EvaluateOptions, evaluate
from regrad_cli.evidence import Evidence
from regrad_cli.export import export
from regrad_cli.learn import generate
from regrad_cli.learn.adapt import adapted
from regrad_cli.learn.generate import Race, likeliest
from regrad_cli.learn.likelihood import answer_log_probability
from regrad_cli.learn.prompt import BEGINNING, Beginnings, greedy, prompt_ids
from regrad_cli.records import Answer, Piece
from regrad_cli.results import Scored
from regrad_cli.trials import noise

QUESTIONS = (
    "Who lights the lamp in Velmora?", "Which ferry crosses to Skerry?", "Who repaired the bell?",
    "When does the tide turn?", "How often does the Grey Heron cross the sound at Brannoch?",
    "What happened after the great storm?", "Who is Oda Brenk?", "What is lit at dusk?",
)  # fmt: skip

MORE = (*QUESTIONS, *(f"{question} {place}" for question in QUESTIONS for place in ("Velmora", "Skerry", "Brannoch")))


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("bank")
    prior = cut_prior(root / "prior.safetensors", tiny_model_folder, k=3)  # weighs by scores, softly
    return fill(root, tiny_model_folder, tiny_embedder_folder, prior)


def by_hand(
    bank: Path, question: str, mode: str, max_tokens: int = 8
) -> tuple[list[str], list[float], list[list[int]]]:
    """Each passage's own answer, its score (log chance + log p of how it begins), and its prompt: one at a time."""
    texts, scores, prompts = [], [], []
    with Answerer(bank, modes={mode}, device="cpu", dtype="fp32") as answerer:
        model = returned(answerer.load())
        found = returned(answerer.retrieve(question, AskOptions()))
        chances = answerer.adaptation(question, found, 1.0).prior.weights_for([hit.score for hit in found.hits])
        for hit, chance in zip(found.hits, chances, strict=True):
            adaptation = answerer.adaptation(question, replace(found, hits=(hit,)), 1.0)
            prior = adaptation.prior.among_passages() if mode == "both" else adaptation.prior
            prompts.append(prompt_ids(model, question, [hit.passage.training_text] if mode == "both" else []))
            with adapted(model, prior, adaptation.change()):
                ids = list(greedy(model, prompts[-1], max_tokens))
                ended = [*ids, *model.end_ids[: len(ids) < max_tokens]]
                begun = answer_log_probability(model, prompts[-1], ended[:BEGINNING])
            texts.append(model.tokenizer.decode(ids, skip_special_tokens=True).strip())
            scores.append(math.log(chance) + begun if chance >= LEAST_CHANCE else -math.inf)
    return texts, scores, prompts


@pytest.mark.parametrize("mode", ["regrad", "both"])
def test_each_passage_answers_by_itself_and_the_likeliest_answer_is_given(bank: Path, mode: str) -> None:
    winners: list[int] = []
    for question in MORE:  # until another than the first passage has answered: texts and weights are random
        if len(winners) >= 4 and len(set(winners)) > 1:
            break
        texts, scores, prompts = by_hand(bank, question, mode)
        best = scores.index(max(scores))
        answer = ask(bank, question, mode)
        assert answer.answer == texts[best]
        weights = [used.weight or 0.0 for used in answer.passages]
        assert weights[best] > 0.9 and weights.count(0.0) == len(weights) - 1
        assert answer.tokens["prompt"] == len(prompts[best])
        winners.append(best)
    assert len(set(winners)) > 1, "the first passage always answers, so this test shows nothing"


@pytest.mark.parametrize("mode", ["regrad", "both"])
def test_questions_together_are_answered_as_alone(bank: Path, mode: str) -> None:
    options = AskOptions(mode=mode, max_tokens=8)
    with Answerer(bank, modes={mode}, device="cpu", dtype="fp32") as answerer:
        found = [each for each in answerer.ask_many(QUESTIONS, options) if isinstance(each, Answer)]
    alone = [ask(bank, question, mode) for question in QUESTIONS]
    assert [replace(each, seconds={}) for each in found] == [replace(each, seconds={}) for each in alone]


@pytest.mark.parametrize("combine", ["likeliest", "sum", "auto"])
def test_an_evaluation_answers_as_ask_does(bank: Path, tmp_path: Path, combine: str) -> None:
    tasks = tmp_path / "tasks.jsonl"
    asked = ", ".join(f'{{"question": "{question}", "answers": ["noon"]}}' for question in QUESTIONS)
    tasks.write_text(f'{{"id": "t", "title": "t", "passages": ["The tide turns at noon."], "questions": [{asked}]}}\n')
    options = EvaluateOptions(
        tasks=(tasks,), modes=("regrad", "both"), bank=bank, combine=combine, max_tokens=8, device="cpu", dtype="fp32"
    )
    scored = [event for event in evaluate(options) if isinstance(event, Scored)]
    assert len(scored) == 2 * len(QUESTIONS)
    for one in scored:
        assert one.answer == ask(bank, one.question, one.mode, combine=combine).answer
    if combine != "sum":
        others = [ask(bank, one.question, one.mode, combine="sum").answer for one in scored]
        assert others != [one.answer for one in scored]


def test_an_adapter_is_of_the_passage_that_answers(bank: Path, tmp_path: Path) -> None:
    winners: set[int] = set()
    for number, question in enumerate(MORE):
        if number >= 4 and len(winners) > 1:
            break
        (exported,) = (
            each
            for each in export(bank, question, tmp_path / str(number), AskOptions(), device="cpu", dtype="fp32")
            if not hasattr(each, "message")
        )
        with Answerer(bank, modes={"regrad"}, device="cpu") as answerer:
            *_, answer = answerer.ask(question, AskOptions(max_tokens=8))
        assert isinstance(answer, Answer) and exported.passages == answer.passages
        place = [used.weight for used in answer.passages].index(max(used.weight or 0 for used in answer.passages))
        winners.add(place)
        with Answerer(bank, modes={"regrad"}, device="cpu", dtype="fp32") as answerer:
            found = returned(answerer.retrieve(question, AskOptions()))
            only = answerer.adaptation(question, replace(found, hits=found.hits[place : place + 1]), 1.0)
        tensors = load_file(tmp_path / str(number) / "adapter_model.safetensors")
        for name, change in only.change().items():
            assert torch.allclose(
                tensors[f"base_model.model.{name}.weight"], only.prior.tensors[name] + change, atol=1e-6
            )
    assert len(winners) > 1


@pytest.mark.parametrize("mode", ["regrad", "both"])
def test_what_each_passages_gradient_does_by_itself_is_explained(bank: Path, mode: str) -> None:
    question = QUESTIONS[0]
    answer = ask(bank, question, mode, explain=True)
    assert answer.answer == ask(bank, question, mode).answer
    told = answer.explain
    assert told is not None and [each.id for each in told.passages] == [used.id for used in answer.passages]
    assert [each.weight for each in told.passages] == pytest.approx([used.weight for used in answer.passages])
    with Answerer(bank, modes={mode}, device="cpu", dtype="fp32") as answerer:
        model = returned(answerer.load())
        found = returned(answerer.retrieve(question, AskOptions()))
        asked = answerer.prepared(model, question, AskOptions(mode=mode, max_tokens=8), found)
        ids = None
        changes = []
        for place, hit in enumerate(found.hits):
            adaptation = answerer.adaptation(question, replace(found, hits=(hit,)), 1.0)
            prior = adaptation.prior.among_passages() if mode == "both" else adaptation.prior
            prompt = prompt_ids(model, question, asked.shown[place : place + 1])
            if answer.passages[place].weight:
                with adapted(model, prior, adaptation.change()):
                    ids = list(greedy(model, prompt, 8))
            changes.append((prompt, prior, adaptation.change()))
        assert ids is not None and len(ids) == answer.tokens["answer"]
        ended = [*ids, *model.end_ids[: len(ids) < 8]]
        for effect, (prompt, prior, change) in zip(told.passages, changes, strict=True):
            with adapted(model, prior, change):
                with_it = answer_log_probability(model, prompt, ended)
            with adapted(model, prior):
                without = answer_log_probability(model, prompt, ended)
            assert effect.change == pytest.approx(with_it - without, abs=1e-3)
            if effect.weight:
                assert (told.log_probability, told.without_gradients) == pytest.approx((with_it, without), abs=1e-3)
                assert told.base_model == pytest.approx(answer_log_probability(model, prompt, ended), abs=1e-3)


def test_a_passage_too_long_to_be_explained_refuses_the_question(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regrad_cli.learn.model import Model

    options = AskOptions(mode="both", max_tokens=8, k=4)
    with Answerer(bank, modes={"both"}, device="cpu", dtype="fp32") as answerer:
        model = returned(answerer.load())
        found = returned(answerer.retrieve(QUESTIONS[0], options))
        lengths = [len(prompt_ids(model, QUESTIONS[0], (hit.passage.training_text,))) for hit in found.hits]
        shortest = lengths.index(min(lengths))
        monkeypatch.setattr("regrad_cli.candidates.ways", lambda *_: [(shortest, 1.0)])
        monkeypatch.setattr(Model, "positions", lengths[shortest] + options.max_tokens)
        (only,) = answerer.prepared(model, QUESTIONS[0], options, found).candidates
        assert len(only.prompt) == lengths[shortest] < max(lengths)
        with pytest.raises(UsageProblem, match="tokens"):
            answerer.prepared(model, QUESTIONS[0], replace(options, explain=True), found)


# ── which of them may ────────────────────────────────────────────────────────────────────────────────────────────────


class Weighing:
    """A prior, as far as `ways` looks at it."""

    def __init__(self, by_score: bool) -> None:
        self.weighs_by_score = by_score


def of(*shares: float, by_score: bool = True) -> Adaptation:
    """Two segments a passage."""
    weights = tuple(part for share in shares for part in (0.75 * share, 0.25 * share))
    owners = tuple(place for place in range(len(shares)) for _ in range(2))
    return Adaptation(Weighing(by_score), Dense({}), weights, 1.0, owners)  # type: ignore[arg-type]


def test_unlikely_passages_do_not_answer_unless_all_are() -> None:
    assert ways(of(0.7, 0.25, 0.05), "likeliest") == [(0, pytest.approx(0.7)), (1, pytest.approx(0.25))]
    assert ways(of(0.95, 0.05), "auto") == [(0, pytest.approx(0.95))]
    assert [place for place, _ in ways(of(*[0.05] * 12), "likeliest")] == list(range(12))
    assert ways(of(1.0, 1.0, 1.0, by_score=False), "likeliest") == [(place, pytest.approx(1 / 3)) for place in range(3)]


def test_no_more_answer_by_themselves_than_one_batch_takes() -> None:
    assert [place for place, _ in ways(of(*[1.0] * 40, by_score=False), "likeliest")] == list(range(MOST))


def test_noise_is_of_its_own_for_each_passage() -> None:
    drawn = noise(None, 3, 0)
    evidence = Evidence("e", (), (), None)
    given = replace(of(0.6, 0.4), gradients=Dense({"t": torch.ones(4, 3, 5)}))
    found = [drawn(evidence, given.alone(place).applied(), place).gradients.dense()["t"] for place in (0, 1, 0)]
    assert found[0].shape == found[1].shape == (2, 3, 5)
    assert torch.equal(found[0], found[2])
    cosine = (found[0] * found[1]).sum() / (found[0].norm() * found[1].norm())
    assert abs(cosine) < 0.6, "two passages get the same noise"


def test_an_evaluation_with_controls_gives_each_its_own_passages_and_the_same_choice(
    bank: Path, tmp_path: Path
) -> None:
    """Noise and other tasks' passages are chosen from by the same rule, one row a passage that may be the right one."""
    rows: list[int] = []
    tasks = tmp_path / "tasks.jsonl"
    lines = [
        f'{{"id": "{place}", "title": "{place}", "passages": ["{about}"], '
        f'"questions": [{{"question": "{question}", "answers": ["noon"]}}]}}\n'
        for place, (about, question) in enumerate(zip(("The tide turns.", "Oda Brenk."), QUESTIONS[3:5], strict=True))
    ]
    tasks.write_text("".join(lines))
    real = generate.greedy_batch
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(generate, "greedy_batch", lambda *given: rows.append(len(given[1])) or real(*given))
        options = EvaluateOptions(
            tasks=(tasks,), modes=("regrad", "random"), bank=bank, max_tokens=4, device="cpu", dtype="fp32"
        )
        scored = [event for event in evaluate(options) if isinstance(event, Scored)]
    assert len(scored) == 2 + 2 * 5
    assert rows[0] > 2 and rows == [rows[0]] * 6


def test_a_prior_that_does_not_weigh_by_scores_adds_gradients_up() -> None:
    assert ways(of(1.0, 1.0, by_score=False), "auto") == ways(of(0.6, 0.4), "sum") == [(None, 1.0)]


def test_alone_a_passage_has_all_the_weight_and_shares_it_as_before() -> None:
    assert of(0.6, 0.4).alone(1).weights == pytest.approx((0.0, 0.0, 0.75, 0.25))
    assert of(1.0, 1.0, by_score=False).alone(0).weights == pytest.approx((1.5, 0.5, 0.0, 0.0))


def test_a_way_to_combine_that_there_is_not_is_refused(bank: Path) -> None:
    with pytest.raises(UsageProblem, match="combine"):
        AskOptions(combine="mean")
    with pytest.raises(UsageProblem, match="combine"):
        list(evaluate(EvaluateOptions(tasks=(bank / "no.jsonl",), combine="sum")))


# ── which answer is given ────────────────────────────────────────────────────────────────────────────────────────────


class Scripted:
    """Tokens and their logits, step by step, instead of a model."""

    end_ids = (9,)

    def __init__(self, *scripts: Sequence[int]) -> None:
        self.scripts = scripts
        self.steps = 0

    def next_tokens(self, _model: Any, _prompts: Any, max_tokens: int, beginnings: Beginnings) -> Iterator[list[int]]:
        for step in range(max_tokens):
            self.steps += 1
            tokens = [script[step] for script in self.scripts]
            logits = torch.zeros(len(tokens), 10)
            for row, token in enumerate(tokens):
                logits[row, token] = 2.0 + row  # the later a row, the surer
            beginnings.add(logits, tokens)
            yield tokens


def raced(
    monkeypatch: pytest.MonkeyPatch, scripts: Sequence[Sequence[int]], chances: Sequence[float]
) -> tuple[Scripted, Race]:
    model = Scripted(*scripts)
    monkeypatch.setattr(generate, "next_tokens", model.next_tokens)
    return model, Race(model, [[1]] * len(scripts), chances, 6)  # type: ignore[arg-type]


def test_the_winner_is_passed_on_once_it_is_known(monkeypatch: pytest.MonkeyPatch) -> None:
    model, race = raced(monkeypatch, [[1, 2, 3, 4, 5, 9], [5, 4, 3, 2, 1, 0]], [0.5, 0.5])
    tokens = race.answer()
    assert next(tokens) == 5 and model.steps == BEGINNING and race.winner == 1
    assert list(tokens) == [4, 3, 2, 1, 0]
    _, race = raced(monkeypatch, [[1, 2, 3, 4, 5, 9], [5, 4, 3, 2, 1, 0]], [0.99, 0.01])
    assert list(race.answer()) == [1, 2, 3, 4, 5] and race.winner == 0


def test_the_only_way_is_passed_on_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    model, race = raced(monkeypatch, [[1, 2, 3, 4, 5, 9]], [1.0])
    assert next(race.answer()) == 1 and model.steps == 1


def test_what_comes_after_an_answers_end_or_its_beginning_does_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    model, _ = raced(monkeypatch, [[1, 9, 1, 1, 1, 1], [1, 1, 1, 1, 1, 1]], [0.5, 0.5])
    seen = Beginnings(model, 2)  # type: ignore[arg-type]
    list(model.next_tokens(None, None, 6, seen))
    each = [peak - math.log(math.exp(peak) + 9) for peak in (2.0, 3.0)]
    assert seen.log_probabilities == pytest.approx([2 * each[0], BEGINNING * each[1]])


def test_of_equal_answers_the_first_is_given() -> None:
    assert likeliest([0.5, 0.5], [-1.0, -1.0]) == 0
    assert likeliest([0.0, 1.0], [-1.0, -5.0]) == 1
    assert likeliest([0.9, 0.1], [math.nan, -5.0]) == 1


def test_an_answer_that_is_left_in_the_middle_leaves_the_model_as_it_was(bank: Path) -> None:
    with Answerer(bank, modes={"regrad", "direct"}, device="cpu", dtype="fp32") as answerer:
        direct = list(answerer.ask(QUESTIONS[0], AskOptions(mode="direct", max_tokens=8)))[-1].answer
        events = answerer.ask(QUESTIONS[0], AskOptions(max_tokens=8))
        assert any(isinstance(event, Piece) for event in events)
        events.close()  # type: ignore[attr-defined]
        assert list(answerer.ask(QUESTIONS[0], AskOptions(mode="direct", max_tokens=8)))[-1].answer == direct
