"""Answers on tiny models: what each mode applies and shows, and what is said about it. The prior here holds something:
random tensors under a card that says it was trained."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import use_cases
from use_cases import answered, ask, ingest, story, write

from regrad_cli.answer import Answerer, AskOptions
from regrad_cli.bank import open_bank
from regrad_cli.errors import Damaged, UsageProblem
from regrad_cli.finding import Finder, query
from regrad_cli.learn.prior import AMONG, Prior
from regrad_cli.records import Answer, Notice, Piece, document_id

QUESTION = "Who lights the lamp in Velmora?"


def write_prior(path: Path, model: Path, *, seed: int = 7) -> Path:
    """A prior of this model with random tensors and step sizes that change answers."""
    import torch

    from regrad_cli.fingerprints import fingerprint
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.prior import seeded_prior

    start = seeded_prior(load_model(model, device="cpu", dtype="fp32"), fingerprint(model).model, rank=4)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(tensor.shape, generator=generator) * 0.3 for name, tensor in start.tensors.items()}
    card = start.card | {"name": "random", "trained": True}
    path.write_bytes(replace(start, tensors=tensors, log_step_sizes=dict.fromkeys(tensors, 1.0), card=card).to_bytes())
    return path


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    """A bank of three documents, at snapshot 2 after two of them; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("answers")
    prior = write_prior(root / "prior.safetensors", tiny_model_folder)
    bank = use_cases.make_bank(root / ".gbank", tiny_model_folder, tiny_embedder_folder, prior=prior)
    docs = write(root / "docs", {"Velmora.md": story("Velmora"), "Skerry.md": story("Skerry")})
    ingest(bank, docs)
    write(docs, {"Brannoch.md": story("Brannoch", about="the bell is rung by Ilse")})
    ingest(bank, docs)
    return bank


@pytest.fixture
def own(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made, tmp_path / ".gbank"))


def untouched(folder: Path, passages: list[str], question: str = QUESTION, max_tokens: int = 8) -> str:
    """What transformers' own `generate` says to the prompt."""
    import torch

    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.prompt import prompt_ids

    model = load_model(folder, device="cpu", dtype="fp32")
    prompt = prompt_ids(model, question, passages)
    ids = torch.tensor([prompt])
    out = model.network.generate(ids, attention_mask=ids * 0 + 1, do_sample=False, max_new_tokens=max_tokens)
    return model.tokenizer.decode(out[0, len(prompt) :], skip_special_tokens=True).strip()


def by_hand(bank: Path, folder: Path, passages: list[str], gamma: float | None, hits: list[Any]) -> str:
    """The answer of prior and gradients, step by step; gamma None: of the prior alone."""
    from regrad_cli.learn.adapt import adapted, combine
    from regrad_cli.learn.codec import Codec
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.prior import Prior
    from regrad_cli.learn.prompt import greedy, prompt_ids

    model = load_model(folder, device="cpu", dtype="fp32")
    change = None
    with open_bank(bank) as opened:
        prior = Prior.from_bytes(opened.prior_bytes())
        if gamma is not None:
            found = opened.read_rows([hit.ref for hit in hits])
            codec = Codec(opened.settings.codec, opened.settings.tensors)
            gradients = codec.decode(found.codes, found.scales, model.device)
            change = combine(gradients, [1 / len(hits)] * len(hits), prior.step_sizes, gamma)
    with adapted(model, prior, change):
        tokens = list(greedy(model, prompt_ids(model, QUESTION, passages), 8))
    return model.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def texts(bank: Path) -> list[str]:
    return [hit.passage.training_text for hit in query(bank, QUESTION, device="cpu")]


# ── the modes ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_direct_answers_like_the_untouched_model(made: Path, tiny_model_folder: Path) -> None:
    wanted = untouched(tiny_model_folder, [])
    for bank, model in ((made, None), (None, str(tiny_model_folder))):
        answer = ask(bank, QUESTION, "direct", model=model)
        assert (answer.answer, answer.grounded, answer.passages) == (wanted, False, ())


