"""`bank repair`: whatever was damaged, what is proved stays as it was, the rest is named, and a repair that is stopped
leaves a bank that is no worse (promises 1, 3 to 7, 10, 13, 16, 20).
"""

from __future__ import annotations

import errno
import json
import os
import random
import shutil
import tracemalloc
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Fault, Watched, flip, run_and_kill
from made_banks import PRIOR, content, copy_of, make_bank, rows, settings, tree
from test_bank_damage import crafted, forge, rewritten
from test_bank_move import NEXT, move, under

from regrad_cli.bank import (
    Repaired,
    create_bank,
    files,
    layout,
    log,
    open_bank,
    remove_documents,
    repair_bank,
    rows_to_move,
    verify,
    write_bank,
)
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.shards import passage_line
from regrad_cli.errors import Damaged, Locked, NoBank, StorageFailed, UnknownFormat, UsageProblem
from regrad_cli.records import BankSettings, canonical_json, document_id, sha256_hex

HISTORY: list[list[tuple[str, int]]] = [[("a.md", 4), ("b.md", 2)], [("c.md", 3), ("d.md", 2)], [("e.md", 1)]]
A, C, E = map(document_id, ("a.md", "c.md", "e.md"))


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory, state_of_module: None) -> Path:
    """Five documents in three shards, two of them removed; two older snapshots; a search graph."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regrad_cli.bank.merging.due", lambda *_, **__: None)
        bank = make_bank(tmp_path_factory.mktemp("whole") / "b", *HISTORY)
        remove_documents(bank, ["b.md", "d.md"])
    return bank


@pytest.fixture(scope="module")
def state_of_module(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REGRAD_STATE", str(tmp_path_factory.mktemp("state")))
        patch.setenv("REGRAD_INDEX_FROM", "3")
        yield


@pytest.fixture(scope="module")
def right(whole: Path) -> dict[str, tuple]:
    return content(whole)


@pytest.fixture
def bank(whole: Path, tmp_path: Path) -> Path:
    return copy_of(whole, tmp_path / "b")


def repair(bank: Path, *priors: bytes) -> Repaired:
    with repair_bank(bank, priors=lambda made_for: priors) as work:
        foreseen = work.foreseen()
        done = work.carry_out()
    for name in ("snapshot", "passages", "damage", "put_back", "rewritten", "lost", "back", "index_dropped"):
        assert getattr(foreseen, name) == getattr(done, name), name
    assert foreseen.dry_run and not foreseen.quarantined and not done.dry_run
    return done


def damage(bank: Path) -> list[str]:
    return [finding.file for finding in verify(bank) if not finding.note]


def newest(bank: Path, kind: str = "json") -> Path:
    return max((bank / "snapshots").glob(f"*.{kind}"))


def shard_of(bank: Path, document: str) -> Any:
    with open_bank(bank) as snapshot:
        (ref, *_) = [ref for ref, _, _ in snapshot.passages(document)]
        return snapshot.manifest.shards[ref.shard]


def place_of(bank: Path, document: str, tensor: str) -> tuple[Path, int, int]:
    """The shard's file of a document, where a tensor begins in it, and the bytes a row has there."""
    with open_bank(bank) as snapshot:
        (ref, *_) = [ref for ref, _, _ in snapshot.passages(document)]
        snapshot.row(ref)
        reader = snapshot.reader(ref.shard)
        assert reader._places is not None
        place = reader._places[tensor]
        return bank / reader.entry.name, place.start, place.row_bytes


def without_quarantine(bank: Path) -> dict[str, bytes]:
    return {name: data for name, data in tree(bank).items() if not name.startswith("quarantine/")}


def in_quarantine(bank: Path) -> list[bytes]:
    return [file.read_bytes() for file in sorted((bank / "quarantine").iterdir())]


# ── any damage ───────────────────────────────────────────────────────────────────────────────────────────────────────


def hurt(bank: Path, whole: Path, chance: random.Random) -> list[tuple]:
    """One to three files flipped, cut or gone."""
    done: list[tuple] = []
    for name in chance.sample(sorted(tree(whole)), chance.choice([1, 1, 2, 3])):
        data, kind = bytearray((whole / name).read_bytes()), chance.choice(["flip", "flip", "cut", "gone"])
        position = chance.randrange(len(data))
        if kind == "flip":
            data[position] ^= 1 << chance.randrange(8)
        (bank / name).write_bytes(data[:position] if kind == "cut" else data)
        if kind == "gone":
            (bank / name).unlink()
        done.append((kind, name, position))
    return done


def nothing_tells(bank: Path, whole: Path) -> bool:
    """Whether the newest manifest went together with its copy: what is left is a whole bank, only an older one."""
    return not any((bank / newest(whole, kind).relative_to(whole)).exists() for kind in ("json", "copy"))


