"""Opening a bank: is there one, of which format, and which snapshot counts. Knows FORMAT, the manifests' folder and the
readers' lock; what a snapshot holds is snapshot.py's.
"""

from __future__ import annotations

import os
from contextlib import suppress
from functools import partial
from pathlib import Path

from regrad_cli.bank import files, layout
from regrad_cli.bank.damage import OLDER, REPAIR, DamagedFile
from regrad_cli.bank.manifest import MANIFEST_LIMIT, Manifest
from regrad_cli.bank.packed import WAY_OUT as OF_PACKED
from regrad_cli.bank.packed import Packed
from regrad_cli.bank.parsing import parse, refuse_newer_format
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.bank.store import Folder, Region, open_plain_file
from regrad_cli.errors import NoBank, RegradError, UnknownFormat, UsageProblem


def open_bank(path: Path, snapshot: int | None = None, *, for_writing: bool = False) -> Snapshot:
    """Opens the newest snapshot, or the one of that number, with a shared lock that keeps it from being deleted; of a
    packed bank its only one.

    for_writing  refuse what a writer would, for who says beforehand what writing comes to
    raises       NoBank, DamagedFile, UnknownFormat; UsageProblem for a number there is not
    """
    if not for_writing and _is_file(path):
        packed = Packed(path)
        if snapshot not in (None, packed.manifest.number):
            packed.close()
            raise UsageProblem(
                f"there is no snapshot {snapshot} in {path}", f"a packed bank holds one: {packed.manifest.number}"
            )
        return Snapshot(packed, packed.manifest, packed.close)
    check_format(path)
    if for_writing:
        _refuse_lost_snapshot(path)
    # A snapshot may go between listing and locking it (an ingest drops its own intermediate ones): look again then.
    while True:
        manifest, fd = _open_manifest(path, snapshot, for_writing=for_writing)
        files.lock_shared(fd)
        if os.fstat(fd).st_nlink:
            return Snapshot(Folder(path), manifest, partial(os.close, fd))
        os.close(fd)


def _is_file(path: Path) -> bool:
    """raises StorageFailed where a folder on the way to it may not be entered"""
    with files.storage("open the bank"):
        return path.is_file()


def check_format(path: Path) -> None:
    """Looks whether a live bank is there, which can be written to.

    raises  NoBank where there is none, UnknownFormat where FORMAT tells of another, DamagedFile where it is broken;
            UsageProblem for a packed one
    """
    if _is_file(path):
        with Packed(path):
            raise UsageProblem(
                f"{path} is packed and cannot be written to",
                f"`regrad bank unpack {path} DIR` makes a folder of it, which can",
            )
    if not layout.looks_like_a_bank(path):
        raise layout.no_bank(path)
    try:
        if (path / layout.FORMAT_FILE).is_symlink():  # whose first bytes the error below would tell
            raise DamagedFile(layout.FORMAT_FILE, "is a link")
        with Folder(path).open(layout.FORMAT_FILE) as region:
            found = region.read(0, min(region.length, 64))
    except DamagedFile as error:
        raise DamagedFile(layout.FORMAT_FILE, error.finding.what, hint=REPAIR) from error
    refuse_newer_format(path, found)
    if found != layout.FORMAT_TEXT:
        raise DamagedFile(layout.FORMAT_FILE, f"reads {found!r}", hint=REPAIR)


def _open_manifest(path: Path, number: int | None, *, for_writing: bool = False) -> tuple[Manifest, int]:
    numbers = layout.snapshot_numbers(path)
    if not numbers:
        if lost_snapshot(path) is not None or any(name.startswith("shards/") for name in layout.content_files(path)):
            raise DamagedFile("snapshots", "holds no snapshot", hint=REPAIR)
        raise NoBank(f"the bank at {path} was never finished", f"run `regrad init {path}` again")
    if number is not None and number not in numbers:
        listed = ", ".join(map(str, numbers[-8:]))
        raise UsageProblem(f"there is no snapshot {number} in {path}", f"there are {listed} (`regrad bank log`)")
    chosen = numbers[-1] if number is None else number
    name = layout.snapshot_name(chosen)
    try:
        fd = open_plain_file(path / name, name)
    except DamagedFile:
        if chosen not in layout.snapshot_numbers(path):
            return _open_manifest(path, number, for_writing=for_writing)
        raise
    try:
        return read_manifest(Region(fd, 0, os.fstat(fd).st_size, name), for_writing=for_writing), fd
    except BaseException as error:
        os.close(fd)
        if isinstance(error, DamagedFile):  # of which nothing can be skipped
            error.hint = f"{REPAIR}; {OLDER}" if chosen > numbers[0] else REPAIR
        raise


