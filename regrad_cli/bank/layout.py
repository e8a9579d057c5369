"""Where each file of a bank's folder lies, and how a bank is found. Knows names, not contents.

Every file but `lock` is written once; those outside `snapshots/` are named by the SHA-256 of what they hold.
"""

from __future__ import annotations

import errno
import re
import stat
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from regrad_cli.bank.files import CLAIM, storage, storage_failed
from regrad_cli.errors import NoBank
from regrad_cli.places import expanded

FORMAT_FILE = "FORMAT"
FORMAT_TEXT = b"gbank 1\n"
LOCK_FILE = "lock"
BANK_FOLDER = ".gbank"
SUFFIXES = {"shards": ".safetensors", "docs": ".jsonl", "priors": ".safetensors", "index": ".hnsw"}
FOLDERS = ("snapshots", *SUFFIXES, "tmp", "quarantine")
PUT_BACK = "back-"  # how names in tmp/ begin of what a repair puts back: no sign of a commit that was killed

_NOT_THERE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENAMETOOLONG}
_CONTENT_NAME = re.compile(r"[0-9a-f]{64}(\.[a-z]+)\Z")
_SNAPSHOT_NAME = re.compile(r"([0-9]{8,12})\.(json|copy)\Z")


def content_name(folder: str, sha256: str) -> str:
    """The name, inside the bank, of a file that is named by its content: folder is a key of SUFFIXES."""
    return f"{folder}/{sha256}{SUFFIXES[folder]}"


def snapshot_name(number: int) -> str:
    return f"snapshots/{number:08d}.json"


def copy_name(number: int) -> str:
    """The name of the second file with a manifest's bytes, which only a repair reads."""
    return f"snapshots/{number:08d}.copy"


def snapshot_numbers(bank: Path, kind: str = "json") -> list[int]:
    """Numbers of the snapshots whose manifests (or, of kind "copy", whose copies) exist, ascending; [] if there is no
    such folder."""
    numbers = []
    for name in _names_in(bank / "snapshots"):
        match = _SNAPSHOT_NAME.match(name)
        if match and match[2] == kind and f"{int(match[1]):08d}" == match[1]:
            numbers.append(int(match[1]))
    return sorted(numbers)


def content_files(bank: Path) -> Iterator[str]:
    """Names, inside the bank, of all files that are named by their content; a stranger's files are not listed."""
    for folder, suffix in SUFFIXES.items():
        for name in sorted(_names_in(bank / folder)):
            match = _CONTENT_NAME.match(name)
            if match and match[1] == suffix:
                yield f"{folder}/{name}"


def _names_in(folder: Path) -> list[str]:
    """[] where there is no such folder. raises StorageFailed for one that may not be read"""
    try:
        return [entry.name for entry in folder.iterdir()]
    except OSError as error:
        if error.errno in _NOT_THERE:
            return []
        raise storage_failed("look into the bank", error) from error


def strange_folders(bank: Path) -> Iterator[tuple[str, str]]:
    """(name, what it is) of what stands in the place of one of the bank's folders. A link is no folder of it, wherever
    it leads: what is written through it lies elsewhere."""
    for name in FOLDERS:
        try:
            mode = (bank / name).lstat().st_mode
        except OSError:
            continue  # what is missing is made; anything else is met where the folder is used
        if stat.S_ISLNK(mode):
            yield name, "is a link, and nothing is written through one"
        elif not stat.S_ISDIR(mode):
            yield name, "is no folder"


def looks_like_a_bank(path: Path) -> bool:
    """Whether this folder is meant to be a bank, however damaged."""
    return (path / FORMAT_FILE).is_file() or bool(snapshot_numbers(path)) or bool(snapshot_numbers(path, "copy"))


def only_beginnings(path: Path) -> bool:
    """Whether this folder is empty, or holds no more than a killed `init` leaves."""
    entries = list(path.iterdir())
    names = {entry.name for entry in entries}
    if not names:
        return True
    if LOCK_FILE not in names or names - {LOCK_FILE, FORMAT_FILE, ".gitignore", *FOLDERS}:
        return False
    content = set(content_files(path))
    return all(
        f"{entry.name}/{inner.name}" in content
        for entry in entries
        if entry.name in FOLDERS and entry.name != "tmp"
        for inner in entry.iterdir()
        if inner.suffix not in (CLAIM, ".copy")
    )


def no_bank(path: Path) -> NoBank:
    """What is raised where there is none. Its hint names a place that `init` takes: no folder of other things."""
    place = path
    with suppress(OSError):
        place = path / BANK_FOLDER if path.is_dir() and not only_beginnings(path) else path
    return NoBank(f"there is no bank at {path}", f"`regrad init {place}` makes one")


def locate_bank(explicit: str | Path | None, start: Path) -> Path:
    """The bank that is meant: the one named, or the nearest `.gbank/` in `start` or a parent, as git finds `.git`.

    raises  NoBank with the way out; StorageFailed for one that may not be entered
    """
    if explicit is not None:
        path = expanded(explicit)
        try:
            if path.is_file() or looks_like_a_bank(path):
                return path
            if looks_like_a_bank(path / BANK_FOLDER):
                raise NoBank(f"{path} is not a bank", f"it holds one: --bank {path / BANK_FOLDER}")
        except ValueError:
            pass  # what the system takes for no name at all is no bank
        except OSError as error:
            if error.errno not in _NOT_THERE:
                raise storage_failed("look for a bank", error) from error
        raise no_bank(path)
    for folder in (start, *start.resolve().parents):
        with storage("look for a bank"):  # one that may not be entered is not passed over for one further up
            if looks_like_a_bank(folder / BANK_FOLDER):
                return folder / BANK_FOLDER
    if looks_like_a_bank(start):  # `init .` has made it
        raise NoBank(f"there is no {BANK_FOLDER} in {start} or a folder above it", "it is a bank itself: --bank .")
    raise NoBank(
        f"there is no bank in {start} or a folder above it",
        "`regrad init` makes one here; --bank PATH or REGRAD_BANK names another",
    )
