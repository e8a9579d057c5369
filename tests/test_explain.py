"""`ask --explain`: leave-one-out by its definition, on tiny models, and what is shown of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, Fakes, answer_of, call
from learn.conftest import FAMILIES, filled_prior, random_passages
from learn.conftest import family as family  # a fixture
from story_bank import story_bank
from test_answer import QUESTION
from use_cases import answered, ask

from regrad_cli.adaptation import Adaptation, Dense
from regrad_cli.answer import Answerer, AskOptions
from regrad_cli.bank import open_bank
from regrad_cli.errors import UsageProblem
from regrad_cli.explain import explain_sum
from regrad_cli.finding import query
from regrad_cli.learn import likelihood
from regrad_cli.learn.adapt import adapted, combine
from regrad_cli.learn.codec import Codec
from regrad_cli.learn.gradients import passage_gradients
from regrad_cli.learn.likelihood import answer_log_probability
from regrad_cli.learn.model import Model, load_model
from regrad_cli.learn.prior import Prior
from regrad_cli.learn.prompt import Kept, greedy, prompt_ids
from regrad_cli.records import Effect, Explanation, Hit, Passage, RowRef, Used


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    return story_bank(tmp_path_factory.mktemp("explained"), tiny_model_folder, tiny_embedder_folder)


def plainly(model: Model, prompt: list[int], answer: list[int]) -> float:
    """log p(answer | prompt) from all logits of one forward pass, in float64."""
    with torch.no_grad():
        logits = model.network(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
    steps = logits.log_softmax(dim=-1)
    return sum(float(steps[len(prompt) - 1 + place, token]) for place, token in enumerate(answer))


# ── the log-probability of an answer ────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("length", [1, 7])
def test_an_answers_log_probability_is_the_sum_over_its_tokens(
    family: Callable[[str], Model], name: str, length: int
) -> None:
    model = family(name)
    prompt, answer = random_passages(model, (20, length), seed=length)
    assert answer_log_probability(model, prompt, answer) == pytest.approx(plainly(model, prompt, answer), rel=1e-5)
    assert answer_log_probability(model, prompt, answer) < 0
    assert answer_log_probability(model, prompt, []) == 0.0


def test_the_likelihoods_of_all_next_tokens_sum_to_one(family: Callable[[str], Model]) -> None:
    model = family("llama")
    (prompt,) = random_passages(model, (12,))
    every = [answer_log_probability(model, prompt, [token]) for token in range(model.network.config.vocab_size)]
    assert sum(torch.tensor(every).exp().tolist()) == pytest.approx(1.0, abs=1e-4)


def test_the_logits_of_the_prompt_are_never_computed(family: Callable[[str], Model]) -> None:
    model, seen = family("llama"), []
    handle = model.network.get_output_embeddings().register_forward_hook(lambda *given: seen.append(given[2].shape[1]))
    try:
        prompt, answer = random_passages(model, (50, 3))
        answer_log_probability(model, prompt, answer)
    finally:
        handle.remove()
    assert seen == [3]


def test_the_token_that_ends_an_answer_is_kept_and_not_shown(
    family: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family("llama")
    prompt = prompt_ids(model, QUESTION)
    tokens = Kept(greedy(model, prompt, 8))
    whole = list(tokens)
    assert (tokens.ids, tokens.end, len(whole)) == (whole, [], 8), "cut at its longest: nothing ended it"
    last = next(place for place in range(1, 8) if whole[place] not in whole[:place])
    monkeypatch.setattr(model.network.generation_config, "eos_token_id", [2, whole[last]])
    tokens = Kept(greedy(model, prompt, 8))
    assert list(tokens) == whole[:last] == tokens.ids
    assert tokens.end == [whole[last]]


# ── what each passage did ───────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("mode", ["regrad", "both"])
def test_a_passages_change_is_what_the_answer_loses_without_its_gradient_and_all_others_as_they_were(
    made: Path, tiny_model_folder: Path, mode: str
) -> None:
    answer = ask(made, QUESTION, mode, explain=True)
    assert answer.answer == ask(made, QUESTION, mode).answer
    model = load_model(tiny_model_folder, device="cpu", dtype="fp32")
    hits = query(made, QUESTION, device="cpu")
    with open_bank(made) as opened:
        prior = Prior.from_bytes(opened.prior_bytes())
        rows = opened.read_rows([hit.ref for hit in hits])
        gradients = Codec(opened.settings.codec, opened.settings.tensors).decode(rows.codes, rows.scales, model.device)
    prompt = prompt_ids(model, QUESTION, [hit.passage.training_text for hit in hits] if mode == "both" else [])

    def under(*weights: float) -> float:
        with adapted(model, prior, combine(gradients, weights, prior.step_sizes)):
            return plainly(model, prompt, tokens)

    third = 1 / 3
    with adapted(model, prior, combine(gradients, [third] * 3, prior.step_sizes)):
        tokens = list(greedy(model, prompt, 8))
    told = answer.explain
    assert told is not None
    assert told.log_probability == pytest.approx(under(third, third, third), rel=1e-4)
    assert told.without_gradients == pytest.approx(under(0, 0, 0), rel=1e-4)
    assert told.base_model == pytest.approx(plainly(model, prompt, tokens), rel=1e-4)
    left_out = [under(0, third, third), under(third, 0, third), under(third, third, 0)]
    assert [each.change for each in told.passages] == pytest.approx(
        [told.log_probability - without for without in left_out], rel=1e-3
    )
    assert [each.id for each in told.passages] == [used.id for used in answer.passages]
    assert [each.weight for each in told.passages] == [used.weight for used in answer.passages]
    assert len({told.log_probability, told.without_gradients, told.base_model, *left_out}) == 6


def test_the_end_of_an_answer_is_part_of_what_is_explained(
    made: Path, tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = []
    real = likelihood.answer_log_probability
    monkeypatch.setattr(likelihood, "answer_log_probability", lambda *given: judged.append(given[2]) or real(*given))
    whole = ask(made, QUESTION, explain=True)
    (tokens,) = {tuple(each) for each in judged}
    assert len(tokens) == whole.tokens["answer"] == 8
    last = next(place for place in range(1, 8) if tokens[place] not in tokens[:place])
    monkeypatch.setattr(Model, "end_ids", [tokens[last]])
    judged.clear()
    ended = ask(made, QUESTION, explain=True)
    assert ended.tokens["answer"] == last
    assert {tuple(each) for each in judged} == {tokens[: last + 1]}


def test_one_passage_left_out_of_one_is_the_prior_alone(made: Path) -> None:
    told = ask(made, QUESTION, k=1, explain=True).explain
    assert told is not None
    (only,) = told.passages
    assert told.log_probability - only.change == told.without_gradients


def test_gradients_of_no_strength_change_nothing(made: Path) -> None:
    told = ask(made, QUESTION, gamma=0.0, explain=True).explain
    assert told is not None
    assert told.log_probability == told.without_gradients
    assert [each.change for each in told.passages] == [0.0] * 3


def test_the_passage_that_says_it_helped_and_the_one_with_its_gradient_turned_round_stood_in_the_way(
    family: Callable[[str], Model],
) -> None:
    model = family("llama")
    prior = filled_prior(model)
    own, other = random_passages(model, (40, 40))
    tensors: dict[str, list[torch.Tensor]] = {}
    for ids, sign in ((own, 1), (other, 1), (own, -0.5)):
        (part,) = passage_gradients(model, prior, [ids])
        for name, tensor in part.tensors.items():
            tensors.setdefault(name, []).append(sign * tensor[0])
    small = replace(prior, log_step_sizes=dict.fromkeys(prior.tensors, -4.6))
    stacked = Dense({name: torch.stack(each) for name, each in tensors.items()})
    adaptation = Adaptation(small, stacked, (1.0, 1.0, 1.0), 1.0, (0, 1, 2))
    hits = [Hit(RowRef(0, row), 0.5, Passage("d", "d", "", row, 0, 40, None)) for row in range(3)]
    told = explain_sum(model, adaptation, hits, own[:10], own[10:])
    helped, stranger, hindered = (each.change for each in told.passages)
    assert helped > 0 > hindered
    assert helped > 4 * abs(stranger)


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")], ids=repr)
def test_weights_are_restored_where_explaining_ends_in_the_middle(
    made: Path, monkeypatch: pytest.MonkeyPatch, error: BaseException
) -> None:
    real, calls = likelihood.answer_log_probability, []

    def failing(*given: object) -> float:
        calls.append(given)
        if len(calls) == 2:
            raise error
        return real(*given)  # type: ignore[arg-type]

    with Answerer(made, modes={"regrad", "direct"}, device="cpu", dtype="fp32") as answerer:
        wanted = answered(answerer, QUESTION, "direct").answer
        with monkeypatch.context() as patch:
            patch.setattr(likelihood, "answer_log_probability", failing)
            with pytest.raises(type(error)):
                answered(answerer, QUESTION, explain=True)
        assert answered(answerer, QUESTION, "direct").answer == wanted
        assert answered(answerer, QUESTION, explain=True).answer == ask(made, QUESTION).answer


def test_explaining_has_its_own_seconds_and_where_nothing_fits_there_is_nothing_to_explain(made: Path) -> None:
    seconds = ask(made, QUESTION, explain=True).seconds
    assert seconds["explain"] > 0
    assert sum(value for stage, value in seconds.items() if stage != "total") == pytest.approx(seconds["total"])
    assert "explain" not in ask(made, QUESTION).seconds
    answer = ask(made, QUESTION, min_score=1.1, explain=True)
    assert (answer.grounded, answer.explain) == (False, None)


@pytest.mark.parametrize("mode", ["rag", "direct"])
def test_a_mode_without_gradients_has_nothing_to_explain(mode: str) -> None:
    with pytest.raises(UsageProblem, match="no gradients") as refused:
        AskOptions(mode=mode, explain=True)
    assert "regrad" in refused.value.hint


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────

TOLD = Explanation(-3.25, -9.5, -12.0, (Effect("i:0", 0.75, 6.125), Effect("j:2", 0.25, -0.5)))
USED = (Used("i:0", "a.md", "Title", 0.9, 0.75, "Text."), Used("j:2", "b.md", "", 0.8, 0.25, "More."))


@pytest.fixture
def fakes(monkeypatch: pytest.MonkeyPatch) -> Fakes:
    fakes = Fakes().install(monkeypatch)

    def ask(question, options):
        fakes.asked.append((question, options))
        yield replace(answer_of(question, "Forty-two", "regrad", USED), explain=TOLD if options.explain else None)

    fakes._ask = ask  # type: ignore[method-assign]
    return fakes


def test_json_has_the_changes_on_the_answer(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAD_BANK", str(made))
    words = ["ask", QUESTION, "--json", "--device", "cpu", "--max-tokens", "6"]
    (line,) = call(*words, "--explain").lines
    assert set(line["explain"]) == {"log_probability", "without_gradients", "base_model", "passages"}
    assert [set(each) for each in line["explain"]["passages"]] == [{"id", "weight", "change"}] * 3
    assert [each["id"] for each in line["explain"]["passages"]] == [each["id"] for each in line["passages"]]
    assert call(*words).lines[0]["explain"] is None
    lines = call("ask", "-", *words[2:], "--explain", stdin=b"one\ntwo\n").lines
    assert [len(line["explain"]["passages"]) for line in lines] == [3, 3]


def test_piped_a_line_a_passage_follows_the_answer(fakes: Fakes) -> None:
    assert call("ask", "q", "--explain").out == "Forty-two\n\n+6.125\t0.750\ti:0\tTitle\n-0.500\t0.250\tj:2\tb.md\n"
    assert call("ask", "q").out == "Forty-two\n"


def test_on_a_terminal_a_table_says_what_each_passage_did(fakes: Fakes) -> None:
    shown = call("ask", "q", "--explain", tty=True, NO_COLOR="1").out
    for part in ("+6.125", "-0.500", "Title", "-3.250 as given", "-9.500 by the prior", "-12.000 by the untouched"):
        assert part in shown
    assert "each passage's gradient" not in call("ask", "q", tty=True).out


@pytest.mark.parametrize("words", [["--mode", "rag"], ["--mode", "direct"], ["--compare"]])
def test_what_cannot_be_explained_is_usage_before_anything_is_loaded(
    made: Path, monkeypatch: pytest.MonkeyPatch, words: list[str]
) -> None:
    monkeypatch.setenv("REGRAD_BANK", str(made))
    monkeypatch.setattr(Answerer, "__init__", lambda *given, **named: pytest.fail("something was opened"))
    result = call("ask", "q", "--explain", *words, "--json")
    assert (result.code, result.out, result.error["kind"]) == (2, "", "usage")
    assert result.error["hint"]


def test_many_questions_are_explained_as_json_only(fakes: Fakes) -> None:
    result = call("ask", "-", "--explain", stdin=b"one\ntwo\n")
    assert (result.code, result.out, fakes.loads) == (2, "", 0)
    assert "--json" in result.err


@pytest.mark.parametrize("tty", [True, False])
def test_promise_21_a_hostile_title_cannot_forge_an_explanation(monkeypatch: pytest.MonkeyPatch, tty: bool) -> None:
    fakes = Fakes().install(monkeypatch)
    used = (Used("i:0", HOSTILE_NAME, HOSTILE_TEXT, 0.9, 0.75, None), Used("j:2", HOSTILE_NAME, "", 0.8, 0.25, None))
    told = replace(answer_of("q", "Forty-two", "regrad", used), explain=TOLD)
    fakes._ask = lambda question, options: (event for event in [told])  # type: ignore[method-assign,assignment]
    result = call("ask", "q", "--explain", tty=tty, NO_COLOR="1")
    assert result.code == 0
    assert not any(character in result.out + result.err for character in OBEYED)
    assert "\nerror: forged" not in result.out
