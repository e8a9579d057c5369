"""The example collection keeps its own rules. Knows nothing of regrad: the files are read here by simple means."""

from __future__ import annotations

import csv
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
DOCS = EXAMPLES / "docs"
Task = dict[str, Any]


class _VisibleText(HTMLParser):
    """Text outside of head, script, style, nav and footer; entities are resolved by the parser."""

    HIDDEN = frozenset({"head", "script", "style", "nav", "footer"})
    INLINE = frozenset({"em", "a", "strong"})

    def __init__(self) -> None:
        super().__init__()
        self.pieces: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in self.HIDDEN
        if tag not in self.INLINE:
            self.pieces.append(" ")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in self.HIDDEN

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.pieces.append(data)


def _one_space(text: str) -> str:
    return " ".join(text.split())


def _bare(text: str) -> str:
    """Single spaces, and no marks of Markdown: a passage may hold an HTML table as rows of `| cell | cell |`."""
    return _one_space(re.sub(r"\|[ |-]*\||[|*#]", " ", text))


def _words(text: str) -> str:
    """Lower case, words only, padded: `in` then compares whole words."""
    return f" {' '.join(re.findall(r'[a-z0-9]+(?:[.,:][0-9]+)*', text.lower()))} "


def _document_text(path: Path) -> str:
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            return "\n".join(row["text"] for row in csv.DictReader(file))
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return "\n".join(json.loads(line)["text"] for line in text.splitlines())
    if path.suffix == ".html":
        parser = _VisibleText()
        parser.feed(text)
        return "".join(parser.pieces)
    return text


def _pdf_text(path: Path) -> str:
    import pypdfium2

    with pypdfium2.PdfDocument(path) as pdf:
        return "\n".join(page.get_textpage().get_text_bounded() for page in pdf)


def _files() -> list[Path]:
    return sorted(path for path in DOCS.rglob("*") if path.is_file())


@pytest.fixture(scope="module")
def tasks() -> list[Task]:
    lines = (EXAMPLES / "questions.jsonl").read_text(encoding="utf-8").splitlines()
    return [json.loads(line) for line in lines]


@pytest.fixture(scope="module")
def collection() -> list[str]:
    """Bare text of each document, in the order of `_files`."""
    return [_bare((_pdf_text if path.suffix == ".pdf" else _document_text)(path)) for path in _files()]


def _asked(tasks: list[Task]) -> list[tuple[Task, dict[str, Any]]]:
    return [(task, question) for task in tasks for question in task["questions"]]


def test_there_are_documents_of_every_kind_that_is_read() -> None:
    files = _files()
    assert len(files) >= 25
    assert {path.suffix for path in files} == {".md", ".txt", ".html", ".csv", ".jsonl", ".pdf"}


def test_every_task_has_exactly_the_fields_of_the_task_format(tasks: list[Task]) -> None:
    for task in tasks:
        assert set(task) == {"id", "title", "passages", "questions"}
        assert task["title"].strip()
        assert task["passages"]
        assert task["questions"]
        for question in task["questions"]:
            assert set(question) == {"question", "answers"}
            assert question["question"].endswith("?")
            assert question["answers"]
            assert all(alias == alias.strip() != "" for alias in question["answers"])


def test_there_are_a_hundred_questions_and_none_is_asked_twice(tasks: list[Task]) -> None:
    questions = [_words(question["question"]) for _, question in _asked(tasks)]
    assert len(questions) >= 100
    assert len(set(questions)) == len(questions)


def test_task_ids_are_unique(tasks: list[Task]) -> None:
    ids = [task["id"] for task in tasks]
    assert len(set(ids)) == len(ids)


def test_every_answer_occurs_in_its_passages(tasks: list[Task]) -> None:
    missing = [
        question["question"]
        for task, question in _asked(tasks)
        if not any(alias in _one_space(" ".join(task["passages"])) for alias in question["answers"])
    ]
    assert missing == []


def test_every_passage_stands_in_a_document(tasks: list[Task], collection: list[str]) -> None:
    missing = [
        f"{task['id']}: {passage[:60]}"
        for task in tasks
        for passage in task["passages"]
        if not any(_bare(passage) in text for text in collection)
    ]
    assert missing == []


def test_passages_are_of_a_length_that_one_gradient_can_hold(tasks: list[Task]) -> None:
    lengths = {task["id"]: [len(passage.split()) for passage in task["passages"]] for task in tasks}
    assert {name: words for name, words in lengths.items() if not all(50 <= n <= 200 for n in words)} == {}


def test_answers_are_short(tasks: list[Task]) -> None:
    long = [alias for _, question in _asked(tasks) for alias in question["answers"] if len(alias.split()) > 6]
    assert long == []


def test_no_question_gives_its_own_answer_away(tasks: list[Task]) -> None:
    given = [
        (question["question"], alias)
        for _, question in _asked(tasks)
        for alias in question["answers"]
        if _words(alias) in _words(question["question"])
    ]
    assert given == []


def test_every_document_is_asked_about(tasks: list[Task], collection: list[str]) -> None:
    passages = [_bare(passage) for task in tasks for passage in task["passages"]]
    unasked = [
        path.name
        for path, text in zip(_files(), collection, strict=True)
        if not any(passage in text for passage in passages)
    ]
    assert unasked == []