@pytest.mark.parametrize("group", range(4))
def test_promise_03_and_04_and_05_after_any_damage_what_is_proved_is_there_and_the_rest_is_named(
    whole: Path, right: dict[str, tuple], tmp_path: Path, group: int
) -> None:
    outcomes = set()
    for seed in range(40 * group, 40 * group + 40):
        chance = random.Random(seed)
        bank = copy_of(whole, tmp_path / str(seed))
        done = hurt(bank, whole, chance)
        if nothing_tells(bank, whole):
            continue
        told = f"seed {seed}: {done}"
        result = repair(bank, b"not it", PRIOR)
        assert damage(bank) == [] and result.left == (), told
        found = content(bank)
        if result.back is None:
            assert found.items() <= right.items(), told
            lost = set(right) - set(found)
            assert sum(each.passages for each in result.lost) == len(lost) == len(right) - result.passages, told
            named = {each.id for each in result.lost}
            assert None in named or named == {place.split(":")[0] for place in lost}, told
            assert all(document_id(each.source) == each.id for each in result.lost if each.source), told
        with repair_bank(bank) as again:
            assert again.plan.damage == [], told
        with write_bank(bank):
            pass
        assert list(verify(bank)) == [] and content(bank) == found, told
        outcomes.add("back" if result.back else "lost" if result.lost else "whole")
        shutil.rmtree(bank)
    assert {"lost", "whole"} <= outcomes


def test_nothing_damaged_changes_nothing(bank: Path) -> None:
    before = tree(bank)
    for name in ("tmp", "quarantine"):  # as `tar xf` leaves a packed bank
        (bank / name).rmdir()
    result = repair(bank)
    assert not (bank / "tmp").exists() and not (bank / "quarantine").exists()
    assert result.damage == result.put_back == result.quarantined == result.left == ()
    assert tree(bank) == before


def test_leftovers_of_a_crash_are_no_damage(whole: Path, tmp_path: Path) -> None:
    """After a commit that was killed at any step, its copy being there or not."""
    for at in range(1, 1000):
        bank = copy_of(whole, tmp_path / str(at))
        step, _ = run_and_kill(lambda told, bank=bank: add(bank, "new.md"), at, True)
        before = tree(bank)
        assert repair(bank).damage == () and tree(bank) == before, f"killed before call {at} ({step})"
        if not step:
            return
    raise AssertionError("the commit never ended")


def add(bank: Path, source: str) -> None:
    with write_bank(bank) as writer:
        writer.add(*rows(source, 2))
        writer.commit("ingest")


