"""Makes further questions to the passages of task files by rules: plain wh-questions where safe, else a gap to fill.

`python -m benchmarks.prior.cloze --seed 0 --out cloze.jsonl nq-train.jsonl xquad-train.jsonl`

The tasks come out with the same titles and passages, their ids with "-cloze" appended, and only the new questions.
Knows no model; what a sentence means it guesses from its shape, so a rule that can mislead is left out here.
"""

import argparse
import json
import random
import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from benchmarks.prior.shapes import COMMON, COUNT, MONTH, MONTHS, NAME, NO_NAME, UPPER, YEAR, is_name
from benchmarks.prior.wh import Made, core_of, plain

Task = dict[str, Any]

_PATTERNS: tuple[tuple[str, re.Pattern[str]], ...] = (
    ("title", re.compile(r"[\"“]([^\"“”]{3,50})[\"”]")),
    ("date", re.compile(rf"\b(\d{{1,2}} {MONTH},? {YEAR}|{MONTH} \d{{1,2}}, {YEAR}|{MONTH} {YEAR})\b")),
    ("year", re.compile(rf"(?<=[ (])({YEAR})(?![\w%–-]|,\d)")),
    ("number", re.compile(rf"(?<![\w.,$£€–-])({COUNT})(?= [a-z]{{3,}})(?!\w)")),
    ("name", re.compile(rf"(?<![\w.'’-])({NAME})")),
)
_ABBREVIATION = re.compile(
    r"(?:\b(?:Mr|Mrs|Ms|Dr|St|Sr|Jr|vs|No|Vol|Gen|Col|Capt|Prof|Rev|Lt|Inc|Ltd|Co|Corp|ca|c|cf|etc|e\.g|i\.e|approx)|\b[A-Z])\.$"
)
_ASK: dict[str, tuple[str, ...]] = {
    "year": (
        'In which year? {t}: "{c}"',
        'According to the text on {t}, which year is missing in "{c}"?',
        'Which year completes this line about {t}: "{c}"?',
    ),
    "date": (
        'On what date? {t}: "{c}"',
        'Which date is missing here ({t}): "{c}"?',
        'When was it? {t}: "{c}"',
    ),
    "number": (
        'Which number is missing? {t}: "{c}"',
        'How many? {t}: "{c}"',
        'In the text on {t}, what number goes into "{c}"?',
    ),
    "name": (
        'Which name is missing? {t}: "{c}"',
        'Who or what is meant by the gap in this line about {t}: "{c}"?',
        'What name belongs in the gap ({t}): "{c}"?',
    ),
    "title": (
        'Which words stood in quotation marks here ({t}): "{c}"?',
        'What is quoted in the gap? {t}: "{c}"',
    ),
}
_ASK_ANY = (
    '{t}: complete the sentence: "{c}"',
    'Fill in the gap ({t}): "{c}"',
    '{t} - "{c}" - what belongs in the gap?',
    'Complete this statement about {t}: "{c}"',
    "fill in the blank, {t}: {c}",
    "{t}: {c}",
)


def main() -> None:
    """Write the tasks of FILES with new questions made by rules; the same ones for the same `--seed`."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.prior.cloze", description=main.__doc__)
    parser.add_argument("files", nargs="+", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, required=True)
    options = parser.parse_args()
    lines = (line for path in options.files for line in path.read_text(encoding="utf-8").splitlines())
    with options.out.open("w", encoding="utf-8") as out:
        for task in generate((json.loads(line) for line in lines), options.seed):
            out.write(json.dumps(task, ensure_ascii=False) + "\n")


def generate(tasks: Iterable[Task], seed: int) -> Iterator[Task]:
    """Each passage once, with two to four new questions; a passage that yields fewer than two is left out."""
    tasks = list(tasks)
    given: dict[str, set[str]] = defaultdict(set)  # the answers asked for already, by passage
    for task in tasks:
        for text in task["passages"]:
            given[text] |= {answer.lower() for question in task["questions"] for answer in question["answers"]}
    seen: set[str] = set()
    for task in tasks:
        text = task["passages"][0]
        if len(task["passages"]) != 1 or text in seen:
            continue
        seen.add(text)
        rng = random.Random(f"{seed}:{task['id']}")
        made = make(task["title"], text, given[text], rng)
        if len(made) >= 2:
            questions = [{"question": one.question, "answers": [one.answer]} for one in made]
            yield {"id": f"{task['id']}-cloze", "title": task["title"], "passages": [text], "questions": questions}


def make(title: str, text: str, given: set[str], rng: random.Random) -> list[Made]:
    """Up to four questions about the passage, the plain ones first, none with a `given` answer (lower case)."""
    found: list[Made] = []
    about = re.match(rf"[\"“]?(?:The )?{re.escape(core_of(title))}\b", text) is not None
    for number, sentence in enumerate(sentences(text)):
        found += plain(title, sentence, about and number == 1, rng)
        found += _gaps(title, sentence, rng)
    rng.shuffle(found)
    found.sort(key=lambda one: not one.plain)
    wanted, taken = rng.randint(2, 4), set(given)
    chosen: list[Made] = []
    for one in found:
        answer = one.answer.lower()
        fresh = not any(answer in old or old in answer for old in taken)
        if len(chosen) < wanted and fresh and _fits(one.answer, title, text):
            chosen.append(one)
            taken.add(answer)
    return chosen


def sentences(text: str) -> list[str]:
    """The passage cut at full stops that end a sentence."""
    parts: list[str] = []
    for part in re.split(r"(?<=[.!?])[\"”)]?\s+(?=[\"“(]?[A-Z])|\n+", re.sub(r"\[[^\]]*\]", "", text)):
        if parts and _ABBREVIATION.search(parts[-1]):
            parts[-1] += " " + part.strip()
        elif part.strip():
            parts.append(part.strip())
    return parts


def _fits(answer: str, title: str, text: str) -> bool:
    """Whether the answer is short, stands exactly once in the passage and isn't given away by the title."""
    inside = re.findall(rf"(?<!\w){re.escape(answer)}(?!\w)", text)
    return len(inside) == 1 and len(answer.split()) <= 6 and answer.lower() not in title.lower()


