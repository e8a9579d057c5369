"""Bytes of one file → title and text, or records. Knows formats; knows no folders, no passages and no bank.

Each reader's library is imported when its first file comes. What was compared, and why these won, is in
docs/readers.md. Every reader raises `Unreadable` with a reason that a user can act on; the text that comes out is
clean in the sense of characters.py.
"""

from __future__ import annotations

import csv
import html
import io
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import PurePath
from typing import Any, BinaryIO

from regrad_cli.characters import Unreadable, clean, clean_title, decode
from regrad_cli.errors import is_panic
from regrad_cli.markdown import first_heading, front_matter

KINDS = {
    ".md": "markdown", ".markdown": "markdown", ".mdown": "markdown", ".mkd": "markdown", ".mdx": "markdown",
    ".html": "html", ".htm": "html", ".xhtml": "html",
    ".pdf": "pdf",
    ".jsonl": "jsonl", ".ndjson": "jsonl",
    ".csv": "csv", ".tsv": "csv",
}  # fmt: skip
WORD, SHEET, IMAGE = "a word processor's file: save it as PDF or HTML", "a spreadsheet: save it as CSV", "an image"
SLIDES, ARCHIVE, SOUND = "slides: save them as PDF", "an archive: unpack it first", "sound or video"
HINTS = {
    ".doc": WORD, ".docx": WORD, ".odt": WORD, ".rtf": WORD, ".pages": WORD, ".xls": SHEET, ".xlsx": SHEET,
    ".ods": SHEET, ".ppt": SLIDES, ".pptx": SLIDES, ".odp": SLIDES, ".epub": "an e-book: convert it to HTML",
    ".png": IMAGE, ".jpg": IMAGE, ".jpeg": IMAGE, ".gif": IMAGE, ".webp": IMAGE, ".bmp": IMAGE, ".ico": IMAGE,
    ".tif": IMAGE, ".tiff": IMAGE, ".avif": IMAGE, ".heic": IMAGE, ".zip": ARCHIVE, ".gz": ARCHIVE, ".bz2": ARCHIVE,
    ".xz": ARCHIVE, ".zst": ARCHIVE, ".tar": ARCHIVE, ".tgz": ARCHIVE, ".7z": ARCHIVE, ".rar": ARCHIVE,
    ".mp3": SOUND, ".mp4": SOUND, ".wav": SOUND, ".ogg": SOUND, ".flac": SOUND, ".mov": SOUND, ".mkv": SOUND,
    ".webm": SOUND,
}  # fmt: skip
GIVE_UP_AFTER = 20  # lines of a .jsonl that are not JSON, before one good one


@dataclass(frozen=True, slots=True)
class Fields:
    """Names of the fields (JSONL) or columns (CSV) that hold a record's parts. `id` None: "id" where there is one."""

    title: str = "title"
    text: str = "text"
    id: str | None = None


@dataclass(frozen=True, slots=True)
class Record:
    """One record of a JSONL or CSV file. `line` is where it starts, from 1; `title` is "" where it has none."""

    line: int
    id: str | None
    title: str
    text: str


@dataclass(frozen=True, slots=True)
class BadRecord:
    """A record, or the rest of a file, that could not be read; `line` None where it is about the file."""

    line: int | None
    reason: str


# ── files that are one document ─────────────────────────────────────────────────────────────────────────────────────


def kind_of(name: str, start: bytes) -> str:
    """What to read a file as, from its name and its first bytes: a key of READERS, "jsonl" or "csv"."""
    if start.startswith(b"%PDF-"):
        return "pdf"
    kind = KINDS.get(PurePath(name).suffix.lower(), "text")
    if kind == "text" and re.match(rb"(?:\xef\xbb\xbf)?\s*<(?:!doctype html|html)[\s>]", start, re.I):
        return "html"
    return kind


def hint_for(name: str) -> str:
    """What a file of this name probably is, where its bytes turned out not to be text; "" where unknown."""
    return HINTS.get(PurePath(name).suffix.lower(), "")


def read_text(data: bytes) -> tuple[str, str]:
    """Plain text. Its title is a Markdown heading on its first line, or "" (the file's name then)."""
    text = decode(data)
    first = text.lstrip().split("\n", 1)[0]
    return (first_heading(first) if first.startswith("#") else ""), text


def read_markdown(data: bytes) -> tuple[str, str]:
    """Markdown stays as it is, less its front matter, whose title wins over the first heading."""
    text = decode(data)
    title, body = front_matter(text)
    return title or first_heading(body), body