def newest_manifest(path: Path, *, for_writing: bool = False) -> Manifest:
    """The manifest that counts, for the one who holds the writer's lock.

    raises  DamagedFile also where there was a newer one, which a new commit would bury
    """
    manifest, fd = _open_manifest(path, None, for_writing=for_writing)
    os.close(fd)
    _refuse_lost_snapshot(path)
    return manifest


def _refuse_lost_snapshot(path: Path) -> None:
    lost = lost_snapshot(path)
    if lost is not None:
        raise DamagedFile(layout.snapshot_name(lost), "is missing, and its copy is there", hint=REPAIR)


def lost_snapshot(path: Path) -> int | None:
    """The number of a newest manifest that is gone: its copy is there, and is not what a crash left of a commit that
    never was. A writer may be at work meanwhile."""
    copies = layout.snapshot_numbers(path, "copy")  # before the manifests: what is linked in between is not missing
    newest = max(layout.snapshot_numbers(path), default=0)
    for number in reversed(copies):
        if number <= newest:
            break
        if not _never_was(path, number) and _is_still_missing(path, number):
            return number
    return None


def _never_was(path: Path, number: int) -> bool:
    """Whether tmp/ has the same bytes as the copy, so that a commit ended before its manifest was linked (commit.py).
    What a repair was putting back is no sign of that."""
    copy = path / layout.copy_name(number)
    with suppress(OSError):
        size = copy.stat().st_size if copy.is_file() else -1
        for entry in os.scandir(path / "tmp"):
            if entry.name.startswith(layout.PUT_BACK):
                continue
            with suppress(FileNotFoundError):  # a writer's, that has its own name now
                same_size = entry.is_file(follow_symlinks=False) and entry.stat().st_size == size <= MANIFEST_LIMIT
                if same_size and Path(entry.path).read_bytes() == copy.read_bytes():
                    return True
    return False


def _is_still_missing(path: Path, number: int) -> bool:
    """Unless a writer has just linked it, or given that commit up."""
    return number not in layout.snapshot_numbers(path) and (path / layout.copy_name(number)).exists()


def read_manifest(region: Region, *, for_writing: bool = False) -> Manifest:
    if region.length > MANIFEST_LIMIT:
        raise DamagedFile(region.name, f"is larger than any manifest ({region.length} bytes)")
    return parse(region.read(0, region.length), region.name, for_writing=for_writing)


def read_own(path: Path, number: int, *, for_writing: bool = False) -> Manifest:
    """The manifest of a snapshot. raises DamagedFile, UnknownFormat"""
    with Folder(path).open(layout.snapshot_name(number)) as region:
        return read_manifest(region, for_writing=for_writing)


def read_copy(path: Path, number: int, *, for_writing: bool = False) -> Manifest:
    """The manifest that a snapshot's copy holds. raises DamagedFile, UnknownFormat"""
    name = layout.copy_name(number)
    with Folder(path).open(name) as region:
        if region.length > MANIFEST_LIMIT:
            raise DamagedFile(name, f"is larger than any manifest ({region.length} bytes)")
        data = region.read(0, region.length)
    try:
        return parse(data, layout.snapshot_name(number), for_writing=for_writing)
    except DamagedFile as error:
        raise DamagedFile(name, error.finding.what) from error


def way_out(path: Path) -> str:
    """What helps where this bank is damaged: REPAIR, but for a packed one and one that a newer version writes to."""
    if _is_file(path):
        return OF_PACKED
    for kind, read in (("json", read_own), ("copy", read_copy)):
        for number in layout.snapshot_numbers(path, kind):
            try:
                read(path, number, for_writing=True)
            except UnknownFormat as error:
                return f"{error.message}; {error.hint} for `regrad bank repair`"
            except RegradError:
                continue
    return REPAIR
