"""Promises 1, 2, 6, 7, 10, 11, 13 for compact: the canonical form, what goes and what stays, and whatever stops it."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import shutil
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from faults import STEPS_OF_A_COMMIT, Fault, Watched, no_links, run_and_kill
from hypothesis import HealthCheck, example, given
from hypothesis import settings as run_with
from hypothesis import strategies as st
from made_banks import PRIOR, content, copy_of, make_bank, rows, settings, tree
from test_bank_damage import rewritten
from test_bank_move import move

from regrad_cli.bank import (
    Compacted,
    compact_bank,
    create_bank,
    files,
    foreseen,
    layout,
    log,
    open_bank,
    plan_compaction,
    remove_documents,
    verify,
    write_bank,
)
from regrad_cli.bank.building import build_shard
from regrad_cli.bank.canonical import cut
from regrad_cli.bank.compact import Recode
from regrad_cli.bank.shards import expected_tensors, passage_line
from regrad_cli.errors import Damaged, NonFinite, StorageFailed, UsageProblem
from regrad_cli.records import BankSettings, CodecSettings, Passage, canonical_json, document_id, sha256_hex

Documents = dict[str, tuple[int, str]]  # source → passages, text
MOST = 5  # rows a shard, in most of these tests
CONTENT = ("shards/", "docs/", "priors/")


@pytest.fixture(autouse=True)
def small_shards(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrad_cli.bank.writer.SHARD_ROWS", MOST)


def compact(
    bank: Path,
    *,
    keep: int = 0,
    made_for: BankSettings | None = None,
    recode: Recode | None = None,
    told: Callable[[int], None] = lambda number: None,
) -> Compacted:
    """`told` is called once, when all is done."""
    with compact_bank(bank) as writer:
        plan = plan_compaction(writer.snapshot, keep=keep, settings=made_for)
        seen = list(writer.compact(plan, recode))
        assert seen == sorted(seen) and (not seen or seen[-1] == plan.form.rows)
        result = writer.end(plan)
    told(1)
    return result


def kept_files(bank: Path) -> dict[str, bytes]:
    """What the canonical form decides: every file but the manifests, which tell when and by whom."""
    return {name: data for name, data in tree(bank).items() if not name.startswith("snapshots/")}


def made(path: Path, documents: Documents) -> Path:
    """A bank that holds these documents and nothing else, and never did."""
    create_bank(path, settings(), PRIOR)
    with write_bank(path) as writer:
        for source, (count, text) in documents.items():
            writer.add(*rows(source, count, text=text))
        writer.commit("ingest")
        writer.finish()
    return path


def sound(bank: Path) -> bool:
    return list(verify(bank)) == []


def numbers(bank: Path) -> list[int]:
    return layout.snapshot_numbers(bank)


HISTORY: list[list[tuple[str, int]]] = [
    [("a.md", 3), ("gone.md", 4)],
    [("b.md", 2), ("long.md", 13)],
    [("c.md", 1)],
    [("d.md", 4), ("e.md", 4)],
]
LIVE: Documents = {source: (count, "") for commit in HISTORY for source, count in commit if source != "gone.md"}


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Six documents in four commits, one of them longer than two shards; and one that was removed."""
    bank = make_bank(tmp_path_factory.mktemp("start") / "b", *HISTORY)
    remove_documents(bank, ["gone.md"])
    return bank


@pytest.fixture(scope="module")
def before(start: Path) -> dict:
    return content(start)


@pytest.fixture(scope="module")
def after(start: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The files of the bank when it is compact."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regrad_cli.bank.writer.SHARD_ROWS", MOST)
        bank = copy_of(start, tmp_path_factory.mktemp("after") / "b")
        compact(bank)
        return kept_files(bank)


@pytest.fixture
def bank(start: Path, tmp_path: Path) -> Path:
    return copy_of(start, tmp_path / "b")


# ── the canonical form ───────────────────────────────────────────────────────────────────────────────────────────────


def naive(documents: Sequence[tuple[str, int]], most: int, bits: str = "") -> list[list[tuple[str, int]]]:
    """The rule of bank-format.md in plain words: (document id, ordinal) in shards."""
    inside = sorted(row for row in documents if f"{int(row[0], 16):064b}".startswith(bits))
    if len(inside) <= most:
        return [inside] if inside else []
    if len({document for document, _ in inside}) == 1:
        return [inside[at : at + most] for at in range(0, len(inside), most)]
    return naive(inside, most, f"{bits}0") + naive(inside, most, f"{bits}1")


def in_shards(bank: Path) -> list[list[tuple[str, int]]]:
    with open_bank(bank) as snapshot:
        found: dict[int, list[tuple[str, int]]] = {}
        for ref, passage, _ in snapshot.passages():
            found.setdefault(ref.shard, []).append((passage.document, passage.ordinal))
        assert all(shard.removed == () for shard in snapshot.manifest.shards)
    return [found[shard] for shard in sorted(found)]