def read_html(data: bytes) -> tuple[str, str]:
    """HTML → Markdown (headings, lists, table rows, code), without scripts, styles, navigation and hidden parts."""
    from html_to_markdown import ConversionOptions, convert

    declared = DECLARED.search(data[:4096])
    page = decode(data, declared[1].decode("ascii") if declared else None)
    options = ConversionOptions(
        extract_metadata=False, compact_tables=True, skip_images=True, autolinks=False, expand_abbreviations=False,
        include_blockquote_citations=False,
        strip_tags=["a", "b", "strong", "i", "em", "mark", "u", "s", "del", "ins", "small", "abbr", "q"],
    )  # fmt: skip
    try:
        result = convert(page, options)
    except BaseException as error:  # the library's own errors, of which it has many
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        raise Unreadable(f"HTML that cannot be read: {error}"[:200]) from None
    if any("depth" in str(warning.kind) for warning in result.warnings):
        raise Unreadable("its tags are nested more than a thousand deep: flatten it, or save it as text")
    text = clean("\n".join(line.rstrip() for line in (result.content or "").split("\n")))
    title = re.search(r"<title(?:\s[^>]{0,200})?>(.{0,1000}?)</title\s*>", page[:200_000], re.I | re.S)
    return (clean_title(html.unescape(title[1])) if title else "") or first_heading(text), text


NO_TITLE = re.compile(r"\(?(anonymous|untitled|unspecified)\)?$|.*\.(docx?|odt|tex|dvi|indd|pptx?|xlsx?)$", re.I)
DECLARED = re.compile(rb"<(?:meta[^>]{0,300}?charset|\?xml[^>]{0,99}?encoding)\s*=\s*[\"']?\s*([\w.:-]{1,40})", re.I)


def read_pdf(data: bytes) -> tuple[str, str]:
    """The text of a PDF's pages, wrapped lines joined. PDFium is not thread-safe: one PDF at a time in a process."""
    import pypdfium2

    if not data.strip():
        raise Unreadable("the file is empty")
    try:
        pdf = pypdfium2.PdfDocument(data)
    except pypdfium2.PdfiumError as error:
        if "password" in str(error).lower():
            raise Unreadable("an encrypted PDF: save a copy that opens without a password") from None
        raise Unreadable("not a PDF that can be opened; it may be damaged or cut short") from None
    try:
        pages = []
        for number in range(len(pdf)):
            try:
                page = pdf[number]
                text_page = page.get_textpage()
                pages.append(text_page.get_text_bounded())
                text_page.close()
                page.close()
            except pypdfium2.PdfiumError:
                raise Unreadable(f"page {number + 1} of {len(pdf)} is damaged: save the PDF anew") from None
        if not any(page.strip() for page in pages):
            raise Unreadable(f"its {len(pages)} page(s) hold no text; a scan needs text recognition (OCR) first")
        title = clean_title(pdf.get_metadata_dict().get("Title", "")).removeprefix("Microsoft Word - ")
    finally:
        pdf.close()
    return ("" if NO_TITLE.match(title) else title), join_pages(pages)


