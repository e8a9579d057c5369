"""Promise 15 for a live bank: whatever stands in the place of a file or a folder of it (a link, a pipe, a socket, a
folder), nothing is written outside, nothing waits for ever, and what it says is a sentence with a way out.
"""

from __future__ import annotations

import os
import shutil
import signal
import socket
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from made_banks import PRIOR, content, copy_of, make_bank, rows, settings, tree

from regrad_cli.bank import (
    beside,
    compact_bank,
    create_bank,
    layout,
    log,
    open_bank,
    pack_bank,
    remove_documents,
    repair_bank,
    verify,
    write_bank,
)
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.planning import plan_compaction
from regrad_cli.errors import Locked, RegradError

SECRET = b"gbank of somebody else's secrets\n"
FOLDERS = list(layout.FOLDERS)
FILES = ["FORMAT", "lock", "manifest", "older manifest", "copy", "shard", "text", "prior", "graph"]


@contextmanager
def within(seconds: float) -> Iterator[None]:
    """Fails where the block waits for longer, as it would for a pipe's other end."""

    def late(*_: Any) -> None:
        pytest.fail(f"it waited for {seconds} s")

    before = signal.signal(signal.SIGALRM, late)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


@pytest.fixture
def whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Every file that a bank may have: two shards with removed rows, a graph, an older snapshot, a copy of each."""
    monkeypatch.setenv("REGRAD_INDEX_FROM", "4")
    bank = make_bank(tmp_path / "b", [("a.md", 4), ("b.md", 2)], [("c.md", 3)])
    monkeypatch.delenv("REGRAD_INDEX_FROM")
    remove_documents(bank, ["b.md"])
    return bank


@pytest.fixture
def outside(tmp_path: Path) -> Path:
    """A folder of somebody else, with a file and with what looks like a bank's."""
    folder = tmp_path / "outside"
    (folder / "sub").mkdir(parents=True)
    (folder / "secret").write_bytes(SECRET)
    (folder / "sub" / "00000009.json").write_bytes(b"{}")
    (folder / "00000001.json").write_bytes(b"{}")
    (folder / f"{'0' * 64}.jsonl").write_bytes(b"x")
    return folder


def name_of(bank: Path, place: str) -> str:
    """The file's name in the bank."""
    with open_bank(bank) as opened:
        manifest = opened.manifest
        assert manifest.index is not None and manifest.parent is not None
    names = {
        "manifest": manifest.name,
        "older manifest": layout.snapshot_name(manifest.parent[0]),
        "copy": layout.copy_name(manifest.number),
        "shard": manifest.shards[0].name,
        "text": manifest.shards[0].docs_name,
        "prior": layout.content_name("priors", manifest.prior.sha256),
        "graph": layout.content_name("index", manifest.index.sha256),
    }
    return names.get(place, place)


def replace_by(path: Path, kind: str, outside: Path) -> None:
    """Puts something else in the place of a bank's file or folder."""
    if path.is_dir():
        shutil.move(path, outside / "moved")
    elif path.exists():
        shutil.move(path, outside / "moved file")
    if kind == "link to its content":
        path.symlink_to(outside / ("moved" if (outside / "moved").exists() else "moved file"))
    elif kind == "link to a folder":
        path.symlink_to(outside)
    elif kind == "link to a file":
        path.symlink_to(outside / "secret")
    elif kind == "link to nothing":
        path.symlink_to(outside / "not there")
    elif kind == "link to itself":
        path.symlink_to(path)
    elif kind == "link to a device":
        path.symlink_to("/dev/zero")
    elif kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to a pipe":
        os.mkfifo(outside / "pipe")
        path.symlink_to(outside / "pipe")
    elif kind == "socket":
        here = Path.cwd()
        os.chdir(path.parent)  # a socket's name has few characters to be in
        try:
            with socket.socket(socket.AF_UNIX) as made:
                made.bind(path.name)
        finally:
            os.chdir(here)
    elif kind == "folder":
        path.mkdir()
    elif kind == "file":
        path.write_bytes(SECRET)