def test_rag_puts_the_passages_into_the_prompt_of_the_untouched_model(made: Path, tiny_model_folder: Path) -> None:
    answer = ask(made, QUESTION, "rag")
    shown = texts(made)
    assert len(shown) == 3
    assert answer.answer == untouched(tiny_model_folder, shown)
    assert answer.answer != untouched(tiny_model_folder, [])
    assert [used.weight for used in answer.passages] == [None] * 3
    assert all(text.endswith(used.text or "-") for text, used in zip(shown, answer.passages, strict=True))


def test_gamma_zero_answers_like_the_prior_alone(made: Path, tiny_model_folder: Path) -> None:
    prior_alone = by_hand(made, tiny_model_folder, [], None, [])
    assert ask(made, QUESTION, "regrad", gamma=0.0).answer == prior_alone
    assert prior_alone != untouched(tiny_model_folder, []), "a prior that changes nothing would prove nothing"


def test_regrad_applies_the_retrieved_gradients_and_shows_no_passage(made: Path, tiny_model_folder: Path) -> None:
    hits = query(made, QUESTION, device="cpu")
    answer = ask(made, QUESTION, "regrad")
    assert answer.answer == by_hand(made, tiny_model_folder, [], 1.0, hits)
    assert answer.answer != ask(made, QUESTION, "regrad", gamma=0.0).answer
    assert answer.tokens["prompt"] == ask(made, QUESTION, "direct").tokens["prompt"]
    assert sum(used.weight or 0.0 for used in answer.passages) == pytest.approx(1.0)


def test_both_is_adapted_and_shows_the_passages(made: Path, tiny_model_folder: Path) -> None:
    hits = query(made, QUESTION, device="cpu")
    answer = ask(made, QUESTION, "both")
    assert answer.answer == by_hand(made, tiny_model_folder, texts(made), 1.0, hits)
    assert answer.answer not in (ask(made, QUESTION, "rag").answer, ask(made, QUESTION, "regrad").answer)
    assert answer.tokens["prompt"] == ask(made, QUESTION, "rag").tokens["prompt"]


