"""A stream of lines → questions, as they come, or those that wait. Knows bytes and lines; not whose stream it is, nor
what answers.
"""

from __future__ import annotations

import json
import os
import select
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

QUESTION_BYTES = 1 << 20  # longest line read as one question
CHUNK_BYTES = 1 << 16  # read at a time


@dataclass(frozen=True, slots=True)
class Line:
    """One line as a question, or why it is none."""

    number: int
    question: str
    problem: str = ""


def read_questions(stream: BinaryIO) -> Iterator[Line]:
    """The questions on a stream, each as soon as its line is there; blank lines are passed over.

    A line that starts with { is JSON with a "question"; any other line is the question itself.
    """
    questions = Questions(stream)
    while found := questions.take(1):
        yield from found


class Questions:
    """The questions on a stream, as `read_questions` gives them, and how many of them wait."""

    def __init__(self, stream: BinaryIO) -> None:
        self._lines = Lines(stream)
        self._number = 0

    def take(self, most: int, *, wait: bool = True) -> list[Line]:
        """So many questions at most, all whose lines are there already.

        wait    for the first of them; [] is then the stream's end
        """
        found: list[Line] = []
        while len(found) < most and ((wait and not found) or self._lines.waits()):
            raw = self._lines.read(QUESTION_BYTES)
            if not raw:
                break
            self._number += 1
            if (line := self._line(raw)) is not None:
                found.append(line)
        return found

    def _line(self, raw: bytes) -> Line | None:
        number = self._number
        if len(raw) == QUESTION_BYTES and not raw.endswith(b"\n"):
            while (rest := self._lines.read(QUESTION_BYTES)) and not rest.endswith(b"\n"):
                pass
            return Line(number, "", "longer than 1 MiB")
        if number == 1:
            raw = raw.removeprefix(b"\xef\xbb\xbf")
        try:
            text = raw.decode("utf-8").strip()
        except UnicodeDecodeError:
            return Line(number, "", "not UTF-8")
        return _parsed(number, text) if text else None


class Lines:
    """Lines of a stream, of which it can be told whether another is there already."""

    def __init__(self, stream: BinaryIO) -> None:
        self._stream = stream
        self._read = b""
        self._ended = False
        try:
            self._file: int | None = stream.fileno()
        except (OSError, AttributeError):  # bytes in memory: all of them are there
            self._file = None

    def read(self, most: int) -> bytes:
        """The next line with its end, or its first `most` bytes; empty at the stream's end."""
        while (end := self._read.find(b"\n", 0, most) + 1) == 0 and len(self._read) < most and not self._ended:
            self._more()
        line = self._read[: end or most]
        self._read = self._read[len(line) :]
        return line

    def waits(self) -> bool:
        """Whether `read` has a whole line, or the last one, without waiting for anybody."""
        while b"\n" not in self._read and not self._ended and len(self._read) < QUESTION_BYTES:
            if self._file is not None and not _readable(self._file):
                return False
            self._more()
        return bool(self._read)

    def _more(self) -> None:
        data = self._stream.read(CHUNK_BYTES) if self._file is None else os.read(self._file, CHUNK_BYTES)
        self._read += data
        self._ended = not data


def _readable(file: int) -> bool:
    """Whether reading would not wait; False where the system cannot tell (a pipe on Windows)."""
    try:
        return bool(select.select([file], [], [], 0)[0])
    except (OSError, ValueError):
        return False


def _parsed(number: int, text: str) -> Line:
    if not text.startswith("{"):
        return Line(number, text)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        return Line(number, "", "starts with { but is not JSON")
    question = value.get("question") if isinstance(value, dict) else None
    if not isinstance(question, str) or not question.strip():
        return Line(number, "", 'has no text under "question"')
    return Line(number, question.strip())
