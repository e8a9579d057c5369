"""Changes of bytes and of JSON that find what a reader believes. Knows no format of ours and no fuzzer: what is chosen
is asked of `choose(n)`, a number from 0 to n - 1, which hypothesis draws and atheris seeds.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

Choose = Callable[[int], int]
Mutate = Callable[[bytes, Choose], bytes]

WORDS: list[Any] = [
    None, True, False, 0, 1, -1, 2, 3, 7, 255, 4096, 4097, 1 << 16, 1 << 31, (1 << 31) - 1, 1 << 32, (1 << 32) - 1,
    1 << 40, 1 << 63, 1 << 64, -(1 << 63), 10**30, 0.5, -0.0, 1e308, float("inf"), float("nan"), "", "x", "0" * 64,
    "f" * 64, "0" * 16, "..", "../../x", "/etc/passwd", "\x00", "\x1b[31m", "\u202e", "é" * 300, "\ud800", "1" * 5000,
    [], [[]], {}, [None], [0, 1], [[0, 1]], [1, 0], {"": None}, "lowrank", "full", "mean", "sum", "softmax", "int8",
    "bert", "llama", "true", "NaN", "-1", [["x", 1, 1]], [["x", 1 << 31, 1 << 31]], "A" * 70_000,
]  # fmt: skip
BYTES = [
    b"", b"\0", b"\xff", b"\n", b"\r\n", b"\r", b'"', b"{", b"}", b"[", b"]", b",", b"\\u0000", b"\xef\xbb\xbf",
    b"\xff\xfe", b"\0" * 512, b"[" * 3000, b'{"a":' * 3000, b"1" * 5000, b"A" * 5000, b"\xed\xa0\x80", b"\x80" * 40,
    b"\x7f\xff\xff\xff\xff\xff\xff\xff", b"\xff" * 8, b"NaN", b"1e999", b"-", b"---\n", b"# ", b"<", b">",
    b"&#x110000;", b"%PDF-1.7", b"endobj", b"stream\n", b"*" * 60, b"a*" * 40, b"| " * 200, b"`" * 50, b"\xe2\x80\xa8",
]  # fmt: skip


def in_bytes(data: bytes, choose: Choose) -> bytes:
    """One part of the bytes flipped, overwritten, taken out, put in twice, filled up or cut off."""
    kind = choose(8)
    at = choose(len(data) + 1)
    end = min(len(data), at + 1 + choose(64))
    if kind == 0 and at < len(data):
        return data[:at] + bytes([data[at] ^ (1 << choose(8))]) + data[at + 1 :]
    if kind == 1:
        word = BYTES[choose(len(BYTES))]
        return data[:at] + word + data[at + len(word) :]
    if kind == 2:
        return data[:at] + data[end:]
    if kind == 3:
        return data[:end] + data[at:]
    if kind == 4:
        return data[:at]
    if kind == 5:
        other = choose(len(data) + 1)
        return data[:at] + data[other : other + 1 + choose(256)] + data[at:]
    if kind == 6:
        return data[:at] + choose(256).to_bytes(1, "little") * (1 + choose(16)) + data[end:]
    return data[:at] + BYTES[choose(len(BYTES))] + data[at:]


def in_json(data: bytes, choose: Choose) -> bytes:
    """One value of a JSON document replaced, taken out, doubled, renamed or wrapped; sometimes its bytes changed."""
    if choose(12) == 0:
        return in_bytes(data, choose)
    try:
        value = json.loads(data)
    except (ValueError, RecursionError):
        return in_bytes(data, choose)
    places = list(_places(value))
    if not places:
        return json.dumps(WORDS[choose(len(WORDS))]).encode()
    holder, key = places[choose(len(places))]
    kind = choose(8)
    if kind == 0:
        del holder[key]
    elif kind == 1 and isinstance(holder, list):
        holder.insert(key, holder[key])
    elif kind == 1:
        holder[f"{key}_"] = holder[key]
    elif kind == 2:
        holder[key] = [holder[key]]
    elif kind == 3:
        other, name = places[choose(len(places))]
        holder[key] = json.loads(json.dumps(other[name])) if isinstance(other, list | dict) and _has(other, name) else 0
    elif kind == 4 and type(holder[key]) is int:
        holder[key] += choose(3) - 1
    else:
        holder[key] = WORDS[choose(len(WORDS))]
    return json.dumps(value).encode()


def _has(holder: Any, key: Any) -> bool:
    return key in holder if isinstance(holder, dict) else key < len(holder)


def _places(value: Any) -> Sequence[tuple[Any, Any]]:
    """(list or dict, index or key) of every value inside, without recursion."""
    found: list[tuple[Any, Any]] = []
    waiting = [value]
    while waiting:
        inner = waiting.pop()
        keys = list(inner) if isinstance(inner, dict) else range(len(inner)) if isinstance(inner, list) else ()
        for key in keys:
            found.append((inner, key))
            waiting.append(inner[key])
    return found


def in_lines(data: bytes, choose: Choose) -> bytes:
    """One line of JSON lines changed as JSON, or doubled, or taken out; sometimes the bytes of all."""
    lines = data.split(b"\n")
    at, kind = choose(len(lines)), choose(8)
    if kind == 0:
        return in_bytes(data, choose)
    if kind == 1:
        lines.insert(at, lines[at])
    elif kind == 2:
        del lines[at]
    else:
        lines[at] = in_json(lines[at], choose)
    return b"\n".join(lines)
