"""Small shards become larger ones while a bank grows: how few there are, how often a row is copied, that nobody
notices, and that whatever stops it in the middle loses nothing.
"""

from __future__ import annotations

import errno
import os
import tracemalloc
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
from faults import STEPS_OF_A_COMMIT, Fault, Watched, flip, run_and_kill
from hypothesis import given, settings
from hypothesis import strategies as st
from made_banks import PRIOR, content, copy_of, make_bank, rows, tree
from made_banks import settings as bank_settings
from test_bank_compact import compact
from test_bank_move import made_new, move

from regrad_cli.bank import (
    Snapshot,
    create_bank,
    files,
    index,
    layout,
    merging,
    open_bank,
    remove_documents,
    verify,
    write_bank,
)
from regrad_cli.bank.manifest import SHARD_ROWS
from regrad_cli.bank.merging import STEP, due, tail
from regrad_cli.bank.shards import ShardReader
from regrad_cli.bank.store import Folder
from regrad_cli.errors import StorageFailed
from regrad_cli.records import document_id

MOST = 4  # rows a shard, where real banks are merged


@pytest.fixture
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrad_cli.bank.writer.SHARD_ROWS", MOST)


def in_shards(bank: Path) -> list[int]:
    with open_bank(bank) as snapshot:
        return [shard.rows for shard in snapshot.manifest.shards]


def in_order(bank: Path) -> list[tuple[bytes, ...]]:
    """All that is stored of each live row, in the order of the shards."""
    with open_bank(bank) as snapshot:
        found = [snapshot.row(ref) for ref, _, _ in snapshot.passages()]
        return [(row.key, row.codes, row.scales, row.embedding, row.line, row.checksum) for row in found]


def sound(bank: Path) -> bool:
    return [finding for finding in verify(bank) if not finding.note] == []


@contextmanager
def unmerged() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merging, "due", lambda *_, **__: None)
        yield


# ── the rule ─────────────────────────────────────────────────────────────────────────────────────────────────────────

Shard = list[int]  # the numbers of its rows


def merged(shards: list[Shard], most: int, first: int, last: int, copies: dict[int, int], **how: bool) -> None:
    """What `merge` does, with rows that are numbers; counts how often each is copied."""
    done = 0
    while done < most and (group := due([len(shard) for shard in shards[first:last]], most, **how)):
        start, end = group
        assert end - start > 1
        joined = [row for shard in shards[first + start : first + end] for row in shard]
        assert len(joined) <= most
        for row in joined:
            copies[row] += 1
        shards[first + start : first + end] = [joined]
        last -= end - start - 1
        done += len(joined)


def lifetime(runs: Sequence[Sequence[int]], most: int) -> tuple[list[Shard], dict[int, int], int]:
    """Runs of commits of so many rows each: the shards, how often each row was copied, the most shards there were."""
    shards: list[Shard] = []
    copies: dict[int, int] = {}
    peak = 0
    for commits in runs:
        found, small = len(shards), tail([len(shard) for shard in shards], most)
        for count in commits:
            last = len(shards)
            for start in range(0, count, most):
                shards.append(list(range(len(copies), len(copies) + min(most, count - start))))
                copies |= dict.fromkeys(shards[-1], 0)
            merged(shards, most, found, last, copies)
            peak = max(peak, len(shards))
        merged(shards, most, small, len(shards), copies, ended=True)
        assert [row for shard in shards for row in shard] == list(range(len(copies)))
    return shards, copies, peak


