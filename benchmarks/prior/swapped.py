"""Gives the tasks of files other answers: each is exchanged for another of its shape, in passages as in questions.

`python -m benchmarks.prior.swapped --seed 0 --copies 2 --out swapped.jsonl nq-train.jsonl xquad-train.jsonl`

A prior that sees a passage twice remembers its answers, and then learns nothing more from its gradient. Here no answer
can be remembered: what a passage says is different in every copy (meta-augmentation, Rajendran et al., arXiv
2007.05549). Names are exchanged for names of as many words from other tasks, numbers and years for numbers, months for
months, anything else for as many words. Knows no model.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks.prior.shapes import MONTH, MONTHS, YEAR

Task = dict[str, Any]
Key = tuple[str, int, str]
Pools = dict[Key, list[str]]

MOST_WORDS = 8  # a longer answer is half a sentence, and stays
LEAST_LETTERS = 2
ENOUGH = 8  # answers to the same question word; otherwise those to any are taken
ASKED = frozenset(["who", "whom", "whose", "where", "when", "which", "what", "how", "why"])
_COUNTED = "two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen twenty thirty"
NUMBER_WORDS = tuple(_COUNTED.split())
_NUMBER_WORD = re.compile(rf"\b(?:{'|'.join(NUMBER_WORDS)})\b", re.IGNORECASE)


def main() -> None:
    """Write copies of the tasks of FILES with other answers; the same ones for the same `--seed`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prior.swapped", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--copies", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = [line for path in options.files for line in path.read_text(encoding="utf-8").splitlines()]
    with options.out.open("w", encoding="utf-8") as out:
        for task in generate([json.loads(line) for line in lines], options.seed, options.copies):
            out.write(json.dumps(task, ensure_ascii=False) + "\n")


def generate(tasks: Sequence[Task], seed: int, copies: int = 1) -> Iterator[Task]:
    """Each task so many times, with those questions whose answer could be exchanged; one without any is left out."""
    pools = pools_of(tasks)
    for copy in range(copies):
        for task in tasks:
            made = swapped(task, pools, random.Random(f"{seed}:{copy}:{task['id']}"))
            if made["questions"]:
                yield made | {"id": f"{task['id']}-swapped-{copy}"}


def pools_of(tasks: Iterable[Task]) -> Pools:
    """All answers by what another must share with them, each once."""
    pools: dict[Key, dict[str, None]] = defaultdict(dict)
    for task in tasks:
        for question in task["questions"]:
            answer = question["answers"][0]
            if not re.search(r"\d", answer):
                for key in _keys(answer, question["question"]):
                    pools[key][answer] = None
    return {key: list(answers) for key, answers in pools.items()}


def _keys(answer: str, question: str) -> list[Key]:
    """What an answer must share with another: shape, number of words and the question's word; the latter if it can."""
    words = re.findall(r"[a-z]+", question.lower())
    asked = next((word for word in words if word in ASKED), "")
    return [(shape(answer), len(answer.split()), asked), (shape(answer), len(answer.split()), "any")]


def shape(answer: str) -> str:
    """ "name" where every longer word begins with a capital, else "words"."""
    words = [word for word in answer.split() if len(word) > 3] or answer.split()
    return "name" if all(word[0].isupper() for word in words) else "words"


def swapped(task: Task, pools: Pools, draw: random.Random) -> Task:
    """The task with other answers; questions that keep theirs are left out."""
    title, passages, questions = task["title"], list(task["passages"]), []
    texts = [question["question"] for question in task["questions"]]
    kept: list[int] = []
    new_answers: dict[int, str] = {}
    for number, question in enumerate(task["questions"]):
        aliases = sorted({answer.strip() for answer in question["answers"]}, key=lambda alias: (-len(alias), alias))
        found = [alias for alias in aliases if any(stands(alias, text) for text in passages)]
        if not found or not _can_go(found[0], title, texts[number]):
            continue
        if any(found[0] in other or other in found[0] for other in new_answers.values()):
            continue  # it stands where another answer has come to stand
        new = another(found[0], texts[number], pools, draw)
        if new is None or any(stands(new, text) for text in (*passages, title)):
            continue
        for alias in found:
            passages = [_exchanged(alias, new, text) for text in passages]
            texts = [_exchanged(alias, new, text) for text in texts]
        kept.append(number)
        new_answers[number] = new
    for number in kept:
        if any(stands(new_answers[number], text) for text in passages):
            questions.append({"question": texts[number], "answers": [new_answers[number]]})
    return task | {"passages": passages, "questions": questions}


def another(answer: str, question: str, pools: Pools, draw: random.Random) -> str | None:
    """Something else of the same shape; None where there is nothing."""
    if re.search(r"\d", answer) or _NUMBER_WORD.search(answer) or re.search(MONTH, answer):
        new = re.sub(r"\d+(?:[.,]\d+)*", lambda number: _number(number[0], draw), answer)
        new = re.sub(MONTH, lambda _: draw.choice(MONTHS), new)
        new = _NUMBER_WORD.sub(lambda word: _cased(draw.choice(NUMBER_WORDS), word[0]), new)
        return new if new != answer else None
    found = [[other for other in pools.get(key, ()) if other != answer] for key in _keys(answer, question)]
    pool = next((pool for pool in found if len(pool) >= ENOUGH), found[-1])
    return draw.choice(pool) if pool else None


def _number(old: str, draw: random.Random) -> str:
    if re.fullmatch(YEAR, old):
        return str(min(2025, max(1000, int(old) + draw.choice((-1, 1)) * draw.randint(1, 60))))
    if len(old) <= 2 and 1 <= int(old) <= 31:
        return str(draw.randint(1, 31))
    return str(draw.randint(1, 9)) + re.sub(r"\d", lambda _: str(draw.randint(0, 9)), old[1:])


def _cased(word: str, like: str) -> str:
    return word.capitalize() if like[0].isupper() else word


def _can_go(answer: str, title: str, question: str) -> bool:
    """Whether it is neither half a sentence nor given away by the title or the question."""
    short = len(answer) >= LEAST_LETTERS and len(answer.split()) <= MOST_WORDS
    return short and not stands(answer, question) and answer.lower() not in title.lower()


def stands(text: str, inside: str) -> bool:
    return re.search(rf"(?<!\w){re.escape(text)}(?!\w)", inside) is not None


def _exchanged(old: str, new: str, inside: str) -> str:
    return re.sub(rf"(?<!\w){re.escape(old)}(?!\w)", lambda _: new, inside)


if __name__ == "__main__":
    main()
