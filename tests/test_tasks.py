"""Tasks from JSON lines: what a line may hold, and that each that holds no task is named with its place and reason."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from regrad_cli.errors import UsageProblem
from regrad_cli.tasks import Task, TaskQuestion, read_tasks

GOOD = {"id": "a", "title": "T", "passages": ["One.", "Two."], "questions": [{"question": "Q?", "answers": ["A", "B"]}]}


def file_of(folder: Path, *lines: object, name: str = "tasks.jsonl") -> Path:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    text = "\n".join(line if isinstance(line, str) else json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text(text + "\n", encoding="utf-8")
    return path


def test_a_line_is_a_task(tmp_path: Path) -> None:
    tasks, skipped = read_tasks([file_of(tmp_path, GOOD)])
    assert tasks == [Task("a", "T", ("One.", "Two."), (TaskQuestion("Q?", ("A", "B")),))]
    assert skipped == []
    assert tasks[0].training_texts == ("T\nOne.", "T\nTwo.") and tasks[0].embedding_texts == ("T. One.", "T. Two.")


def test_order_is_that_of_the_files_and_their_lines(tmp_path: Path) -> None:
    one = file_of(tmp_path, GOOD | {"id": "z"}, GOOD | {"id": "b"}, name="one.jsonl")
    two = file_of(tmp_path, "", GOOD | {"id": "a"}, "  ", name="two.jsonl")
    assert [task.id for task in read_tasks([two, one])[0]] == ["a", "z", "b"]


def test_title_and_id_may_be_missing_and_ids_are_then_made_of_the_place(tmp_path: Path) -> None:
    bare = {name: value for name, value in GOOD.items() if name not in ("id", "title")}
    first = file_of(tmp_path / "x", bare, bare, name="train.jsonl")
    second = file_of(tmp_path / "y", bare, bare | {"id": None}, name="train.jsonl")
    other = file_of(tmp_path, "", bare, name="dev.jsonl")
    tasks, skipped = read_tasks([first, second, other])
    assert skipped == [] and tasks[0].title == ""
    assert [task.id for task in tasks] == ["train-1-1", "train-1-2", "train-2-1", "train-2-2", "dev-2"]
    assert tasks[0].training_texts == ("One.", "Two.")


def test_a_byte_order_mark_and_windows_line_ends_are_no_trouble(tmp_path: Path) -> None:
    path = tmp_path / "t.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\r\n\r\n")
    assert len(read_tasks([path])[0]) == 1


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85", "\x1c", "\x0b", "\x0c"])
def test_characters_that_python_takes_for_line_ends_may_stand_in_a_text(tmp_path: Path, character: str) -> None:
    text = f"One{character}two."
    path = tmp_path / "t.jsonl"
    raw = json.dumps(GOOD | {"passages": [text]}, ensure_ascii=False)
    path.write_text(raw + "\n" + json.dumps(GOOD | {"id": "b"}) + "\n", encoding="utf-8")
    tasks, skipped = read_tasks([path])
    assert skipped == [] and [task.id for task in tasks] == ["a", "b"] and tasks[0].passages == (text,)


BAD = {
    "not JSON": ('{"passages": [', "Expecting value"),
    "an array": ("[1, 2]", "a task is a JSON object"),
    "no passages": ({"questions": GOOD["questions"]}, "'passages' must hold text"),
    "passages as text": (GOOD | {"passages": "One."}, "'passages' must hold text"),
    "no passage": (GOOD | {"passages": []}, "'passages' must hold text"),
    "an empty passage": (GOOD | {"passages": ["One.", "  "]}, "'passages' must hold text"),
    "no questions": (GOOD | {"questions": []}, "'questions' must be a list"),
    "questions as text": (GOOD | {"questions": ["Q?"]}, "a question is an object"),
    "a question without text": (GOOD | {"questions": [{"question": " ", "answers": ["A"]}]}, "'question' must hold"),
    "no answer": (GOOD | {"questions": [{"question": "Q?", "answers": []}]}, "'answers' must hold text"),
    "an answer that is a number": (GOOD | {"questions": [{"question": "Q?", "answers": [7]}]}, "'answers' must hold"),
    "half a character": ('{"passages": ["\\ud800"], "questions": [{"question": "Q?", "answers": ["A"]}]}', "half of a"),
    "too deep": ("[" * 100_000, "recursion"),
    "a long number": ("9" * 5000, "digits"),
}


@pytest.mark.parametrize("what", BAD)
def test_a_line_that_is_no_task_is_named_and_the_others_are_read(tmp_path: Path, what: str) -> None:
    line, reason = BAD[what]
    path = file_of(tmp_path, GOOD, line, GOOD | {"id": "b"})
    tasks, skipped = read_tasks([path])
    assert [task.id for task in tasks] == ["a", "b"]
    (told,) = skipped
    assert told.source == f"{path}:2" and reason in told.reason


def test_an_id_that_is_there_already_is_named(tmp_path: Path) -> None:
    one, two = file_of(tmp_path, GOOD, name="one.jsonl"), file_of(tmp_path, GOOD | {"title": "U"}, name="two.jsonl")
    tasks, skipped = read_tasks([one, two])
    assert [task.title for task in tasks] == ["T"]
    assert [(told.source, told.reason) for told in skipped] == [(f"{two}: a", "another task has this id")]


@pytest.mark.parametrize("kind", ["none", "a folder", "not UTF-8", "empty", "nothing good"])
def test_a_file_that_gives_nothing_is_refused_by_name(tmp_path: Path, kind: str) -> None:
    path = tmp_path / "t.jsonl"
    if kind == "a folder":
        path.mkdir()
    elif kind != "none":
        path.write_bytes({"not UTF-8": b"\xff\xfe{", "empty": b"\n", "nothing good": b"{}\n"}[kind])
    with pytest.raises(UsageProblem) as refused:
        read_tasks([path])
    assert str(path) in refused.value.message
    if kind == "nothing good":
        assert f"{path}:1" in refused.value.message and "'passages' must hold text" in refused.value.message
    if kind in ("not UTF-8", "empty", "nothing good"):
        assert '"questions"' in refused.value.hint