LINKS = ["link to its content", "link to a folder", "link to a file", "link to nothing", "link to itself"]
LINKS += ["link to a device", "link to a pipe"]
KINDS = [*LINKS, "pipe", "socket", "folder", "file"]
AS_A_FOLDER = [*LINKS[:2], *LINKS[3:5], "pipe", "file"]
AT_LENGTH = ["FORMAT", "lock", "manifest", "shard"]  # of the other files fewer kinds are tried
PLACES = [(place, kind) for place in FOLDERS for kind in AS_A_FOLDER]
PLACES += [(place, kind) for place in AT_LENGTH for kind in KINDS]
PLACES += [(place, kind) for place in FILES if place not in AT_LENGTH for kind in (LINKS[2], LINKS[-1], "pipe")]


def shape(folder: Path) -> dict[str, tuple[Any, ...]]:
    """Everything in a folder, by name: kind, size, time of the last change, content of a file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        place = path.lstat()
        data = path.read_bytes() if path.is_file() and not path.is_symlink() else None
        found[str(path.relative_to(folder))] = (place.st_mode, place.st_size, place.st_mtime_ns, data)
    return found


def add(bank: Path) -> None:
    with write_bank(bank) as writer:
        writer.add(*rows("new.md", 2))
        writer.commit("ingest")
        writer.finish()


def compact(bank: Path) -> None:
    with compact_bank(bank) as writer:
        plan = plan_compaction(writer.snapshot)
        list(writer.compact(plan))
        writer.end(plan)


def repair(bank: Path) -> None:
    with repair_bank(bank) as repairer:
        repairer.carry_out()


def read(bank: Path) -> None:
    list(log(bank))
    with open_bank(bank) as opened:
        opened.stats(), beside(opened), opened.prior_bytes()
        list(opened.documents())
        list(opened.passages())
        for warm in (False, True):
            opened.search(np.ones((1, 16), np.float32) / 4, 3, warm=warm)


WRITES: dict[str, Callable[[Path], object]] = {
    "add": add,
    "rm": lambda bank: remove_documents(bank, ["a.md"]),
    "compact": compact,
    "repair": repair,
    "init": lambda bank: create_bank(bank, settings(), PRIOR),
}
READS: dict[str, Callable[[Path], object]] = {
    "read": read,
    "verify": lambda bank: list(verify(bank)),
    "pack": lambda bank: pack_bank(bank, bank.parent / "out.gbank", force=True),
}


def tried(work: Callable[[Path], object], bank: Path) -> RegradError | None:
    """What it says, if it does not do it. Anything but an error of ours goes through."""
    with within(30):
        try:
            work(bank)
        except RegradError as error:
            assert error.message and error.hint, repr(error)
            assert "secrets" not in error.message or not _has_links(bank)
            return error
    return None


def _has_links(bank: Path) -> bool:
    return any(path.is_symlink() for path in (bank, *bank.iterdir()))


@pytest.mark.parametrize(("place", "kind"), PLACES)
def test_promise_15_nothing_is_written_through_what_stands_in_a_banks_place(
    whole: Path, outside: Path, tmp_path: Path, place: str, kind: str
) -> None:
    """Every reader, then every writer, one after another, over a bank of which one name is something else."""
    name = name_of(whole, place)
    right = content(whole)
    replace_by(whole / name, kind, outside)
    before = shape(outside)
    for what, use in {**READS, **WRITES}.items():
        bank = tmp_path / what / "b"
        shutil.copytree(whole, bank, symlinks=True, copy_function=_copy)
        if not (bank / name).is_symlink() and not (bank / name).exists():
            replace_by(bank / name, kind, outside)  # which cannot be copied
        was = tree(bank) if use in READS.values() else None
        error = tried(use, bank)
        assert shape(outside) == before, f"{what} wrote outside"
        if was is not None:
            assert tree(bank) == was, f"{what} wrote"
        if place in FOLDERS and use in WRITES.values():
            assert error is not None, f"{what} went on"
        with suppress(RegradError):  # whatever is still read is right
            found = content(bank)
            assert found.items() <= right.items() or what in ("add", "rm")


def _copy(source: str, target: str) -> object:
    """As shutil does, but for what cannot be copied."""
    return shutil.copy2(source, target) if Path(source).is_file() else None


@pytest.mark.parametrize("kind", KINDS)
def test_promise_15_the_lock_is_a_file_of_the_bank_or_nobody_writes(whole: Path, outside: Path, kind: str) -> None:
    """A lock that leads elsewhere would be emptied and signed there."""
    replace_by(whole / "lock", kind, outside)
    before = shape(outside)
    if kind == "file":
        add(whole)
    else:
        for use in WRITES.values():
            error = tried(use, whole)
            assert error is not None
            assert use is WRITES["init"] or (isinstance(error, DamagedFile) and "lock" in error.message)
        read(whole)
    assert shape(outside) == before


@pytest.mark.parametrize("data", [b"", b"[" * 900, b'{"pid": []}', b"\xff", b'{"pid": 1, "host": "' + b"x" * 5000])
def test_a_signature_of_the_lock_that_is_none_names_nobody(whole: Path, data: bytes) -> None:
    with write_bank(whole):
        (whole / "lock").write_bytes(data)
        with pytest.raises(Locked, match="another process is writing"), write_bank(whole):
            pass


@pytest.mark.parametrize("folder", FOLDERS)
def test_a_folder_that_is_a_link_is_told_by_verify_and_read(whole: Path, outside: Path, folder: str) -> None:
    right = content(whole)
    replace_by(whole / folder, "link to its content", outside)
    assert content(whole) == right
    (found,) = [finding for finding in verify(whole) if not finding.note]
    assert found.file == folder and "link" in found.what
    with pytest.raises(DamagedFile, match=folder) as caught, write_bank(whole):
        pass
    assert caught.value.exit_code == 14 and "take it away" in caught.value.hint


def test_what_lies_behind_a_linked_tmp_is_not_listed(whole: Path, outside: Path) -> None:
    replace_by(whole / "tmp", "link to a folder", outside)
    assert not [finding for finding in verify(whole) if "secret" in f"{finding.file}{finding.what}"]


def test_a_file_that_is_a_link_is_proved_like_any_other(whole: Path, outside: Path) -> None:
    """As git-annex keeps large files."""
    right = content(whole)
    name = name_of(whole, "shard")
    replace_by(whole / name, "link to its content", outside)
    before = shape(outside)
    assert content(whole) == right
    add(whole)
    compact(whole)
    assert shape(outside) == before
    assert not (whole / name).is_symlink()
    assert {passage: row for passage, row in content(whole).items() if passage in right} == right


def test_a_damaged_file_that_is_a_link_is_moved_away_by_a_repair_and_its_target_is_not(
    whole: Path, outside: Path
) -> None:
    name = name_of(whole, "shard")
    replace_by(whole / name, "link to a file", outside)
    before = shape(outside)
    repair(whole)
    assert shape(outside) == before
    assert not [finding for finding in verify(whole) if not finding.note]
    kept = [path for path in (whole / "quarantine").iterdir() if path.is_symlink()]
    assert [path.readlink() for path in kept] == [outside / "secret"]
    assert (outside / "secret").stat().st_nlink == 1
    compact(whole)
    assert shape(outside) == before and not list((whole / "quarantine").iterdir())


def test_an_older_snapshot_that_is_a_pipe_keeps_no_writer_waiting(whole: Path, outside: Path) -> None:
    compact(copy_of(whole, whole.parent / "c"))
    replace_by(whole / name_of(whole, "older manifest"), "pipe", outside)
    with within(30):
        add(whole)
        with suppress(RegradError):
            compact(whole)
        add(whole)


@pytest.mark.parametrize("use", [*READS, *WRITES])
def test_the_banks_folder_itself_may_be_a_link(whole: Path, tmp_path: Path, use: str) -> None:
    link = tmp_path / "elsewhere" / ".gbank"
    link.parent.mkdir()
    link.symlink_to(whole)
    assert layout.locate_bank(None, link.parent) == link
    error = tried({**READS, **WRITES}[use], link)
    assert (error is not None) == (use == "init")
    assert link.is_symlink() and not [finding for finding in verify(whole) if not finding.note]


def test_a_packed_bank_may_be_a_link(whole: Path, tmp_path: Path) -> None:
    pack_bank(whole, tmp_path / "x.gbank")
    (tmp_path / "link.gbank").symlink_to("x.gbank")
    assert content(tmp_path / "link.gbank") == content(whole)


@pytest.mark.parametrize("kind", ["pipe", "socket", "link to a pipe", "link to nothing", "link to itself"])
def test_what_is_no_bank_at_all_is_told_and_waited_for_by_nobody(tmp_path: Path, outside: Path, kind: str) -> None:
    place = tmp_path / "x.gbank"
    replace_by(place, kind, outside)
    for use in {**READS, **WRITES}.values():
        error = tried(use, place)
        assert error is not None and error.exit_code in (2, 10), repr(error)
