"""Where damaged files go instead of being deleted. Knows names; not what is wrong with a file.

A file there is named after when it came, from which folder, and what it was: 20261122T051003Z.docs.<sha256>.jsonl.
Nothing reads it, `compact` empties it, and whoever knows better than a repair finds there what was left out.
"""

from __future__ import annotations

import datetime
from pathlib import Path

from regrad_cli.bank import files
from regrad_cli.bank.salvage import readable
from regrad_cli.bank.store import Folder

FOLDER = "quarantine"


def move(bank: Path, name: str) -> str | None:
    """Moves a file there. Returns its new name in the bank; None if there is no such file."""
    return _take(bank, name, moves=True)


def keep(bank: Path, name: str) -> str | None:
    """Gives a file a second name there, because something else is about to take its place."""
    return _take(bank, name, moves=False)


def put(bank: Path, name: str, data: bytes) -> str:
    """Writes what is about to go as a new file there."""
    target = _free(bank, name)
    files.publish(files.write_temporary(bank / "tmp", [data]), target)
    files.sync_folder(bank / FOLDER)
    return f"{FOLDER}/{target.name}"


def _take(bank: Path, name: str, *, moves: bool) -> str | None:
    path, target = bank / name, _free(bank, name)
    if not (path.is_symlink() or path.exists()):
        return None
    if moves or path.is_symlink() or not path.is_file():
        files.SYSTEM.rename(path, target)
        files.sync_folder(path.parent)
    else:
        try:
            files.SYSTEM.link(path, target)
        except OSError as error:
            if error.errno not in files.NO_LINKS:
                raise
            return put(bank, name, readable(Folder(bank), name, path.stat().st_size) or b"")
    files.sync_folder(bank / FOLDER)
    return f"{FOLDER}/{target.name}"


def _free(bank: Path, name: str) -> Path:
    """A path there that nothing has; the caller holds the writer's lock, so nobody else takes it."""
    time = datetime.datetime.now(datetime.UTC).strftime("%Y%m%dT%H%M%SZ")
    stem, number = f"{time}.{name.replace('/', '.')}", 1
    target = bank / FOLDER / stem
    while target.is_symlink() or target.exists():
        number += 1
        target = bank / FOLDER / f"{stem}.{number}"
    return target
