"""Which documents of a bank are gone: their file lay under a given path and is there no more. Knows paths and sources;
opens no file and no bank.

What merely was not read stays: a file that could not be, a hidden one, one that .gitignore leaves out.
"""

from __future__ import annotations

import os
import re
import stat
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from regrad_cli.characters import printable_name
from regrad_cli.documents import STDIN

_WRITTEN_BYTE = re.compile(r"\\x([89a-f][0-9a-f])")  # of a name that is no UTF-8, as `printable_name` writes it


def gone(
    sources: Iterable[str], *, base: Path, paths: Sequence[Path], read: Iterable[str], skipped: Iterable[str]
) -> Iterator[str]:
    """Those of the sources that are to go.

    sources        what the bank holds and this ingest has not seen
    base           the folder that sources are relative to
    paths          what was named to the ingest
    read, skipped  sources that it has seen, and sources that it could not read
    """
    where = _place(_real(base)).rstrip("/")
    roots = [(_place(_real(path)), path.is_dir()) for path in paths]
    unread = [_absolute(whole, where) for one in skipped for whole in _whole(one)]
    files_read = {file for one in read if not one.startswith(STDIN) for file in _files(_absolute(one, where))}
    for source in sources:
        place = _absolute(source, where)
        if source.startswith(STDIN) or any(_lies_in(place, one) or _is_record(place, one) for one in unread):
            continue
        if not any(_lies_in(place, root) or (not folder and _is_record(place, root)) for root, folder in roots):
            continue
        files = _files(place)
        if place not in files and files_read.issuperset(files):
            yield source


def _files(place: str) -> list[str]:
    """The file of a source, or those there are that it may be a record of; none where it is gone."""
    if _is_there(place):
        return [place]
    return [place[:end] for end, letter in enumerate(place) if letter == "#" and _is_there(place[:end])]


def _is_there(place: str) -> bool:
    """Whether there is a file: true also where one may not look."""
    for name in {place, _WRITTEN_BYTE.sub(lambda byte: os.fsdecode(bytes.fromhex(byte[1])), place)}:
        try:
            if not stat.S_ISDIR(os.lstat(name).st_mode):
                return True
        except (FileNotFoundError, NotADirectoryError, ValueError):  # ValueError: no file has such a name
            continue
        except OSError:
            return True
    return False


def _absolute(source: str, where: str) -> str:
    """Where a source lies: however a path is written or linked, sources and paths can be compared."""
    return source if Path(source).is_absolute() else f"{where}/{source.removeprefix('./')}"


def _real(path: Path) -> Path:
    """A folder with every link followed; a file, or what is not there, keeps its own name, as its source does."""
    path = path.absolute()
    return Path(os.path.realpath(path) if path.is_dir() else Path(os.path.realpath(path.parent), path.name))


def _place(path: Path) -> str:
    return printable_name(path.as_posix())


def _whole(source: str) -> Iterator[str]:
    """A skipped source, and the file of a skipped line: nobody knows which record that line was."""
    yield source
    if line := re.fullmatch(r"(.+)#\d+", source):
        yield line[1]


def _lies_in(place: str, root: str) -> bool:
    """Whether a place is this one, or lies in this folder."""
    return place == root or place.startswith(f"{root.rstrip('/')}/")


def _is_record(place: str, file: str) -> bool:
    """Whether a place may be a record of this file."""
    return place.startswith(f"{file}#")
