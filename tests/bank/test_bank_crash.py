"""Promises 1, 2, 6, 7: whatever stops a writer, the bank opens at the old or the new snapshot, and says the truth."""

from __future__ import annotations

import errno
import os
import random
import resource
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from pathlib import Path

import pytest
from faults import (
    STEPS_OF_A_COMMIT,
    Child,
    Fault,
    NoSmallDisk,
    Watched,
    die,
    fill,
    no_links,
    on_small_disk,
    run_and_kill,
)
from made_banks import PRIOR, content, copy_of, make_bank, rows, settings, tree

from regrad_cli.bank import (
    compact_bank,
    create_bank,
    files,
    layout,
    open_bank,
    plan_compaction,
    remove_documents,
    repair_bank,
    verify,
    write_bank,
)
from regrad_cli.bank.manifest import Counts
from regrad_cli.bank.opening import lost_snapshot
from regrad_cli.errors import Damaged, Locked, NoBank, StorageFailed
from regrad_cli.records import document_id


def ingest(bank: Path, reported: Callable[[int], None] = lambda number: None) -> None:
    """Three commits: one replaces a document, two add; enough for intermediate snapshots to come and go."""
    with write_bank(bank) as writer:
        writer.remove(ref for ref, _, _ in writer.snapshot.passages(document_id("a.md")))
        for number, source in enumerate(("b.md", "c.md", "d.md"), start=1):
            writer.add(*rows(source, 2))
            writer.commit("ingest")
            reported(number)
        writer.finish()


def clear(bank: Path) -> None:
    """What every writer does first."""
    with write_bank(bank):
        pass