def facts(sentence: str) -> Iterator[tuple[str, int, str]]:
    """Dates, numbers, names and quoted words that stand by themselves: which of these, where, and the words."""
    covered: list[tuple[int, int]] = []
    for sort, pattern in _PATTERNS:
        for match in pattern.finditer(sentence):
            start = match.start(1)
            answer = match[1].strip(" .,")
            end = start + len(answer)
            if any(start < right and left < end for left, right in covered):
                continue
            covered.append((start, end))
            if sort == "name" and not _stands_alone(sentence, start, end, answer):
                continue
            if sort == "title" or not _in_list(sentence, start, end):
                yield sort, start, answer


def _gaps(title: str, sentence: str, rng: random.Random) -> list[Made]:
    """Questions with a gap: a clause around a date, a number, a name or quoted words."""
    made: list[Made] = []
    for sort, start, answer in facts(sentence):
        end = start + len(answer)
        if sort == "number" and re.search(r"(?:[Nn]o\.|chapter|page|least|than|about|top) $", sentence[:start]):
            continue
        if sort == "title" and (len(answer.split()) > 6 or not answer[0].isupper()):
            continue
        clause = _clause(sentence, start, end, rng)
        if clause:
            asks = _ASK[sort] if rng.random() < 0.55 else _ASK_ANY
            made.append(Made(rng.choice(asks).format(t=title, c=clause), answer, False))
    return made


def _stands_alone(sentence: str, start: int, end: int, answer: str) -> bool:
    """Whether the span is a whole name: not the sentence's first word, no part of a longer name, no initials."""
    before, behind = sentence[:start].rstrip(), sentence[end:]
    if not before.strip('"“ (') or not is_name(answer) or (before.endswith("(") and answer.isupper()):
        return False
    last = before.split()[-1].strip('"“(')
    opens = len(before.split()) == 1 and last.lower() in NO_NAME | COMMON
    longer = last[:1].isupper() and last[-1:] not in ",;:" and not opens
    follows = re.match(
        rf" (?:(?:of|on|for|de|nan|and|&|to) )?(?:the |an? )?[{UPPER}\d]|[’'-]\w(?!\b)|[’'] |\.\w|/", behind
    )
    origin = " " not in answer and re.search("(?:an|ish|ese|ch)$", answer) and re.match(r" [a-z]", behind)
    return not (
        longer or follows or origin or answer in MONTHS or re.search(rf"[{UPPER}]\w* (?:and the|of|and|&)$", before)
    )


def _in_list(sentence: str, start: int, end: int) -> bool:
    """Whether the span is one of several in a row, where the gap could hold any of them."""
    before, behind = sentence[:start].rstrip(), sentence[end:]
    several = rf"(?:[{UPPER}][\w-]+|{YEAR})"
    between = re.search(r"[\w)\"”],(?: and| or)?$", before) and re.match(r",| and | or |\.|;|\)", behind)
    after = re.search(rf"{several},? (?:and|or|&)$", before) or before.endswith("/")
    ahead = re.match(rf",? (?:and|or|&) (?:the )?{several}|, {several}(?:,| and | or )", behind)
    return bool(between or after or ahead)


def _clause(sentence: str, start: int, end: int, rng: random.Random) -> str:
    """The words around a span with the span as a gap; "" when they say too little to tell what is missing."""
    left, right = sentence[:start].rstrip(), sentence[end:]
    after = re.match(r"['’]s\b|[\"”]|%", right)
    tail = after[0] if after and after[0] not in ('"', "”") else ""
    right = right[after.end() :] if after else right
    if left.endswith(('"', "“")):
        left = left[:-1].rstrip()
    most = rng.randint(8, 12)
    before = _near(left.split(), most, backwards=True)
    behind = _near(right.split(), max(3, most - len(before)), backwards=False)
    head = "... " if len(before) < len(left.split()) else ""
    foot = " ..." if len(behind) < len(right.split()) else ""
    glue = "" if right[:1] in (",", ".", ";", ")", ":") or tail else " "
    space = "" if before and before[-1].endswith("(") else " "
    body = f"{' '.join(before)}{space}____{tail}{glue if not tail else ' '}{' '.join(behind)}".strip()
    body = re.sub(r"[ ,;:]+$", "", body).replace('"', "'").replace("“", "'").replace("”", "'")
    telling = [word for word in before + behind if len(word) > 3 and word.lower().strip(".,;") not in COMMON]
    return f"{head}{body}{foot}" if len(telling) >= 3 and len(before) + len(behind) >= 5 else ""


def _near(words: list[str], most: int, *, backwards: bool) -> list[str]:
    """The words nearest to the gap, up to the clause's end once there are five, and `most` at the most."""
    words = words[::-1] if backwards else words
    kept: list[str] = []
    for word in words[:most]:
        if len(kept) >= 5 and backwards and word.endswith((",", ";", ":", "—")):
            break
        kept.append(word)
        if not backwards and len(kept) >= 3 and word.endswith((",", ";", ":")):
            break
    return kept[::-1] if backwards else kept


if __name__ == "__main__":
    main()