# ── manifests and FORMAT ─────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("age", [0, 1], ids=["newest", "older"])
@pytest.mark.parametrize("kind", ["json", "copy"])
def test_promise_03_a_flipped_bit_in_a_manifest_or_its_copy_costs_nothing(bank: Path, kind: str, age: int) -> None:
    before = tree(bank)
    file = sorted((bank / "snapshots").glob(f"*.{kind}"))[-1 - age]
    for position in (0, file.stat().st_size // 2, file.stat().st_size - 1):
        flip(file, position)
        hurt = file.read_bytes()
        assert damage(bank) == [f"snapshots/{file.name}"]
        result = repair(bank)
        assert [back.file for back in result.put_back] == [f"snapshots/{file.name}"]
        assert without_quarantine(bank) == before and hurt in in_quarantine(bank)


def test_promise_05_a_missing_newest_manifest_is_put_back_and_not_buried_by_a_writer(bank: Path) -> None:
    before = tree(bank)
    newest(bank).unlink()
    assert damage(bank) == [f"snapshots/{newest(bank, 'copy').stem}.json"]
    hint = ""
    try:
        add(bank, "new.md")
    except DamagedFile as error:
        hint = error.hint
    assert "regrad bank repair" in hint
    assert repair(bank).lost == () and tree(bank) == before


def test_a_bank_that_lost_every_manifest_is_found_and_gets_its_newest_back(bank: Path, right: dict) -> None:
    for file in (bank / "snapshots").glob("*.json"):
        file.unlink()
    (bank / "FORMAT").unlink()
    with pytest.raises(Damaged) as caught:
        open_bank(bank)
    assert "repair" in caught.value.hint
    with pytest.raises(UsageProblem, match="damaged bank"):
        create_bank(bank, settings(), PRIOR)
    repair(bank)
    assert content(bank) == right and damage(bank) == []


def test_where_manifest_and_copy_are_damaged_an_older_snapshot_takes_their_place_and_that_is_said(bank: Path) -> None:
    with open_bank(bank) as snapshot:
        number, counts = snapshot.number, snapshot.manifest.counts
        named = {name for name, _ in snapshot.manifest.files()}
    older = int(sorted((bank / "snapshots").glob("*.json"))[-2].stem)
    before, orphan = content(bank, older), bank / "docs" / ("0" * 64 + ".jsonl")
    orphan.write_bytes(b"nobody can say whose")
    flip(newest(bank), 200)
    flip(newest(bank, "copy"), 100)
    with repair_bank(bank) as work:
        assert work.plan.destroys and work.plan.back is not None
        result = work.carry_out()
    assert result.back == (number, older, counts.documents, counts.passages)
    assert result.snapshot == number + 1 and content(bank) == before and damage(bank) == []
    assert [entry["snapshot"] for entry in log(bank)] == [number + 1, older, 1]
    assert log(bank)[0]["operation"] == "repair"
    with open_bank(bank) as snapshot:
        gone = named - {name for name, _ in snapshot.manifest.files()}
    assert not orphan.exists() and b"nobody can say whose" in in_quarantine(bank)
    assert gone and {name for name in gone if (bank / name).exists()} == set(), "what it named is kept aside"


def test_an_older_snapshot_that_cannot_be_read_leaves_the_history(bank: Path, right: dict) -> None:
    number = newest(bank).name
    older = sorted((bank / "snapshots").glob("*.json"))[-2]
    older.write_bytes(b"?")
    older.with_suffix(".copy").unlink()
    result = repair(bank)
    assert [dropped.snapshot for dropped in result.dropped_snapshots] == [int(older.stem)]
    assert not older.exists() and newest(bank).name == number and content(bank) == right and damage(bank) == []
    assert b"?" in in_quarantine(bank)


@pytest.mark.parametrize("found", [b"", b"gbank 1", b"gbank q\n", b"gbank 3\n", b"x" * 100, None, "folder"])
def test_format_is_written_again_where_a_manifest_proves_it(bank: Path, found: Any, right: dict) -> None:
    (bank / "FORMAT").unlink()
    if found == "folder":
        (bank / "FORMAT").mkdir()
    elif found is not None:
        (bank / "FORMAT").write_bytes(found)
    result = repair(bank)
    assert [back.file for back in result.put_back] == ["FORMAT"]
    assert (bank / "FORMAT").read_bytes() == b"gbank 1\n" and content(bank) == right


def test_promise_20_a_bank_of_a_newer_version_is_not_repaired(bank: Path) -> None:
    flags: list[dict[str, Any]] = [{"format": 2}, {"reader_flags": ["folded"]}, {"writer_flags": ["counts-words"]}]
    for change in flags:
        copy = copy_of(bank, bank.with_name(next(iter(change))))
        rewritten(copy, lambda body, change=change: body.update(change))
        flip(copy / shard_of(bank, A).docs_name, 3)
        before = tree(copy)
        with pytest.raises(UnknownFormat), repair_bank(copy):
            pass
        assert tree(copy) == before


def test_where_nothing_says_what_the_bank_was_nothing_is_touched(bank: Path, tmp_path: Path) -> None:
    for file in (bank / "snapshots").iterdir():
        file.write_bytes(file.read_bytes()[1:])
    before = tree(bank)
    with pytest.raises(DamagedFile, match="no manifest that can be read") as caught, repair_bank(bank):
        pass
    assert caught.value.hint and tree(bank) == before
    with pytest.raises(NoBank), repair_bank(tmp_path):
        pass
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "FORMAT").write_bytes(b"gbank 1\n")
    with pytest.raises(NoBank, match="never finished"), repair_bank(tmp_path / "begun"):
        pass


def test_counts_that_are_wrong_are_counted_again(bank: Path, right: dict) -> None:
    with open_bank(bank) as snapshot:
        manifest = snapshot.manifest
    forge(bank, replace(manifest, counts=replace(manifest.counts, documents=99, tokens=1)).to_bytes()[0])
    repair(bank)
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.counts == manifest.counts
    assert content(bank) == right and damage(bank) == []


def test_a_snapshot_of_another_bank_or_another_line_leaves_the_history(bank: Path, right: dict, tmp_path: Path) -> None:
    older = sorted((bank / "snapshots").glob("*.json"))[-2]
    strange = copy_of(bank, tmp_path / "strange")
    rewritten(strange, lambda body: body.update(parent={"number": int(older.stem), "sha256": "0" * 64}))
    repair(strange)
    assert content(strange) == right and damage(strange) == []
    body = older.read_text().replace('"bank":"', '"bank":"0', 1)
    other = bank / "snapshots" / older.name

    parsed = json.loads(body)
    parsed.pop("sha256")
    data = (canonical_json(parsed | {"sha256": sha256_hex(canonical_json(parsed))}) + "\n").encode()
    for file in (other, other.with_suffix(".copy")):
        file.write_bytes(data)
    assert [dropped.snapshot for dropped in repair(bank).dropped_snapshots] == [int(older.stem)]
    assert content(bank) == right and damage(bank) == []