DOCUMENT = st.tuples(st.integers(0, 7), st.integers(1, 12), st.sampled_from(["", "other"]))
STEP = st.one_of(
    st.tuples(st.just("add"), st.lists(DOCUMENT, min_size=1, max_size=4, unique_by=lambda document: document[0])),
    st.tuples(st.just("remove"), st.integers(0, 7)),
    st.tuples(st.just("compact"), st.integers(0, 2)),
)


@run_with(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@example(history=[("add", [(number, 1, "") for number in range(8)])], most=100)
@given(history=st.lists(STEP, max_size=10), most=st.sampled_from([1, 3, 7, 100]))
def test_promise_11_any_history_of_the_same_documents_ends_in_the_same_files(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[Any, ...]], most: int
) -> None:
    root = tmp_path_factory.mktemp("history")
    live: Documents = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("regrad_cli.bank.writer.SHARD_ROWS", most)
        bank = make_bank(root / "b")
        for step, what in history:
            if step == "compact":
                compact(bank, keep=what)
                continue
            with write_bank(bank) as writer:
                for number, *passages in what if step == "add" else [(what,)]:
                    source = f"{number}.md"
                    writer.remove(ref for ref, _, _ in writer.snapshot.passages(document_id(source)))
                    live.pop(source, None)
                    if passages:
                        live[source] = (passages[0], passages[1])
                        writer.add(*rows(source, passages[0], text=passages[1]))
                writer.commit("ingest")
                writer.finish()
        held = content(bank)
        result = compact(bank)
        assert content(bank) == held and sound(bank)
        assert result.passages == len(held) and result.documents == len(live)
        assert len(numbers(bank)) == 1
        places = [(document_id(source), ordinal) for source, (count, _) in live.items() for ordinal in range(count)]
        assert in_shards(bank) == naive(places, most)
        fresh = made(root / "fresh", dict(sorted(live.items(), reverse=True)))
        compact(fresh)
        assert kept_files(fresh) == kept_files(bank)
        again, whole = compact(bank), tree(bank)
        assert (again.changed, again.snapshot, again.shards["rewritten"]) == (False, numbers(bank)[-1], 0)
        assert tree(bank) == whole
    shutil.rmtree(root)


def test_promise_11_a_document_whose_passages_came_in_another_order_ends_in_the_same_files(tmp_path: Path) -> None:
    """As one does of which some passages changed: the others stay where they were."""
    parts = rows("a.md", 4)
    bank = tmp_path / "b"
    create_bank(bank, settings(), PRIOR)
    for chosen in (slice(2, 4), slice(0, 2)):
        with write_bank(bank) as writer:
            writer.add(*(part[chosen] for part in parts))
            writer.commit("ingest")
    straight = made(tmp_path / "straight", {"a.md": (4, "")})
    for each in (bank, straight):
        compact(each)
    assert kept_files(bank) == kept_files(straight)


@run_with(deadline=None)
@given(
    counts=st.lists(st.integers(1, 9), min_size=1, max_size=40),
    seed=st.integers(0, 1 << 30),
    most=st.integers(1, 20),
    added=st.integers(1, 9),
)
def test_a_document_more_changes_one_shard_at_most(counts: list[int], seed: int, most: int, added: int) -> None:
    ids = np.unique(np.random.default_rng(seed).integers(0, 1 << 64, len(counts) + 1, dtype=np.uint64)).tolist()

    def pieces(documents: list[tuple[int, int]]) -> list[tuple[int, ...]]:
        column = np.array([id for id, count in sorted(documents) for _ in range(count)], np.uint64)
        found = cut(column, most)
        assert [start for start, _ in found] == [0, *(end for _, end in found[:-1])] and found[-1][1] == len(column)
        assert all(0 < end - start <= most for start, end in found)
        return [tuple(column[start:end].tolist()) for start, end in found]

    chosen = seed % len(ids)
    documents = list(zip(ids, [*counts, added], strict=False))
    old, new = Counter(pieces(documents[:chosen] + documents[chosen + 1 :])), Counter(pieces(documents))
    assert (old - new).total() <= 1


def test_shards_of_many_short_documents_are_half_full_at_least(monkeypatch: pytest.MonkeyPatch) -> None:
    ids = np.sort(np.random.default_rng(5).integers(0, 1 << 63, 50_000, dtype=np.int64)).astype(np.uint64) << np.uint64(
        1
    )
    sizes = [end - start for start, end in cut(ids, 4096)]
    assert sum(sizes) == 50_000 and min(sizes) > 0.4 * 4096


