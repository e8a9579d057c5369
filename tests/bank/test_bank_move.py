"""A move to another prior, as the store sees it: the old rows until one commit, whatever stops the writer, whoever else
writes or reads; and after that commit what a bank made new with that prior holds.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from faults import STEPS_OF_A_COMMIT, Fault, Watched, run_and_kill
from made_banks import content, copy_of, make_bank, rows, settings, tree
from test_bank_damage import rewritten

from regrad_cli.bank import (
    files,
    layout,
    log,
    move_bank,
    open_bank,
    remove_documents,
    rows_to_move,
    verify,
    write_bank,
)
from regrad_cli.errors import Damaged, StorageFailed, UnknownFormat
from regrad_cli.records import BankSettings, document_id, row_key, sha256_hex

NEXT = b"the next prior" * 9
OTHER = b"another prior" * 9
DOCUMENTS = [("a.md", 3), ("b.md", 2), ("c.md", 2)]


def under(prior: bytes, made_for: BankSettings | None = None) -> BankSettings:
    """The bank's settings under another prior, of another rank: a row has another size."""
    changes = {"prior": sha256_hex(prior), "prior_name": "next", "prior_trained": True}
    return replace(made_for or settings(), **changes, code_bytes=72, scale_count=9)


def gradients(keys: Sequence[bytes], made_for: BankSettings) -> tuple[np.ndarray, np.ndarray]:
    """What a model would compute for these rows: a function of the key alone."""
    codes, scales = [], []
    for key in keys:
        rng = np.random.default_rng(int.from_bytes(key[:8], "little"))
        codes.append(rng.integers(0, 256, made_for.code_bytes, dtype=np.uint8))
        scales.append(rng.normal(size=made_for.scale_count).astype(np.float16))
    return np.array(codes), np.array(scales)


def moved_rows(source: str, count: int, made_for: BankSettings) -> tuple:
    """What `move` makes of a document: the arguments of Writer.add for a bank made new with that prior."""
    passages, _, _, _, embeddings = rows(source, count)
    keys = [row_key(passage, made_for.model, made_for.tokenizer, made_for.prior) for passage in passages]
    return passages, keys, *gradients(keys, made_for), embeddings


def move(
    bank: Path,
    prior: bytes = NEXT,
    *,
    step: int = 2,
    stop: int | None = None,
    target: BankSettings | None = None,
    told: Callable[[int], None] = lambda number: None,
) -> None:
    """Moves a bank, a commit for every `step` rows; left after `stop` commits. `told` 1 for each, and 2 at the end."""
    target = target or under(prior)
    with move_bank(bank) as writer:
        if writer.snapshot.settings == target:
            return
        missing = rows_to_move(writer.snapshot, target)
        writer.begin(target, prior)
        told(1)
        for start in range(0, len(missing), step):
            if stop is not None and start >= stop * step:
                return
            old = writer.snapshot.read_rows(missing[start : start + step])
            keys = [row_key(each, target.model, target.tokenizer, target.prior) for each in old.passages]
            writer.add(old.passages, keys, *gradients(keys, target), old.embeddings)
            writer.commit()
            told(1)
        writer.switch()
        told(2)
        writer.finish()


def made_new(path: Path, documents: Sequence[tuple[str, int]], prior: bytes = NEXT) -> dict:
    """What a bank holds that was made with this prior from the same documents."""
    from regrad_cli.bank import create_bank

    target = under(prior)
    create_bank(path, target, prior)
    with write_bank(path) as writer:
        for source, count in documents:
            writer.add(*moved_rows(source, count, target))
        writer.commit("ingest")
    return content(path)


def operations(bank: Path) -> list[str]:
    return [entry["operation"] for entry in log(bank)][::-1]


