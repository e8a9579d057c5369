"""Tasks with sentences left out: what is still asked is still answered, by all that answered it before."""

from __future__ import annotations

import random
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # benchmarks are not installed with the package

from benchmarks.prior.cropped import cropped, generate, sentences  # noqa: E402

LIT = "Oda Brenk lit the lamp in May."
BURNED = "It burned for three nights."
FERRY = "The ferry goes to Skerry, the next island."
AGAIN = "In Skerry nobody waits for the ferry."
FOG = "There was fog."
TASK: dict[str, Any] = {
    "id": "tarn",
    "title": "Tarn",
    "passages": [f"{LIT} {BURNED}  {FERRY}\n{AGAIN}", FOG],
    "questions": [
        {"question": "Who lit the lamp?", "answers": ["Brenk", "Oda Brenk"]},
        {"question": "How long did it burn?", "answers": ["three nights"]},
        {"question": "Where does the ferry go?", "answers": ["Skerry"]},
        {"question": "Who swam?", "answers": ["Nils Aas"]},
    ],
}
SEEDS = range(60)


def copies() -> list[dict[str, Any]]:
    return [made for seed in SEEDS if (made := cropped(TASK, random.Random(seed)))]


def test_sentences_are_those_of_the_passage_without_what_is_between_them() -> None:
    assert sentences(TASK["passages"][0]) == [LIT, BURNED, FERRY, AGAIN]


def test_what_stays_is_whole_sentences_in_their_order() -> None:
    order = [LIT, BURNED, FERRY, AGAIN, FOG]
    for made in copies():
        kept = [part for passage in made["passages"] for part in sentences(passage)]
        assert kept == [part for part in order if part in kept]
        assert made["title"] == TASK["title"] and all(made["passages"])


def test_a_question_stays_where_all_that_may_answer_it_does_and_one_always_does() -> None:
    for made in copies():
        text = " ".join(made["passages"])
        asked = {one["question"] for one in made["questions"]}
        assert ("Who lit the lamp?" in asked) == (LIT in text)
        assert ("How long did it burn?" in asked) == (BURNED in text)
        assert ("Where does the ferry go?" in asked) == (FERRY in text and AGAIN in text)
        assert asked and "Who swam?" not in asked


def test_copies_differ_and_the_same_seed_gives_the_same() -> None:
    assert len({str(made["passages"]) for made in copies()}) > 5
    first = list(generate([TASK], seed=1, copies=3))
    assert [made["id"] for made in first] == ["tarn-cropped-0", "tarn-cropped-1", "tarn-cropped-2"]
    assert first == list(generate([TASK], seed=1, copies=3)) != list(generate([TASK], seed=2, copies=3))


@pytest.mark.parametrize("passages", [[FOG], []])
def test_a_task_that_answers_nothing_is_left_out(passages: list[str]) -> None:
    assert list(generate([TASK | {"passages": passages}], seed=1)) == []