def test_a_small_bank_is_one_shard_and_one_docs_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrad_cli.bank.writer.SHARD_ROWS", 4096)
    bank = make_bank(tmp_path / "b", *[[(f"{number}.md", 2)] for number in range(9)])
    assert compact(bank).shards == {"before": 9, "after": 1, "rewritten": 1}
    assert [len(list((bank / folder).iterdir())) for folder in ("shards", "docs")] == [1, 1]
    assert len(numbers(bank)) == 1


def test_large_rows_make_shards_of_fewer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrad_cli.bank.writer.SHARD_BYTES", 2 * (40 + 2 * (4 + 16)) + 1)
    bank = make_bank(tmp_path / "b", [("a.md", 5)])
    compact(bank)
    assert [len(rows) for rows in in_shards(bank)] == [2, 2, 1]


def test_a_shard_that_is_canonical_is_not_touched(bank: Path) -> None:
    compact(bank)
    files_before = {path: path.stat() for folder in ("shards", "docs") for path in (bank / folder).iterdir()}
    with write_bank(bank) as writer:
        writer.add(*rows("new.md", 1))
        writer.commit("ingest")
    result = compact(bank)
    assert result.shards["rewritten"] <= 2 and result.changed
    stayed = [path for path, stat in files_before.items() if path.exists() and path.stat().st_ino == stat.st_ino]
    assert len(stayed) >= len(files_before) - 2
    assert all(path.stat().st_mtime_ns == files_before[path].st_mtime_ns for path in stayed)


def test_a_shard_of_the_right_rows_in_another_layout_is_written_anew(tmp_path: Path) -> None:
    """As another implementation may write it: canonical is what is the same to the last byte."""
    bank = make_bank(tmp_path / "b", [("a.md", 3)])
    compact(bank)
    whole, held = kept_files(bank), content(bank)
    (shard,) = (bank / "shards").iterdir()
    data = shard.read_bytes()
    end = 8 + int.from_bytes(data[:8], "little")
    header = data[8:end] + b" " * 8
    data = len(header).to_bytes(8, "little") + header + data[end:]
    shard.unlink()
    (bank / "shards" / f"{sha256_hex(data)}.safetensors").write_bytes(data)

    def change(body: dict[str, Any]) -> None:
        body["shards"][0] |= {"sha256": sha256_hex(data), "bytes": len(data)}
        body["shards"][0]["blocks"]["header"] = sha256_hex(len(header).to_bytes(8, "little") + header)

    rewritten(bank, change)
    assert content(bank) == held and kept_files(bank) != whole
    assert compact(bank).shards["rewritten"] == 1
    assert kept_files(bank) == whole


def test_our_bytes_are_those_that_the_safetensors_library_writes() -> None:
    from safetensors.numpy import load, save

    for count in (1, 2, 3, 8, 100):
        parts, _, entry = build_shard(settings(), *rows("a.md", count))
        data = b"".join(parts)
        tensors = load(data)
        assert save(tensors) == data and len(data) == entry.bytes
        expected = expected_tensors(settings(), count)
        assert {name: tensor.shape for name, tensor in tensors.items()} == {
            n: shape for n, (_, shape) in expected.items()
        }


def test_a_row_that_is_there_twice_is_there_once(tmp_path: Path) -> None:
    """Ingest makes none; rows of one place that differ are two rows, in an order that they decide."""
    other = list(rows("a.md", 3))
    other[2] = other[2].copy()
    other[2][1] ^= 1  # the same passage of another codec, say
    for name, commits in (("one", (rows("a.md", 3), other, rows("a.md", 3))), ("two", (other, rows("a.md", 3), other))):
        create_bank(tmp_path / name, settings(), PRIOR)
        with write_bank(tmp_path / name) as writer:
            for number, commit in enumerate(commits):
                writer.add(*commit)
                writer.add(*rows(f"{number}.md", 1))  # so that no shard is one that is there already
                writer.commit("ingest")
            assert writer.snapshot.manifest.counts.passages == 12
    result = compact(tmp_path / "one")
    compact(tmp_path / "two")
    assert (result.passages, result.dead, result.documents) == (7, 5, 4)
    assert kept_files(tmp_path / "one") == kept_files(tmp_path / "two")
    assert sound(tmp_path / "one") and not compact(tmp_path / "one").changed


@pytest.mark.parametrize("gone", [[], ["a.md"]], ids=["empty", "emptied"])
def test_a_bank_of_nothing_has_no_shards(tmp_path: Path, gone: list[str]) -> None:
    bank = make_bank(tmp_path / "b", [(source, 2) for source in gone])
    if gone:
        remove_documents(bank, gone)
    compact(bank)
    assert content(bank) == {} and sound(bank)
    assert [len(list((bank / folder).iterdir())) for folder in ("shards", "docs")] == [0, 0]
    assert not compact(bank).changed


# ── what goes, and what stays ────────────────────────────────────────────────────────────────────────────────────────


