"""Promises 18 and 19 for the two use cases, on tiny models of several shapes; a signal hits a real process."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import tiny
import use_cases
from test_answer import QUESTION, write_prior
from use_cases import answered, ask, files, ingest, number, story, write

from regrad_cli.answer import Answerer, AskOptions
from regrad_cli.bank import open_bank, verify
from regrad_cli.errors import Mismatch, RegradError
from regrad_cli.finding import query
from regrad_cli.ingest import initialise
from regrad_cli.records import Piece

MODES = ("regrad", "both", "rag", "direct")
NAMES = ("Brannoch", "Skerry", "Velmora", "Gale")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("empty") / ".gbank"
    prior = write_prior(path.parent / "prior.safetensors", tiny_model_folder)
    return use_cases.make_bank(path, tiny_model_folder, tiny_embedder_folder, prior=prior)


@pytest.fixture(scope="module")
def made(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of four documents and their folder; not to be changed."""
    bank = Path(shutil.copytree(empty, tmp_path_factory.mktemp("made") / ".gbank"))
    ingest(bank, write(bank.parent / "docs", {f"{name}.md": story(name) for name in NAMES}))
    return bank


def sound(bank: Path) -> bool:
    return [finding for finding in verify(bank) if not finding.note] == []


# ── promise 18: what does not belong together is refused ────────────────────────────────────────────────────────────


@pytest.fixture
def folders(tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path) -> tuple[Path, Path, Path]:
    """A bank, and the model's and embedder's folders, which may be changed."""
    model = Path(shutil.copytree(tiny_model_folder, tmp_path / "model"))
    embedder = Path(shutil.copytree(tiny_embedder_folder, tmp_path / "embedder"))
    bank = use_cases.make_bank(tmp_path / ".gbank", model, embedder)
    ingest(bank, write(tmp_path / "docs", {"Velmora.md": story("Velmora")}))
    return bank, model, embedder


def other_weights(model: Path, embedder: Path) -> None:
    tiny.write_model(model, seed=5)


def other_tokenizer(model: Path, embedder: Path) -> None:
    path = model / "tokenizer.json"
    content = json.loads(path.read_text())
    content["model"]["merges"] = content["model"]["merges"][:-1]
    path.write_text(json.dumps(content))


def other_embedder(model: Path, embedder: Path) -> None:
    tiny.write_embedder(embedder, seed=5)


@pytest.mark.parametrize(
    ("change", "what"), [(other_weights, "model"), (other_tokenizer, "tokenizer"), (other_embedder, "embedder")]
)
def test_promise_18_another_model_tokenizer_or_embedder_is_refused_and_both_are_named(
    folders: tuple[Path, Path, Path], change: Callable[[Path, Path], None], what: str
) -> None:
    bank, model, embedder = folders
    with open_bank(bank) as opened:
        own = opened.stats()["fingerprints"]
    before = files(bank)
    change(model, embedder)
    from regrad_cli.fingerprints import fingerprint, fingerprint_embedder

    given_one = fingerprint_embedder(embedder) if what == "embedder" else getattr(fingerprint(model), what)
    write(bank.parent / "docs", {"new.md": story("new")})
    uses: list[Callable[[], Any]] = [
        lambda: ingest(bank, bank.parent / "docs"),
        lambda: ingest(bank, bank.parent / "docs", dry_run=True),
        *(lambda mode=mode: ask(bank, QUESTION, mode) for mode in MODES if mode != "direct"),
        # Each looks at what it needs and at nothing else: a question's search at no model, mode direct at no embedder.
        (lambda: query(bank, QUESTION, device="cpu"))
        if what == "embedder"
        else (lambda: ask(bank, QUESTION, "direct")),
    ]
    for use in uses:
        with pytest.raises(Mismatch) as refused:
            use()
        assert refused.value.exit_code == 12
        assert own[what][:12] in refused.value.message
        assert given_one[:12] in refused.value.message
        assert what in refused.value.message
        assert refused.value.hint
    assert files(bank) == before


def test_promise_18_a_prior_of_another_model_is_refused_at_init(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    from regrad_cli.fingerprints import fingerprint

    other = tiny.write_model(tmp_path / "other", seed=5)
    prior = write_prior(tmp_path / "prior.safetensors", other)
    with pytest.raises(Mismatch) as refused:
        use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder, prior=prior)
    assert refused.value.exit_code == 12
    assert fingerprint(other).model[:12] in refused.value.message
    assert fingerprint(tiny_model_folder).model[:12] in refused.value.message
    assert not (tmp_path / ".gbank").exists()


