"""Opening a bank: is there one, of which format, and which snapshot counts. Knows FORMAT, the manifests' folder and the
readers' lock; what a snapshot holds is snapshot.py's.
"""

from __future__ import annotations

import os
from pathlib import Path

from regrad_cli.bank import files, layout
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.manifest import MANIFEST_LIMIT, Manifest, parse
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.bank.store import Folder, Region, open_plain_file
from regrad_cli.errors import NoBank, UnknownFormat, UsageProblem


def open_bank(path: Path, snapshot: int | None = None) -> Snapshot:
    """Opens the newest snapshot, or the one of that number, with a shared lock that keeps it from being deleted.

    raises  NoBank, DamagedFile, UnknownFormat; UsageProblem for a number there is not
    """
    check_format(path)
    # A snapshot may go between listing and locking it (an ingest drops its own intermediate ones): look again then.
    while True:
        manifest, fd = _open_manifest(path, snapshot)
        files.lock_shared(fd)
        if os.fstat(fd).st_nlink:
            return Snapshot(Folder(path), manifest, fd)
        os.close(fd)


def check_format(path: Path) -> None:
    """raises NoBank where there is none, UnknownFormat where FORMAT tells of another, DamagedFile where it is broken"""
    if path.is_file():
        raise UnknownFormat(f"{path} is a file; this version reads banks that are folders", "install a newer regrad")
    if not layout.looks_like_a_bank(path):
        raise NoBank(f"there is no bank at {path}", f"`regrad init {path}` makes one")
    try:
        with Folder(path).open(layout.FORMAT_FILE) as region:
            found = region.read(0, min(region.length, 64))
    except DamagedFile as error:
        raise DamagedFile(layout.FORMAT_FILE, error.finding.what, hint="its one line is `gbank 1`") from error
    if found != layout.FORMAT_TEXT:
        if found.startswith(b"gbank ") and found[6:-1].isdigit() and found.endswith(b"\n"):
            raise UnknownFormat(f"{path} is of format {found[6:-1].decode()}", "install a newer regrad")
        raise DamagedFile(layout.FORMAT_FILE, f"reads {found!r}", hint="its one line is `gbank 1`")


def _open_manifest(path: Path, number: int | None, *, for_writing: bool = False) -> tuple[Manifest, int]:
    numbers = layout.snapshot_numbers(path)
    if not numbers:
        if any(name.startswith("shards/") for name in layout.content_files(path)):
            raise DamagedFile(
                "snapshots", "holds no snapshot", hint="put back a copy of that folder, or ingest into a new bank"
            )
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
    except BaseException:
        os.close(fd)
        raise


def newest_manifest(path: Path, *, for_writing: bool = False) -> Manifest:
    """The manifest that counts, for the one who holds the writer's lock."""
    manifest, fd = _open_manifest(path, None, for_writing=for_writing)
    os.close(fd)
    return manifest


def read_manifest(region: Region, *, for_writing: bool = False) -> Manifest:
    if region.length > MANIFEST_LIMIT:
        raise DamagedFile(region.name, f"is larger than any manifest ({region.length} bytes)")
    return parse(region.read(0, region.length), region.name, for_writing=for_writing)