@st.composite
def lifetimes(draw: st.DrawFn) -> tuple[int, list[list[int]]]:
    most = draw(st.sampled_from([1, 2, 5, 63, 130, 256, 4096]))
    sizes = draw(st.sampled_from([1, max(1, most // STEP), max(1, most // 16), max(1, most // 2)]))
    return most, draw(st.lists(st.lists(st.integers(1, sizes), min_size=1, max_size=40), max_size=40))


@given(lifetimes())
@settings(max_examples=150, deadline=None)
def test_whatever_is_ingested_shards_stay_few_and_no_row_is_copied_more_than_twice(
    life: tuple[int, list[list[int]]],
) -> None:
    most, runs = life
    shards, copies, _ = lifetime(runs, most)
    assert max(copies.values(), default=0) <= 2
    full = -(-2 * len(copies) // most) + 1
    assert len(shards) <= 2 * full + 5 * STEP


@given(st.lists(st.lists(st.integers(1, 300), min_size=1, max_size=20), max_size=20))
@settings(max_examples=100, deadline=None)
def test_commits_larger_than_a_shard_are_copied_no_more_often(runs: list[list[int]]) -> None:
    _, copies, _ = lifetime(runs, 100)
    assert max(copies.values(), default=0) <= 2


@given(st.lists(st.integers(1, 70), max_size=60), st.booleans(), st.booleans())
def test_what_is_due_is_small_fits_and_is_found_until_nothing_is(sizes: list[int], ended: bool, closed: bool) -> None:
    most, now = 70, sizes[:]
    while group := due(now, most, ended=ended, closed=closed):
        start, end = group
        assert end - start > 1 and max(now[start:end]) <= most // 2 and sum(now[start:end]) <= most
        now[start:end] = [sum(now[start:end])]
    small = [count <= most // 2 for count in now]
    if ended and closed:
        assert not any(one and other for one, other in pairwise(small))
    assert sum(now[tail(now, most) :]) < most


@pytest.mark.parametrize(
    ("runs", "at_end", "peak", "copied"),
    [
        ([[256] * 80], 5, 20, 1.0),  # 20,480 rows in one ingest
        ([[256] * 16 * 250], 250, 265, 1.0),  # a million
        ([[1]] * 5000, 1 + 14 + 8, 128, 1.9),  # a passage a day
        ([[8]] * 3650, 7 + 8 + 2, 80, 2.0),  # ten years of a document a day
        ([[256] * 3 + [100], [5], [1]] * 30, 22, 35, 1.1),
    ],
)
def test_shards_of_well_known_lives(runs: list[list[int]], at_end: int, peak: int, copied: float) -> None:
    shards, copies, most = lifetime(runs, SHARD_ROWS)
    assert len(shards) <= at_end and most <= peak
    assert sum(copies.values()) / len(copies) <= copied


# ── shards on disk ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(("commits", "most"), [(1, 1), (10, 10), (100, 37), (1000, 55)])
def test_the_number_of_shards_stays_small_and_so_do_the_bytes_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, commits: int, most: int
) -> None:
    written: list[tuple[str, int]] = []
    put = merging.write_shard

    def counted(bank: Path, entry: object, data: list, docs: bytes) -> None:
        written.append(("", sum(len(memoryview(part).cast("B")) for part in data) + len(docs)))
        put(bank, entry, data, docs)  # type: ignore[arg-type]

    monkeypatch.setattr(merging, "write_shard", counted)
    monkeypatch.setattr("regrad_cli.bank.writer.write_shard", counted)
    bank = make_bank(tmp_path / "b", *([(f"{number}.md", 1)] for number in range(commits)))
    assert len(in_shards(bank)) <= most and sum(in_shards(bank)) == commits
    with open_bank(bank) as snapshot:
        least = sum(shard.bytes + shard.docs.bytes for shard in snapshot.manifest.shards)
    assert sum(count for _, count in written) < 3 * least * 1.4  # headers weigh something in shards of one small row
    assert len(list((bank / "shards").iterdir())) == len(in_shards(bank))
    assert sound(bank)


def test_a_document_a_day_leaves_few_shards_though_no_run_has_many(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    for number in range(70):
        with write_bank(bank) as writer:
            writer.add(*rows(f"{number}.md", 3))
            writer.commit("ingest")
            writer.finish()
    assert in_shards(bank) == [63, 63, 63] + [3] * 7
    with open_bank(bank, 40) as snapshot:  # older snapshots keep their own
        assert [shard.rows for shard in snapshot.manifest.shards][-1] == 3
        assert sum(shard.rows for shard in snapshot.manifest.shards) == len(list(snapshot.passages()))
    assert list(verify(bank)) == []


def where_live(bank: Snapshot) -> list[bool]:
    """Of each row in the concatenation of all shards, whether it is live."""
    readers = [ShardReader(bank.store, shard, bank.settings) for shard in bank.manifest.shards]
    return [live for reader in readers for live in reader.live().tolist()]


def history(bank: Path) -> None:
    """Rows added, replaced and removed by two runs, their own and the bank's."""
    for run in range(2):
        with write_bank(bank) as writer:
            for number in range(7):
                if number % 3 == 2:
                    gone = document_id(f"{run}-{number - 1}.md" if number % 2 else f"{number - 2}.md")
                    writer.remove(ref for ref, _, _ in writer.snapshot.passages(gone))
                writer.add(*rows(f"{run}-{number}.md", 1 + number % 2))
                writer.commit("ingest")
            writer.finish()


def test_rows_their_order_and_all_counts_are_as_without_merging(tmp_path: Path, small_shards: None) -> None:
    start = make_bank(tmp_path / "start", [("0.md", 2)], [("3.md", 1)])
    bank, plain = copy_of(start, tmp_path / "merged"), copy_of(start, tmp_path / "plain")
    history(bank)
    with unmerged():
        history(plain)
    assert len(in_shards(bank)) < len(in_shards(plain)) == 16
    assert content(bank) == content(plain) and in_order(bank) == in_order(plain)
    with open_bank(bank) as one, open_bank(plain) as other:
        assert one.manifest.counts == other.manifest.counts and one.manifest.counts.dead > 0
        assert any(shard.removed for shard in one.manifest.shards if shard.rows > 2)
        assert list(one.documents()) == list(other.documents())
        assert where_live(one) == where_live(other)  # so a graph's labels would still be right
    assert list(verify(bank)) == list(verify(plain)) == []
    compact(bank)
    compact(plain)
    files_of = [{name: data for name, data in tree(each).items() if "snapshots" not in name} for each in (bank, plain)]
    assert files_of[0] == files_of[1]


def test_what_compacting_made_stands(tmp_path: Path, small_shards: None) -> None:
    """The canonical form has shards that are small; no merging follows it."""
    bank = make_bank(tmp_path / "b", *([(f"{number}.md", 1)] for number in range(23)))
    compact(bank)
    found = in_shards(bank)
    assert any(one + other <= MOST for one, other in pairwise(found))
    assert not compact(bank).changed and in_shards(bank) == found


def test_places_of_what_was_there_before_a_run_stay_until_it_ends(tmp_path: Path, small_shards: None) -> None:
    """An ingest removes and copies rows that it found when it began."""
    bank = make_bank(tmp_path / "b", [("a.md", 1)], [("b.md", 1)])
    with write_bank(bank) as writer:
        held = {ref: key for ref, _, key in writer.snapshot.passages()}
        for number in range(20):
            writer.add(*rows(f"new{number}.md", 1))
            writer.commit("ingest")
            assert writer.snapshot.read_rows(list(held)).keys == tuple(held.values())
        assert len(writer.snapshot.manifest.shards) == 2 + 4 + 4
        writer.remove(list(held)[:1])
        writer.commit("ingest")
        writer.finish()
    assert {passage.split(":")[0] for passage in content(bank)} == {
        document_id(name) for name in ("b.md", *(f"new{number}.md" for number in range(20)))
    }
    assert in_shards(bank)[0] == 2 and sound(bank)


def test_a_reader_keeps_what_it_opened_while_its_shards_are_merged(tmp_path: Path, small_shards: None) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 1)])
    with write_bank(bank) as writer:
        for number in range(3):
            writer.add(*rows(f"{number}.md", 1))
            writer.commit("ingest")
        with open_bank(bank) as reader:
            before = [passage.id for _, passage, _ in reader.passages()]
            for number in range(3, 12):
                writer.add(*rows(f"{number}.md", 1))
                writer.commit("ingest")
            writer.finish()
            names = {shard.name for shard in reader.manifest.shards}
            assert names & set(layout.content_files(bank)) == names
            assert not names <= {shard.name for shard in writer.snapshot.manifest.shards}
            assert [reader.row(ref).passage.id for ref, _, _ in reader.passages()] == before
            assert len(reader.search(np.ones((1, 16), np.float32) / 4, 9)[0]) == len(before)
    with write_bank(bank):  # the reader is gone: so is what only it kept
        pass
    with open_bank(bank) as now, open_bank(bank, 2) as older:
        named = {name for each in (now, older) for name, _ in each.manifest.files()}
    assert set(layout.content_files(bank)) == named and list(verify(bank)) == []


def test_the_very_rows_of_a_dead_shard_are_not_named_twice(tmp_path: Path, small_shards: None) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2), ("b.md", 2)])
    remove_documents(bank, ["a.md", "b.md"])
    with write_bank(bank) as writer:
        for source in ("a.md", "b.md", "c.md", "d.md"):
            writer.add(*rows(source, 2))
            writer.commit("ingest")
        writer.finish()
    assert len(content(bank)) == 8 and list(verify(bank)) == []
    assert in_shards(bank)[:3] == [4, 2, 2]


