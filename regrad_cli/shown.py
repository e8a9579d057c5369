"""Makes text from elsewhere safe to show: what a terminal would obey becomes a visible escape. Knows no stream.

Documents, their titles, file names and a model's answers are data. Printed as they are, they could move the cursor,
colour or hide what stands beside them, or reverse its order.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from os import PathLike
from typing import Any

# Controls but tab and newline (C0, DEL, C1), bidi marks, embeddings, overrides and isolates, line and paragraph
# separators, invisible formatting (zero-width space, word joiner, BOM, interlinear notes, tags), lone surrogates.
# Joiners (U+200C, U+200D) stay: Persian, Indic scripts and emoji need them.
_INVISIBLE = (
    r"\u061c\u200b\u200e\u200f\u2028-\u202e\u2060-\u206f\ufeff\ufff9-\ufffb"
    r"\U0001d173-\U0001d17a\U000e0000-\U000e007f"
)
_OBEYED = re.compile(rf"[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff{_INVISIBLE}]")
_OBEYED_IN_LINE = re.compile(rf"[\x00-\x1f\x7f-\x9f\ud800-\udfff{_INVISIBLE}]")
_OBEYED_IN_JSON = re.compile(rf"[\x7f-\x9f{_INVISIBLE}]")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_SHORT = {"\n": r"\n", "\t": r"\t", "\r": r"\r"}


def _escape(match: re.Match[str]) -> str:
    character = match.group()
    code = ord(character)
    if character in _SHORT:
        return _SHORT[character]
    if 0xDC80 <= code <= 0xDCFF:  # a byte of a file name that is not UTF-8, as Python carries it
        return f"\\x{code - 0xDC00:02x}"
    if code <= 0xFF:
        return f"\\x{code:02x}"
    return f"\\u{code:04x}" if code <= 0xFFFF else f"\\U{code:08x}"


def visible(text: str) -> str:
    """Text of many lines: newlines and tabs stay, everything else that would be obeyed is shown as an escape."""
    return _OBEYED.sub(_escape, text.replace("\r\n", "\n"))


def visible_line(text: str) -> str:
    """Text for one line or one cell: newlines and tabs are shown as escapes too."""
    return _OBEYED_IN_LINE.sub(_escape, text)


def json_text(value: Any, *, indent: int | None = None, ascii_only: bool = False) -> str:
    """`value` as JSON that every parser takes: no NaN (null instead), no lone surrogates (visible escapes instead).

    What a terminal would obey is written as \\uXXXX, which reads back as the same text.
    """
    text = json.dumps(_plain(value), ensure_ascii=ascii_only, allow_nan=False, indent=indent)
    return text if ascii_only else _OBEYED_IN_JSON.sub(_json_escape, text)


def _json_escape(match: re.Match[str]) -> str:
    return json.dumps(match.group())[1:-1] if match.group() > "\x7f" else "\\u007f"


def _plain(value: Any) -> Any:
    if isinstance(value, str):
        return _SURROGATE.sub(_escape, value)
    if isinstance(value, bool | int) or value is None:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {_plain(str(key)): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, PathLike):
        return _plain(str(value))
    if isinstance(value, bytes):
        return value.hex()
    if hasattr(value, "item"):  # a numpy scalar
        return _plain(value.item())
    raise TypeError(f"{type(value).__name__} has no JSON form")


def size(count_bytes: float) -> str:
    """A size for people: 1.2 MB, in powers of 1000."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(count_bytes) < 999.5:
            return f"{count_bytes:.0f} {unit}" if unit == "B" or count_bytes >= 99.95 else f"{count_bytes:.1f} {unit}"
        count_bytes /= 1000
    return f"{count_bytes:.1f} TB"


def duration(seconds: float) -> str:
    """A time for people: 0.4 s, 12 s, 3 min 20 s, 1 h 5 min."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60} s"
    return f"{whole // 3600} h {whole % 3600 // 60} min"


def percent(share: float) -> str:
    """A share for people: 12 %, and never 0 % of something or 100 % of not everything."""
    if 0 < share <= 0.005:
        return "<1 %"
    return ">99 %" if 0.995 <= share < 1 else f"{100 * share:.0f} %"


def apportioned(amounts: Sequence[float], cells: int) -> list[int]:
    """How many of so many cells each amount gets, in all just as many; what is more than nothing gets one at least."""
    kept = [amount for amount in amounts if amount > 0]
    shares = [amount / sum(kept) * max(0, cells - len(kept)) if amount > 0 else 0.0 for amount in amounts]
    found = [int(share) + (amount > 0) for share, amount in zip(shares, amounts, strict=True)]
    by_rest = sorted(range(len(shares)), key=lambda place: int(shares[place]) - shares[place])
    for place in by_rest[: max(0, cells - sum(found)) if kept else 0]:
        found[place] += 1
    return found


def count(number: int, one: str, many: str = "") -> str:
    """`1 passage`, `1,200 passages`."""
    return f"{number:,} {one if number == 1 else many or one + 's'}"