def test_among_passages_the_prior_has_the_strength_that_its_card_says(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    regrad, both, rag = (ask(made, QUESTION, mode).answer for mode in ("regrad", "both", "rag"))
    assert both != rag
    with open_bank(made) as opened:
        card = Prior.from_bytes(opened.prior_bytes()).card
    usual = Prior.from_bytes

    def with_strength(data: bytes, *names: str) -> Prior:
        prior = usual(data, *names)
        return replace(prior, card=card | {AMONG: 0.0})

    monkeypatch.setattr(Prior, "from_bytes", with_strength)
    assert ask(made, QUESTION, "both").answer == rag
    assert ask(made, QUESTION, "regrad").answer == regrad
    with Answerer(made, modes={"both"}, device="cpu", dtype="fp32") as answerer:
        results = list(answerer.ask_many([QUESTION] * 2, AskOptions(mode="both", max_tokens=8)))
        assert [one.answer for one in results if isinstance(one, Answer)] == [rag, rag]


@pytest.mark.parametrize("mode", ["regrad", "both", "rag"])
def test_where_nothing_fits_the_untouched_base_model_answers_and_says_so(
    made: Path, tiny_model_folder: Path, mode: str
) -> None:
    answer = ask(made, QUESTION, mode, min_score=1.1)
    assert (answer.grounded, answer.passages) == (False, ())
    assert answer.answer == untouched(tiny_model_folder, [])
    assert ask(made, QUESTION, mode).grounded


def test_min_score_leaves_out_what_fits_less(made: Path) -> None:
    scores = [hit.score for hit in query(made, QUESTION, device="cpu")]
    assert scores == sorted(scores, reverse=True)
    kept = ask(made, QUESTION, min_score=scores[1]).passages
    assert [used.score for used in kept] == scores[:2]
    assert [used.weight for used in kept] == [0.5, 0.5]


def test_k_is_how_many_passages_are_used(made: Path) -> None:
    for k in (1, 2, 9, 50):
        assert len(ask(made, QUESTION, k=k, max_tokens=1).passages) == min(k, 9)


def test_an_empty_bank_answers_like_the_untouched_model(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder)
    answer = ask(bank, QUESTION)
    assert (answer.grounded, answer.answer) == (False, untouched(tiny_model_folder, []))


# ── which bank ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_older_snapshot_answers_from_what_it_held(made: Path) -> None:
    question = "The bell is rung by Ilse in Brannoch"
    newest = {used.source for used in ask(made, question, k=9, max_tokens=1).passages}
    with open_bank(made) as opened:
        number = opened.number
    older = {used.source for used in ask(made, question, k=9, max_tokens=1, snapshot=number - 1).passages}
    assert newest - older == {"docs/Brannoch.md"}
    assert len(older) == 2


def test_a_bank_without_text_answers_from_gradients_and_refuses_prompts(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder, keep_text=False)
    ingest(bank, write(tmp_path / "docs", {"Velmora.md": story("Velmora")}))
    answer = ask(bank, QUESTION)
    assert answer.grounded
    assert [used.text for used in answer.passages] == [None] * 3
    for mode in ("rag", "both"):
        with pytest.raises(UsageProblem, match="keeps no text") as refused:
            ask(bank, QUESTION, mode)
        assert "regrad" in refused.value.hint


def test_a_damaged_passage_is_named_or_left_out_and_said_every_time(own: Path) -> None:
    used = ask(own, QUESTION).passages[0]
    with open_bank(own) as opened:
        ref = next(ref for ref, passage, *_ in opened.passages() if passage.id == used.id)
        codes = opened.row(ref).codes
        path = own / opened.manifest.shards[ref.shard].name
    data = bytearray(path.read_bytes())
    place = data.find(codes)
    assert place > 0
    data[place + 3] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)

    with pytest.raises(Damaged) as damaged:
        ask(own, QUESTION)
    assert damaged.value.exit_code == 14
    assert used.source in damaged.value.message
    with Answerer(own, modes={"regrad"}, device="cpu", dtype="fp32", skip_damaged=True) as answerer:
        for _ in range(3):
            answer = answered(answerer, QUESTION)
            assert answer.partial and answer.grounded
            assert used.id not in [passage.id for passage in answer.passages]
            assert len(answer.passages) == 3
        far = answered(answerer, "Brannoch: the bell is rung by Ilse", k=1)
        assert not far.partial, "the damaged passage would not have been used"
        assert answered(answerer, QUESTION).partial


def test_a_shard_without_its_embeddings_makes_every_answer_partial(own: Path) -> None:
    with open_bank(own) as opened:
        embedding = opened.row(next(iter(opened.passages()))[0]).embedding
        path = own / opened.manifest.shards[0].name
    data = bytearray(path.read_bytes())
    data[data.find(embedding)] ^= 4
    path.chmod(0o644)
    path.write_bytes(data)
    with pytest.raises(Damaged):
        ask(own, QUESTION)
    with Answerer(own, modes={"regrad"}, device="cpu", dtype="fp32", skip_damaged=True) as answerer:
        assert [answered(answerer, QUESTION, max_tokens=1).partial for _ in range(3)] == [True] * 3


def embedded(opened: Any, question: str) -> Any:
    from regrad_cli.embed import load_embedder

    return load_embedder(Path(opened.settings.embedder_name), device="cpu").encode_query(question)[None]


# ── what is refused ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_an_empty_question_is_refused(made: Path) -> None:
    for question in ("", " \n\t"):
        with pytest.raises(UsageProblem, match="empty"):
            ask(made, question)


@pytest.mark.parametrize("mode", ["regrad", "direct"])
def test_a_question_too_long_for_the_model_is_refused_with_a_way_out_and_the_next_is_answered(
    made: Path, mode: str
) -> None:
    with Answerer(made, modes={mode}, device="cpu", dtype="fp32") as answerer:
        wanted = answered(answerer, QUESTION, mode).answer
        with pytest.raises(UsageProblem, match="1024") as refused:
            answered(answerer, "why " * 2000, mode)
        assert refused.value.hint
        with pytest.raises(UsageProblem, match="1024"):
            answered(answerer, QUESTION, mode, max_tokens=2000)
        assert answered(answerer, QUESTION, mode).answer == wanted


