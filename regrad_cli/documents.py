"""Files and standard input → documents. Knows sources and sizes; which files a folder gives is folders.py's subject.

`read_documents` and `read_stream` never raise for an input: what cannot be read comes as `Skipped`, with a reason a
user can act on, and the rest goes on. `split` (passages.py) cuts a document into passages.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

from regrad_cli.characters import Unreadable, clean_title, printable_name, readable_name
from regrad_cli.folders import files_of, os_reason
from regrad_cli.passages import split as split
from regrad_cli.readers import READERS, BadRecord, Fields, Record, hint_for, kind_of, read_csv, read_jsonl, read_text
from regrad_cli.records import Document, Skipped, document_id, sha256_hex
from regrad_cli.tally import Tally

MAX_BYTES = 50_000_000
STDIN = "stdin#"  # how every source of standard input begins
AT_ONCE = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)  # never wait for a pipe's writer
SPECIAL = (
    (stat.S_ISFIFO, "a pipe, not a file: send it to standard input, and name - instead"),
    (stat.S_ISCHR, "a device, not a file"),
    (stat.S_ISBLK, "a device, not a file"),
    (stat.S_ISSOCK, "a socket, not a file"),
)


def read_documents(
    paths: Sequence[Path],
    *,
    base: Path,
    title_field: str = "title",
    text_field: str = "text",
    id_field: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Document | Skipped]:
    """The documents of files and folders, in the order named, each file once.

    base         the folder that sources are relative to: the bank's parent
    *_field      fields or columns of JSONL and CSV records; id_field None takes "id" where a record has it
    max_bytes    larger files are skipped; of a JSONL file, which is read line by line, larger lines
    """
    fields = Fields(title_field, text_field, id_field)
    seen: set[str] = set()
    for named in paths:
        for path, reason in files_of(Path(named).absolute()):
            real = os.path.realpath(path)
            if real in seen:
                continue
            seen.add(real)
            source = source_of(path, base)
            if reason:
                yield Skipped(source, reason)
            else:
                yield from _read(path, source, fields, max_bytes)


def read_stream(
    stream: BinaryIO,
    *,
    format: str = "text",
    name: str | None = None,
    title_field: str = "title",
    text_field: str = "text",
    id_field: str | None = None,
    max_bytes: int = MAX_BYTES,
) -> Iterator[Document | Skipped]:
    """Standard input as one document ("text") or as one a line ("jsonl"), read as the lines come.

    Its source is `stdin#name` (never that of a file), or `stdin#` and the first 16 hex digits of the text's SHA-256:
    the same text is the same document. A record's is `stdin#name#id` or `stdin#name#line`; without a name `stdin#id`,
    or `stdin#` and the text's digits.
    raises       ValueError for another format
    """
    fields, place = Fields(title_field, text_field, id_field), f"{STDIN}{name}" if name else "stdin"
    if format == "jsonl":
        yield from _records(read_jsonl(stream, fields, max_bytes), place, name or "", by_text=not name)
        return
    if format != "text":
        raise ValueError(f"standard input is read as text or jsonl, not as {format!r}")
    try:
        data = stream.read(max_bytes + 1)
        if len(data) > max_bytes:
            raise Unreadable(f"more than {max_bytes / 1e6:,.0f} MB: split it, or raise the limit")
        title, text = read_text(data)
        if not text.strip():
            raise Unreadable("it is empty")
    except (Unreadable, OSError) as error:
        yield Skipped(place, _reason(error))
        return
    title = title or (_name_title(name) if name else "")
    yield Document(place if name else f"{STDIN}{sha256_hex(text)[:16]}", title, text)


def source_of(path: str | Path, base: Path) -> str:
    """A file's name in the bank: relative to `base` with forward slashes, or absolute outside it.

    Links among the folders are followed, a link that is the file itself is not: however a file is reached, its name is
    one. Bytes that are no UTF-8 are written out (\\xe9), so that a source can be stored and printed anywhere. A name
    that begins like standard input has ./ before it.
    """
    path = Path(path).absolute()
    place, root = Path(os.path.realpath(path.parent), path.name), Path(os.path.realpath(base))
    source = printable_name((place.relative_to(root) if place.is_relative_to(root) else place).as_posix())
    return f"./{source}" if source.startswith(STDIN) else source


# ── one file ────────────────────────────────────────────────────────────────────────────────────────────────────────


def _read(path: Path, source: str, fields: Fields, max_bytes: int) -> Iterator[Document | Skipped]:
    try:
        mode = path.stat().st_mode
        for is_kind, reason in SPECIAL:
            if is_kind(mode):
                raise Unreadable(reason)
        with os.fdopen(os.open(path, AT_ONCE), "rb") as file:
            size = os.fstat(file.fileno()).st_size
            kind = kind_of(path.name, file.peek(1024)[:1024])
            if kind == "jsonl":
                yield from _records(read_jsonl(file, fields, max_bytes), source, path.name)
                return
            data = b"" if size > max_bytes else file.read(max_bytes + 1)
        if size > max_bytes or len(data) > max_bytes:
            sizes = f"{max(size, len(data)) / 1e6:,.1f} MB, over the limit of {max_bytes / 1e6:,.1f} MB"
            raise Unreadable(f"{sizes}: split it, or raise the limit")
        if not data or data.isspace():
            raise Unreadable("the file is empty")
        if kind == "csv":
            yield from _records(read_csv(data, fields), source, path.name)
            return
        title, text = READERS[kind](data)
        if not text or text.isspace():
            raise Unreadable("it holds no text")
        yield Document(source, title or _name_title(path.name), text)
    except FileNotFoundError:
        yield Skipped(source, "it was gone before it could be read")
    except Unreadable as error:
        hint = hint_for(path.name) if error.reason.startswith("a binary file") else ""
        yield Skipped(source, f"not text, but {hint}" if hint else error.reason)
    except Exception as error:  # a reader's library failed on this file: that must not end the rest
        yield Skipped(source, _reason(error))


def _name_title(name: str) -> str:
    return clean_title(readable_name(printable_name(name)))


def _reason(error: Exception) -> str:
    if isinstance(error, Unreadable):
        return error.reason
    if isinstance(error, OSError):
        return os_reason(error)
    return f"it could not be read ({type(error).__name__}: {error})"[:300]


def _records(
    records: Iterator[Record | BadRecord], source: str, name: str, *, by_text: bool = False
) -> Iterator[Document | Skipped]:
    """Records as documents of their own. Of records with one id, the later ones have their line behind it."""
    taken = Tally()
    title = _name_title(name) if name else ""
    found = False
    try:
        for record in records:
            found = True
            if isinstance(record, BadRecord):
                yield Skipped(source if record.line is None else f"{source}#{record.line}", record.reason)
                continue
            part = record.id or (sha256_hex(record.text)[:16] if by_text else str(record.line))
            while not taken.add(int(document_id(f"{source}#{part}"), 16)):
                part = f"{part}:{record.line}"
            yield Document(f"{source}#{part}", record.title or title, record.text)
    except OSError as error:
        yield Skipped(source, f"{_reason(error)}; what follows was not read")
        return
    if not found:
        yield Skipped(source, "it holds no records")