# ── shards and docs ──────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("tensor", ["line_ends", "tokens", "checksums", "documents", "keys"])
def test_a_block_that_follows_from_the_rest_is_made_again(bank: Path, tensor: str) -> None:
    before = tree(bank)
    file, start, row_bytes = place_of(bank, A, tensor)
    for position in (start, start + row_bytes, start + 5 * row_bytes):  # of a live row, of its neighbour, of a dead one
        flip(file, position)
        result = repair(bank)
        assert [back.file for back in result.put_back] == [f"shards/{file.name}"] and result.lost == ()
        assert without_quarantine(bank) == before
    data = bytearray(file.read_bytes())
    data[start : start + 6 * row_bytes] = bytes(6 * row_bytes)
    file.write_bytes(data)
    assert repair(bank).lost == () and without_quarantine(bank) == before


def test_a_header_is_made_again_and_so_is_a_tail_that_was_cut(bank: Path) -> None:
    before = tree(bank)
    file, start, _ = place_of(bank, A, "documents")
    docs = bank / shard_of(bank, A).docs_name
    length = 8 + int.from_bytes(file.read_bytes()[:8], "little")
    for position in (0, 3, 7, 8, length // 2, length - 1):
        flip(file, position)
        assert repair(bank).lost == () and without_quarantine(bank) == before
    for size in (start, start + 9, file.stat().st_size - 1):
        file.write_bytes(file.read_bytes()[:size])
        assert repair(bank).lost == () and without_quarantine(bank) == before
    file.write_bytes(file.read_bytes() + b"more")
    docs.write_bytes(docs.read_bytes() + b"more\n")
    assert repair(bank).lost == () and without_quarantine(bank) == before


@pytest.mark.parametrize("tensor", ["codes", "scales", "embeddings"])
def test_of_what_nothing_else_says_the_one_row_is_lost_and_the_others_stay(
    bank: Path, right: dict[str, tuple], tensor: str
) -> None:
    file, start, row_bytes = place_of(bank, A, tensor)
    flip(file, start + 2 * row_bytes + 1)
    hurt, docs = file.read_bytes(), (bank / shard_of(bank, A).docs_name).read_bytes()
    number = int(newest(bank).stem)
    result = repair(bank)
    assert result.lost == ((A, "a.md", 1),) and result.rewritten == ((f"shards/{file.name}", 3, 4),)
    assert content(bank) == {place: row for place, row in right.items() if place != f"{A}:2"}
    assert damage(bank) == [] and int(newest(bank).stem) == number + 1
    assert {hurt, docs} <= set(in_quarantine(bank)) and not file.exists()


def test_a_damaged_row_that_was_removed_costs_nothing(bank: Path, right: dict) -> None:
    file, start, row_bytes = place_of(bank, A, "codes")
    flip(file, start + 4 * row_bytes)  # of b.md
    result = repair(bank)
    assert result.lost == () and content(bank) == right and damage(bank) == []
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.counts.dead == 2, "the others that were removed are as they were"


def test_a_damaged_line_costs_its_row(bank: Path, right: dict) -> None:
    docs = bank / shard_of(bank, A).docs_name
    lines = docs.read_bytes().splitlines(keepends=True)
    flip(docs, len(lines[0]) + len(lines[1]) // 2)
    result = repair(bank)
    assert result.lost == ((A, "a.md", 1),)
    assert content(bank) == {place: row for place, row in right.items() if place != f"{A}:1"}


def test_lines_that_moved_are_found_again(bank: Path, right: dict) -> None:
    """A byte too many in one line: the others do not lie where the shard says."""
    docs = bank / shard_of(bank, A).docs_name
    lines = docs.read_bytes().splitlines(keepends=True)
    lines[1] = lines[1].replace(b'"title":"', b'"title":"x')
    docs.write_bytes(b"".join(lines))
    repair(bank)
    assert content(bank) == {place: row for place, row in right.items() if place != f"{A}:1"}


def test_a_missing_shard_is_named_by_its_docs_and_missing_docs_by_their_shard(bank: Path, right: dict) -> None:
    lost = [shard_of(bank, A).name, shard_of(bank, C).docs_name]
    for name in lost:
        (bank / name).unlink()
    result = repair(bank)
    assert result.lost == ((A, "a.md", 4), (C, None, 3))
    assert set(content(bank)) == {place for place in right if place.startswith(E)} and damage(bank) == []


def test_a_shard_that_is_gone_with_its_docs_is_counted_and_named_where_it_held_one_document(bank: Path) -> None:
    for shard in [shard_of(bank, C), shard_of(bank, E)]:
        (bank / shard.name).unlink()
        (bank / shard.docs_name).unlink()
    assert repair(bank).lost == ((E, None, 1), (None, None, 3))
    assert damage(bank) == []


def test_a_bank_that_lost_everything_is_an_empty_bank(bank: Path) -> None:
    for folder in ("shards", "docs"):
        shutil.rmtree(bank / folder)
    result = repair(bank)
    assert result.passages == 0 and sum(each.passages for each in result.lost) == 8
    assert content(bank) == {} and damage(bank) == []
    add(bank, "new.md")


def test_a_source_is_known_from_passages_in_other_shards(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    with write_bank(bank) as writer:
        writer.add(*rows("a.md", 3, text="more"))
        writer.commit("ingest")
        shard = writer.snapshot.manifest.shards[0]
    (bank / shard.docs_name).unlink()
    assert repair(bank).lost == ((A, "a.md", 2),)


def test_rows_are_kept_from_a_disk_that_cannot_read_one_sector(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made_for = settings(code_bytes=9000)
    bank = tmp_path / "b"
    create_bank(bank, made_for, PRIOR)
    with write_bank(bank) as writer:
        writer.add(*rows("a.md", 8, made_for=made_for))
        writer.commit("ingest")
    before = content(bank)
    file, start, row_bytes = place_of(bank, A, "codes")
    bad = start + 3 * row_bytes + 4500
    real = os.preadv

    def preadv(fd: int, buffers: list, offset: int) -> int:
        if Path(f"/proc/self/fd/{fd}").readlink().name == file.name and offset <= bad < offset + len(buffers[0]):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return real(fd, buffers, offset)

    monkeypatch.setattr(os, "preadv", preadv)
    result = repair(bank)
    monkeypatch.setattr(os, "preadv", real)
    assert result.lost == ((A, "a.md", 1),) and damage(bank) == []
    assert content(bank) == {place: row for place, row in before.items() if place != f"{A}:3"}


@pytest.mark.parametrize("code", [errno.EMFILE, errno.EACCES, errno.ESTALE])
@pytest.mark.parametrize("folder", ["shards", "docs", "priors", "snapshots", "index"])
def test_what_is_no_damage_is_not_repaired(bank: Path, monkeypatch: pytest.MonkeyPatch, code: int, folder: str) -> None:
    """No permission, too many open files, a network file system that is away: no row is dropped for that."""
    before, real = tree(bank), os.open

    def refuse(path: Any, *more: Any) -> int:
        if str(path).startswith(str(bank / folder) + "/"):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, *more)

    monkeypatch.setattr(os, "open", refuse)
    with pytest.raises(StorageFailed), repair_bank(bank) as work:
        work.carry_out()
    monkeypatch.setattr(os, "open", real)
    assert tree(bank) == before


def test_the_rows_of_a_shard_that_was_all_removed_may_live_again(tmp_path: Path) -> None:
    """What is left of a damaged shard can be the very shard of an old commit; it is not named twice."""
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    remove_documents(bank, ["a.md"])
    with write_bank(bank) as writer:
        writer.add(*rows("a.md", 2))
        writer.add(*rows("z.md", 1))
        writer.commit("ingest")
    before = content(bank)
    file, start, row_bytes = place_of(bank, A, "codes")
    flip(file, start + 2 * row_bytes)
    assert [each.source for each in repair(bank).lost] == ["z.md"]
    assert content(bank) == {place: row for place, row in before.items() if place.startswith(A)} and damage(bank) == []


def test_files_that_are_as_they_were_written_and_do_not_agree_with_themselves(tmp_path: Path) -> None:
    """Made so on purpose: every hash is right, and a row is none."""
    lines = [passage_line(passage) for passage in rows("a.md", 3)[0]]
    other = lines[1].replace(document_id("a.md").encode(), document_id("b.md").encode())
    ends = [len(lines[0]), len(lines[0]) + len(other), len(lines[0]) + len(other) + len(lines[2])]
    bank = crafted(tmp_path / "other", [lines[0], other, lines[2]], ends)
    assert damage(bank) and repair(bank).lost == ()
    assert damage(bank) == [] and {place[-1] for place in content(bank)} == {"0", "1", "2"}
    bank = crafted(
        tmp_path / "none", [lines[0], b"[]\n", lines[2]], [ends[0], ends[0] + 3, ends[0] + 3 + len(lines[2])]
    )
    header = copy_of(bank, tmp_path / "header")
    with open_bank(header) as snapshot:
        flip(header / snapshot.manifest.shards[0].name, 20)
    for each in (bank, header):
        assert damage(each) and [lost.passages for lost in repair(each).lost] == [1]
        assert damage(each) == [] and {place[-1] for place in content(each)} == {"0", "2"}
    bank = crafted(tmp_path / "more", [*lines, b"more\n"], np.cumsum([len(line) for line in lines]).tolist())
    with open_bank(bank) as snapshot:
        flip(bank / snapshot.manifest.shards[0].docs_name, sum(map(len, lines)))
    assert damage(bank) and repair(bank).lost == ()
    assert damage(bank) == [] and len(content(bank)) == 3


def test_a_bank_without_text_keeps_its_rows_too(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 4)], keep_text=False)
    before = content(bank)
    file, start, row_bytes = place_of(bank, A, "keys")
    flip(file, start + row_bytes)  # nothing says what a key was, without its text
    assert [each.passages for each in repair(bank).lost] == [1]
    assert content(bank) == {place: row for place, row in before.items() if place != f"{A}:1"} and damage(bank) == []


# ── priors, moves, the graph ─────────────────────────────────────────────────────────────────────────────────────────


def prior_file(bank: Path) -> Path:
    (file,) = (bank / "priors").iterdir()
    return file


def test_a_prior_is_put_back_from_the_very_bytes_and_no_others(bank: Path, right: dict) -> None:
    before, file = tree(bank), prior_file(bank)
    flip(file, 3)
    result = repair(bank, b"", PRIOR[:-1], PRIOR + b"x")
    assert [finding.file for finding in result.left] == [f"priors/{file.name}"] and "--stale" in result.left[0].what
    assert result.put_back == () and damage(bank) == [f"priors/{file.name}"]
    asked: list[BankSettings] = []
    with repair_bank(bank, priors=lambda made_for: asked.append(made_for) or [b"", PRIOR]) as work:  # type: ignore[func-returns-value]
        assert work.carry_out().left == ()
    assert asked[0].prior == settings().prior and without_quarantine(bank) == before and content(bank) == right


def test_where_the_prior_is_lost_the_bank_moves_to_another_and_keeps_its_text(bank: Path, right: dict) -> None:
    prior_file(bank).unlink()
    flip(newest(bank), 5)
    result = repair(bank)
    assert len(result.left) == 1 and result.lost == ()
    move(bank)
    assert {place: row[0].text for place, row in content(bank).items()} == {
        place: row[0].text for place, row in right.items()
    }
    repair(bank)  # the older snapshots need the prior that is lost
    assert damage(bank) == [] and len(content(bank)) == len(right)


@pytest.fixture
def moving(bank: Path) -> Path:
    """A move to another prior that is half done."""
    move(bank, stop=3)
    return bank


def moved_shards(bank: Path) -> list[Any]:
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.move is not None
        return list(snapshot.manifest.move.shards)


def test_damaged_rows_of_a_move_are_dropped_and_computed_again(moving: Path, right: dict) -> None:
    with open_bank(moving) as snapshot:
        before = rows_to_move(snapshot, under(NEXT))
    (moving / moved_shards(moving)[1].name).unlink()
    result = repair(moving)
    assert result.lost == () and content(moving) == right and damage(moving) == []
    with open_bank(moving) as snapshot:
        assert len(rows_to_move(snapshot, under(NEXT))) == len(before) + 2
    move(moving)
    assert len(content(moving)) == len(right)


def test_a_move_whose_prior_is_lost_is_given_up_and_one_whose_prior_is_found_goes_on(
    moving: Path, right: dict, tmp_path: Path
) -> None:
    with open_bank(moving) as snapshot:
        assert snapshot.manifest.move is not None
        name = layout.content_name("priors", snapshot.manifest.move.prior.sha256)
    (moving / name).unlink()
    other = copy_of(moving, tmp_path / "other")
    result = repair(moving)
    assert result.move_given_up and result.left == () and result.lost == ()
    with open_bank(moving) as snapshot:
        assert snapshot.manifest.move is None and snapshot.manifest.writer_flags == ()
    assert content(moving) == right and damage(moving) == []
    assert not repair(other, NEXT).move_given_up and moved_shards(other) and damage(other) == []


def test_a_docs_file_that_a_bank_and_its_move_share_is_repaired_for_both(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)], [("b.md", 2)])
    move(bank, stop=1)
    before = content(bank)
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.move is not None
        (own, _), (moved,) = snapshot.manifest.shards, snapshot.manifest.move.shards
    assert own.docs_name == moved.docs_name
    flip(bank / own.docs_name, 5)
    assert [each.passages for each in repair(bank).lost] == [1]
    assert damage(bank) == [] and content(bank).items() < before.items()
    assert [shard.rows for shard in moved_shards(bank)] == [1]


