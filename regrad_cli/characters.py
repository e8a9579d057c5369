"""Bytes → clean characters, and names → titles. Knows encodings; knows no file formats and no folders.

Clean text has "\\n" as line ends, no NUL, no byte order mark and no lone surrogate (neither tokenizers nor UTF-8 take
one). Other control characters, terminal escapes among them, are data: renderers escape them.
"""

from __future__ import annotations

import re
from pathlib import PurePath

TITLE_CHARS = 300  # a title is a line; what is longer is a mistake of its document, and every passage would carry it
SURROGATES = re.compile("[\ud800-\udfff]")
CONTROL = bytes(set(range(32)) - {7, 8, 9, 10, 11, 12, 13, 27})
MARKS = (
    (b"\xff\xfe\0\0", "utf-32"),  # before UTF-16, whose mark is its beginning
    (b"\0\0\xfe\xff", "utf-32"),
    (b"\xff\xfe", "utf-16"),
    (b"\xfe\xff", "utf-16"),
    (b"\xef\xbb\xbf", "utf-8"),
)
NOT_CHARSETS = {"unicode_escape", "raw_unicode_escape", "punycode", "idna", "utf_7"}  # Python's, no page means them


class Unreadable(Exception):
    """This input cannot become text; `reason` says why, in words a user can act on."""

    def __init__(self, reason: str) -> None:
        super().__init__(reason)
        self.reason = reason


def clean(text: str) -> str:
    """The same text with "\\n" as line ends, and without NUL, byte order mark and lone surrogates."""
    text = text.replace("\r\n", "\n").replace("\r", "\n").replace("\0", "").removeprefix("\ufeff")
    return SURROGATES.sub("\ufffd", text)


def clean_title(title: str) -> str:
    """One line, single spaces, at most TITLE_CHARS characters."""
    title = " ".join(clean(title).split())
    return title if len(title) <= TITLE_CHARS else title[:TITLE_CHARS].rsplit(" ", 1)[0]


def readable_name(name: str) -> str:
    """A file's name as a title: "release_notes-2024.txt" → "Release notes 2024". A date keeps its hyphens."""
    stem = re.sub(r"\.[A-Za-z][A-Za-z0-9]{0,9}$", "", PurePath(name).name)
    words = clean_title(re.sub(r"_+|(?<!\d)-+|-+(?!\d)", " ", stem))
    return words[:1].upper() + words[1:] or clean_title(name)


def printable_name(name: str) -> str:
    """A path as text that UTF-8 can hold: bytes of a name that are no UTF-8 are written out, as in "caf\\\\xe9.txt"."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "backslashreplace")


def decode(data: bytes, declared: str | None = None) -> str:
    """Bytes → clean text: byte order mark, then UTF-8, then what the document declares, then what chardet finds.

    Raises Unreadable for binary data, and for UTF-8 with a few broken bytes (as another encoding it would be rubbish).
    """
    for mark, encoding in MARKS:
        if data.startswith(mark):
            try:
                return clean(data.decode(encoding))
            except UnicodeDecodeError as error:
                raise Unreadable(f"not valid {encoding.upper()} (byte {error.start:,}): save it as UTF-8") from None
    controls = len(data) - len(data.translate(None, CONTROL))
    if controls > max(8, len(data) // 10):
        if (wide := _wide(data)) is not None:
            return clean(wide)
        raise Unreadable("a binary file, not text")
    try:
        return clean(data.decode())
    except UnicodeDecodeError as error:
        first = error.start
    if declared is not None and declared.lower().replace("-", "_") not in NOT_CHARSETS:
        latin = declared.lower() in ("iso-8859-1", "latin1", "latin-1", "us-ascii", "ascii")  # browsers read it so
        try:
            return clean(data.decode("cp1252" if latin else declared))
        except (LookupError, UnicodeDecodeError, ValueError):
            pass  # a wrong declaration is common; what the bytes say counts
    lenient = data.decode(errors="replace")
    if len(re.findall(r"[\x80-\ufffc\U00010000-\U0010ffff]", lenient)) > lenient.count("\ufffd"):
        raise Unreadable(f"UTF-8 with broken bytes (the first is byte {first:,}): repair it, or save it as UTF-8")
    return clean(_guess(data))


def _wide(data: bytes) -> str | None:
    """UTF-16 without its mark, which is how some tools write it: nearly every other byte of plain text is NUL."""
    even, odd = data[0::2].count(0), data[1::2].count(0)
    if max(even, odd) < 0.2 * len(data) or min(even, odd) > 0.1 * max(even, odd):
        return None
    try:
        text = data.decode("utf-16-le" if odd > even else "utf-16-be")
    except UnicodeDecodeError:
        return None
    odd_ones = sum(1 for character in text[:10_000] if character < " " and character not in "\t\n\r\f")
    return text if odd_ones * 100 <= min(len(text), 10_000) else None


def _guess(data: bytes) -> str:
    # chardet 7 told 34 of 36 samples of legacy texts right, charset-normalizer 20 (docs/readers.md)
    import chardet

    encoding = chardet.detect(data[:1_000_000])["encoding"]
    if encoding is None or b"\0" in data:
        raise Unreadable("a binary file, or text of an encoding that cannot be told: save it as UTF-8")
    if encoding.lower().startswith("iso8859") and re.search(rb"[\x80-\x9f]", data):
        encoding = "cp1252"  # these bytes are curly quotes and dashes there, and nothing in any ISO 8859
    try:
        return data.decode(encoding)
    except (LookupError, UnicodeDecodeError):
        raise Unreadable(f"neither UTF-8 nor {encoding}, which it resembles: save it as UTF-8") from None