def everything(bank: Path) -> bytes:
    return b"".join(file.read_bytes() for file in bank.rglob("*") if file.is_file())


def test_what_was_removed_is_nowhere_in_the_folder(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("secret.md", 3), ("a.md", 2)], [("b.md", 1)])
    passages, keys, codes, _, embeddings = rows("secret.md", 3)
    parts = [b"secret.md", passages[0].document.encode(), bytes.fromhex(passages[0].document)]
    parts += [*keys, *(row.tobytes() for row in codes), *(row.tobytes() for row in embeddings)]
    remove_documents(bank, ["secret.md"])
    for place in ("quarantine/old.safetensors", "quarantine/more/x", "tmp/half"):
        (bank / place).parent.mkdir(exist_ok=True)
        (bank / place).write_bytes(b"secret.md")
    assert all(part in everything(bank) for part in parts)
    result = compact(bank)
    assert [part for part in parts if part in everything(bank)] == []
    assert (result.dead, result.quarantined, result.dropped_snapshots) == (3, 2, (1, 3, 4))
    assert not list((bank / "quarantine").iterdir()) and sound(bank)


def test_quarantine_is_emptied_also_where_all_else_is_compact(bank: Path) -> None:
    compact(bank)
    (bank / "quarantine" / "x").write_bytes(b"damaged")
    before = numbers(bank)
    result = compact(bank)
    assert (result.quarantined, result.changed) == (1, True)
    assert not list((bank / "quarantine").iterdir()) and numbers(bank) == before


@pytest.mark.parametrize("folder", ["tmp", "quarantine"])
def test_promise_15_a_folder_that_leads_elsewhere_is_not_emptied(bank: Path, tmp_path: Path, folder: str) -> None:
    theirs = tmp_path / "theirs"
    theirs.mkdir()
    (theirs / "letter").write_text("mine")
    (bank / folder).rmdir()
    (bank / folder).symlink_to(theirs, target_is_directory=True)
    with pytest.raises(Damaged, match=folder):
        compact(bank)
    assert (theirs / "letter").read_text() == "mine"
    (theirs / "more").mkdir()
    (bank / folder).unlink()
    (bank / folder).mkdir()
    (bank / folder / "link").symlink_to(theirs, target_is_directory=True)
    compact(bank)
    assert (theirs / "letter").read_text() == "mine" and not list((bank / folder).iterdir())


def test_keep_keeps_the_newest_older_snapshots_as_they_were(bank: Path, before: dict) -> None:
    there = numbers(bank)
    held = {number: content(bank, number) for number in there}
    result = compact(bank, keep=2)
    assert (result.kept_snapshots, result.dropped_snapshots) == (tuple(there[-2:]), tuple(there[:-2]))
    assert numbers(bank) == [*there[-2:], there[-1] + 1]
    assert content(bank) == before == content(bank, there[-1])
    assert content(bank, there[-2]) == held[there[-2]] != before
    assert sound(bank)
    again = compact(bank, keep=2)
    assert not again.changed and numbers(bank) == [*there[-2:], there[-1] + 1]
    assert compact(bank, keep=1).kept_snapshots == (there[-1] + 1,)
    assert numbers(bank) == [there[-1] + 1, there[-1] + 2] and sound(bank)


def test_what_is_kept_stays_through_later_writers(bank: Path) -> None:
    there = numbers(bank)
    compact(bank, keep=1)
    for source in ("x.md", "y.md"):
        with write_bank(bank) as writer:
            writer.add(*rows(source, 2))
            writer.commit("ingest")
            writer.finish()
    assert numbers(bank) == [there[-1], there[-1] + 1, there[-1] + 2, there[-1] + 3]
    assert len(content(bank, there[-1])) == 27 and sound(bank)


def test_a_snapshot_to_be_kept_that_cannot_be_read_is_refused_and_one_to_be_dropped_goes(bank: Path) -> None:
    """Nobody knows which files a damaged manifest needs; without --keep nobody needs to."""
    there = numbers(bank)
    path = bank / layout.snapshot_name(there[-2])
    path.write_bytes(b"damaged")
    whole = tree(bank)
    with pytest.raises(Damaged, match=path.name) as caught:
        compact(bank, keep=2)
    assert "repair" in caught.value.hint and tree(bank) == whole
    compact(bank)
    assert numbers(bank) == [there[-1] + 1] and sound(bank)


