"""A stream of lines → questions, each as it comes. Knows bytes and lines; not whose stream it is, nor what answers."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from typing import BinaryIO

QUESTION_BYTES = 1 << 20  # longest line read as one question


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
    number = 0
    while line := stream.readline(QUESTION_BYTES):
        number += 1
        if len(line) == QUESTION_BYTES and not line.endswith(b"\n"):
            while (rest := stream.readline(QUESTION_BYTES)) and not rest.endswith(b"\n"):
                pass
            yield Line(number, "", "longer than 1 MiB")
            continue
        if number == 1:
            line = line.removeprefix(b"\xef\xbb\xbf")
        try:
            text = line.decode("utf-8").strip()
        except UnicodeDecodeError:
            yield Line(number, "", "not UTF-8")
            continue
        if text:
            yield _parsed(number, text)


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
