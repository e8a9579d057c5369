"""A named path → the files to read. Knows folders, .gitignore, links and banks by sight; opens no document.

A folder gives its files in sorted order, except hidden ones, those that .gitignore files leave out (as git reads them,
from the repository's root down), and banks. A link to a file counts as a file of the link's name; a link to a folder is
not followed. What was named itself is given, hidden or ignored as it may be; a bank never is.
"""

from __future__ import annotations

import os
import re
import stat
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from regrad_cli.characters import printable_name

if TYPE_CHECKING:
    from pathspec import GitIgnoreSpec

_UNPAIRED = {code: 0x10F700 + code - 0xDC00 for code in range(0xDC80, 0xDD00)}  # private to nobody but us
Ignores = tuple[tuple[Path, "GitIgnoreSpec"], ...]  # folder and its .gitignore, outermost first


def os_reason(error: OSError) -> str:
    """The operating system's error in words, without number and path."""
    if isinstance(error, PermissionError):
        return "permission denied"
    text = error.strerror or str(error)
    return text[:1].lower() + text[1:]


def files_of(named: Path) -> Iterator[tuple[Path, str]]:
    """(path, "") of each file to read, (path, reason) of what cannot be, for one absolute path that a user named."""
    real = Path(os.path.realpath(named))
    if any(is_bank(place) for place in (named, real, *real.parents)):
        yield named, "a bank, or part of one: a bank is never read as documents"
        return
    try:
        if stat.S_ISDIR(named.stat().st_mode):
            yield from _walk(real)
        else:
            yield named, ""
    except FileNotFoundError:
        yield named, "no such file (a link to nothing)" if named.is_symlink() else "no such file"
    except OSError as error:
        yield named, os_reason(error)


def _walk(top: Path) -> Iterator[tuple[Path, str]]:
    # a stack of iterators, not recursion: folders may be nested deeper than Python's stack
    waiting = [_entries(top, _ignores_above(top))]
    while waiting:
        entry = next(waiting[-1], None)
        if entry is None:
            waiting.pop()
            continue
        path, reason, below = entry
        if below is not None:
            waiting.append(_entries(path, below))
        elif reason != "link":
            yield path, reason
        else:
            target = Path(os.path.realpath(path))
            if not target.is_relative_to(top) and not top.is_relative_to(target):
                yield path, "a link to a folder elsewhere, which is not followed: name that folder to read it"


def _entries(folder: Path, ignores: Ignores) -> Iterator[tuple[Path, str, Ignores | None]]:
    """(path, reason, ignores) of what is to be read in a folder: `ignores` None but for a folder, where they hold."""
    try:
        with os.scandir(folder) as found:
            entries = sorted(found, key=lambda entry: os.fsencode(entry.name))
    except FileNotFoundError:
        yield folder, "it was gone before it could be read", None
        return
    except OSError as error:
        yield folder, os_reason(error), None
        return
    ignores = _with_folder(ignores, folder)
    for entry in entries:
        if entry.name.startswith("."):
            continue
        path = Path(entry.path)
        try:
            is_folder, linked = entry.is_dir(follow_symlinks=False), entry.is_symlink()
            # git takes a link for a file, wherever it leads
            if _ignored(ignores, path, is_folder) or is_bank(path):
                continue
            if linked and not path.exists():
                yield path, f"a link to nothing ({printable_name(os.readlink(path))})", None  # noqa: PTH115
            elif linked and entry.is_dir():
                yield path, "link", None
            else:
                yield path, "", ignores if is_folder else None
        except OSError as error:
            yield path, os_reason(error), None


def is_bank(path: Path) -> bool:
    """Whether a path is a bank, of either form: by its name, or by a FORMAT file in it that says so."""
    if path.name.endswith(".gbank"):
        return True
    marker = path / "FORMAT"
    try:
        place = path.stat()
        if stat.S_ISREG(place.st_mode):
            if place.st_size % 512 or not place.st_size:  # a packed bank is whole blocks, as few documents are
                return False
            with path.open("rb") as file:
                start = file.read(518)
            return start.startswith(b"FORMAT\0") and start[512:] == b"gbank "
        if not stat.S_ISREG(marker.stat().st_mode):
            return False
        with marker.open("rb") as file:
            return file.read(5) == b"gbank"
    except (OSError, ValueError):
        return False


def _ignores_above(folder: Path) -> Ignores:
    """The .gitignore files of the folders above, up to the repository's root; none where they leave out `folder`."""
    above = [folder, *folder.parents]
    root = next((number for number, place in enumerate(above) if (place / ".git").exists()), 0)
    ignores: Ignores = ()
    for number in range(root, 0, -1):
        ignores = _with_folder(ignores, above[number])
        if _ignored(ignores, above[number - 1], True):
            return ()  # it was named all the same: its own .gitignore files count, and no others
    return ignores


def _with_folder(ignores: Ignores, folder: Path) -> Ignores:
    path = folder / ".gitignore"
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return ignores
        with path.open("rb") as file:
            lines = file.read(1_000_000).decode("utf-8", "surrogateescape").splitlines()
    except OSError:
        return ignores
    return (*ignores, *((folder, spec) for spec in _specs(lines)))


def _specs(lines: list[str]) -> list[GitIgnoreSpec]:
    """The patterns of a .gitignore: one specification, or several of which the last one that fits decides, where there
    are more than RE2 takes at once."""
    whole = _spec(lines)
    if whole is not None:
        return [whole]
    patterns = [line for line in lines if _spec([line]) is not None]  # git passes over a line that is none
    if len(patterns) < len(lines):
        return _specs(patterns)
    half = len(lines) // 2
    return [*_specs(lines[:half]), *_specs(lines[half:])]


def _spec(lines: list[str]) -> GitIgnoreSpec | None:
    """None where they cannot be compiled. RE2 takes time in proportion to a name's length, where Python's own patterns
    take ages over a*a*a*a*a*b."""
    from pathspec import GitIgnoreSpec
    from re2 import error

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of re, about patterns such as [[x]
            return GitIgnoreSpec.from_lines([_plain(line) for line in lines], backend="re2")
    except (ValueError, re.error, error):
        return None


def _plain(name: str) -> str:
    """A name whose bytes that are no UTF-8 are characters that no name has: RE2 takes no halves of characters."""
    return name.translate(_UNPAIRED)


def _ignored(ignores: Ignores, path: Path, is_folder: bool) -> bool:
    for folder, spec in reversed(ignores):
        relative = path.relative_to(folder).as_posix()
        include = spec.check_file(_plain(relative + "/" if is_folder else relative)).include
        if include is not None:
            return include
    return False