def sound(bank: Path) -> bool:
    return [finding for finding in verify(bank) if not finding.note] == []


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three documents in two commits, one passage of them removed."""
    bank = make_bank(tmp_path_factory.mktemp("start") / "b", DOCUMENTS[:2], [*DOCUMENTS[2:], ("gone.md", 1)])
    remove_documents(bank, ["gone.md"])
    return bank


@pytest.fixture(scope="module")
def before(start: Path) -> dict:
    return content(start)


@pytest.fixture(scope="module")
def after(tmp_path_factory: pytest.TempPathFactory) -> dict:
    return made_new(tmp_path_factory.mktemp("new") / "b", DOCUMENTS)


@pytest.fixture
def bank(start: Path, tmp_path: Path) -> Path:
    return copy_of(start, tmp_path / "b")


# ── what it comes to ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_moved_bank_holds_what_a_bank_made_with_that_prior_holds(bank: Path, before: dict, after: dict) -> None:
    assert before.keys() == after.keys() and not set(before.values()) & set(after.values())
    move(bank)
    assert content(bank) == after
    with open_bank(bank) as snapshot:
        assert snapshot.settings == under(NEXT)
        assert snapshot.prior_bytes() == NEXT
        stats = snapshot.stats()
    assert (stats["stale"], stats["move"], stats["prior"], stats["dead"]) == (0, None, "next", 0)
    assert (stats["documents"], stats["passages"]) == (3, 7)
    assert sound(bank) and operations(bank) == ["init", "ingest", "rm", "move"]


def test_a_move_needs_no_rows(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    move(bank)
    assert content(bank) == {}
    with open_bank(bank) as snapshot:
        assert snapshot.settings == under(NEXT) and snapshot.prior_bytes() == NEXT
    with write_bank(bank) as writer:
        writer.add(*moved_rows("a.md", 2, under(NEXT)))
        writer.commit("ingest")
    assert len(content(bank)) == 2 and sound(bank)


def test_until_the_last_commit_the_old_prior_answers_with_its_own_rows(bank: Path, before: dict, after: dict) -> None:
    seen = []

    def look(_: int) -> None:
        with open_bank(bank) as snapshot:
            stats = snapshot.stats()
            assert sha256_hex(snapshot.prior_bytes()) == snapshot.settings.prior
            seen.append((stats["stale"], stats["prior"], (stats["move"] or {}).get("passages")))
        assert content(bank) == (before if stats["stale"] else after)
        assert sound(bank)

    move(bank, told=look)
    assert seen == [(7, "seeded", done) for done in (0, 2, 4, 6, 7)] + [(0, "next", None)]


def test_a_reader_keeps_its_snapshot_through_a_move(bank: Path, before: dict, after: dict) -> None:
    with open_bank(bank) as reader:
        move(bank)
        move(bank, OTHER)
        assert {passage.id for _, passage, _ in reader.passages()} == set(before)
        for ref, passage, key in reader.passages():
            row = reader.row(ref)
            assert (row.passage, key, row.codes, row.scales, row.embedding) == before[passage.id]
        assert sha256_hex(reader.prior_bytes()) == settings().prior
    assert content(bank) != after and len(content(bank)) == len(after)


def test_the_old_prior_goes_when_no_snapshot_names_it_any_more(bank: Path, after: dict) -> None:
    old = bank / layout.content_name("priors", settings().prior)
    shards = set((bank / "shards").iterdir())
    move(bank)
    with open_bank(bank, 4) as snapshot:
        assert snapshot.settings == settings(), "an older snapshot is what it was"
    assert old.exists()
    for number in layout.snapshot_numbers(bank)[:-1]:
        (bank / layout.snapshot_name(number)).unlink()
    with write_bank(bank):
        pass
    assert not old.exists() and not shards & set((bank / "shards").iterdir())
    assert [path.name for path in (bank / "priors").iterdir()] == [f"{sha256_hex(NEXT)}.safetensors"]
    assert content(bank) == after and list(verify(bank)) == []


def test_the_graph_of_the_old_rows_is_not_taken_for_one_of_the_new(
    bank: Path, after: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAD_INDEX_FROM", "3")
    with write_bank(bank) as writer:
        writer.finish()
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.index is not None
        old = snapshot.manifest.index
    move(bank)
    with open_bank(bank) as snapshot:
        new = snapshot.manifest.index
        assert new is not None and new.sha256 != old.sha256
    assert content(bank) == after and sound(bank)


# ── interrupted ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_promise_01_and_11_a_move_killed_at_every_step_leaves_old_or_new_and_goes_on(
    start: Path, tmp_path: Path, before: dict, after: dict, links: bool
) -> None:
    seen: set[str] = set()
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        step, reported = run_and_kill(lambda told, bank=bank: move(bank, told=told), at, links)
        seen.add(step)
        found = content(bank)
        assert found in (before, after), f"killed before call {at} ({step})"
        assert found == after or reported < 2, "what was reported stays"
        assert sound(bank)
        with open_bank(bank) as snapshot:
            left = len(rows_to_move(snapshot, under(NEXT))) if found == before else 0
        if at % 3 == 0 or not step:
            again: list[int] = []
            move(bank, told=again.append)
            assert content(bank) == after
            if found == before:  # one for begin, one a commit of two rows, two for the switch: what was made is kept
                assert again == [1, *[1] * -(-left // 2), 2]
            assert operations(bank) == ["init", "ingest", "rm", "move"] and sound(bank)
            assert set(tree(bank)) == named(bank)
        if not step:
            break
    assert seen - {""} == STEPS_OF_A_COMMIT


def named(bank: Path) -> set[str]:
    """The files that may be in a bank: what its snapshots name, and what every bank has."""
    found = {layout.FORMAT_FILE, ".gitignore"}
    for number in layout.snapshot_numbers(bank):
        with open_bank(bank, number) as snapshot:
            found |= {snapshot.manifest.name, layout.copy_name(number)}
            found |= {name for name, _ in snapshot.manifest.files()}
    return found


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["disk full", "disk error"])
def test_promise_07_an_error_at_every_step_of_a_move_leaves_the_bank_and_it_goes_on(
    start: Path, tmp_path: Path, before: dict, after: dict, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        fault = Fault(at, lambda: OSError(code, os.strerror(code)))
        monkeypatch.setattr(files, "SYSTEM", Watched(fault))
        failed = False
        try:
            move(bank)
        except StorageFailed as error:
            failed = True
            assert os.strerror(code) in error.message and error.hint
        monkeypatch.setattr(files, "SYSTEM", files.System())
        assert failed or fault.hit in ("", "unlink")
        assert content(bank) in (before, after) and sound(bank)
        move(bank)
        assert content(bank) == after and sound(bank)
        if not fault.hit:
            return
    raise AssertionError("the move never ended")


def test_promise_02_a_move_is_durable_before_a_manifest_names_it(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(files, "SYSTEM", Watched(lambda step, path: calls.append((step, path.replace(f"{bank}/", "")))))
    move(bank)
    links = [place for place, (step, _) in enumerate(calls) if step == "link"]
    assert len(links) == 6  # begin, four commits, the switch
    begin = calls[: links[0]]
    (renamed,) = [place for place, (step, path) in enumerate(begin) if step == "rename" and "priors/" in path]
    assert begin[renamed - 1][0] == "fsync" and ("fsync folder", "priors") in begin[renamed:]
    for first, last in pairwise(links[:-1]):
        part = calls[first:last]
        shard = max(place for place, (step, path) in enumerate(part) if step == "rename" and "shards/" in path)
        assert ("fsync folder", "shards") in part[shard:] and ("fsync folder", "docs") in part[shard:]


def test_a_killed_move_is_gone_on_with_also_after_others_wrote(bank: Path) -> None:
    """What was added meanwhile is moved too, what was removed is not, and nothing is computed twice."""
    move(bank, stop=2)  # a.md and one passage of b.md
    with write_bank(bank) as writer:
        writer.add(*rows("d.md", 2))
        writer.commit("ingest")
    remove_documents(bank, ["a.md"])
    with open_bank(bank) as snapshot:
        assert snapshot.stats()["stale"] == 6
        missing = rows_to_move(snapshot, under(NEXT))
        assert [snapshot.row(ref).passage.id for ref in missing] == [
            f"{document_id(source)}:{ordinal}" for source, ordinal in (("b.md", 1), ("c.md", 0), ("c.md", 1))
        ] + [f"{document_id('d.md')}:{ordinal}" for ordinal in range(2)]
    move(bank)
    assert content(bank) == made_new(bank.with_name("new"), [("b.md", 2), ("c.md", 2), ("d.md", 2)])
    with open_bank(bank) as snapshot:
        assert snapshot.stats()["dead"] == 1, "a row beside one of b.md; a shard of nothing else is left out"
    assert sound(bank)


def test_a_passage_that_changed_at_its_place_is_moved_as_it_is_now(bank: Path) -> None:
    move(bank, stop=2)
    with write_bank(bank) as writer:
        writer.remove(ref for ref, _, _ in writer.snapshot.passages(document_id("a.md")))
        writer.add(*rows("a.md", 3, text="changed"))
        writer.commit("ingest")
    move(bank)
    found = {row[0].text for row in content(bank).values() if row[0].source == "a.md"}
    assert found == {passage.text for passage in rows("a.md", 3, text="changed")[0]}
    assert len(content(bank)) == 7 and sound(bank)


def test_a_move_that_is_killed_again_and_again_leaves_one_snapshot_of_itself(bank: Path, before: dict) -> None:
    for _ in range(3):
        move(bank, stop=1, step=1)
    with write_bank(bank):
        pass
    assert operations(bank) == ["init", "ingest", "rm", "moving"]
    with open_bank(bank) as snapshot:
        assert snapshot.stats()["move"] == {"prior": "next", "passages": 3}
        assert len(rows_to_move(snapshot, under(NEXT))) == 4
        assert len(rows_to_move(snapshot, under(OTHER))) == 7
        assert len(rows_to_move(snapshot, replace(under(NEXT), code_bytes=80))) == 7, "rows of another size"
    assert content(bank) == before


@pytest.mark.parametrize(
    "change",
    [
        lambda body: body.update(writer_flags=[]),
        lambda body: body.pop("move"),
        lambda body: body.update(move=None),
        lambda body: body["move"].pop("prior"),
        lambda body: body["move"].update(prior=body["prior"]),
        lambda body: body["move"]["shards"].append(body["move"]["shards"][0]),
        lambda body: body["move"].update(shards=[{}]),
        lambda body: body["move"]["settings"].update(code_bytes=-1),
    ],
    ids=["no flag", "no move", "null", "no prior", "the bank's prior", "twice", "no shard", "no size"],
)
def test_promise_16_a_manifest_whose_move_is_not_one_is_damage(bank: Path, change: Callable[[dict], None]) -> None:
    move(bank, stop=1)
    rewritten(bank, change)
    with pytest.raises(Damaged):
        open_bank(bank)


def test_promise_20_a_version_that_knows_no_moves_may_read_and_not_write(
    bank: Path, before: dict, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrad_cli.bank import parsing

    move(bank, stop=1)
    monkeypatch.setattr(parsing, "WRITER_FLAGS", frozenset())
    assert content(bank) == before
    with pytest.raises(UnknownFormat, match="move"), write_bank(bank):
        pass


def test_another_prior_in_the_middle_starts_over_and_leaves_nothing_of_the_first(bank: Path) -> None:
    move(bank, stop=2)
    first = bank / layout.content_name("priors", sha256_hex(NEXT))
    assert first.exists()
    move(bank, OTHER)
    assert content(bank) == made_new(bank.with_name("new"), DOCUMENTS, OTHER)
    assert not first.exists() and sound(bank) and set(tree(bank)) == named(bank)


def test_a_move_that_is_given_up_leaves_the_bank_as_it_was(bank: Path, before: dict) -> None:
    had = set(tree(bank))
    move(bank, stop=2)
    with move_bank(bank) as writer:
        writer.give_up()
        writer.finish()
    assert content(bank) == before and list(verify(bank)) == []
    with open_bank(bank) as snapshot:
        assert (snapshot.stats()["stale"], snapshot.stats()["move"], snapshot.moved()) == (0, None, None)
    assert {name for name in set(tree(bank)) - had if not name.startswith("snapshots/")} == set()
    assert operations(bank) == ["init", "ingest", "rm", "move given up"]


def test_nothing_is_switched_to_before_all_of_it_is_there(bank: Path, before: dict) -> None:
    move(bank, stop=2)
    with move_bank(bank) as writer:
        with pytest.raises(StorageFailed, match="3 rows"):
            writer.switch()
        with pytest.raises(ValueError):
            writer.remove([])
    assert content(bank) == before
    with move_bank(copy_of(bank, bank.with_name("other"))) as writer:
        writer.give_up()
        for early in (writer.commit, writer.switch):
            with pytest.raises(ValueError):
                early()


@pytest.mark.parametrize("what", ["shards", "docs"])
@pytest.mark.parametrize("way", ["flipped", "cut", "gone"])
def test_moved_rows_that_are_damaged_are_made_again(bank: Path, before: dict, after: dict, what: str, way: str) -> None:
    had = set((bank / what).iterdir())
    move(bank, stop=3)
    (path, *_) = sorted(set((bank / what).iterdir()) - had)
    data = path.read_bytes()
    if way == "gone":
        path.unlink()
    else:
        keys = data[:-5] + bytes([data[-5] ^ 1]) + data[-4:]  # the last tensor of a shard, the last line of a docs file
        path.write_bytes(keys if way == "flipped" else data[:-3])
    assert any(finding.documents for finding in verify(bank) if not finding.note)
    assert content(bank) == before, "the bank's own rows are read as ever"
    move(bank)
    assert content(bank) == after
    assert sound(bank)


def test_a_damaged_prior_of_a_move_is_noticed_and_healed_by_naming_it_again(bank: Path, after: dict) -> None:
    move(bank, stop=2)
    path = bank / layout.content_name("priors", sha256_hex(NEXT))
    path.write_bytes(NEXT[:-1] + b"?")
    with open_bank(bank) as snapshot:
        moved = snapshot.moved()
        assert moved is not None
        with pytest.raises(Damaged):
            moved.prior_bytes()
    move(bank)
    assert content(bank) == after and sound(bank)


def test_settings_that_do_not_fit_are_our_own_mistakes(bank: Path, before: dict) -> None:
    with move_bank(bank) as writer:
        with pytest.raises(ValueError, match="SHA-256"):
            writer.begin(under(NEXT), OTHER)
        with pytest.raises(ValueError, match="text"):
            writer.begin(replace(under(NEXT), keep_text=False), NEXT)
    assert content(bank) == before and not (bank / layout.content_name("priors", sha256_hex(NEXT))).exists()
