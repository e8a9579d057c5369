"""Finds the invented names of the project's own examples, which no training text may hold; knows no generator."""

import json
import re
from collections import Counter
from pathlib import Path

from benchmarks.prior.worlds.names import DAYS, MONTHS

_TEXT = {".md", ".txt", ".html", ".csv"}
# Words that the examples write with a capital in a name or heading, and that are nevertheless ordinary English.
_ORDINARY = re.findall(
    r"\w+",
    """bank bridge brothers dairy desk foundry lake little meadow mount office patient point port professor sister
    sisters upper weather yard great lane sound trust mondays tuesdays thursdays sundays csv pdf markdown ghz
    mhz jsonl instruments isles pilots grandmother authority polytechnic mutual fishers cooperative kettle
    oyster easter eve mini minis""",
)


def example_names(folder: Path) -> set[str]:
    """Lower-case words that are names in the examples: capital within a sentence more often than small anywhere."""
    capital: Counter[str] = Counter()
    small: Counter[str] = Counter()
    for text in _texts(folder):
        for match in re.finditer(r"(?<![\w@/.-])[^\W\d_]{3,}(?![\w@/]|-\w)", text):
            word = match[0]
            if word.islower():
                small[word] += 1
            elif re.search(r"[\w,;(] [\"*(]*$", text[max(0, match.start() - 4) : match.start()]):
                capital[word.lower()] += 1
    ordinary = {*_ORDINARY, *(word.lower() for word in (*MONTHS, *DAYS))}
    return {word for word, count in capital.items() if count > small[word]} - ordinary


def _texts(folder: Path) -> list[str]:
    texts = [path.read_text(encoding="utf-8") for path in sorted(folder.rglob("*")) if path.suffix in _TEXT]
    for path in sorted(folder.rglob("*.jsonl")):
        for line in path.read_text(encoding="utf-8").splitlines():
            task = json.loads(line)
            texts += [str(task.get("title", "")), str(task.get("text", "")), *task.get("passages", [])]
            for question in task.get("questions", []):
                texts += [question["question"], *question["answers"]]
    return texts
