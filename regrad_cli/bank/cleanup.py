"""Clearing what is no longer needed: a crash's leftovers, an ingest's own intermediate snapshots, those that a
`compact` put behind the bank. Knows which files which snapshots name; the caller holds the writer's lock.

Nothing here may fail a write: what cannot be removed stays until the next writer. No file goes that any snapshot names,
and while a snapshot's manifest cannot be read, nobody knows what it names, so none goes at all.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from itertools import chain
from pathlib import Path

from regrad_cli.bank import files, layout
from regrad_cli.bank.manifest import MANIFEST_LIMIT, Manifest
from regrad_cli.bank.opening import read_manifest
from regrad_cli.bank.store import Folder
from regrad_cli.errors import RegradError


def clear_leftovers(bank: Path, newest: Manifest) -> None:
    """Empties tmp/, drops snapshots that are not meant to stay (a killed writer's intermediate ones, those older than
    `newest.oldest`), copies without their manifests, and files that no snapshot names."""
    _clear_unfinished_commit(bank)
    clear_claims(bank)
    for number in layout.snapshot_numbers(bank):
        if number < newest.oldest:
            _drop(bank, number)
    for number in reversed(layout.snapshot_numbers(bank)[:-1]):
        older = _manifest(bank, number)
        if older is None or older.run != newest.run:
            break
        _drop(bank, number)
    named = {name for name, _ in newest.files()}
    remove_unnamed(bank, [name for name in layout.content_files(bank) if name not in named])


def clear_claims(bank: Path) -> None:
    """Removes those that a process left which was killed while it gave a manifest its number (files.py)."""
    with suppress(OSError):
        for claim in (bank / "snapshots").glob(f"*{files.CLAIM}"):
            files.discard(claim)


def _clear_unfinished_commit(bank: Path) -> None:
    """Drops copies without their manifests and, when those are gone for good, empties tmp/: what lies there tells such
    a copy from that of a snapshot that was lost (`lost_snapshot` in opening.py)."""
    unnamed = set(layout.snapshot_numbers(bank, "copy")).difference(layout.snapshot_numbers(bank))
    if all(files.discard(bank / layout.copy_name(number)) for number in unnamed):
        with suppress(OSError):
            if unnamed:
                files.sync_folder(bank / "snapshots")
            empty_folder(bank / "tmp")


def empty_folder(folder: Path) -> None:
    """Removes whatever lies in one of the bank's folders, as far as it can be removed. None is a link: the lock would
    have been refused."""
    with suppress(OSError):
        for entry in folder.iterdir():
            if entry.is_dir() and not entry.is_symlink():
                shutil.rmtree(entry, ignore_errors=True)
            else:
                files.discard(entry)


def drop_snapshots(bank: Path, manifests: Sequence[Manifest], newest: Manifest) -> None:
    """Drops these snapshots, but for those a reader has locked, and the files that only they named."""
    freed: set[str] = set()
    for manifest in manifests:
        if _drop(bank, manifest.number):
            freed.update(name for name, _ in manifest.files())
    remove_unnamed(bank, freed - {name for name, _ in newest.files()})


def _manifest(bank: Path, number: int) -> Manifest | None:
    name = layout.snapshot_name(number)
    try:
        with Folder(bank).open(name) as region:
            return read_manifest(region)
    except (RegradError, OSError):
        return None


def _drop(bank: Path, number: int) -> bool:
    """Unlinks one snapshot unless a reader holds it; a reader that opens it in this moment sees that it is gone."""
    with unread(bank, number) as free:
        if not (free and files.discard(bank / layout.snapshot_name(number))):
            return False
    files.discard(bank / layout.copy_name(number))
    return True


@contextmanager
def unread(bank: Path, number: int) -> Iterator[bool]:
    """Keeps readers from a snapshot for the length of the block; False where it cannot: one has it, or it is gone."""
    try:
        fd = os.open(bank / layout.snapshot_name(number), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError:
        yield False
        return
    try:
        try:
            free = files.lock_exclusive(fd)
        except OSError:
            free = False  # no locks here: nobody can tell whether it is read
        yield free
    finally:
        os.close(fd)


def remove_unnamed(bank: Path, candidates: Iterable[str]) -> None:
    """Removes those of the candidates that no snapshot names.

    A hash that stands in quotes anywhere in a manifest keeps its file: that is told without parsing, ten times faster,
    where thousands of snapshots name shards that were merged since. A shard is named by a run of snapshots, so every
    64th, then every 32nd … finds most names soon. Only what is left then has every manifest proved.
    """
    remaining: dict[bytes, list[str]] = {}
    for name in candidates:
        remaining.setdefault(Path(name).stem.encode(), []).append(name)
    numbers = sorted(layout.snapshot_numbers(bank), key=lambda number: -(number & -number)) if remaining else []
    for number in numbers:
        if not remaining:
            return
        try:
            with Folder(bank).open(layout.snapshot_name(number)) as region:
                text = region.read(0, min(region.length, MANIFEST_LIMIT))
        except (RegradError, OSError):
            return
        for named in remaining.keys() & set(text.split(b'"')):
            del remaining[named]
    if remaining and all(_manifest(bank, number) is not None for number in numbers):
        for name in chain.from_iterable(remaining.values()):
            files.discard(bank / name)