@pytest.mark.parametrize("gone", [False, True])
def test_a_damaged_graph_is_dropped_and_no_row_with_it(bank: Path, right: dict, gone: bool) -> None:
    (file,) = (bank / "index").iterdir()
    hurt = file.read_bytes()[:-5]
    file.write_bytes(hurt)
    if gone:
        file.unlink()
    result = repair(bank)
    assert result.index_dropped and result.lost == () and not file.exists()
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.index is None
    assert content(bank) == right and list(verify(bank)) == []
    assert gone or hurt in in_quarantine(bank)


def test_a_graph_is_not_believed_where_its_rows_are_others_now(bank: Path) -> None:
    file, start, _ = place_of(bank, A, "codes")
    flip(file, start)
    repair(bank)
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.index is None


def test_older_snapshots_that_need_what_is_lost_leave_the_history_with_their_files(bank: Path, right: dict) -> None:
    with write_bank(bank) as writer:
        writer.remove(ref for ref, _, _ in writer.snapshot.passages(E))
        writer.add(*rows("new.md", 1))
        writer.commit("ingest")
    before = content(bank)
    with open_bank(bank) as snapshot:
        number = snapshot.number
        (lost,) = [shard for shard in snapshot.manifest.shards if shard.live == 0]
    (bank / lost.name).unlink()  # which only its dead rows need now
    result = repair(bank)
    assert result.lost == () and content(bank) == before and damage(bank) == []
    assert [entry["snapshot"] for entry in log(bank)] == [number + 1, 1]
    names = [file.name.split(".", 1)[1] for file in (bank / "quarantine").iterdir()]
    assert any(name.startswith("docs.") for name in names) and sum(name.startswith("snapshots.") for name in names) >= 2