def join_pages(pages: Sequence[str]) -> str:
    """Pages as PDFium gives them → text. Words parted at a line's end are whole again, lines of one paragraph are one
    line, and a line that heads or ends most pages (but for its number) is kept once."""
    split = []
    for page in pages:
        # PDFium marks the hyphen of a parted word as U+0002 or U+FFFE
        page = re.sub("-?[\x02\ufffe](?:\r?\n)?", "", page)
        split.append([line.strip() for line in clean(page).split("\n") if line.strip()])
    for end in (0, -1):
        heads: dict[tuple[str, ...], list[int]] = {}
        for number, lines in enumerate(split):
            if lines and len(lines[end]) <= 100:
                # one that runs through the pages is the same on each but for their number, which grows with them
                pieces = re.split(r"(\d+)", lines[end])
                moving = (str(int(part) - number) if part.isdecimal() and len(part) < 9 else part for part in pieces)
                for key in {tuple(pieces), tuple(moving)}:
                    heads.setdefault(key, []).append(number)
        for where in heads.values():
            if len(where) >= 3 and len(where) * 2 > len(pages):
                for number in where[1:]:
                    del split[number][end]
                break
    lengths = sorted(len(line) for lines in split for line in lines)
    full = lengths[len(lengths) * 9 // 10] * 0.5 if lengths else 0.0
    parts: list[str] = []
    last = ""
    for lines in split:
        for position, line in enumerate(lines):
            wrapped = len(last) > full and last[-1] not in ".!?:;|" and line[0].islower()
            parts += ["" if not parts else " " if wrapped else "\n" if position else "\n\n", line]
            last = line
    return "".join(parts)


READERS = {"text": read_text, "markdown": read_markdown, "html": read_html, "pdf": read_pdf}


# ── files that are many documents ───────────────────────────────────────────────────────────────────────────────────


def read_jsonl(stream: BinaryIO, fields: Fields, max_bytes: int) -> Iterator[Record | BadRecord]:
    """A JSON object a line, read as it comes; no line longer than `max_bytes` is held in memory.

    Where the first GIVE_UP_AFTER lines are all bad, the file is another thing than it says: one BadRecord, no flood.
    """
    number, bad = 0, []
    holding = True
    while line := stream.readline(max_bytes + 1):
        number += 1
        result: Record | BadRecord
        if len(line) > max_bytes and not line.endswith(b"\n"):
            while len(line) > max_bytes and not line.endswith(b"\n"):
                line = stream.readline(max_bytes + 1)
            result = BadRecord(number, f"longer than {max_bytes / 1e6:,.1f} MB: split it, or raise the limit")
        elif line.strip():
            result = _json_record(line.removeprefix(b"\xef\xbb\xbf") if number == 1 else line, number, fields)
        else:
            continue
        if not holding:
            yield result
        elif isinstance(result, BadRecord) and not result.reason.endswith("is empty"):
            bad.append(result)
            if len(bad) == GIVE_UP_AFTER:
                yield BadRecord(None, f"none of its first {len(bad)} lines is a record; the last: {result.reason}")
                return
        else:
            holding = False
            yield from bad
            yield result
    if holding:
        yield from bad


def _json_record(line: bytes, number: int, fields: Fields) -> Record | BadRecord:
    try:
        value = json.loads(line.decode())
    except UnicodeDecodeError:
        return BadRecord(number, "not valid UTF-8")
    except RecursionError:
        return BadRecord(number, "nested too deeply")
    except json.JSONDecodeError as error:
        return BadRecord(number, f"not valid JSON: {error.msg} (column {error.colno})")
    except ValueError:
        return BadRecord(number, "not valid JSON: a number too long")
    if not isinstance(value, dict):
        return BadRecord(number, f"not valid here: an object is needed, this is {type(value).__name__}")
    text = value.get(fields.text)
    if isinstance(text, list) and all(isinstance(part, str) for part in text):
        text = "\n\n".join(text)
    if not isinstance(text, str):
        names = ", ".join(map(str, list(value)[:8])) or "none"
        what = "is not text" if fields.text in value else f"is missing (it has: {names})"
        return BadRecord(number, f"the field {fields.text!r} {what}: name the field that holds the text")
    title, key = value.get(fields.title), value.get(fields.id or "id")
    if fields.id is not None and not isinstance(key, (str, int)):
        return BadRecord(number, f"the field {fields.id!r}, which names a record, is missing or not text")
    return _record(number, key, title if isinstance(title, str) else "", text, fields)


def _record(number: int, key: Any, title: str, text: str, fields: Fields) -> Record | BadRecord:
    text = clean(text)
    if not text or text.isspace():
        return BadRecord(number, f"its {fields.text!r} is empty")
    key = clean_title(str(key)) if isinstance(key, (str, int)) and not isinstance(key, bool) else ""
    return Record(number, key or None, clean_title(title), text)


def read_csv(data: bytes, fields: Fields) -> Iterator[Record | BadRecord]:
    """A table with a header; comma, semicolon, tab or bar, whichever gives the header a column named `fields.text`."""
    text = decode(data)
    if not text.strip():
        raise Unreadable("the file is empty")
    header, delimiter = _header(text, fields)
    at = {name: position for position, name in reversed(list(enumerate(header)))}
    column, title_at, id_at = at[fields.text.lower()], at.get(fields.title.lower()), at.get((fields.id or "id").lower())
    if fields.id is not None and id_at is None:
        raise Unreadable(f"it has no column {fields.id!r} (it has: {', '.join(header)})")
    before = csv.field_size_limit(max(len(text), 131_072))  # the module's own limit refuses a long article
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)
        start = 1
        for position, row in enumerate(rows):
            line, start = start, rows.line_num + 1
            if position == 0 or not any(cell.strip() for cell in row):
                continue
            if len(row) <= column:
                yield BadRecord(line, f"it has {len(row)} cells, and the text is in column {column + 1}")
                continue
            title = row[title_at] if title_at is not None and title_at < len(row) else ""
            key = row[id_at] if id_at is not None and id_at < len(row) else None
            yield _record(line, key, title, row[column], fields)
    except csv.Error as error:
        yield BadRecord(None, f"line {start}: {error}; what follows was not read")
    finally:
        csv.field_size_limit(before)


def _header(text: str, fields: Fields) -> tuple[list[str], str]:
    best: list[str] = []
    for delimiter in ",;\t|":
        try:
            row = next(csv.reader(io.StringIO(text, newline=""), delimiter=delimiter), [])
        except csv.Error:
            continue
        names = [" ".join(cell.split()).lower() for cell in row]
        if fields.text.lower() in names:
            return names, delimiter
        best = max(best, names, key=len)
    found = ", ".join(name[:40] for name in best[:12]) or "none"
    raise Unreadable(f"it has no column {fields.text!r} (it has: {found}): name the column that holds the text")
