"""`ingest --stale`: a bank moves to another prior, on tiny models. What it comes to is what a bank made new with that
prior holds; until it is there, the bank is what it was. (Every system call is hit in tests/bank/test_bank_move.py.)
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import use_cases
from faketerminal import call
from test_promises_ingest import regrad, sound
from use_cases import answered, counted, files, ingest, rows, sources, story, write

from regrad_cli.answer import Answerer
from regrad_cli.bank import layout, log, open_bank, remove_documents, write_bank
from regrad_cli.errors import Damaged, Locked, Mismatch, NonFinite, PriorMismatch, UsageProblem
from regrad_cli.ingest import initialise
from regrad_cli.learn.prior import Prior
from regrad_cli.move import MoveOptions, move
from regrad_cli.records import IngestSummary, Notice, Passage, Progress, document_id, row_key

NAMES = ("Brannoch", "Skerry", "Velmora", "Gale")
QUESTION = "Who lights the lamp in Velmora?"
FIRST, SECOND, WIDE = "first", "second", "wide"


def write_prior(path: Path, model: Path, name: str, *, seed: int, rank: int = 4, size: float = 0.3) -> Path:
    """A prior of this model with random tensors that change answers."""
    import torch

    from regrad_cli.fingerprints import fingerprint
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.prior import seeded_prior

    start = seeded_prior(load_model(model, device="cpu", dtype="fp32"), fingerprint(model).model, rank=rank)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(tensor.shape, generator=generator) * size for name, tensor in start.tensors.items()}
    card = start.card | {"name": name, "trained": True}
    path.write_bytes(replace(start, tensors=tensors, log_step_sizes=dict.fromkeys(tensors, 1.0), card=card).to_bytes())
    return path


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Path]:
    root = tmp_path_factory.mktemp("priors")
    made = {FIRST: (7, 4), SECOND: (8, 4), WIDE: (9, 6)}
    return {
        name: write_prior(root / f"{name}.safetensors", tiny_model_folder, name, seed=seed, rank=rank)
        for name, (seed, rank) in made.items()
    }


@pytest.fixture(scope="module")
def banks(
    tmp_path_factory: pytest.TempPathFactory,
    priors: dict[str, Path],
    tiny_model_folder: Path,
    tiny_embedder_folder: Path,
) -> dict[str, Path]:
    """A bank of the same four documents of three passages under each prior; not to be changed."""
    found = {}
    for name, prior in priors.items():
        root = tmp_path_factory.mktemp(name)
        found[name] = use_cases.make_bank(root / ".gbank", tiny_model_folder, tiny_embedder_folder, prior=prior)
        ingest(found[name], write(root / "docs", {f"{each}.md": story(each) for each in NAMES}))
    return found


@pytest.fixture
def bank(banks: dict[str, Path], tmp_path: Path) -> Path:
    """A bank under the first prior, its documents beside it."""
    root = Path(shutil.copytree(banks[FIRST].parent, tmp_path / "own"))
    return root / ".gbank"


def events_of(bank: Path, prior: Path | None = None, **options: Any) -> Iterator[Any]:
    return move(bank, MoveOptions(prior=prior, device="cpu", dtype="fp32", **options))


def moved(bank: Path, prior: Path | None = None, **options: Any) -> IngestSummary:
    return list(events_of(bank, prior, **options))[-1]


def stopped(bank: Path, prior: Path, committed_rows: int, **options: Any) -> None:
    """A move that Ctrl-C ends when so many rows have been committed."""
    events = events_of(bank, prior, **options)
    for event in events:
        if isinstance(event, Progress) and committed(bank) >= committed_rows:
            with pytest.raises(KeyboardInterrupt):
                events.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
            return
    raise AssertionError("it ended before")


def committed(bank: Path) -> int:
    """Rows that a move has made so far."""
    return (stats(bank)["move"] or {"passages": 0})["passages"]


def stats(bank: Path) -> dict[str, Any]:
    with open_bank(bank) as opened:
        return opened.stats()


def operations(bank: Path) -> list[str]:
    return [entry["operation"] for entry in log(bank)][::-1]


# ── what it comes to ─────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("name", [SECOND, WIDE])
def test_a_moved_bank_has_the_rows_and_answers_of_one_made_new_with_that_prior(
    banks: dict[str, Path], bank: Path, priors: dict[str, Path], name: str
) -> None:
    assert rows(bank) != rows(banks[name])
    before = answered_by(bank)
    summary = moved(bank, priors[name])
    assert rows(bank) == rows(banks[name])
    assert answered_by(bank) == answered_by(banks[name]) != before
    assert (summary.documents, summary.passages, summary.recomputed, summary.unchanged) == (4, 12, 12, 0)
    with open_bank(bank) as one, open_bank(banks[name]) as other:
        assert one.settings == other.settings
        assert one.prior_bytes() == other.prior_bytes() == priors[name].read_bytes()
        assert summary.snapshot == one.number
    assert (stats(bank)["stale"], stats(bank)["move"], stats(bank)["dead"]) == (0, None, 0)
    assert sound(bank)


def answered_by(bank: Path) -> str:
    return use_cases.ask(bank, QUESTION).answer


def test_a_moved_row_is_keyed_by_the_new_prior_and_keeps_text_and_embedding(
    bank: Path, priors: dict[str, Path]
) -> None:
    from regrad_cli.records import sha256_hex

    before = rows(bank)
    moved(bank, priors[SECOND])
    after = rows(bank)
    with open_bank(bank) as opened:
        own = opened.settings
        assert own.prior == sha256_hex(priors[SECOND].read_bytes())
        for _, passage, key in opened.passages():
            assert key == row_key(passage, own.model, own.tokenizer, own.prior)
    assert before.keys() == after.keys()
    for place, row in before.items():
        assert (row[:5], row[8]) == (after[place][:5], after[place][8])
        assert all(mine != new for mine, new in zip(row[5:7], after[place][5:7], strict=True))


def test_after_a_move_ingest_finds_everything_unchanged_and_adds_under_the_new_prior(
    bank: Path, priors: dict[str, Path], banks: dict[str, Path]
) -> None:
    moved(bank, priors[SECOND])
    with counted() as calls:
        assert ingest(bank, bank.parent / "docs").unchanged == 12
    assert calls == []
    (bank.parent / "docs" / "Gale.md").unlink()
    ingest(bank, bank.parent / "docs", prune=True)
    write(bank.parent / "docs", {"Gale.md": story("Gale")})
    ingest(bank, bank.parent / "docs")
    assert rows(bank) == rows(banks[SECOND])


def test_no_embedder_is_needed(bank: Path, priors: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from regrad_cli import engine

    def none(*_: Any, **__: Any) -> Any:
        raise AssertionError("an embedder was looked for")

    monkeypatch.setattr(engine, "resolve_embedder", none)
    monkeypatch.setattr("regrad_cli.embed.load_embedder", none)
    assert moved(bank, priors[SECOND]).recomputed == 12


def test_a_passage_that_two_documents_share_is_computed_once(
    tmp_path: Path, priors: dict[str, Path], tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder, prior=priors[FIRST])
    ingest(bank, write(tmp_path / "docs", {"a.md": story("Velmora"), "b.md": story("Velmora")}))
    with counted() as calls:
        assert moved(bank, priors[SECOND]).recomputed == 6
    assert sum(calls) == 3
    first, second = (use_cases.rows_of(bank, f"docs/{name}.md") for name in "ab")
    assert [row[1:] for row in first.values()] == [row[1:] for row in second.values()]


def test_rows_that_were_removed_stay_removed(bank: Path, priors: dict[str, Path], banks: dict[str, Path]) -> None:
    remove_documents(bank, ["docs/Skerry.md"])
    assert moved(bank, priors[SECOND]).recomputed == 9
    gone = document_id("docs/Skerry.md")
    assert rows(bank) == {place: row for place, row in rows(banks[SECOND]).items() if place[0] != gone}
    assert stats(bank)["dead"] == 0


def test_an_empty_bank_moves_too(
    tmp_path: Path, priors: dict[str, Path], banks: dict[str, Path], tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder, prior=priors[FIRST])
    assert moved(bank, priors[WIDE]).passages == 0
    ingest(bank, write(tmp_path / "docs", {f"{each}.md": story(each) for each in NAMES}))
    assert rows(bank) == rows(banks[WIDE])


@pytest.mark.parametrize("named", [True, False])
def test_where_nothing_is_stale_nothing_changes_and_nothing_is_loaded(
    bank: Path, priors: dict[str, Path], named: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = files(bank)
    monkeypatch.setattr("regrad_cli.learn.model.load_model", lambda *_, **__: pytest.fail("a model was loaded"))
    notice, summary = list(events_of(bank, priors[FIRST] if named else None))
    assert "no passage is stale" in notice.message and FIRST in notice.message
    assert (summary.recomputed, summary.unchanged, summary.documents) == (0, 12, 4)
    assert {name: data for name, data in files(bank).items() if name != "lock"} == {
        name: data for name, data in before.items() if name != "lock"
    }


def test_the_log_says_what_happened_and_the_old_prior_goes_with_its_snapshots(
    bank: Path, priors: dict[str, Path]
) -> None:
    old = stats(bank)["fingerprints"]["prior"]
    moved(bank, priors[SECOND], commit_rows=2)
    entries = log(bank)
    assert [entry["operation"] for entry in entries] == ["move", "ingest", "init"], "nothing of the way is left"
    assert [entry["prior"] for entry in entries] == [SECOND, FIRST, FIRST]
    assert (entries[0]["passages"], entries[0]["documents"]) == (12, 4)
    assert use_cases.ask(bank, QUESTION, snapshot=entries[1]["snapshot"]).prior == FIRST
    assert (bank / layout.content_name("priors", old)).exists()
    for entry in entries[1:]:
        (bank / layout.snapshot_name(entry["snapshot"])).unlink()
    with write_bank(bank):
        pass
    assert not (bank / layout.content_name("priors", old)).exists()
    assert len(list((bank / "priors").iterdir())) == 1
    assert sound(bank)


# ── on the way ───────────────────────────────────────────────────────────────────────────────────────────────────────


def test_promise_11_a_move_interrupted_at_any_progress_event_goes_on_to_the_same_rows(
    bank: Path, priors: dict[str, Path], banks: dict[str, Path]
) -> None:
    old, new, start = rows(bank), rows(banks[SECOND]), files(bank)
    steps = len(use_cases.progress(list(events_of(bank, priors[SECOND], commit_rows=3))))
    assert steps > 8 and rows(bank) == new
    for stop in range(1, steps, 2):
        shutil.rmtree(bank)
        write(bank, start)
        under_way = events_of(bank, priors[SECOND], commit_rows=3)
        for _ in range(stop):
            while not isinstance(next(under_way), Progress):
                pass
        with pytest.raises(KeyboardInterrupt):
            under_way.throw(KeyboardInterrupt())  # type: ignore[attr-defined]
        assert rows(bank) == old and sound(bank)
        figures = stats(bank)
        assert (figures["stale"], figures["prior"], figures["move"]["prior"]) == (12, FIRST, SECOND)
        done = figures["move"]["passages"]
        with counted() as calls:
            summary = moved(bank, commit_rows=5)  # --stale alone
        assert sum(calls) == summary.recomputed == 12 - done == 12 - summary.unchanged
        assert rows(bank) == new and sound(bank)
        assert operations(bank) == ["init", "ingest", "move"]


@pytest.mark.slow
def test_promise_01_and_11_a_move_killed_at_random_moments_goes_on_to_the_same_rows(
    bank: Path, priors: dict[str, Path], banks: dict[str, Path]
) -> None:
    """Between the kills the bank holds its old rows, all of them, under the old prior."""
    old, new, chance = rows(bank), rows(banks[SECOND]), random.Random(11)
    words = ["ingest", "--stale", "--json", "--dtype", "fp32", "--device", "cpu"]
    kills, done, first_s = 0, [0], 0.0
    for turn in range(5):
        begun = stats(bank)["move"] is not None
        named = [] if begun else ["--prior", priors[SECOND]]
        started = time.monotonic()
        process = regrad(bank, *words, "--commit-rows", "1", *named)
        # The first is killed right after a commit, wherever it is then; the others at random moments around that time.
        last = started + (first_s * chance.uniform(0.3, 1.1) if turn else 300)
        while time.monotonic() < last and process.poll() is None and (turn or not committed(bank)):
            time.sleep(0.005)
        first_s = first_s or time.monotonic() - started
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert sound(bank)
        held = rows(bank)
        assert held in (old, new)
        if held == new:
            break
        done.append(committed(bank))
        assert done[-1] >= done[-2], "nothing that was committed is lost"
    assert kills and done[-1]
    ended = regrad(bank, *words)
    out, err = ended.communicate()
    assert ended.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["unchanged"] == (12 if held == new else done[-1])
    assert rows(bank) == new


def test_a_session_of_questions_keeps_its_prior_and_its_rows_through_a_move(
    bank: Path, priors: dict[str, Path], banks: dict[str, Path]
) -> None:
    old = answered_by(bank)
    with Answerer(bank, modes={"regrad"}, device="cpu", dtype="fp32") as session:
        events = events_of(bank, priors[WIDE], commit_rows=4)
        said = {answered(session, QUESTION).answer}
        for event in events:
            if isinstance(event, Progress):
                said.add(answered(session, QUESTION).answer)
        assert answered(session, QUESTION).prior == FIRST
    assert said == {old}
    assert answered_by(bank) == answered_by(banks[WIDE]) != old


def test_while_a_move_runs_other_writers_are_refused(bank: Path, priors: dict[str, Path]) -> None:
    events = events_of(bank, priors[SECOND], commit_rows=3)
    next(event for event in events if isinstance(event, Progress))
    with pytest.raises(Locked):
        ingest(bank, bank.parent / "docs")
    with pytest.raises(Locked):
        moved(bank)
    events.close()  # type: ignore[attr-defined]
    assert moved(bank).passages == 12


def test_an_ingest_in_the_middle_of_a_move_says_so_and_is_moved_with_the_rest(
    bank: Path, priors: dict[str, Path], banks: dict[str, Path]
) -> None:
    stopped(bank, priors[SECOND], 8, commit_rows=4)
    docs = write(bank.parent / "docs", {"new.md": story("new", 2)})
    (docs / "Skerry.md").unlink()
    events = list(use_cases.events_of(bank, docs, prune=True))
    assert any("on its way" in event.message for event in events if isinstance(event, Notice))
    assert (events[-1].added, events[-1].removed, events[-1].unchanged) == (2, 1, 9)
    assert stats(bank)["stale"] == 11
    moved(bank)
    assert sources(bank) == {f"docs/{name}.md" for name in ("Brannoch", "Velmora", "Gale", "new")}
    places = {document_id(f"docs/{name}.md") for name in ("Brannoch", "Velmora", "Gale")}
    kept = {place: row for place, row in rows(bank).items() if place[0] in places}
    assert kept == {place: row for place, row in rows(banks[SECOND]).items() if place[0] in places}
    with counted() as calls:
        assert ingest(bank, docs).unchanged == 11
    assert calls == [] and sound(bank)


def test_naming_the_old_prior_in_the_middle_gives_the_move_up(bank: Path, priors: dict[str, Path]) -> None:
    before = rows(bank)
    stopped(bank, priors[SECOND], 8, commit_rows=4)
    notice, summary = list(events_of(bank, priors[FIRST]))
    assert SECOND in notice.message and "given up" in notice.message
    assert (summary.recomputed, summary.unchanged) == (0, 12)
    assert rows(bank) == before and stats(bank)["stale"] == 0
    assert len(list((bank / "priors").iterdir())) == 1 and sound(bank)
    assert operations(bank)[-1] == "move given up"


def test_naming_a_third_prior_in_the_middle_moves_there(
    bank: Path, priors: dict[str, Path], banks: dict[str, Path]
) -> None:
    stopped(bank, priors[SECOND], 8, commit_rows=4)
    assert moved(bank, priors[WIDE]).recomputed == 12
    assert rows(bank) == rows(banks[WIDE])
    assert {path.name for path in (bank / "priors").iterdir()} == {
        f"{entry}.safetensors" for entry in (stats(banks[name])["fingerprints"]["prior"] for name in (FIRST, WIDE))
    }


def test_a_dry_run_changes_nothing_and_foretells_the_move(bank: Path, priors: dict[str, Path]) -> None:
    before = files(bank)
    foretold = moved(bank, priors[SECOND], dry_run=True)
    assert files(bank) == before
    assert (foretold.dry_run, foretold.recomputed, foretold.unchanged) == (True, 12, 0)
    assert foretold.estimated_seconds > 0
    size = stats(bank)["bytes"]
    written = size["gradients"] + size["embeddings"] + size["text"]
    assert written / 3 < foretold.estimated_bytes < 3 * written
    stopped(bank, priors[SECOND], 8, commit_rows=4)
    left = moved(bank, dry_run=True)
    assert (left.recomputed, left.unchanged) == (4, 8)
    assert moved(bank).recomputed == 4


# ── what is refused ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_promise_18_a_prior_of_another_model_is_refused_and_both_are_named(
    bank: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    from regrad_cli.fingerprints import fingerprint

    other = tiny.write_model(tmp_path / "other", seed=5)
    prior = write_prior(tmp_path / "other.safetensors", other, "other", seed=1)
    before = files(bank)
    with pytest.raises(Mismatch) as refused:
        moved(bank, prior)
    assert refused.value.exit_code == 12 and refused.value.hint
    for model in (other, tiny_model_folder):
        assert fingerprint(model).model[:12] in refused.value.message
    assert unchanged(bank, before)


def unchanged(bank: Path, before: dict[str, bytes]) -> bool:
    """Whether all files are what they were, but for who held the lock last."""
    return files(bank) | {"lock": b""} == before | {"lock": b""}


def test_a_prior_of_other_tensors_under_a_card_of_this_model_is_refused_before_anything_changes(
    bank: Path, tmp_path: Path, priors: dict[str, Path]
) -> None:
    from regrad_cli.learn.prior import Prior

    real = Prior.from_bytes(priors[SECOND].read_bytes())
    name = next(iter(real.tensors))
    wrong = replace(real, tensors=real.tensors | {name: real.tensors[name][:, :-1]})
    file = tmp_path / "wrong.safetensors"
    file.write_bytes(wrong.to_bytes())
    before = files(bank)
    with pytest.raises(PriorMismatch):
        moved(bank, file)
    assert unchanged(bank, before)


def test_the_prior_that_comes_with_regrad_goes_by_a_name(
    bank: Path, priors: dict[str, Path], banks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrad_cli import priors as module

    def shipped(identity: Any) -> bytes | None:
        return priors[SECOND].read_bytes() if identity.model == stats(bank)["fingerprints"]["model"] else None

    with pytest.raises(UsageProblem, match="comes with regrad"):
        moved(bank, Path("shipped"))
    monkeypatch.setattr(module, "shipped_prior", shipped)
    moved(bank, Path("shipped"))
    assert rows(bank) == rows(banks[SECOND])


@pytest.mark.parametrize("way", ["flipped", "cut", "empty", "not there"])
def test_a_file_that_is_no_prior_is_refused(bank: Path, tmp_path: Path, priors: dict[str, Path], way: str) -> None:
    data = priors[SECOND].read_bytes()
    broken = {"flipped": data[:20] + b"\xff" + data[21:], "cut": data[:-4], "empty": b"", "not there": None}[way]
    file = tmp_path / "broken.safetensors"
    if broken is not None:
        file.write_bytes(broken)
    before = files(bank)
    with pytest.raises(UsageProblem if broken is None else Damaged, match=r"broken\.safetensors"):
        moved(bank, file)
    assert unchanged(bank, before)


def test_a_fine_tuned_baseline_is_no_prior_of_a_bank(
    bank: Path, tmp_path: Path, priors: dict[str, Path], tiny_model_folder: Path
) -> None:
    tuned = Prior.from_bytes(priors[SECOND].read_bytes())
    file = tmp_path / "tuned.safetensors"
    file.write_bytes(replace(tuned, card=tuned.card | {"objective": "direct"}).to_bytes())
    before = files(bank)
    with pytest.raises(UsageProblem, match="tuned for direct") as told:
        moved(bank, file)
    assert "--baseline" in told.value.hint and unchanged(bank, before)
    with pytest.raises(UsageProblem, match="tuned for direct"):
        list(initialise(tmp_path / "new", model=str(tiny_model_folder), prior=file))
    assert not (tmp_path / "new").exists()


def test_a_damaged_prior_of_the_move_is_told_with_the_way_out(
    bank: Path, priors: dict[str, Path], banks: dict[str, Path]
) -> None:
    old = rows(bank)
    stopped(bank, priors[SECOND], 4, commit_rows=4)
    file = bank / layout.content_name("priors", stats(banks[SECOND])["fingerprints"]["prior"])
    file.write_bytes(file.read_bytes()[:-1] + b"?")
    with pytest.raises(Damaged) as told:
        moved(bank)
    assert told.value.hint == "give the prior again: regrad ingest --stale --prior FILE"
    assert rows(bank) == old
    assert moved(bank, priors[SECOND]).recomputed == 8
    assert rows(bank) == rows(banks[SECOND]) and sound(bank)


@pytest.mark.parametrize("named", [True, False])
def test_a_bank_without_text_is_refused_with_the_way_out(
    tmp_path: Path, priors: dict[str, Path], tiny_model_folder: Path, tiny_embedder_folder: Path, named: bool
) -> None:
    bank = use_cases.make_bank(
        tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder, prior=priors[FIRST], keep_text=False
    )
    ingest(bank, write(tmp_path / "docs", {"a.md": story("Velmora")}))
    before = files(bank)
    with pytest.raises(UsageProblem, match="keeps no text") as refused:
        moved(bank, priors[SECOND] if named else None)
    assert "regrad init PATH --prior FILE" in refused.value.hint
    assert unchanged(bank, before)


def test_a_damaged_row_stops_the_move_and_names_its_document(bank: Path, priors: dict[str, Path]) -> None:
    (shard,) = (bank / "shards").iterdir()
    data = shard.read_bytes()
    start = data.index(rows(bank)[document_id("docs/Skerry.md"), 1][6][:64])
    shard.write_bytes(data[:start] + bytes([data[start] ^ 1]) + data[start + 1 :])
    with pytest.raises(Damaged, match=r"Skerry\.md"):
        moved(bank, priors[SECOND])
    assert stats(bank)["prior"] == FIRST


def test_promise_22_where_no_gradient_is_finite_the_bank_stays_with_its_prior(
    bank: Path, tmp_path: Path, tiny_model_folder: Path
) -> None:
    before = rows(bank)
    prior = write_prior(tmp_path / "huge.safetensors", tiny_model_folder, "huge", seed=1, size=1e30)
    with pytest.raises(NonFinite, match="12 of 12"):
        moved(bank, prior)
    assert rows(bank) == before and stats(bank)["prior"] == FIRST and sound(bank)


def test_promise_22_one_passage_that_is_not_finite_is_named_and_the_rest_is_not_computed_again(
    bank: Path, priors: dict[str, Path], banks: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrad_cli.engine import Engine

    before, real = rows(bank), Engine.gradients

    def one_bad(self: Engine, passages: list[Passage]) -> Any:
        codes, scales, finite = yield from real(self, passages)
        for place, passage in enumerate(passages):
            if (passage.source, passage.ordinal) == ("docs/Skerry.md", 1):
                codes[place], scales[place], finite[place] = 0, 0, False
        return codes, scales, finite

    with monkeypatch.context() as patch:
        patch.setattr(Engine, "gradients", one_bad)
        with pytest.raises(NonFinite, match=r"passage 1 of docs/Skerry\.md") as told:
            moved(bank, priors[SECOND], commit_rows=5)
    assert "--dtype fp32" in told.value.hint
    assert rows(bank) == before
    with counted() as calls:
        moved(bank)
    assert sum(calls) == 1
    assert rows(bank) == rows(banks[SECOND])


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_command_moves_the_bank_and_says_so(bank: Path, priors: dict[str, Path], banks: dict[str, Path]) -> None:
    words = ["--bank", bank, "--device", "cpu", "--dtype", "fp32"]
    result = call("ingest", "--stale", "--prior", priors[SECOND], "--dry-run", *words, piped_in=False)
    assert result.code == 0 and "4 documents, 12 passages: would recompute 12 (about " in result.out
    result = call("ingest", "--stale", "--prior", priors[SECOND], *words, stdin=b"not a document")
    assert result.code == 0, result.err
    assert "4 documents, 12 passages: 12 recomputed, 0 unchanged, in " in result.out
    assert f"the bank's prior is now '{SECOND}'; it was '{FIRST}'" in result.err
    assert rows(bank) == rows(banks[SECOND])
    result = call("ingest", "--stale", "--json", *words, stdin=b"not a document")
    (summary,) = result.lines
    assert (summary["type"], summary["recomputed"], summary["unchanged"], summary["added"]) == ("summary", 0, 12, 0)
    assert call("bank", "stats", "--json", "--bank", bank).document["stale"] == 0


def test_the_commands_of_the_bank_tell_of_a_move_that_is_under_way(bank: Path, priors: dict[str, Path]) -> None:
    stopped(bank, priors[SECOND], 8, commit_rows=4)
    shown = call("bank", "stats", "--bank", bank).out
    assert f"on the way to prior {SECOND}: 8 of 12 passages computed; `regrad ingest --stale` goes on" in shown
    figures = call("bank", "stats", "--json", "--bank", bank).document
    assert (figures["stale"], figures["move"]) == (12, {"prior": SECOND, "passages": 8})
    assert figures["bytes"]["total"] == sum(size for name, size in figures["bytes"].items() if name != "total")
    on_disk = [p for name in layout.SUFFIXES for p in (bank / name).iterdir()]
    assert figures["bytes"]["total"] == sum(path.stat().st_size for path in on_disk)
    assert call("bank", "log", "--json", "--bank", bank).lines[0]["operation"] == "moving"
    assert call("bank", "verify", "--bank", bank).code == 0


@pytest.mark.parametrize(
    "words",
    [
        ("--prior", "p"),
        ("--prior", "p", "docs"),
        ("--stale", "docs"),
        ("--stale", "--prune"),
        ("--stale", "--name", "feed"),
        ("--stale", "--format", "jsonl"),
        ("--stale", "--files-from", "-"),
    ],
)
def test_options_that_contradict_each_other_are_2(bank: Path, words: tuple[str, ...]) -> None:
    result = call("ingest", *words, "--bank", bank)
    assert result.code == 2 and "--stale" in result.err
    assert call("ingest", *words, "--bank", bank, "--json").error["kind"] == "usage"


@pytest.mark.parametrize(("prior", "code"), [("other", 12), ("broken", 14), ("none", 2)])
def test_exit_codes(bank: Path, tmp_path: Path, priors: dict[str, Path], prior: str, code: int) -> None:
    from regrad_cli.learn.prior import Prior

    real = Prior.from_bytes(priors[SECOND].read_bytes())
    (tmp_path / "other").write_bytes(replace(real, card=real.card | {"model": "0" * 64}).to_bytes())
    (tmp_path / "broken").write_bytes(b"broken")
    assert call("ingest", "--stale", "--prior", tmp_path / prior, "--bank", bank, "--device", "cpu").code == code


def test_ctrl_c_says_how_to_go_on(bank: Path, priors: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    from regrad_cli.bank import MovingWriter

    real = MovingWriter.commit

    def interrupted(self: MovingWriter, operation: str = "moving") -> int:
        real(self, operation)
        raise KeyboardInterrupt

    monkeypatch.setattr(MovingWriter, "commit", interrupted)
    words = ["--bank", bank, "--device", "cpu", "--dtype", "fp32", "--commit-rows", "5"]
    result = call("ingest", "--stale", "--prior", priors[SECOND], *words)
    assert result.code == 130 and "`regrad ingest --stale` resumes" in result.err
    monkeypatch.undo()
    assert call("ingest", "--stale", *words, "--json").lines[-1]["recomputed"] == 7
