"""Leaves sentences out of tasks' passages, others in every copy, and the questions that were about them.

A passage that was learned from a few times is known by its gradient, and so is where in it an answer stands. Copies of
which sentences are missing have other gradients and other segments; with other answers (`swapped`) as well, little of a
known passage can be remembered. Knows no model.
"""

from __future__ import annotations

import random
from collections.abc import Iterable, Iterator
from itertools import groupby, pairwise
from typing import Any

from benchmarks.prior.swapped import stands
from regrad_cli.passages import last_of, read_outline

Task = dict[str, Any]

LEAST_KEPT, MOST_KEPT = 0.3, 0.9  # of sentences that are not asked about: the share is drawn for each copy


def generate(tasks: Iterable[Task], seed: int, copies: int = 1) -> Iterator[Task]:
    """Each task so many times, each time without some of its sentences; the same ones for the same seed."""
    for task in tasks:
        for copy in range(copies):
            made = cropped(task, random.Random(f"{seed}:{copy}:{task['id']}"))
            if made is not None:
                yield made | {"id": f"{task['id']}-cropped-{copy}"}


def cropped(task: Task, draw: random.Random) -> Task | None:
    """The task with the sentences of one of its questions, and some of the others; None where no question stays.

    A question stays where every sentence that has one of its answers does.
    """
    parts = {
        (number, place): part
        for number, passage in enumerate(task["passages"])
        for place, part in enumerate(sentences(passage))
    }
    wanted = [{place for place, part in parts.items() if _answers(one, part)} for one in task["questions"]]
    asked = [places for places in wanted if places]
    if not asked:
        return None
    share = draw.uniform(LEAST_KEPT, MOST_KEPT)
    kept = set(draw.choice(asked)) | {place for place in parts if draw.random() < share}
    left = groupby((place for place in parts if place in kept), key=lambda place: place[0])
    passages = [" ".join(parts[place] for place in places) for _, places in left]
    questions = [one for one, places in zip(task["questions"], wanted, strict=True) if places and places <= kept]
    return task | {"passages": passages, "questions": questions}


def sentences(text: str) -> list[str]:
    """A passage's sentences, items and rows, without the space between them."""
    begins = sorted({0, *read_outline(text).starts})
    return [text[begin : last_of(text, begin, end)].strip() for begin, end in pairwise([*begins, len(text)])]


def _answers(question: dict[str, Any], part: str) -> bool:
    return any(stands(answer.strip(), part) for answer in question["answers"])