def test_a_move_collects_full_shards_too(tmp_path: Path, small_shards: None) -> None:
    documents = [(f"{number}.md", 1) for number in range(16)]
    bank = make_bank(tmp_path / "b", documents)
    move(bank, step=1, stop=11)
    move(bank, step=1)
    assert content(bank) == made_new(tmp_path / "new", documents)
    assert in_shards(bank) == [4, 4, 4, 4] and sound(bank)


# ── the search graph ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_shards_under_a_graph_are_left_alone_and_it_stays_valid(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAD_INDEX_FROM", "10")
    monkeypatch.setattr(index, "EXTEND_SHARE", 0.8)
    bank = make_bank(tmp_path / "b", *([(f"{number}.md", 1)] for number in range(11)))
    with open_bank(bank) as snapshot:
        graph = snapshot.manifest.index
    assert in_shards(bank) == [4, 4, 3] and graph is not None and graph.shards == 3  # merged before it was built
    for number in range(11, 21):
        with write_bank(bank) as writer:
            writer.add(*rows(f"{number}.md", 1))
            writer.commit("ingest")
            writer.finish()
        with open_bank(bank) as snapshot:
            assert snapshot.manifest.index == graph
            assert index.load(Folder(bank), snapshot.manifest) is not None
            question = np.ones((1, 16), np.float32) / 4
            assert snapshot.search(question, 30, warm=True) == snapshot.search(question, 30)
    assert in_shards(bank) == [4, 4, 3, 4, 4, 1, 1] and list(verify(bank)) == []