@pytest.fixture(scope="module")
def start(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_bank(tmp_path_factory.mktemp("start") / "b", [("a.md", 2), ("z.md", 1)])


@pytest.fixture(scope="module")
def states(start: Path, tmp_path_factory: pytest.TempPathFactory) -> list[dict]:
    """What the bank holds before, and after each commit of `ingest`."""
    found = [content(start)]
    bank = copy_of(start, tmp_path_factory.mktemp("states") / "b")
    ingest(bank, lambda number: found.append(content(bank)))
    assert len(found) == 4
    return found


@pytest.mark.parametrize("way", ["links", "no-links", "with-index"])
def test_promise_01_killed_at_every_step_of_ingest(
    start: Path, states: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    if way == "with-index":
        monkeypatch.setenv("REGRAD_INDEX_FROM", "3")
    seen: set[str] = set()
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        step, reported = run_and_kill(lambda told, bank=bank: ingest(bank, told), at, way != "no-links")
        seen.add(step)
        after = content(bank)
        assert after in states[reported:], f"killed before call {at} ({step}) after commit {reported}"
        assert [finding for finding in verify(bank) if not finding.note] == []
        if not step:
            break
        if at % 4 == 0:  # promise 11, as far as the bank goes: started again, it ends with the same rows
            ingest(bank)
            assert content(bank) == states[-1]
            assert list(verify(bank)) == []
    assert seen - {""} == STEPS_OF_A_COMMIT


def test_promise_01_killed_at_every_step_of_rm(start: Path, tmp_path: Path) -> None:
    before = content(start)
    gone = copy_of(start, tmp_path / "gone")
    remove_documents(gone, ["a.md"])
    after = content(gone)
    assert after != before
    seen: list[dict] = []
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        step, _ = run_and_kill(lambda told, bank=bank: remove_documents(bank, ["a.md"]), at, True)
        seen.append(content(bank))
        assert seen[-1] in (before, after), f"killed before call {at} ({step})"
        assert [finding for finding in verify(bank) if not finding.note] == []
        if not step:
            break
    assert before in seen and seen[-1] == after


def test_promise_01_killed_while_it_clears_what_another_left(start: Path, tmp_path: Path) -> None:
    """Above all between the two files of a commit that never was: its copy, and what lies in tmp/."""
    unfinished = unfinished_commit(start, tmp_path / "left")
    names = set(tree(unfinished))
    assert "snapshots/00000003.copy" in names and any(name.startswith("tmp/") for name in names)
    before = content(start)
    for at in range(1, 1000):
        bank = copy_of(unfinished, tmp_path / str(at))
        step, _ = run_and_kill(lambda told, bank=bank: clear(bank), at, True)
        assert content(bank) == before, f"killed before call {at} ({step})"
        assert [finding for finding in verify(bank) if not finding.note] == [], f"killed before call {at} ({step})"
        if not step:
            break
    assert set(tree(bank)) == set(tree(start))


def unfinished_commit(start: Path, folder: Path) -> Path:
    """A bank whose next commit was killed between its copy and its link."""
    for at in range(1, 1000):
        bank = copy_of(start, folder / str(at))
        if run_and_kill(lambda told, bank=bank: ingest(bank, told), at, True)[0] == "link":
            return bank
    raise AssertionError("nothing was linked")


def test_promise_13_a_commit_that_was_killed_does_not_hide_that_the_newest_snapshot_is_lost(
    start: Path, tmp_path: Path
) -> None:
    bank, before = unfinished_commit(start, tmp_path), content(start)
    (bank / "snapshots" / "00000002.json").unlink()
    assert [finding.file for finding in verify(bank) if not finding.note] == ["snapshots/00000002.json"]
    with pytest.raises(Damaged, match="its copy is there"):
        clear(bank)
    with repair_bank(bank) as repair:
        repair.carry_out()
    clear(bank)
    assert content(bank) == before and set(tree(bank)) >= set(tree(start))


def io_error() -> None:
    raise OSError(errno.EIO, "no")


def interrupt() -> None:
    raise KeyboardInterrupt


@pytest.mark.parametrize("work", ["rm", "compact"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(io_error, die), (io_error, io_error), (io_error, interrupt), (interrupt, interrupt)],
    ids=["error and kill", "errors", "error and Ctrl-C", "Ctrl-C twice"],
)
def test_promise_07_a_commit_that_ends_twice_between_its_copy_and_its_link_never_was(
    start: Path, tmp_path: Path, work: str, first: Callable[[], None], second: Callable[[], None]
) -> None:
    """At the link, and where its copy is to be removed for that."""
    hit = False

    def twice(step: str, path: str) -> None:
        nonlocal hit
        if step == "link" and not hit:
            hit = True
            first()
        if hit and step == "unlink" and path.endswith(".copy"):
            second()

    def end(told: Callable[[int], None]) -> None:
        files.SYSTEM = Watched(twice)
        with suppress(KeyboardInterrupt, StorageFailed):
            if work == "rm":
                remove_documents(bank, ["a.md"])
            else:
                with compact_bank(bank) as writer:
                    plan = plan_compaction(writer.snapshot)
                    list(writer.compact(plan))
                    writer.end(plan)
        told(int(hit))

    bank, before = copy_of(start, tmp_path / "b"), content(start)
    assert Child(end).wait().reported == int(second is not die)
    for _ in range(2):
        assert content(bank) == before
        assert [finding for finding in verify(bank) if not finding.note] == []
        with repair_bank(bank) as repair:
            assert repair.carry_out().damage == ()
        clear(bank)
    assert list(verify(bank)) == []


def test_promise_13_a_snapshot_that_was_reported_is_missed_though_its_name_in_tmp_stayed(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(step: str, path: str) -> None:
        if step == "unlink" and "/tmp/" in path:
            io_error()

    bank = copy_of(start, tmp_path / "b")
    with monkeypatch.context() as patched:
        patched.setattr(files, "SYSTEM", Watched(lambda step, path: refuse(step, path.removeprefix(str(tmp_path)))))
        remove_documents(bank, ["a.md"])
    after = content(bank)
    assert list((bank / "tmp").iterdir()) != []
    (bank / "snapshots" / "00000003.json").unlink()
    with pytest.raises(Damaged, match="its copy is there"):
        clear(bank)
    with repair_bank(bank) as repair:
        repair.carry_out()
    assert content(bank) == after != content(start)


def test_promise_13_a_claim_that_a_crash_left_does_not_stop_a_repair(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = copy_of(start, tmp_path / "b")
    next((bank / "shards").iterdir()).unlink()
    (bank / "snapshots" / "00000003.claim").touch()
    monkeypatch.setattr(files, "SYSTEM", Watched(no_links))
    with repair_bank(bank) as repair:
        assert repair.carry_out().snapshot == 3
    assert [finding for finding in verify(bank) if not finding.note] == []


@pytest.mark.parametrize("at", ["the copies are listed", "tmp is looked through"])
def test_promise_10_a_commit_in_this_moment_is_no_loss(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: str
) -> None:
    """`verify` holds no lock: a writer may link what it has just seen the copy of."""
    bank = unfinished_commit(start, tmp_path)
    name = {"the copies are listed": "snapshot_numbers", "tmp is looked through": "copy_name"}[at]
    real = getattr(layout, name)

    def then_commit(*arguments: object) -> object:
        found = real(*arguments)
        for left in (bank / "tmp").iterdir():
            left.rename(bank / "snapshots" / "00000003.json")
        return found

    monkeypatch.setattr(layout, name, then_commit)
    assert lost_snapshot(bank) is None
    assert (bank / "snapshots" / "00000003.json").exists()


def test_promise_06_a_leftover_copy_that_cannot_be_removed_keeps_what_tells_it(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = copy_of(start, tmp_path / "b")
    for name in ("tmp/0123", "snapshots/00000003.copy"):
        (bank / name).write_bytes(b"of a commit that never was")

    def refuse(step: str, path: str) -> None:
        if step == "unlink" and path.endswith(".copy"):
            raise OSError(errno.EACCES, "not this one")

    with monkeypatch.context() as patched:
        patched.setattr(files, "SYSTEM", Watched(refuse))
        clear(bank)
    assert [finding for finding in verify(bank) if not finding.note] == []
    clear(bank)
    assert set(tree(bank)) == set(tree(start))


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_promise_01_killed_at_every_step_of_init(tmp_path: Path, links: bool) -> None:
    def init(bank: Path, at: int) -> str:
        return run_and_kill(lambda told: create_bank(bank, settings(), PRIOR), at, links)[0]

    for at in range(1, 1000):
        bank = tmp_path / str(at) / ".gbank"
        step = init(bank, at)
        try:
            assert content(bank) == {}
        except NoBank:
            assert step
            init(bank, 0)
            assert content(bank) == {}, f"killed before call {at} ({step})"
        with write_bank(bank):
            pass
        assert list(verify(bank)) == []
        if not step:
            return
    raise AssertionError("init never ended")


def test_promise_07_an_error_at_every_step_of_init_can_be_tried_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 1000):
        bank = tmp_path / str(at) / ".gbank"
        fault = Fault(at, lambda: OSError(errno.ENOSPC, os.strerror(errno.ENOSPC)))
        monkeypatch.setattr(files, "SYSTEM", Watched(fault))
        try:
            create_bank(bank, settings(), PRIOR)
            failed = False
        except StorageFailed as error:
            failed = True
            assert str(bank) in error.message and "disk is full" in error.hint
        monkeypatch.setattr(files, "SYSTEM", files.System())
        assert failed or fault.hit in ("", "unlink")
        try:
            assert content(bank) == {}
        except NoBank:
            create_bank(bank, settings(), PRIOR)
            assert content(bank) == {}
        if not fault.hit:
            return
    raise AssertionError("init never ended")


LOOP = """
import sys, pathlib
sys.path.insert(0, sys.argv[2])
from made_banks import rows
from regrad_cli.bank import write_bank
from regrad_cli.records import document_id
with write_bank(pathlib.Path(sys.argv[1])) as writer:
    for round in range(10000):
        source = f"{round % 7}.md"
        writer.remove(ref for ref, _, _ in writer.snapshot.passages(document_id(source)))
        writer.add(*rows(source, 3, text=str(round)))
        print(writer.commit("ingest"), flush=True)
"""


def test_promise_01_real_processes_killed_at_random_moments(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    seed = int(time.time())
    chance = random.Random(seed)
    last = 1
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, str(bank), str(Path(__file__).parent)], stdout=subprocess.PIPE, text=True
        )
        assert process.stdout is not None
        first = process.stdout.readline()
        time.sleep(chance.uniform(0, 0.15))
        process.kill()
        reported = [int(line) for line in (first + process.stdout.read()).split()]
        process.wait()
        with open_bank(bank) as snapshot:
            assert snapshot.number >= max(reported) > last, f"seed {seed}"
            last = snapshot.number
        content(bank)
        assert [finding for finding in verify(bank) if not finding.note] == [], f"seed {seed}"


@pytest.mark.parametrize("links", [True, False], ids=["links", "no-links"])
def test_promise_02_everything_is_durable_before_the_commit_names_it(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    bank = copy_of(start, tmp_path / "b")
    calls: list[tuple[str, str]] = []

    def note(step: str, path: str) -> None:
        calls.append((step, path.replace(f"{bank}/", "")))
        if not links:
            no_links(step, path)

    monkeypatch.setattr(files, "SYSTEM", Watched(note))
    with write_bank(bank) as writer:
        writer.add(*rows("b.md", 2))
        writer.commit("ingest")
        end = len(calls)
    calls = calls[:end]
    commit = "link" if links else "rename"
    names = dict(path.split(" ") for step, path in calls if step in ("rename", "link"))  # temporary → final
    assert sorted(target.split("/")[0] for target in names.values()) == ["docs", "shards", "snapshots", "snapshots"]
    (manifest,) = [temporary for temporary, target in names.items() if target.endswith(".json")]
    (copy,) = [temporary for temporary, target in names.items() if target.endswith(".copy")]
    linked = calls.index((commit, f"{manifest} {names[manifest]}"))
    assert calls.index(("fsync", manifest)) < calls.index(("rename", f"{copy} {names[copy]}")) < linked
    for temporary, target in names.items():
        writes = [place for place, call in enumerate(calls) if call == ("write", temporary)]
        synced = calls.index(("fsync", temporary))
        named = calls.index((commit if temporary == manifest else "rename", f"{temporary} {target}"))
        folder = str(bank / target.split("/")[0]).replace(f"{bank}/", "")
        folder_synced = [
            place for place, call in enumerate(calls) if call == ("fsync folder", folder) and place > named
        ]
        assert max(writes) < synced < named < folder_synced[0]
        if temporary not in (manifest, copy):
            assert folder_synced[0] < calls.index(("write", manifest)) < linked
    assert max(place for place, (step, _) in enumerate(calls) if step.startswith("fsync")) > linked


def test_promise_02_a_new_bank_is_durable_with_its_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = tmp_path / "x" / "b"
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(files, "SYSTEM", Watched(lambda step, path: calls.append((step, path))))
    create_bank(bank, settings(), PRIOR)
    linked = [place for place, (step, _) in enumerate(calls) if step == "link"]
    for made, (step, path) in enumerate(calls):
        if step == "mkdir":
            assert ("fsync folder", str(Path(path).parent)) in calls[made:]
    (named,) = [place for place, (step, path) in enumerate(calls) if path.endswith(f" {bank / 'FORMAT'}")]
    assert ("fsync folder", str(bank)) in calls[named : linked[0]]
    (prior,) = [place for place, (step, path) in enumerate(calls) if f" {bank / 'priors'}/" in path]
    assert ("fsync folder", str(bank / "priors")) in calls[prior : linked[0]]
    assert calls[linked[0] :].count(("fsync folder", str(bank / "snapshots"))) == 1


def test_promise_02_syncing_is_the_systems(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, real_disk: None) -> None:
    synced = []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(str(Path(f"/proc/self/fd/{fd}").readlink())))
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    assert {str(bank / name) for name in ("snapshots", "shards", "docs", "priors")} <= set(synced)


def test_files_get_the_mode_of_the_umask(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        bank = make_bank(tmp_path / "b", [("a.md", 2)])
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in bank.rglob("*") if file.is_file()} == {0o640}


def test_promise_06_leftovers_in_every_folder_are_harmless_and_go(start: Path, tmp_path: Path) -> None:
    bank = copy_of(start, tmp_path / "b")
    before, files_before = content(bank), set(tree(bank))
    for folder, suffix in (
        ("shards", ".safetensors"),
        ("docs", ".jsonl"),
        ("priors", ".safetensors"),
        ("index", ".hnsw"),
    ):
        (bank / folder / ("0" * 64 + suffix)).write_bytes(b"half a fi")
    (bank / "tmp" / "0123").write_bytes(b"half")
    (bank / "tmp" / "folder").mkdir()
    (bank / "tmp" / "folder" / "x").write_bytes(b"half")
    (bank / "snapshots" / "00000003.claim").touch()
    (bank / "snapshots" / "00000003.copy").write_bytes(b"half")  # as what lies in tmp/: a commit that never was
    (bank / "snapshots" / "00000000.copy").write_bytes(b"of one that went")
    (bank / "shards" / "notes of a stranger.txt").write_text("stays")
    assert content(bank) == before
    findings = list(verify(bank))
    assert len(findings) == 8 and all(finding.note for finding in findings)
    with write_bank(bank):
        pass
    assert set(tree(bank)) == files_before | {"shards/notes of a stranger.txt"}
    assert content(bank) == before and list(verify(bank)) == []


def test_promise_06_nothing_an_older_snapshot_names_is_a_leftover(tmp_path: Path) -> None:
    """Also where that snapshot cannot be read any more: then nobody knows what it names."""
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    orphan = bank / "docs" / ("0" * 64 + ".jsonl")
    orphan.write_bytes(b"")
    (bank / "snapshots" / "00000001.json").write_bytes(b"damaged")
    with write_bank(bank):
        pass
    assert orphan.exists()
    (bank / "snapshots" / "00000001.json").unlink()
    with write_bank(bank):
        pass
    assert not orphan.exists()


def test_promise_06_what_only_an_older_snapshot_names_stays(tmp_path: Path) -> None:
    """As after a `compact --keep`: the newest snapshot names none of the older one's files."""
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    before = content(bank)
    with open_bank(bank) as snapshot:
        old = snapshot.manifest
    new = replace(old, number=3, parent=(2, old.sha256), run="another", shards=(), counts=Counts())
    (bank / new.name).write_bytes(new.to_bytes()[0])
    with write_bank(bank) as writer:
        for source in ("b.md", "c.md", "d.md"):
            writer.add(*rows(source, 1))
            writer.commit("ingest")
        writer.finish()
    assert content(bank, 2) == before and list(verify(bank)) == []


def test_promise_06_a_killed_ingest_leaves_no_snapshot_behind_for_long(start: Path, tmp_path: Path) -> None:
    bank = copy_of(start, tmp_path / "b")
    with write_bank(bank) as writer:
        for source in ("b.md", "c.md", "d.md"):
            writer.add(*rows(source, 1))
            writer.commit("ingest")
    assert [path.name for path in sorted((bank / "snapshots").iterdir())] == [
        f"0000000{number}.{kind}" for number in (1, 2, 4, 5) for kind in ("copy", "json")
    ]
    with write_bank(bank):
        pass
    assert [path.name for path in sorted((bank / "snapshots").iterdir())] == [
        f"0000000{number}.{kind}" for number in (1, 2, 5) for kind in ("copy", "json")
    ]


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO], ids=["disk full", "disk error"])
def test_promise_07_an_error_at_every_step_leaves_the_bank_and_says_so(
    start: Path, states: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    steps: set[str] = set()
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / f"{code}-{at}")
        reported = 0

        def told(number: int) -> None:
            nonlocal reported
            reported = number

        fault = Fault(at, lambda: OSError(code, os.strerror(code)))
        monkeypatch.setattr(files, "SYSTEM", Watched(fault))
        try:
            ingest(bank, told)
            failed = False
        except StorageFailed as error:
            failed = True
            assert error.hint and os.strerror(code) in error.message
        monkeypatch.setattr(files, "SYSTEM", files.System())
        after = content(bank)
        # An error from the very last sync leaves open which of the two the disk has; any other leaves the old one.
        last_sync = failed and fault.hit == "fsync folder" and after == states[min(reported + 1, 3)]
        assert after == states[reported] or last_sync, f"call {at}: {fault.hit}"
        assert failed or fault.hit in ("", "unlink"), f"call {at}: {fault.hit} went unnoticed"
        assert [finding for finding in verify(bank) if not finding.note] == []
        steps.add(fault.hit)
        if not fault.hit:
            break
        if failed:
            ingest(bank)
            assert content(bank) == states[-1] and list(verify(bank)) == []
    assert steps - {""} == STEPS_OF_A_COMMIT


def test_promise_07_after_an_error_the_same_writer_can_commit(
    start: Path, states: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        with write_bank(bank) as writer:
            writer.remove(ref for ref, _, _ in writer.snapshot.passages(document_id("a.md")))
            writer.add(*rows("b.md", 2))
            fault = Fault(at, lambda: OSError(errno.ENOSPC, "full"))
            monkeypatch.setattr(files, "SYSTEM", Watched(fault))
            try:
                writer.commit("ingest")
                failed = False
            except StorageFailed:
                failed = True
            monkeypatch.setattr(files, "SYSTEM", files.System())
            if failed and content(bank) == states[0]:
                writer.commit("ingest")
            elif failed:  # linked, but not confirmed: this writer must not go on
                with pytest.raises(StorageFailed, match="could not be confirmed"):
                    writer.commit("ingest")
        assert content(bank) == states[1]
        if not fault.hit:
            return
    raise AssertionError("the commit never ended")


LIMITED = """
import sys, pathlib, resource
sys.path.insert(0, sys.argv[2])
from made_banks import rows
from regrad_cli.bank import write_bank
from regrad_cli.errors import StorageFailed
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[3]),) * 2)
try:
    with write_bank(pathlib.Path(sys.argv[1])) as writer:
        writer.add(*rows("b.md", 20))
        writer.commit("ingest")
        writer.finish()
    print("done")
except StorageFailed as error:
    print("refused:", error.message)
"""


def test_promise_07_a_file_that_may_not_grow(start: Path, tmp_path: Path) -> None:
    said = []
    for limit in (100, 1000, 3000, 100_000):
        bank = copy_of(start, tmp_path / str(limit))
        before = content(bank)
        process = subprocess.run(
            [sys.executable, "-c", LIMITED, str(bank), str(Path(__file__).parent), str(limit)],
            capture_output=True,
            text=True,
            check=True,
        )
        said.append(process.stdout)
        assert (content(bank) == before) == process.stdout.startswith("refused")
        assert [finding for finding in verify(bank) if not finding.note] == []
        assert not list((bank / "tmp").iterdir())
    assert said[-1] == "done\n" and all("File too large" in line for line in said[:-1])
    assert resource.getrlimit(resource.RLIMIT_FSIZE)[0] == resource.RLIM_INFINITY


def full_disk(start: Path, folder: Path, limit: Callable[[int], Callable[[], None]]) -> list[tuple[int, int, str]]:
    """Ingests with a page more room each time, until it is enough.

    limit    takes the room in bytes away for a child process, and returns what gives it back
    returns  of each the exit code, the commits it reported, and what it said
    """
    found = []
    for room in range(0, 1 << 20, 1 << 12):
        bank = copy_of(start, folder / "b")
        before = content(bank)
        give_back = limit(room)
        ended = Child(lambda told, bank=bank: ingest(bank, told)).wait()
        give_back()
        assert ended.reported or content(bank) == before
        assert [finding for finding in verify(bank) if not finding.note] == []
        ingest(bank)  # with room again the same command ends its work
        assert list(verify(bank)) == []
        shutil.rmtree(bank)
        found.append((ended.code or 0, ended.reported, ended.said))
        if ended.code == 0:
            break
    return found


def limited_files(room: int) -> Callable[[], None]:
    """The way where no file system can be mounted: files of this process and its children may not grow beyond that."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    return lambda: resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_promise_07_a_disk_that_is_really_full(start: Path, tmp_path: Path) -> None:
    def on_disk(disk: Path) -> list[tuple[int, int, str]]:
        return full_disk(start, disk, lambda room: fill(disk, room).unlink)

    try:
        found = on_small_disk(1 << 20, on_disk)
    except NoSmallDisk:
        found = full_disk(start, tmp_path, limited_files)
    *full, (last, commits, _) = found
    assert (last, commits) == (0, 3) and len(full) > 3
    assert all(code == StorageFailed.exit_code and "what was committed stays" in said for code, _, said in full)


def test_without_a_right_to_mount_files_that_may_not_grow_do(start: Path, tmp_path: Path) -> None:
    *full, (last, commits, _) = full_disk(start, tmp_path, limited_files)
    assert (last, commits) == (0, 3) and full
    assert all(code == StorageFailed.exit_code and "file sizes" in said for code, _, said in full)


def test_promise_07_a_system_that_writes_less_than_it_was_asked_to(
    start: Path, states: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a disk does that fills up in the middle of a write, or a signal that comes then."""
    monkeypatch.setattr(files.System, "write", staticmethod(lambda fd, data: os.write(fd, data[:700])))
    bank = copy_of(start, tmp_path / "b")
    ingest(bank)
    assert content(bank) == states[-1] and list(verify(bank)) == []


def test_promise_16_a_manifest_too_large_to_be_read_is_never_committed(
    start: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = copy_of(start, tmp_path / "b")
    before = content(bank)
    monkeypatch.setattr("regrad_cli.bank.commit.MANIFEST_LIMIT", 1000)
    with write_bank(bank) as writer:
        writer.add(*rows("b.md", 2))
        with pytest.raises(StorageFailed, match="too many shards"):
            writer.commit("ingest")
        assert content(bank) == before and [finding for finding in verify(bank) if not finding.note] == []
        monkeypatch.undo()
        writer.commit("ingest")
    assert len(content(bank)) == len(before) + 2


def test_interrupted_between_link_and_answer_a_writer_stops(
    start: Path, states: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C at every step: the bank is at the old or the new snapshot, and going on loses and doubles nothing."""
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        fault = Fault(at, KeyboardInterrupt)
        with write_bank(bank) as writer:
            writer.remove(ref for ref, _, _ in writer.snapshot.passages(document_id("a.md")))
            writer.add(*rows("b.md", 2))
            monkeypatch.setattr(files, "SYSTEM", Watched(fault))
            try:
                writer.commit("ingest")
            except KeyboardInterrupt:
                monkeypatch.setattr(files, "SYSTEM", files.System())
                assert content(bank) in states[:2]
                try:
                    writer.commit("ingest")
                except StorageFailed:
                    assert content(bank) == states[1]
            monkeypatch.setattr(files, "SYSTEM", files.System())
        assert content(bank) == states[1]
        if not fault.hit:
            return
    raise AssertionError("the commit never ended")


def test_promise_07_no_room_for_the_graph_is_no_failure(
    start: Path, states: list[dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The rows are committed by then: whatever fails while the graph is made and named, finish() says nothing."""
    monkeypatch.setenv("REGRAD_INDEX_FROM", "3")
    for at in range(1, 1000):
        bank = copy_of(start, tmp_path / str(at))
        with write_bank(bank) as writer:
            writer.remove(ref for ref, _, _ in writer.snapshot.passages(document_id("a.md")))
            writer.add(*rows("b.md", 2))
            writer.commit("ingest")
            fault = Fault(at, lambda: OSError(errno.ENOSPC, "full"))
            monkeypatch.setattr(files, "SYSTEM", Watched(fault))
            try:
                writer.finish()
            except StorageFailed:
                assert fault.hit == "fsync folder"  # linked, but not confirmed
            monkeypatch.setattr(files, "SYSTEM", files.System())
        assert content(bank) == states[1]
        assert [finding for finding in verify(bank) if not finding.note] == []
        if not fault.hit:
            return
    raise AssertionError("finish never ended")


@pytest.mark.parametrize("links", [True, False])
def test_a_name_that_is_taken_is_never_given_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, links: bool
) -> None:
    if not links:
        monkeypatch.setattr(files, "SYSTEM", Watched(no_links))
    (tmp_path / "own").mkdir()
    (tmp_path / "taken").write_bytes(b"first")
    with pytest.raises(FileExistsError):
        files.publish_once(files.write_temporary(tmp_path / "own", [b"second"]), tmp_path / "taken")
    files.publish_once(files.write_temporary(tmp_path / "own", [b"second"]), tmp_path / "free")
    shutil.rmtree(tmp_path / "own")
    assert tree(tmp_path) == {"taken": b"first", "free": b"second"}


def test_a_name_that_is_claimed_is_not_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where there are no links: another process looks at the name in this moment."""
    monkeypatch.setattr(files, "SYSTEM", Watched(no_links))
    (tmp_path / "own").mkdir()
    (tmp_path / "name.claim").touch()
    with pytest.raises(FileExistsError):
        files.publish_once(files.write_temporary(tmp_path / "own", [b"mine"]), tmp_path / "name")
    shutil.rmtree(tmp_path / "own")
    assert tree(tmp_path) == {"name.claim": b""}


def test_a_snapshot_that_another_process_took_is_not_overwritten(start: Path, tmp_path: Path) -> None:
    """Where locks are not what they seem (some network mounts), the number still is nobody's twice."""
    bank = copy_of(start, tmp_path / "b")
    with write_bank(bank) as writer:
        theirs = bank / "snapshots" / f"{writer.snapshot.number + 1:08d}.json"
        theirs.write_bytes(b"theirs")
        theirs.with_suffix(".copy").write_bytes(b"theirs")
        writer.add(*rows("b.md", 2))
        with pytest.raises(Locked):
            writer.commit("ingest")
        assert theirs.read_bytes() == theirs.with_suffix(".copy").read_bytes() == b"theirs"
        with pytest.raises(StorageFailed):
            writer.commit("ingest")