def test_promise_18_a_prior_put_in_the_place_of_the_banks_own_is_refused(
    made: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    bank = Path(shutil.copytree(made, tmp_path / ".gbank"))
    (path,) = (bank / "priors").iterdir()
    path.chmod(0o644)
    write_prior(path, tiny_model_folder, seed=8)
    for use in (lambda: ask(bank, QUESTION), lambda: ingest(bank, tmp_path)):
        with pytest.raises(RegradError) as refused:
            use()
        assert refused.value.exit_code in (12, 14)
        assert "priors/" in refused.value.message


# ── promise 19: the weights are what they were ──────────────────────────────────────────────────────────────────────


def weights_hash(network: Any) -> str:
    """Of every weight's bytes, and of how many hooks are on the model."""
    import torch

    found = hashlib.sha256()
    for name, tensor in sorted(network.state_dict().items()):
        found.update(name.encode() + tensor.contiguous().view(torch.uint8).numpy().tobytes())
    hooks = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in network.modules())
    return f"{found.hexdigest()} {hooks}"


class Watch:
    """An Answerer whose weights and prior are hashed before; `same` says whether they are what they were."""

    def __init__(self, answerer: Answerer) -> None:
        assert answerer._opened is not None
        list(answerer._opened.prepare())
        engine = answerer._opened.engine
        assert engine is not None
        self.engine = engine
        self.before = self._now()
        assert self.before[0].endswith(" 0")

    def _now(self) -> tuple[str, bytes]:
        return weights_hash(self.engine.model.network), self.engine.prior.to_bytes()

    @property
    def same(self) -> bool:
        return self._now() == self.before

    @property
    def changed_answers(self) -> bool:
        return not weights_hash(self.engine.model.network).endswith(" 0")


@pytest.fixture
def watched(made: Path) -> Iterator[tuple[Answerer, Watch]]:
    with Answerer(made, modes=set(MODES), device="cpu", dtype="fp32") as answerer:
        yield answerer, Watch(answerer)


@pytest.mark.parametrize("mode", MODES)
def test_promise_19_weights_and_prior_are_the_same_bits_after_every_answer(
    watched: tuple[Answerer, Watch], mode: str
) -> None:
    answerer, watch = watched
    for options in ({}, {"k": 1}, {"gamma": 0.0}, {"gamma": 50.0}, {"min_score": 2.0}, {"max_tokens": 1}):
        answered(answerer, QUESTION, mode, **options)
        assert watch.same, options


def stop_after_three(error: BaseException) -> Callable[..., Iterator[int]]:
    from regrad_cli.learn.prompt import answer_of

    def tokens(*given: Any) -> Iterator[int]:
        for place, token in enumerate(answer_of(*given)):
            if place == 3:
                raise error
            yield token

    return tokens


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory"), SystemExit(1)], ids=repr)
def test_promise_19_weights_are_restored_after_an_exception_or_ctrl_c_at_the_third_token(
    watched: tuple[Answerer, Watch], monkeypatch: pytest.MonkeyPatch, mode: str, error: BaseException
) -> None:
    answerer, watch = watched
    wanted = answered(answerer, QUESTION, mode).answer
    with monkeypatch.context() as patch:
        patch.setattr("regrad_cli.learn.generate.answer_of", stop_after_three(error))
        with pytest.raises(type(error)):
            answered(answerer, QUESTION, mode)
    assert watch.same
    assert answered(answerer, QUESTION, mode).answer == wanted