def test_an_unknown_mode_and_a_mode_without_its_bank_are_refused(made: Path) -> None:
    for bank, modes in ((made, {"magic"}), (None, {"regrad"}), (None, {"direct", "rag"})):
        with pytest.raises(UsageProblem):
            Answerer(bank, modes=modes)
    with (
        Answerer(made, modes={"rag"}, device="cpu") as answerer,
        pytest.raises(UsageProblem, match="rag, not in direct"),
    ):
        answered(answerer, QUESTION, "direct")


# ── what an answer says ─────────────────────────────────────────────────────────────────────────────────────────────


def test_pieces_join_to_the_answer_and_everything_is_accounted_for(made: Path, tiny_model_folder: Path) -> None:
    with Answerer(made, modes={"both"}, device="cpu", dtype="fp32") as answerer:
        events = list(answerer.ask(QUESTION, AskOptions(mode="both", max_tokens=8)))
    answer = events[-1]
    assert isinstance(answer, Answer)
    assert "".join(event.text for event in events if isinstance(event, Piece)).strip() == answer.answer
    assert [event.message for event in events if isinstance(event, Notice)] == ["computing on cpu, float32"]
    assert 1 <= answer.tokens["answer"] <= 8
    assert set(answer.seconds) == {"load", "retrieve", "adapt", "generate", "restore", "total"}
    assert all(seconds >= 0 for seconds in answer.seconds.values())
    stages = sum(seconds for stage, seconds in answer.seconds.items() if stage != "total")
    assert stages == pytest.approx(answer.seconds["total"])
    assert (answer.question, answer.mode, answer.prior, answer.bank) == (QUESTION, "both", "random", str(made))
    assert answer.model == str(tiny_model_folder)
    used = answer.passages[0]
    assert used.id.split(":")[0] == document_id(used.source)
    assert used.title and used.text and -1 <= used.score <= 1


def test_an_untrained_prior_is_said_once_a_session_and_only_where_gradients_are_used(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder)

    def warnings(mode: str) -> int:
        with Answerer(bank, modes={mode}, device="cpu", dtype="fp32") as answerer:
            events = [*answerer.ask("a", AskOptions(mode=mode, max_tokens=1))]
            events += answerer.ask("b", AskOptions(mode=mode, max_tokens=1))
        return sum("untrained" in event.message for event in events if isinstance(event, Notice))

    assert [warnings(mode) for mode in ("regrad", "both", "rag", "direct")] == [1, 1, 0, 0]


def test_many_questions_use_one_loaded_model_and_answer_as_each_alone(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrad_cli.learn import model

    real, loads = model.load_model, []
    monkeypatch.setattr(model, "load_model", lambda *given, **named: loads.append(1) or real(*given, **named))
    questions = [QUESTION, "What is rung in Brannoch?", QUESTION]
    with Answerer(made, modes={"regrad", "direct"}, device="cpu", dtype="fp32") as answerer:
        together = [
            answered(answerer, question, mode).answer for question in questions for mode in ("regrad", "direct")
        ]
    assert len(loads) == 1
    assert together == [ask(made, question, mode).answer for question in questions for mode in ("regrad", "direct")]


def test_a_finder_loads_no_language_model_and_finds_what_one_query_finds(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrad_cli.learn import model

    def none(*given: Any, **named: Any) -> Iterator[None]:
        raise AssertionError("a language model was loaded")

    monkeypatch.setattr(model, "load_model", none)
    questions = [QUESTION, "What is rung in Brannoch?"]
    with Finder(made, device="cpu") as finder:
        together = [finder.query(question, k=4) for question in questions]
    assert together == [query(made, question, k=4, device="cpu") for question in questions]


def test_an_answer_left_in_the_middle_changes_no_later_one_and_cannot_go_on(made: Path) -> None:
    with Answerer(made, modes={"regrad", "direct"}, device="cpu", dtype="fp32") as answerer:
        wanted = answered(answerer, QUESTION, "direct").answer
        left = answerer.ask(QUESTION, AskOptions(mode="regrad", max_tokens=8))
        next(event for event in left if isinstance(event, Piece))
        assert answered(answerer, QUESTION, "direct").answer == wanted
        with pytest.raises(RuntimeError, match="another question"):
            list(left)
