"""Generates the tasks of a seed and writes them as JSON lines; knows the folders, not the grammar."""

import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks.prior.worlds.avoid import example_names
from benchmarks.prior.worlds.compose import compose, read_all_kinds

EXAMPLES = Path(__file__).parents[3] / "examples"


def generate(seed: int, count: int) -> Iterator[dict[str, Any]]:
    """The tasks of a seed, every kind in turn; task i is the same whatever `count` is."""
    kinds, avoid = read_all_kinds(), example_names(EXAMPLES)
    for index in range(count):
        kind = kinds[index % len(kinds)]
        task = compose(kind, random.Random(f"{seed}:{index}"), avoid)
        yield {"id": f"world-{seed}-{index}", **task}


def write_worlds(path: Path, *, seed: int, tasks: int) -> None:
    """Writes the first `tasks` tasks of a seed to a file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    with part.open("w", encoding="utf-8") as out:
        for task in generate(seed, tasks):
            out.write(json.dumps(task, ensure_ascii=False) + "\n")
    part.replace(path)