def test_promise_19_weights_are_restored_after_an_error_inside_a_layer(
    watched: tuple[Answerer, Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    answerer, watch = watched
    projection = watch.engine.model.projections[-1].module
    calls = []

    def fails(*given: Any) -> Any:
        calls.append(1)
        raise KeyboardInterrupt if len(calls) > 2 else NotImplementedError

    for _ in range(3):
        with monkeypatch.context() as patch:
            patch.setattr(projection, "forward", fails)
            with pytest.raises((KeyboardInterrupt, NotImplementedError)):
                answered(answerer, QUESTION, "regrad")
        assert watch.same


@pytest.mark.parametrize("way", ["closed", "dropped", "thrown into", "session closed"])
def test_promise_19_weights_are_restored_when_the_consumer_leaves(made: Path, way: str) -> None:
    with Answerer(made, modes={"regrad"}, device="cpu", dtype="fp32") as answerer:
        watch = Watch(answerer)
        events = answerer.ask(QUESTION, AskOptions(max_tokens=8))
        next(event for event in events if isinstance(event, Piece))
        assert watch.changed_answers, "in the middle of an answer the gradients are on"
        if way == "closed":
            events.close()  # type: ignore[attr-defined]
        elif way == "dropped":
            del events
        elif way == "thrown into":
            with pytest.raises(KeyboardInterrupt):
                events.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
        else:
            answerer.__exit__(None, None, None)
        assert watch.same


def test_promise_19_between_two_pieces_the_consumer_computes_as_ever(watched: tuple[Answerer, Watch]) -> None:
    import torch

    answerer, _ = watched
    events = answerer.ask(QUESTION, AskOptions(max_tokens=8))
    next(event for event in events if isinstance(event, Piece))
    leaked = torch.is_inference_mode_enabled()
    events.close()  # type: ignore[attr-defined]
    assert not torch.is_inference_mode_enabled()
    assert not leaked


SIGNALLED = """
import sys, time
sys.path[:0] = [{tests!r}, {root!r}]
import regrad_cli.learn.model as module
import regrad_cli.learn.generate as generate
from test_promises_use import weights_hash
held = []
real, answer_of = module.load_model, generate.answer_of
def load_model(*given, **named):
    model = real(*given, **named)
    held.append((model, weights_hash(model.network)))
    return model
def slow(*given):
    for place, token in enumerate(answer_of(*given)):
        time.sleep({pause!r})
        yield token
module.load_model, generate.answer_of = load_model, slow
from regrad_cli.cli import main
code = main(sys.argv[1:])
model, before = held[0]
open({report!r}, "w").write("same" if weights_hash(model.network) == before else "changed")
sys.exit(code)
"""


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["regrad", "both"])
def test_promise_19_ctrl_c_after_the_third_token_of_a_streamed_answer_restores_and_exits_130(
    made: Path, tmp_path: Path, mode: str
) -> None:
    here, report = Path(__file__).parent, tmp_path / "report"
    code = SIGNALLED.format(tests=str(here), root=str(here.parent), pause=0.2, report=str(report))
    words = [
        "ask",
        QUESTION,
        "--mode",
        mode,
        "--bank",
        made,
        "--max-tokens",
        "300",
        "--dtype",
        "fp32",
        "--device",
        "cpu",
    ]
    process = subprocess.Popen(
        [sys.executable, "-c", code, *map(str, words), "--quiet"],
        stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stdout is not None
    for _ in range(3):
        assert os.read(process.stdout.fileno(), 4096), process.communicate()
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert (process.returncode, err) == (130, b"interrupted\n")
    assert report.read_text() == "same"


# ── every shape of model ────────────────────────────────────────────────────────────────────────────────────────────


def shape_of(family: str) -> Any:
    from transformers import GemmaConfig, GPT2Config, Qwen2Config

    shape: dict[str, Any] = {
        "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "initializer_range": 0.2, "max_position_embeddings": 512,
        "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2,
    }  # fmt: skip
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=512, initializer_range=0.2, eos_token_id=2)
    return GemmaConfig(**shape, head_dim=8) if family == "gemma" else Qwen2Config(**shape)


@pytest.mark.parametrize("family", ["gpt2", "qwen2", "gemma"])
def test_models_of_other_families_go_from_init_to_an_answer(
    tmp_path: Path, tiny_embedder_folder: Path, family: str
) -> None:
    model = tiny.write_model(
        tmp_path / family, shape_of(family), chat_template=None if family == "gpt2" else tiny.CHAT_TEMPLATE
    )
    prior = write_prior(tmp_path / "prior.safetensors", model)
    for name, options in (("untrained", {}), ("learned", {"prior": prior})):
        bank = use_cases.make_bank(tmp_path / name / ".gbank", model, tiny_embedder_folder, **options)
        docs = write(bank.parent / "docs", {"Velmora.md": story("Velmora"), "Skerry.md": story("Skerry")})
        assert ingest(bank, docs).added == 6
        made_at = number(bank)
        assert ingest(bank, docs).snapshot == made_at
        with Answerer(bank, modes=set(MODES), device="cpu", dtype="fp32") as answerer:
            watch = Watch(answerer)
            answers = {mode: answered(answerer, QUESTION, mode) for mode in MODES}
            without = answered(answerer, QUESTION, "regrad", gamma=0.0)
            assert watch.same
        assert all(answer.tokens["answer"] for answer in answers.values())
        assert [answer.grounded for answer in answers.values()] == [True, True, True, False]
        assert sound(bank)
    assert answers["regrad"].answer != answers["direct"].answer
    assert answers["regrad"].answer != without.answer


def test_a_bank_is_used_from_any_folder_where_its_model_was_named_from_another(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tiny.write_model(tmp_path / "m")
    tiny.write_embedder(tmp_path / "e")
    (tmp_path / "below").mkdir()
    monkeypatch.chdir(tmp_path)
    list(initialise(Path("bank"), model="./m", embedder="e"))
    write(tmp_path / "docs", {"a.md": story("a")})
    monkeypatch.chdir(tmp_path / "below")
    ingest(tmp_path / "bank", tmp_path / "docs")
    assert query(tmp_path / "bank", QUESTION, device="cpu")


def test_a_question_to_the_bank_alone_needs_no_model_and_mode_direct_no_embedder(
    folders: tuple[Path, Path, Path], tmp_path: Path
) -> None:
    bank, model, embedder = folders
    write(bank.parent / "docs", {"new.md": story("new")})
    ingest(bank, bank.parent / "docs")
    model.rename(tmp_path / "model-away")
    assert query(bank, QUESTION, device="cpu")
    (tmp_path / "model-away").rename(model)
    embedder.rename(tmp_path / "embedder-away")
    assert ask(bank, QUESTION, "direct")