def test_where_no_graph_comes_of_it_nothing_of_the_attempt_is_left(
    tmp_path: Path, small_shards: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAD_INDEX_FROM", "3")
    monkeypatch.setattr(index, "build", lambda *_: None)
    bank = make_bank(tmp_path / "b", *([(f"{number}.md", 1)] for number in range(7)))
    assert in_shards(bank) == [4, 1, 1, 1] and list(verify(bank)) == []


# ── what stops it ────────────────────────────────────────────────────────────────────────────────────────────────────


def ingest(bank: Path, reported: Callable[[int], None] = lambda number: None) -> None:
    """Three commits, of which the last merges, and an end that does."""
    with write_bank(bank) as writer:
        for number, count in enumerate((2, 2, 1)):
            if number == 2:
                writer.remove(ref for ref, _, _ in writer.snapshot.passages(document_id("1.md")))
            writer.add(*rows(f"{number}.md", count))
            writer.commit("ingest")
            reported(number + 1)
        writer.finish()


@pytest.fixture
def start(tmp_path: Path, small_shards: None) -> Path:
    return make_bank(tmp_path / "start", [("a.md", 1)], [("z.md", 1)])


@pytest.fixture
def states(start: Path, tmp_path: Path) -> list[dict]:
    """What the bank holds before, and after each commit of `ingest`."""
    bank, found = copy_of(start, tmp_path / "states"), [content(start)]
    ingest(bank, lambda number: found.append(content(bank)))
    assert in_shards(bank) == [2, 4, 1]
    return found


def test_promise_01_killed_at_every_step_of_an_ingest_that_merges(
    start: Path, states: list[dict], tmp_path: Path
) -> None:
    seen: set[str] = set()
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        step, reported = run_and_kill(lambda told, bank=bank: ingest(bank, told), at, True)
        seen.add(step)
        assert content(bank) in states[reported:], f"killed before call {at} ({step}) after commit {reported}"
        assert sound(bank)
        if not step:
            break
        if at % 9 == 0:  # the next writer removes what is left
            with write_bank(bank):
                pass
            assert list(verify(bank)) == []
    assert seen - {""} == STEPS_OF_A_COMMIT


def test_promise_07_an_error_at_every_step_of_an_ingest_that_merges(
    start: Path, states: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done_without = 0
    for at in range(1, 1000):
        bank, reported = copy_of(start, tmp_path / str(at)), [0]
        fault = Fault(at, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        monkeypatch.setattr(files, "SYSTEM", Watched(fault))
        failed = False
        try:
            ingest(bank, reported.append)
        except StorageFailed as error:
            failed = True
            assert error.hint and os.strerror(errno.ENOSPC) in error.message
        monkeypatch.setattr(files, "SYSTEM", files.System())
        found = content(bank)
        last_sync = failed and fault.hit == "fsync folder" and found == states[min(reported[-1] + 1, 3)]
        assert found == states[reported[-1]] or last_sync, f"call {at}: {fault.hit}"
        assert sound(bank) and (fault.hit == "unlink" or not list((bank / "tmp").iterdir()))
        done_without += not failed and fault.hit not in ("", "unlink")
        if not failed and fault.hit != "unlink":
            assert list(verify(bank)) == []  # nothing of a merge without room is left
        if not fault.hit:
            break
    assert done_without > 10  # merging found no room: no commit fails for that


def test_promise_07_without_room_to_merge_all_is_committed_and_a_later_run_merges(
    start: Path, states: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = copy_of(start, tmp_path / "b")

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "full")

    with monkeypatch.context() as patch:
        patch.setattr(merging, "write_shard", full)
        ingest(bank)
    assert content(bank) == states[-1] and in_shards(bank) == [1, 1, 2, 2, 1] and list(verify(bank)) == []
    with write_bank(bank) as writer:
        writer.add(*rows("late.md", 1))
        writer.commit("ingest")
        writer.finish()
    assert in_shards(bank) == [4, 2, 1, 1] and sound(bank)  # a full shard a commit


def test_promise_02_merged_shards_are_durable_before_a_commit_names_them(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank, calls = copy_of(start, tmp_path / "b"), []
    monkeypatch.setattr(files, "SYSTEM", Watched(lambda step, path: calls.append((step, path.replace(f"{bank}/", "")))))
    with write_bank(bank) as writer:
        for number in range(5):
            calls.clear()
            writer.add(*rows(f"{number}.md", 1))
            writer.commit("ingest")
    names = dict(path.split(" ") for step, path in calls if step == "rename")
    renamed = [target.split("/")[0] for target in names.values()]
    assert sorted(renamed) == ["docs", "docs", "shards", "shards", "snapshots"]  # of the rows added and of those merged
    (linked,) = [place for place, (step, _) in enumerate(calls) if step == "link"]
    for temporary, target in names.items():
        named = calls.index(("rename", f"{temporary} {target}"))
        assert calls.index(("fsync", temporary)) < named
        assert target.startswith("snapshots") or ("fsync folder", target.split("/")[0]) in calls[named:linked]


def test_merging_takes_memory_for_the_new_shard_alone(tmp_path: Path) -> None:
    wide = bank_settings(code_bytes=1 << 20)
    create_bank(tmp_path / "b", wide, PRIOR)
    with write_bank(tmp_path / "b") as writer:
        for source in ("a.md", "b.md"):
            writer.add(*rows(source, 4, made_for=wide))
            writer.commit("ingest")
        shards = writer.snapshot.manifest.shards
        tracemalloc.start()
        _, _, entry = merging.joined(Folder(tmp_path / "b"), shards, wide)
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert (len(shards), entry.rows) == (2, 8)
    assert entry.bytes < peak < entry.bytes + (1 << 20)


@pytest.mark.parametrize("part", ["shard", "docs"])
def test_promise_03_damage_gets_no_right_name(start: Path, tmp_path: Path, part: str) -> None:
    """A small shard whose bytes changed is not merged: they would be wrong under a name that says they are right."""
    bank = copy_of(start, tmp_path / "b")
    with write_bank(bank) as writer:
        writer.add(*rows("0.md", 1))
        writer.commit("ingest")
        shard = writer.snapshot.manifest.shards[-1]
        name = shard.name if part == "shard" else shard.docs_name
        flip(bank / name, (shard.bytes if part == "shard" else shard.docs.bytes) - 40)
        before = {finding.file for finding in verify(bank)}
        for number in range(1, 6):
            writer.add(*rows(f"{number}.md", 1))
            writer.commit("ingest")
        writer.finish()
    assert name in before and {finding.file for finding in verify(bank)} == before
    with open_bank(bank) as snapshot:
        assert shard in snapshot.manifest.shards and snapshot.stats()["passages"] == 8
