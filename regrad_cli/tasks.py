"""Question-answering tasks from JSON lines. Knows no model: what a line holds, or what is wrong with it."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from regrad_cli.errors import UsageProblem
from regrad_cli.records import Skipped, embedding_text, training_text

SHAPE = '{"id", "title", "passages": [text, …], "questions": [{"question", "answers": [alias, …]}, …]}'


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """A question about a task's passages; `answers` are aliases of one answer, the first is what training teaches."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Passages and the questions that they answer."""

    id: str
    title: str
    passages: tuple[str, ...]
    questions: tuple[TaskQuestion, ...]

    @property
    def training_texts(self) -> tuple[str, ...]:
        """The exact text of each passage that its gradient is taken on."""
        return tuple(training_text(self.title, text) for text in self.passages)

    @property
    def embedding_texts(self) -> tuple[str, ...]:
        """The exact text of each passage that is embedded to find it."""
        return tuple(embedding_text(self.title, text) for text in self.passages)


def read_tasks(files: Sequence[Path]) -> tuple[list[Task], list[Skipped]]:
    """The tasks of all files in order, and the lines that hold none, each with its place and reason.

    raises  UsageProblem where a file cannot be read, or none holds a task
    """
    tasks: list[Task] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    stems = [file.stem for file in files]
    for place, file in enumerate(files):
        unnamed = file.stem if stems.count(file.stem) == 1 else f"{file.stem}-{place + 1}"
        try:
            # Not splitlines(): what it takes for the end of a line, such as U+2028, may stand inside of JSON.
            lines = file.read_text(encoding="utf-8-sig").split("\n")
        except OSError as error:
            raise UsageProblem(f"the tasks {file} cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UsageProblem(f"the tasks {file} are not UTF-8 text", f"tasks are JSON lines: {SHAPE}") from None
        for found in _tasks(file, lines, unnamed):
            if isinstance(found, Task) and found.id in seen:
                found = Skipped(f"{file}: {found.id}", "another task has this id")
            if isinstance(found, Task):
                seen.add(found.id)
                tasks.append(found)
            else:
                skipped.append(found)
    if not tasks:
        detail = f" (first: {skipped[0].source}: {skipped[0].reason})" if skipped else ""
        raise UsageProblem(f"there is no task in {', '.join(map(str, files))}{detail}", f"one line a task: {SHAPE}")
    return tasks, skipped


def _tasks(file: Path, lines: Sequence[str], unnamed: str) -> Iterator[Task | Skipped]:
    """`unnamed`: what the id of a task without one begins with."""
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            data = json.loads(line)
            json.dumps(data, ensure_ascii=False).encode()
            yield _task(data, f"{unnamed}-{number}")
        except UnicodeEncodeError:
            yield Skipped(f"{file}:{number}", "it holds half of a character (a lone surrogate)")
        except (ValueError, RecursionError) as error:
            yield Skipped(f"{file}:{number}", str(error))


def _task(data: Any, default_id: str) -> Task:
    """raises ValueError that says what is wrong"""
    if not isinstance(data, dict):
        raise ValueError("a task is a JSON object")
    passages = _texts(data.get("passages"), "passages")
    questions = data.get("questions")
    if not isinstance(questions, list) or not questions:
        raise ValueError("'questions' must be a list that is not empty")
    asked = []
    for question in questions:
        if not isinstance(question, dict):
            raise ValueError("a question is an object with 'question' and 'answers'")
        (text,) = _texts([question.get("question")], "question")
        asked.append(TaskQuestion(text, _texts(question.get("answers"), "answers")))
    given = data.get("id")
    return Task(default_id if given is None else str(given), str(data.get("title") or ""), passages, tuple(asked))


def _texts(value: Any, name: str) -> tuple[str, ...]:
    if not isinstance(value, list) or not value or not all(isinstance(text, str) and text.strip() for text in value):
        raise ValueError(f"'{name}' must hold text")
    return tuple(value)