# ── whatever stops it ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def hurt_bank(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Something for every part of a repair: FORMAT, newest manifest, prior, a header, a row, a line, the graph."""
    bank = copy_of(whole, tmp_path_factory.mktemp("hurt") / "b")
    file, start, _ = place_of(bank, C, "codes")
    header, docs = bank / shard_of(bank, E).name, bank / shard_of(bank, A).docs_name
    for target, position in ((file, start), (header, 20), (docs, 30), (bank / "FORMAT", 2), (newest(bank), 50)):
        flip(target, position)
    flip(prior_file(bank), 9)
    flip(next((bank / "index").iterdir()), 100)
    return bank


@pytest.fixture(scope="module")
def repaired(hurt_bank: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple]:
    bank = copy_of(hurt_bank, tmp_path_factory.mktemp("repaired") / "b")
    result = repair(bank, PRIOR)
    assert sum(each.passages for each in result.lost) == 2 and len(result.put_back) == 4 and result.left == ()
    return content(bank)


def mend(bank: Path) -> None:
    with repair_bank(bank, priors=lambda made_for: [PRIOR]) as work:
        work.carry_out()


def assert_no_worse(bank: Path, hurt_bank: Path, repaired: dict[str, tuple], told: str) -> None:
    """What could be kept before can still be, nothing else can be read, and no damaged byte is deleted, also not by who
    writes next."""
    try:
        with open_bank(bank) as snapshot:
            for _, passage, key in snapshot.passages(skip_damaged=True):
                assert passage.id not in repaired or repaired[passage.id][:2] == (passage, key), told
    except (Damaged, UnknownFormat):
        pass
    mend(bank)
    assert content(bank) == repaired and damage(bank) == [], told
    with write_bank(bank):
        pass
    kept = set(tree(bank).values())
    assert [name for name, data in tree(hurt_bank).items() if data not in kept] == [], told


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_promise_01_and_13_killed_at_every_step_a_repair_leaves_a_bank_that_is_no_worse(
    hurt_bank: Path, repaired: dict[str, tuple], tmp_path: Path, links: bool
) -> None:
    seen: set[str] = set()
    for at in range(1, 1000):
        bank = copy_of(hurt_bank, tmp_path / str(at))
        step, _ = run_and_kill(lambda told, bank=bank: mend(bank), at, links)
        seen.add(step)
        assert_no_worse(bank, hurt_bank, repaired, f"killed before call {at} ({step})")
        shutil.rmtree(bank)
        if not step:
            break
    assert seen - {""} >= {"open", "write", "fsync", "fsync folder", "rename", "link", "unlink"}


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_promise_01_and_13_killed_while_it_puts_the_newest_snapshot_back_a_repair_can_be_done_again(
    whole: Path, tmp_path: Path, links: bool
) -> None:
    """What it writes then has the bytes of the copy, as a commit has that was killed."""
    before = content(whole)
    for at in range(1, 1000):
        bank = copy_of(whole, tmp_path / str(at))
        max((bank / "snapshots").glob("*.json")).unlink()
        step, _ = run_and_kill(lambda told, bank=bank: mend(bank), at, links)
        mend(bank)
        assert content(bank) == before and damage(bank) == [], f"killed before call {at} ({step})"
        if not step:
            return
    raise AssertionError("the repair never ended")


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["disk full", "disk error"])
def test_promise_07_and_13_an_error_at_every_step_of_a_repair_is_told_and_leaves_a_bank_that_is_no_worse(
    hurt_bank: Path, repaired: dict[str, tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    for at in range(1, 1000):
        bank = copy_of(hurt_bank, tmp_path / str(at))
        fault = Fault(at, lambda: OSError(code, os.strerror(code)))
        monkeypatch.setattr(files, "SYSTEM", Watched(fault))
        try:
            mend(bank)
            failed = False
        except StorageFailed as error:
            failed = True
            assert os.strerror(code) in error.message and error.hint
        monkeypatch.setattr(files, "SYSTEM", files.System())
        assert failed or fault.hit in ("", "unlink"), f"call {at}: {fault.hit} went unnoticed"
        assert_no_worse(bank, hurt_bank, repaired, f"call {at}: {fault.hit}")
        shutil.rmtree(bank)
        if not fault.hit:
            return
    raise AssertionError("the repair never ended")


def test_promise_01_before_its_commit_a_repair_takes_nothing_from_its_place(
    hurt_bank: Path, repaired: dict[str, tuple], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And files that take the place of others are synced first; what was there lies in quarantine/ by then."""
    bank = copy_of(hurt_bank, tmp_path / "b")
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(files, "SYSTEM", Watched(lambda step, path: calls.append((step, path.replace(f"{bank}/", "")))))
    mend(bank)
    (commit,) = [
        place
        for place, (step, path) in enumerate(calls)
        if step == "link" and path.split(" ")[1].startswith("snapshots/")
    ]
    for place, (step, path) in enumerate(calls):
        if step == "rename":
            source, target = path.split(" ")
            if source.startswith("tmp/"):
                assert ("fsync", source) in calls[:place]
            else:
                assert place > commit and target.startswith("quarantine/"), path
    assert ("fsync folder", "snapshots") in calls[commit:]


def test_a_reader_keeps_what_it_reads_and_the_rest_is_done_when_it_has_ended(bank: Path, right: dict) -> None:
    file, start, _ = place_of(bank, A, "codes")
    flip(file, start)
    number = int(newest(bank).stem)
    with open_bank(bank) as reader:
        first = repair(bank)
        assert [finding.file for finding in first.left] == [layout.snapshot_name(number)]
        read = {passage.id for _, passage, _ in reader.passages(skip_damaged=True)}
        assert read == set(right) and file.exists(), "its rows are where they were"
    assert len(content(bank)) == len(right) - 1
    second = repair(bank)
    assert second.left == () and second.lost == () and second.snapshot == first.snapshot
    assert damage(bank) == [] and not file.exists()


def test_promise_08_a_bank_that_is_written_to_is_not_repaired_meanwhile(bank: Path) -> None:
    with write_bank(bank), pytest.raises(Locked), repair_bank(bank):
        pass
    with repair_bank(bank), pytest.raises(Locked), write_bank(bank):
        pass


def test_a_disk_that_gets_worse_meanwhile_is_told(bank: Path, right: dict) -> None:
    file, start, row_bytes = place_of(bank, A, "codes")
    flip(file, start)
    with repair_bank(bank) as work:
        flip(file, start + row_bytes)
        with pytest.raises(DamagedFile, match="got worse"):
            work.carry_out()
    assert [each.passages for each in repair(bank).lost] == [2] and damage(bank) == []


def test_in_quarantine_nothing_takes_another_ones_name(bank: Path) -> None:
    seen = set()
    for position in range(0, 40, 4):
        flip(newest(bank), position)
        seen.add(newest(bank).read_bytes())
        repair(bank)
    assert set(in_quarantine(bank)) == seen


def test_a_pipe_or_a_folder_in_the_place_of_a_file_is_set_aside(bank: Path, right: dict) -> None:
    shard = bank / shard_of(bank, E).name
    shard.unlink()
    os.mkfifo(shard)
    copy = newest(bank, "copy")
    copy.unlink()
    copy.mkdir()
    result = repair(bank)
    assert [each.source for each in result.lost] == ["e.md"] and damage(bank) == []
    assert content(bank) == {place: row for place, row in right.items() if not place.startswith(E)}


def test_promise_16_a_manifest_that_lies_about_sizes_costs_no_memory(tmp_path: Path) -> None:
    for number, change in enumerate(
        [
            {"bytes": 1 << 39},
            {"bytes": 1 << 39, "docs": {"bytes": 1 << 39, "sha256": "0" * 64}},
            {"rows": 4096},
        ]
    ):
        bank = make_bank(tmp_path / str(number), [("a.md", 2)])

        def lie(body: dict[str, Any], change: dict[str, Any] = change) -> None:
            body["shards"][0] |= change
            body["counts"]["passages"] = body["shards"][0]["rows"]

        rewritten(bank, lie)
        tracemalloc.start()
        repair(bank)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < 40 << 20 and damage(bank) == []


def test_a_packed_bank_is_told_what_to_do(bank: Path, tmp_path: Path) -> None:
    from regrad_cli.bank import pack_bank

    pack_bank(bank, tmp_path / "x.gbank")
    with pytest.raises(UsageProblem, match="packed"), repair_bank(tmp_path / "x.gbank"):
        pass
