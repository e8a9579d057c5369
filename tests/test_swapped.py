"""Tasks with other answers in their place: what is asked is still answered, and by nothing that stood there before."""

from __future__ import annotations

import json
import random
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are not installed with the package

from benchmarks.prior.swapped import ENOUGH, another, generate, pools_of, shape, swapped  # noqa: E402


def task(name: str, passage: str, *asked: tuple[str, list[str]], title: str = "Tarn") -> dict[str, Any]:
    questions = [{"question": question, "answers": answers} for question, answers in asked]
    return {"id": name, "title": title, "passages": [passage], "questions": questions}


PEOPLE = (
    "Oda Brenk",
    "Ilse Torvald",
    "Jon Vark",
    "Ragna Moe",
    "Per Holt",
    "Siv Dahl",
    "Ulf Berg",
    "Tora Lind",
    "Nils Aas",
)
PLACES = ("Skerry", "Velmora", "Brannoch")
TASKS = [
    *(
        task(f"p{n}", f"The lamp is lit by {name} at dusk.", ("Who lights it?", [name]))
        for n, name in enumerate(PEOPLE)
    ),
    *(task(f"q{n}", f"The ferry goes to {name}.", ("Where does it go?", [name])) for n, name in enumerate(PLACES)),
]
POOLS = pools_of(TASKS)


def places(text: str, inside: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", inside) is not None


def test_the_answer_is_another_everywhere_and_so_are_its_other_spellings() -> None:
    text = "Oda Brenk lit the lamp. Later Brenk went home, and Brenks-lamp burned on for Oda Brenk."
    made = swapped(
        task("x", text, ("Who lit the lamp?", ["Brenk", "Oda Brenk"]), ("What did Brenk burn?", ["coal"])),
        POOLS,
        random.Random(1),
    )
    (question,) = made["questions"]
    (answer,) = question["answers"]
    assert answer in PEOPLE and answer != "Oda Brenk"
    assert made["passages"][0].count(answer) == 3 and not places("Oda", made["passages"][0])
    assert "Brenks-lamp" in made["passages"][0], "part of another word stays"


def test_what_a_later_question_says_of_an_earlier_answer_goes_with_it() -> None:
    text = "The smith of Skerry is Ilse Torvald. She was born in 1902."
    asked = ("Who is the smith?", ["Ilse Torvald"]), ("When was Ilse Torvald born?", ["1902"])
    made = swapped(task("x", text, *asked), POOLS, random.Random(1))
    first, second = made["questions"]
    assert first["answers"][0] in second["question"] and "Torvald" not in json.dumps(made)
    assert second["answers"][0] in made["passages"][0] and second["answers"] != ["1902"]


@pytest.mark.parametrize(
    ("answer", "wanted"),
    [
        ("1987", r"(19[2-9]\d|20[0-4]\d)"),
        ("May 18, 2018", r"[A-Z][a-z]+ \d{1,2}, \d{4}"),
        ("about 3,500 tons", r"about [1-9],\d{3} tons"),
        ("Three", r"[A-Z][a-z]+"),
        ("12", r"\d{1,2}"),
    ],
)
def test_a_number_becomes_another_of_its_kind(answer: str, wanted: str) -> None:
    found = {another(answer, "how much?", {}, random.Random(seed)) for seed in range(30)} - {None}
    assert len(found) > 5 and answer not in found
    assert all(re.fullmatch(wanted, each or "") for each in found), found


def test_a_name_becomes_one_that_answers_the_same_kind_of_question_where_there_are_enough() -> None:
    assert len(PEOPLE) > ENOUGH > len(PLACES)
    found = {another("Oda Brenk", "Who was it?", POOLS, random.Random(seed)) for seed in range(60)}
    assert found == set(PEOPLE) - {"Oda Brenk"}
    found = {another("Skerry", "where is it", POOLS, random.Random(seed)) for seed in range(60)}
    assert found == set(PLACES) - {"Skerry"}
    assert another("of such a length as no other", "what?", POOLS, random.Random(0)) is None


def test_names_and_other_words_are_told_apart() -> None:
    assert {shape(text) for text in ("Oda Brenk", "the Bay of Tarn", "UN")} == {"name"}
    assert {shape(text) for text in ("by the sea", "carbon monoxide", "Carbon monoxide")} == {"words"}


@pytest.mark.parametrize(
    ("title", "question", "answer"),
    [
        ("Oda Brenk", "Who lit it?", "Oda Brenk"),
        ("Tarn", "Was it Oda Brenk?", "Oda Brenk"),
        ("Tarn", "Who lit it?", "Nobody"),
        ("Tarn", "Why?", "one two three four five six seven eight nine"),
    ],
)
def test_what_cannot_be_exchanged_is_left_out(title: str, question: str, answer: str) -> None:
    text = "Oda Brenk lit it, one two three four five six seven eight nine."
    assert swapped(task("x", text, (question, [answer]), title=title), POOLS, random.Random(0))["questions"] == []
    assert list(generate([task("x", text, (question, [answer]), title=title)], 0)) == []


def test_copies_differ_and_a_seed_gives_the_same_again(tmp_path: Path) -> None:
    found = list(generate(TASKS, 0, copies=3))
    assert len(found) == 3 * len(TASKS) and len({one["id"] for one in found}) == len(found)
    for number, one in enumerate(found):
        (question,) = one["questions"]
        assert places(question["answers"][0], one["passages"][0])
        assert question["answers"] != TASKS[number % len(TASKS)]["questions"][0]["answers"]
    answers = [tuple(one["questions"][0]["answers"][0] for one in found[i :: len(TASKS)]) for i in range(len(PEOPLE))]
    assert any(len(set(each)) > 1 for each in answers)
    source, outs = tmp_path / "tasks.jsonl", [tmp_path / "a.jsonl", tmp_path / "b.jsonl"]
    source.write_text("".join(json.dumps(one) + "\n" for one in TASKS))
    for out in outs:
        words = [sys.executable, "-m", "benchmarks.prior.swapped", "--copies", "3", "--out", str(out), str(source)]
        subprocess.run(words, cwd=ROOT, check=True)
    assert outs[0].read_bytes() == outs[1].read_bytes()
    assert [json.loads(line) for line in outs[0].read_text().splitlines()] == found