def test_the_graph_is_built_anew_and_the_old_one_forgotten(
    bank: Path, before: dict, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAD_INDEX_FROM", "3")
    with write_bank(bank) as writer:
        writer.finish()
    (old,) = (bank / "index").iterdir()
    told: list[tuple[int, int]] = []
    with compact_bank(bank) as writer:
        plan = plan_compaction(writer.snapshot)
        list(writer.compact(plan))
        writer.end(plan, lambda done, total: told.append((done, total)))
    with open_bank(bank) as snapshot:
        index = snapshot.manifest.index
    assert index is not None and index.rows == 27 and told[-1] == (27, 27)
    assert [path.stem for path in (bank / "index").iterdir()] == [index.sha256] != [old.stem]
    assert [path.stem for path in (state / "indexes").iterdir()] == [index.sha256]
    assert content(bank) == before and sound(bank) and len(numbers(bank)) == 1
    whole = tree(bank)
    assert not compact(bank).changed and tree(bank) == whole


def test_what_is_foreseen_is_what_comes_and_looking_changes_nothing(bank: Path) -> None:
    (bank / "quarantine" / "x").write_bytes(b"damaged" * 9)
    whole = tree(bank)
    for keep in (2, 0, 0):
        with write_bank(bank), open_bank(bank) as snapshot:  # a dry run waits for no writer
            dry = foreseen(plan_compaction(snapshot, keep=keep))
        if keep:
            assert tree(bank) == whole
        real = compact(bank, keep=keep)
        assert dry.dry_run and not real.dry_run
        assert abs(dry.bytes["after"] - real.bytes["after"]) < 0.02 * real.bytes["after"]
        assert dry.bytes["before"] == real.bytes["before"]
        same = {"dry_run": False, "snapshot": real.snapshot, "bytes": real.bytes}
        assert replace(dry, **same) == real


# ── readers ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_promise_10_a_reader_keeps_its_snapshot_and_the_next_writer_drops_it(bank: Path, before: dict) -> None:
    there = numbers(bank)
    first = content(bank, there[1])
    with open_bank(bank, there[1]) as old, open_bank(bank) as newest:
        result = compact(bank)
        assert result.held_snapshots == (there[1], there[-1])
        assert set(result.dropped_snapshots) == set(there) - {there[1], there[-1]}
        assert {passage.id for _, passage, _ in old.passages()} == set(first)
        for snapshot, held in ((old, first), (newest, before)):
            for ref, passage, _ in snapshot.passages():
                assert snapshot.row(ref).codes == held[passage.id][2]
        assert not compact(bank).changed, "there is nothing to do but to wait"
        assert numbers(bank) == [there[1], there[-1], result.snapshot]
    with write_bank(bank):
        pass
    assert numbers(bank) == [result.snapshot] and sound(bank)
    compacted = set(kept_files(bank))
    compact(bank)
    assert set(kept_files(bank)) == compacted


def _read_over_and_over(path: str, enough: Any, failures: Any, rounds: Any) -> None:
    while not enough.is_set():
        try:
            with open_bank(Path(path)) as snapshot:
                passages = list(snapshot.passages())
                read = snapshot.read_rows([ref for ref, _, _ in passages])
                hits = snapshot.search(np.ones((1, 16), np.float32) / 4, 3)[0]
                written = {passage.text.split()[0] for passage in read.passages if passage.text}
                assert len(passages) == snapshot.stats()["passages"] == 9 and len(hits) == 3
                assert len(written) == 1, written  # all documents are of the same round: one snapshot
            rounds.value += 1
        except BaseException as error:
            failures.put(repr(error))
            return


def test_promise_10_a_reader_sees_one_snapshot_while_others_ingest_and_compact(tmp_path: Path) -> None:
    sources = ("a.md", "b.md", "c.md")
    bank = make_bank(tmp_path / "b")
    with write_bank(bank) as writer:
        for source in sources:
            writer.add(*rows(source, 3, text="0"))
        writer.commit("ingest")
    context = multiprocessing.get_context("spawn")
    failures, rounds, enough = context.Queue(), context.Value("i", 0), context.Event()
    arguments = (str(bank), enough, failures, rounds)
    readers = [context.Process(target=_read_over_and_over, args=arguments) for _ in range(2)]
    for reader in readers:
        reader.start()
    number, deadline = 0, time.time() + 120
    while rounds.value < 60 and time.time() < deadline and all(reader.is_alive() for reader in readers):
        number += 1
        with write_bank(bank, wait_s=5) as writer:
            writer.remove(ref for ref, _, _ in writer.snapshot.passages())
            for source in sources:
                writer.add(*rows(source, 3, text=str(number)))
            writer.commit("ingest")
            writer.finish()
        compact(bank)
    enough.set()
    for reader in readers:
        reader.join()
    assert failures.empty(), failures.get()
    assert rounds.value >= 60 and number > 3
    with write_bank(bank):
        pass
    assert len(numbers(bank)) == 1 and sound(bank)


# ── whatever stops it ────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_promise_01_and_13_killed_at_every_step_the_bank_is_the_old_one_or_the_new_one(
    start: Path, before: dict, after: dict[str, bytes], tmp_path: Path, links: bool
) -> None:
    """And the next writer takes away what is too much, of the one or the other."""
    whole, seen = tree(start), set()
    for at in range(1, 1000, 1 if links else 3):
        bank = copy_of(start, tmp_path / str(at))
        step, done = run_and_kill(lambda told, bank=bank: compact(bank, told=told), at, links)
        seen.add(step)
        assert content(bank) == before, f"killed before call {at} ({step})"
        assert [finding for finding in verify(bank) if not finding.note] == []
        committed = log(bank)[0]["operation"] == "compact"
        assert committed or not done
        with write_bank(bank):
            pass
        if committed:
            assert kept_files(bank) == after and len(numbers(bank)) == 1
        else:
            assert tree(bank) == whole
        if at % 5 == 0 or not step:
            compact(bank)
            assert kept_files(bank) == after and sound(bank)
        shutil.rmtree(bank)
        if not step:
            break
    assert not links or seen - {""} >= STEPS_OF_A_COMMIT


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["disk full", "disk error"])
def test_promise_07_and_13_an_error_at_every_step_neither_grows_the_bank_nor_loses_a_row(
    start: Path, before: dict, after: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    whole, steps = tree(start), set()
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        fault = Fault(at, lambda: OSError(code, os.strerror(code)))
        monkeypatch.setattr(files, "SYSTEM", Watched(fault))
        failed = False
        try:
            compact(bank)
        except StorageFailed as error:
            failed = True
            assert error.hint and os.strerror(code) in error.message
        monkeypatch.setattr(files, "SYSTEM", files.System())
        steps.add(fault.hit)
        assert content(bank) == before and [finding for finding in verify(bank) if not finding.note] == []
        assert failed or fault.hit in ("", "unlink"), f"call {at}: {fault.hit} went unnoticed"
        committed = log(bank)[0]["operation"] == "compact"
        if failed and not committed:
            assert tree(bank) == whole, f"call {at}: {fault.hit}"
        assert committed or failed
        # Only the last sync leaves open which snapshot a power cut would leave: both are there then.
        assert not (failed and committed) or (fault.hit == "fsync folder" and whole.keys() <= tree(bank).keys())
        compact(bank)
        assert kept_files(bank) == after and sound(bank) and len(numbers(bank)) == 1
        shutil.rmtree(bank)
        if not fault.hit:
            break
    assert steps - {""} >= STEPS_OF_A_COMMIT


def test_promise_13_ctrl_c_at_every_step_leaves_the_old_bank_or_the_new_one(
    start: Path, before: dict, after: dict[str, bytes], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = tree(start)
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        fault = Fault(at, KeyboardInterrupt)
        monkeypatch.setattr(files, "SYSTEM", Watched(fault))
        with suppress(KeyboardInterrupt):
            compact(bank)
        monkeypatch.setattr(files, "SYSTEM", files.System())
        assert content(bank) == before
        if log(bank)[0]["operation"] != "compact":
            assert tree(bank) == whole, f"call {at}: {fault.hit}"
        compact(bank)
        assert kept_files(bank) == after and sound(bank)
        shutil.rmtree(bank)
        if not fault.hit:
            return
    raise AssertionError("it never ended")


def test_promise_13_left_in_the_middle_it_takes_back_what_it_wrote(bank: Path) -> None:
    whole = tree(bank)
    with compact_bank(bank) as writer:
        steps = writer.compact(plan_compaction(writer.snapshot))
        while len(list((bank / "shards").iterdir())) < 8:
            next(steps)
        steps.close()
        assert tree(bank) == whole


LIMITED = """
import sys, pathlib, resource
sys.path.insert(0, sys.argv[2])
from test_bank_compact import compact
from regrad_cli.bank import writer
from regrad_cli.errors import StorageFailed
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
writer.SHARD_ROWS = 5
try:
    compact(pathlib.Path(sys.argv[1]))
    print("done")
except StorageFailed as error:
    print("refused:", error.message)
"""


def test_promise_07_a_file_that_may_not_grow(start: Path, before: dict, tmp_path: Path) -> None:
    whole, said = tree(start), []
    for limit in (100, 700, 1500, 3000, 100_000):
        bank = copy_of(start, tmp_path / str(limit))
        words = [sys.executable, "-c", LIMITED, str(bank), str(Path(__file__).parent), str(limit)]
        said.append(subprocess.run(words, capture_output=True, text=True, check=True).stdout)
        assert content(bank) == before
        assert (tree(bank) == whole) == said[-1].startswith("refused")
    assert said[-1] == "done\n" and all("File too large" in line for line in said[:-1])


def test_without_room_it_does_not_begin(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = tree(bank)
    with open_bank(bank) as snapshot:
        needed = plan_compaction(snapshot).written_bytes
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=needed - 1, f_frsize=1))
    with pytest.raises(StorageFailed) as caught:
        compact(bank)
    assert f"{needed:,} bytes" in caught.value.message and f"{needed - 1:,} are free" in caught.value.message
    assert caught.value.hint and tree(bank) == whole
    monkeypatch.setattr(os, "statvfs", lambda path: SimpleNamespace(f_bavail=needed, f_frsize=1))
    written = {name: len(data) for name, data in tree(bank).items()}
    compact(bank)
    new = {name: len(data) for name, data in tree(bank).items() if name not in written}
    assert needed == sum(size for name, size in new.items() if name.startswith(CONTENT)), "an exact figure"


def test_promise_02_it_is_durable_before_anything_goes(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(files, "SYSTEM", Watched(lambda step, path: calls.append((step, path.replace(f"{bank}/", "")))))
    compact(bank)
    (linked,) = [place for place, (step, path) in enumerate(calls) if step == "link" and ".json" in path]
    renamed = [
        place for place, (step, path) in enumerate(calls) if step == "rename" and path.split()[-1].startswith(CONTENT)
    ]
    assert len(renamed) >= 8
    for folder in ("docs", "shards"):
        assert ("fsync folder", folder) in calls[max(renamed) : linked]
    gone = [place for place, (step, path) in enumerate(calls) if step == "unlink" and not path.startswith("tmp/")]
    confirmed = next(
        place for place, call in enumerate(calls) if call == ("fsync folder", "snapshots") and place > linked
    )
    assert len(gone) > 8 and min(gone) > confirmed
    kinds = [calls[place][1].split("/")[0] for place in gone]
    assert kinds == sorted(kinds, key=lambda kind: kind != "snapshots"), "no snapshot is left without its files"


# ── what it refuses ──────────────────────────────────────────────────────────────────────────────────────────────────


def flipped(path: Path, place: int) -> None:
    data = bytearray(path.read_bytes())
    data[place] ^= 16
    path.write_bytes(data)


@pytest.mark.parametrize("standing", [False, True], ids=["rewritten", "standing"])
def test_a_damaged_row_stops_it_before_anything_changes(bank: Path, standing: bool) -> None:
    """Also in a shard that stays: what may be the only other copy of its rows is about to go."""
    if standing:
        compact(bank)
        with write_bank(bank) as writer:
            writer.add(*rows("new.md", 1))
            writer.commit("ingest")
            plan = plan_compaction(writer.snapshot)
            stays = next(each for each in plan.form.shards if each.standing is not None).standing
            shard = writer.snapshot.manifest.shards[stays]  # type: ignore[index]
    else:
        with open_bank(bank) as snapshot:
            shard = snapshot.manifest.shards[1]
    path = bank / shard.name
    flipped(path, path.stat().st_size - shard.rows * 40 - 1)  # the last codes: before them only documents and keys
    whole = tree(bank)
    with pytest.raises(Damaged) as caught:
        compact(bank)
    assert caught.value.exit_code == 14 and "bank repair" in caught.value.hint and "document" in caught.value.message
    assert tree(bank) == whole


@pytest.mark.parametrize("kind", ["shards", "docs"])
def test_any_damage_to_live_rows_stops_it_or_changes_nothing_that_lives(
    bank: Path, before: dict, tmp_path: Path, kind: str
) -> None:
    for file in (bank / kind).iterdir():
        for place in np.linspace(0, file.stat().st_size - 1, 12).astype(int).tolist():
            copy = copy_of(bank, tmp_path / "copy")
            flipped(copy / kind / file.name, place)
            whole = tree(copy)
            try:
                compact(copy)
            except Damaged as error:
                assert "bank repair" in error.hint
                assert tree(copy) == whole
            else:  # it was of a removed row, or in what nobody reads
                assert content(copy) == before and sound(copy)
            shutil.rmtree(copy)


def test_a_missing_file_is_named_and_nothing_changes(bank: Path) -> None:
    with open_bank(bank) as snapshot:
        name = snapshot.manifest.shards[1].docs_name
    (bank / name).unlink()
    whole = tree(bank)
    with pytest.raises(Damaged, match=name):
        compact(bank)
    assert tree(bank) == whole


def test_a_bank_on_its_way_to_another_prior_is_refused(bank: Path) -> None:
    move(bank, stop=1)
    with write_bank(bank):
        pass  # clears what the interrupted move left
    whole = tree(bank)
    with pytest.raises(UsageProblem, match="next") as caught:
        compact(bank)
    assert "ingest --stale" in caught.value.hint and tree(bank) == whole
    move(bank)
    held = content(bank)
    compact(bank)
    assert content(bank) == held and sound(bank)
    assert [path.stem for path in (bank / "priors").iterdir()] != [settings().prior]


@pytest.mark.parametrize("oldest", [-1, 7, "6", 1.0, None], ids=str)
def test_promise_16_an_oldest_snapshot_that_cannot_be_is_damage(bank: Path, oldest: Any) -> None:
    compact(bank)
    (path,) = (bank / "snapshots").glob("*.json")
    assert json.loads(path.read_bytes())["oldest"] == json.loads(path.read_bytes())["number"]
    rewritten(bank, lambda body: body.update(oldest=oldest if oldest != 7 else body["number"] + 1))
    with pytest.raises(Damaged):
        open_bank(bank)


@pytest.mark.parametrize(
    "change",
    [{"ordinal": 1 << 70}, {"offset": -(1 << 64)}, {"tokens": 1 << 40}, {"tokens": -1}, {"document": "0" * 16}],
    ids=str,
)
def test_a_line_that_says_what_no_passage_can_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, change: dict[str, Any]
) -> None:
    """Rows with right checksums that someone else made."""

    def forged(passage: Passage) -> bytes:
        line = passage_line(passage)
        return canonical_json(json.loads(line) | change).encode() + b"\n" if passage.ordinal == 1 else line

    monkeypatch.setattr("regrad_cli.bank.building.passage_line", forged)
    bank = make_bank(tmp_path / "b", [("b.md", 3)])
    with write_bank(bank) as writer:
        writer.add(*rows("a.md", 1))
        writer.commit("ingest")
    whole = tree(bank)
    with pytest.raises(Damaged):
        compact(bank)
    assert tree(bank) == whole


# ── another codec ────────────────────────────────────────────────────────────────────────────────────────────────────

NARROW = replace(settings(), codec=CodecSettings("full", 0, 4), code_bytes=10, scale_count=2)


def narrow(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Some function of each row alone."""
    return codes[:, ::4] ^ 0xFF, scales[:, :2] * np.float16(0.5)


def test_another_codec_changes_codes_and_scales_and_nothing_else(bank: Path, before: dict) -> None:
    result = compact(bank, made_for=NARROW, recode=narrow)
    found = content(bank)
    assert found.keys() == before.keys() and result.codec == "int4"
    for place, (passage, key, codes, scales, embedding) in found.items():
        old = before[place]
        assert (passage, key, embedding) == (old[0], old[1], old[4])
        new = narrow(np.frombuffer(old[2], np.uint8)[None], np.frombuffer(old[3], np.float16)[None])
        assert (codes, scales) == (new[0].tobytes(), new[1].tobytes())
    with open_bank(bank) as snapshot:
        assert snapshot.settings == NARROW
    assert sound(bank) and len(numbers(bank)) == 1
    with write_bank(bank) as writer:
        writer.add(*rows("new.md", 2, made_for=NARROW))
        writer.commit("ingest")
    compact(bank)
    assert len(content(bank)) == 29 and sound(bank)


def test_another_codec_of_the_same_size_changes_every_shard_too(bank: Path) -> None:
    compact(bank)
    held = content(bank)
    alike = replace(settings(), codec=CodecSettings("full", 0, 8))
    result = compact(bank, made_for=alike, recode=lambda codes, scales: (codes ^ 0xFF, scales))
    assert result.shards["rewritten"] == result.shards["before"]
    assert {place: bytes(255 - byte for byte in row[2]) for place, row in content(bank).items()} == {
        place: row[2] for place, row in held.items()
    }


def test_kept_snapshots_stay_under_their_codec(bank: Path, before: dict) -> None:
    number = numbers(bank)[-1]
    compact(bank, keep=1, made_for=NARROW, recode=narrow)
    assert content(bank, number) == before and content(bank) != before and sound(bank)


def test_promise_22_a_gradient_that_the_codec_makes_infinite_never_enters(bank: Path) -> None:
    def bad(codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        made = narrow(codes, scales)
        made[1][-1, 0] = np.inf
        return made

    whole = tree(bank)
    with pytest.raises(NonFinite, match=r"document [0-9a-f]{16}") as caught:
        compact(bank, made_for=NARROW, recode=bad)
    assert caught.value.hint and tree(bank) == whole


def test_promise_01_killed_at_every_step_of_another_codec(start: Path, before: dict, tmp_path: Path) -> None:
    whole = copy_of(start, tmp_path / "whole")
    compact(whole, made_for=NARROW, recode=narrow)
    new = content(whole)
    for at in range(1, 1000, 3):
        bank = copy_of(start, tmp_path / str(at))
        step, done = run_and_kill(
            lambda told, bank=bank: compact(bank, made_for=NARROW, recode=narrow, told=told), at, True
        )
        found = content(bank)
        assert found in (before, new) and (found == new or not done), f"killed before call {at} ({step})"
        shutil.rmtree(bank)
        if not step:
            return
    raise AssertionError("it never ended")


def test_where_there_are_no_links_it_works_too(
    bank: Path, after: dict[str, bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "SYSTEM", Watched(no_links))
    compact(bank)
    assert kept_files(bank) == after
