"""Banks under a prior whose passages are cut: a row holds a gradient of each segment, and a question weighs all."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import use_cases
from test_answer import write_prior as whole_prior
from use_cases import ask, ingest, rows, write

from regrad_cli.bank import open_bank, pack_bank
from regrad_cli.comparing import Compared, Version, compare
from regrad_cli.errors import UnknownFormat
from regrad_cli.evaluate import EvaluateOptions, evaluate
from regrad_cli.finding import query
from regrad_cli.lexical import Lexicon
from regrad_cli.maintain import CompactOptions, compact
from regrad_cli.move import MoveOptions, move
from regrad_cli.records import Passage, embedding_text
from regrad_cli.results import Scored
from regrad_cli.segments import Segment, cosines, cut, fits, heavy

SEGMENTS = 3
QUESTION = "Who lights the lamp in Velmora?"
PLACES = ("Velmora", "Skerry", "Brannoch")
ABOUT = (
    "The lamp of {} is lit by Oda Brenk every evening at dusk, in summer and in winter.",
    "Its ferry is called the Grey Heron, and it crosses the sound twice a day at most.",
    "The bell was repaired by the smith Ilse Torvald in the year 1902, after the great storm.",
)


def cut_prior(path: Path, model: Path, changed: str = "", **card: Any) -> Path:
    """A prior of segments, whose gradients are of the tensors alone whose names end so."""
    from regrad_cli.learn.prior import Prior

    prior = Prior.from_bytes(whole_prior(path, model).read_bytes())
    rule = {"name": "cut", "segments": SEGMENTS, "segment_temperature": 0.1, "k": 2, "gamma": 0.5}
    rule |= {"weights": "softmax", "temperature": 0.2}
    logs = {name: log for name, log in prior.log_step_sizes.items() if name.endswith(changed)}
    path.write_bytes(replace(prior, log_step_sizes=logs, card=prior.card | rule | card).to_bytes())
    return path


def documents() -> dict[str, str]:
    """Three of three sentences each, and one that stays whole."""
    texts = {f"{place}.txt": " ".join(line.format(place) for line in ABOUT) for place in PLACES}
    return texts | {"Short.txt": "The tide turns at noon."}


@pytest.fixture(scope="module", params=["", "down_proj.lora_B"], ids=["of every tensor", "of some tensors"])
def prior(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    return cut_prior(tmp_path_factory.mktemp("prior") / "cut.safetensors", tiny_model_folder, request.param)


def fill(root: Path, model: Path, embedder: Path, prior: Path, **options: Any) -> Path:
    bank = use_cases.make_bank(root / ".gbank", model, embedder, prior=prior, chunk_tokens=192, **options)
    ingest(bank, write(root / "docs", documents()))
    return bank


@pytest.fixture(scope="module")
def bank(
    tmp_path_factory: pytest.TempPathFactory, prior: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> Path:
    return fill(tmp_path_factory.mktemp("bank"), tiny_model_folder, tiny_embedder_folder, prior)


@pytest.fixture
def own(bank: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(bank, tmp_path / ".gbank"))


class ByHand:
    """Everything computed for one text after the other."""

    def __init__(self, model: Path, embedder: Path, prior: Path, codec: str | None = "r1-int4") -> None:
        from regrad_cli.embed import load_embedder
        from regrad_cli.learn.codec import Codec, parse_codec
        from regrad_cli.learn.model import load_model
        from regrad_cli.learn.prior import Prior
        from regrad_cli.learn.tokens import Tokenizer

        self.model = load_model(model, device="cpu", dtype="fp32")
        self.prior = Prior.from_bytes(prior.read_bytes())
        self.embedder = load_embedder(embedder, device="cpu")
        self.spans = Tokenizer(model).spans
        self.codec = Codec(parse_codec(codec), self.prior.shapes) if codec else None

    def coded(self, segment: Segment) -> Any:
        from regrad_cli.learn.gradients import passage_gradients

        (part,) = passage_gradients(self.model, self.prior, [self.model.token_ids(segment.training_text)])
        return self.codec.encode(part.tensors) if self.codec else part.tensors

    def segments(self, passages: Sequence[tuple[str, str]]) -> list[tuple[int, Segment]]:
        return [
            (place, segment)
            for place, (title, text) in enumerate(passages)
            for segment in cut(title, text, self.spans, SEGMENTS)
        ]

    def answer(
        self,
        question: str,
        passages: Sequence[tuple[str, str]],
        scores: Sequence[float],
        words: bool = True,
        meaning: bool = True,
        in_bank: bool = True,
    ) -> tuple[str, list[float]]:
        """The answer and what each passage weighs in it.

        words, meaning  whether segments are told apart by these
        scores          of the bank, in which a passage's cosine has ⅝, or without text all
        """
        import torch

        from regrad_cli.learn.adapt import adapted, combine
        from regrad_cli.learn.prompt import greedy, prompt_ids

        parts = self.segments(passages)
        vectors = self.embedder.encode([segment.embedding_text for _, segment in parts])
        if in_bank:
            vectors = np.rint(vectors * 127) / np.float32(127)
        asked = self.embedder.encode_query(question)
        near = cosines(asked, vectors) * meaning
        if in_bank and meaning:  # the best segment's for half of the passage's own
            whole = self.embedder.encode([embedding_text(title, text) for title, text in passages]).astype(np.float16)
            best = [
                max(near[row] for row, (owner, _) in enumerate(parts) if owner == at) for at in range(len(passages))
            ]
            gains = (np.array(best) - whole.astype(np.float32) @ asked) / 2 * (5 / 8 if words else 1)
            scores = [score + gain for score, gain in zip(scores, gains.tolist(), strict=True)]
        weights = []
        for place, weight in enumerate(self.prior.weights_for(scores)):
            own = [row for row, (owner, _) in enumerate(parts) if owner == place]
            found = fits(question, [parts[row][1] for row in own], near[own], Lexicon()) if words else near[own]
            raw = np.exp(found / 0.1)
            weights += (weight * raw / raw.sum()).tolist()
        kept = heavy(weights)
        rows = [self.coded(parts[place][1]) for place in kept]
        decoded = [self.codec.decode(*row) if self.codec else row for row in rows]
        stacked = {name: torch.cat([one[name] for one in decoded]) for name in self.prior.log_step_sizes}
        gamma = float(self.prior.card["gamma"])
        change = combine(stacked, [weights[place] for place in kept], self.prior.step_sizes, gamma)
        with adapted(self.model, self.prior, change):
            tokens = list(greedy(self.model, prompt_ids(self.model, question, ()), 8))
        sums = [sum(weights[place] for place in kept if parts[place][0] == number) for number in range(len(passages))]
        return self.model.tokenizer.decode(tokens, skip_special_tokens=True).strip(), sums


@pytest.fixture(scope="module")
def hand(tiny_model_folder: Path, tiny_embedder_folder: Path, prior: Path) -> ByHand:
    return ByHand(tiny_model_folder, tiny_embedder_folder, prior)


def texts_of(used: Sequence[Any]) -> list[tuple[str, str]]:
    return [(one.title, one.text) for one in used]


def scores_of(used: Sequence[Any]) -> list[float]:
    return [one.score for one in used]


# ── what a row holds ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_row_holds_the_gradient_and_the_vector_of_each_segment_alone(bank: Path, hand: ByHand) -> None:
    from regrad_cli.learn.rows import layout_of

    counts = {}
    with open_bank(bank) as opened:
        layout = layout_of(opened.settings)
        for ref, passage, _ in opened.passages():
            read = opened.read_rows([ref])
            parts = layout.split(read.codes, read.scales)
            wanted = cut(passage.title, passage.text or "", hand.spans, SEGMENTS)
            assert parts.begins.tolist() == [segment.begin for segment in wanted]
            for place, segment in enumerate(wanted):
                codes, scales = hand.coded(segment)
                assert np.array_equal(parts.codes[place], codes[0]) and np.array_equal(parts.scales[place], scales[0])
            assert parts.vectors is not None
            exact = hand.embedder.encode([segment.embedding_text for segment in wanted])
            assert np.abs(parts.vectors - exact).max() < 0.5 / 127 + 1e-6
            counts[passage.title] = len(wanted)
    assert counts == {"Velmora": 3, "Skerry": 3, "Brannoch": 3, "Short": 1}


def test_a_row_is_the_same_in_any_company(
    bank: Path, prior: Path, tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    other = use_cases.make_bank(
        tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder, prior=prior, chunk_tokens=192
    )
    docs = tmp_path / "docs"
    for name, text in documents().items():
        ingest(other, write(docs, {name: text}))

    def told(of: Path) -> list[tuple[Any, ...]]:
        return sorted((row[1], row[4], *row[6:]) for row in rows(of).values())

    assert told(other) == told(bank)


def test_the_prior_says_how_long_segments_are(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    from regrad_cli.learn.rows import layout_of

    found = {}
    for tokens in (12, 10_000):
        prior = cut_prior(tmp_path / f"{tokens}.safetensors", tiny_model_folder, segment_tokens=tokens)
        with open_bank(fill(tmp_path / str(tokens), tiny_model_folder, tiny_embedder_folder, prior)) as opened:
            for ref, passage, _ in opened.passages():
                row = opened.read_rows([ref])
                found[tokens, passage.title] = len(layout_of(opened.settings).split(row.codes, row.scales).owners)
    assert all(found[10_000, title] == 1 for title in (*PLACES, "Short"))
    assert all(found[12, title] == SEGMENTS for title in PLACES)


def test_a_row_is_of_those_tensors_that_the_prior_changes(bank: Path, prior: Path) -> None:
    from regrad_cli.learn.prior import Prior

    given = Prior.from_bytes(prior.read_bytes())
    with open_bank(bank) as opened:
        assert opened.settings.tensors == given.shapes and len(given.shapes) == len(given.log_step_sizes)


def test_an_adapter_has_every_tensor_of_the_prior(bank: Path, prior: Path, tmp_path: Path) -> None:
    """Also those that no gradient changes: without them PEFT would answer with another θ."""
    import torch
    from safetensors.torch import load_file

    from regrad_cli.answer import AskOptions
    from regrad_cli.export import export
    from regrad_cli.learn.prior import Prior

    list(export(bank, QUESTION, tmp_path / "adapter", AskOptions(), device="cpu"))
    given = Prior.from_bytes(prior.read_bytes())
    found = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    changed = set()
    for name, tensor in given.tensors.items():
        if not torch.equal(found.pop(f"base_model.model.{name}.weight"), tensor):
            changed.add(name)
    assert not found and changed == set(given.log_step_sizes)


def test_promise_20_readers_that_know_no_segments_refuse_the_bank(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from regrad_cli.bank import parsing

    with open_bank(bank) as opened:
        assert opened.manifest.reader_flags == ("segments",) and opened.settings.segments == SEGMENTS
        assert opened.settings.to_json()["segments"] == SEGMENTS
    monkeypatch.setattr(parsing, "READER_FLAGS", frozenset())
    with pytest.raises(UnknownFormat, match="segments"):
        open_bank(bank)


# ── what a question makes of it ──────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("question", [QUESTION, "Which ferry crosses to Skerry?", "Who repaired the bell?"])
def test_a_question_weighs_the_segments_of_all_its_passages(bank: Path, hand: ByHand, question: str) -> None:
    answer = ask(bank, question, combine="sum")
    assert len(answer.passages) == 2
    wanted, weights = hand.answer(question, texts_of(answer.passages), scores_of(answer.passages))
    assert answer.answer == wanted
    assert [used.weight for used in answer.passages] == pytest.approx(weights)


def test_each_question_weighs_one_passages_segments_anew(bank: Path) -> None:
    from regrad_cli.answer import Answerer, AskOptions

    with Answerer(bank, modes={"regrad"}, device="cpu", dtype="fp32") as answerer:
        *_, retrieved = _run(answerer.retrieve(QUESTION, AskOptions(k=1)))
        adaptation = answerer.adaptation(QUESTION, retrieved, 1.0)
        other = answerer.adaptation("Who repaired the bell in 1902?", retrieved, 1.0)
    assert adaptation.owners == (0,) * len(adaptation.weights)
    assert adaptation.weights != other.weights, "one passage, and two things asked of it"
    assert sum(adaptation.shares(1)) == pytest.approx(sum(adaptation.weights))


def _run(steps: Any) -> list[Any]:
    """What a generator yields, and what it returns."""
    found = []
    while True:
        try:
            found.append(next(steps))
        except StopIteration as end:
            return [*found, end.value]


def test_a_passage_is_left_out_with_all_its_segments(bank: Path) -> None:
    import torch

    from regrad_cli.answer import Answerer, AskOptions

    answer = ask(bank, QUESTION, explain=True, combine="sum")
    assert answer.explain is not None
    effects = answer.explain.passages
    assert [effect.weight for effect in effects] == [used.weight for used in answer.passages]
    with Answerer(bank, modes={"regrad"}, device="cpu", dtype="fp32") as answerer:
        *_, retrieved = _run(answerer.retrieve(QUESTION, AskOptions()))
        adaptation = answerer.adaptation(QUESTION, retrieved, 1.0)
    only = replace(
        adaptation,
        weights=tuple(w * (o == 0) for o, w in zip(adaptation.owners, adaptation.weights, strict=True)),
    )
    for name, tensor in adaptation.change(without=1).items():
        torch.testing.assert_close(tensor, only.change()[name])  # sums of fewer rows have other last bits


def test_without_an_embedder_words_alone_tell_segments_apart(bank: Path, hand: ByHand) -> None:
    from regrad_cli.answer import Answerer

    with Answerer(bank, modes={"regrad"}, device="cpu", dtype="fp32", search="lexical") as answerer:
        answer = use_cases.answered(answerer, QUESTION, combine="sum")
        assert answerer._opened is not None and answerer._opened.engine is not None
        assert not answerer._opened.engine.embeds
    wanted = hand.answer(QUESTION, texts_of(answer.passages), scores_of(answer.passages), meaning=False)
    assert (answer.answer, [used.weight for used in answer.passages]) == (wanted[0], pytest.approx(wanted[1]))


def test_without_text_words_count_for_nothing(
    prior: Path, tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path, bank: Path, hand: ByHand
) -> None:
    bare = fill(tmp_path, tiny_model_folder, tiny_embedder_folder, prior, keep_text=False)
    answer = ask(bare, QUESTION, k=4, combine="sum")
    shown = {used.title: used.text for used in ask(bank, QUESTION, k=4).passages}
    passages = [(used.title, shown[used.title]) for used in answer.passages]
    wanted, weights = hand.answer(QUESTION, passages, scores_of(answer.passages), words=False)
    assert answer.answer == wanted
    assert [used.weight for used in answer.passages] == pytest.approx(weights)


# ── what becomes of such a bank ──────────────────────────────────────────────────────────────────────────────────────


def test_packed_it_answers_the_same(bank: Path, tmp_path: Path) -> None:
    packed = tmp_path / "one.gbank"
    pack_bank(bank, packed)
    assert replace(ask(packed, QUESTION), seconds={}, bank=None) == replace(ask(bank, QUESTION), seconds={}, bank=None)


def test_another_codec_reaches_every_segment_and_leaves_the_vectors(
    own: Path, bank: Path, tmp_path: Path, prior: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    from regrad_cli.learn.rows import layout_of

    fine = fill(tmp_path / "fine", tiny_model_folder, tiny_embedder_folder, prior, codec="r4-int8")
    before = {}
    with open_bank(fine) as opened:
        layout = layout_of(opened.settings)
        for ref, passage, _ in opened.passages():
            row = opened.read_rows([ref])
            before[passage.title] = layout.split(row.codes, row.scales)
    list(compact(fine, CompactOptions(codec="r1-int4", device="cpu")))
    with open_bank(fine) as opened:
        layout = layout_of(opened.settings)
        assert str(opened.settings.codec) == "r1-int4" and opened.settings.segments == SEGMENTS
        for ref, passage, _ in opened.passages():
            row = opened.read_rows([ref])
            parts = layout.split(row.codes, row.scales)
            old = before[passage.title]
            assert np.array_equal(parts.begins, old.begins) and np.array_equal(parts.vectors, old.vectors)
    assert ask(fine, QUESTION, combine="sum").passages == ask(bank, QUESTION, combine="sum").passages
    *_, compared = compare(Version(bank, None), Version(fine, None), device="cpu")
    assert isinstance(compared, Compared)
    cosines_found = [one.cosine.worst for one in compared.difference.recomputed if one.cosine is not None]
    assert len(cosines_found) == 4 and min(value or 0.0 for value in cosines_found) > 0.98


@pytest.mark.parametrize("way", ["to segments", "to whole passages"])
def test_a_bank_moves_from_whole_passages_to_segments_and_back(
    way: str, prior: Path, tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    whole = whole_prior(tmp_path / "whole.safetensors", tiny_model_folder, seed=9)
    old, new = (whole, prior) if way == "to segments" else (prior, whole)
    moved = fill(tmp_path / "moved", tiny_model_folder, tiny_embedder_folder, old)
    made = fill(tmp_path / "made", tiny_model_folder, tiny_embedder_folder, new)
    list(move(moved, MoveOptions(prior=new, device="cpu", dtype="fp32")))
    with open_bank(moved) as one, open_bank(made) as other:
        assert one.settings == other.settings and one.manifest.reader_flags == other.manifest.reader_flags

    def told(bank: Path) -> list[Any]:
        return sorted((row[1], *row[4:8]) for row in rows(bank).values())

    assert told(moved) == told(made)


# ── evaluation ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def tasks(tmp_path: Path) -> Path:
    file = tmp_path / "tasks.jsonl"
    questions = [{"question": f"Who {what}?", "answers": ["Oda"]} for what in ("lights the lamp", "repaired the bell")]
    lines = [
        {"id": place, "title": place, "passages": [documents()[f"{place}.txt"]], "questions": questions}
        for place in PLACES
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


@pytest.mark.parametrize("codec", ["r1-int4", None])
def test_an_evaluation_weighs_each_tasks_segments_by_each_question(
    tasks: Path, prior: Path, codec: str | None, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    options = EvaluateOptions(
        tasks=(tasks,), modes=("regrad", "other", "random"), prior=prior, model=str(tiny_model_folder), codec=codec,
        embedder=str(tiny_embedder_folder), max_tokens=8, device="cpu", dtype="fp32",
    )  # fmt: skip
    scored = [event for event in evaluate(options) if isinstance(event, Scored)]
    hand = ByHand(tiny_model_folder, tiny_embedder_folder, prior, codec)
    found = {(one.task, one.question): one.answer for one in scored if one.mode == "regrad"}
    assert len(found) == 6
    for (place, question), answer in found.items():
        assert answer == hand.answer(question, [(place, documents()[f"{place}.txt"])], [1.0], in_bank=False)[0]
    strange = {(one.task, one.question): one.answer for one in scored if one.mode == "other"}
    for (place, question), answer in strange.items():
        others = [
            hand.answer(question, [(each, documents()[f"{each}.txt"])], [1.0], in_bank=False)[0]
            for each in PLACES
            if each != place
        ]
        assert answer in others


def test_an_evaluation_by_a_bank_weighs_as_ask_does(tasks: Path, bank: Path) -> None:
    options = EvaluateOptions(
        tasks=(tasks,), modes=("regrad",), bank=bank, max_tokens=8, device="cpu", dtype="fp32", min_score=None
    )
    scored = [event for event in evaluate(options) if isinstance(event, Scored)]
    assert len(scored) == 6
    for one in scored:
        assert one.answer == ask(bank, one.question, min_score=None).answer


def test_passages_are_what_they_were(bank: Path) -> None:
    """Retrieval, and what stands in a prompt, know nothing of segments."""
    found = query(bank, QUESTION, device="cpu")
    assert {hit.passage.text for hit in found} <= set(documents().values())
    assert all(isinstance(hit.passage, Passage) for hit in found)
