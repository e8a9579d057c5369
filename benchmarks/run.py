"""Runs the benchmarks in order, prints their tables and, with --write, keeps them in benchmarks/RESULTS.md.

python -m benchmarks.run [--only NAME …] [--device cpu|cuda|all] [--write]
"""

from __future__ import annotations

import argparse
import importlib
import os
import re
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import machine
from benchmarks.bench import Bench, Options, Result, environment, told
from benchmarks.measure import table

# Those that time whole processes come first: later ones leave torch and a model in this one.
NAMES = ("startup", "ingest", "gradients", "memory", "cold_ask", "many", "answer", "drift", "metatrain", "rows")
RESULTS = Path(__file__).with_name("RESULTS.md")
HEADER = """# Results

Written by `python -m benchmarks.run --write`; each section names its machine. A ratio is to a baseline that ran on the
same machine in the same minutes, paired round by round; so it can differ from the quotient of the two medians beside
it. Figures of different machines do not compare; ratios nearly do.
"""
NOT_RUN = "not run: there is no CUDA device on this machine"


def module_of(name: str) -> Any:
    return importlib.import_module(f"benchmarks.{name}")


def section(name: str, device: str, body: str) -> str:
    """A benchmark's part of RESULTS.md; its heading is its identity."""
    module = module_of(name)
    return f"## {name} · {device}\n\n{module.TITLE}: `benchmarks/{name}.py`.\n\n{body.strip()}\n"


def body(result: Result, described: str, seconds: float) -> str:
    notes = "\n".join(f"- {note}" for note in [described + f" · took {seconds:.0f} s", *result.notes])
    return "\n\n".join(filter(None, (table(result.figures), result.more, notes)))


def updated(text: str, sections: dict[str, str], order: Sequence[str]) -> str:
    """RESULTS.md with these {heading: section} in it. Others stay; a result is never replaced by `not run`."""
    parts = re.split(r"^(?=## )", text, flags=re.MULTILINE)
    kept = {part.splitlines()[0].removeprefix("## "): part for part in parts if part.startswith("## ")}
    for heading, new in sections.items():
        if NOT_RUN not in new or heading not in kept:
            kept[heading] = new
    headings = [heading for heading in order if heading in kept] + [each for each in kept if each not in order]
    return "\n".join([HEADER, *(kept[heading].strip() + "\n" for heading in headings)])


def headings() -> list[str]:
    return [f"{name} · {device}" for name in NAMES for device in module_of(name).DEVICES]


def main(arguments: Sequence[str] | None = None) -> int:
    chosen = _parsed(arguments)
    if warning := machine.busy():  # asked once: later, the load is our own
        told(f"warning: {warning}")
    available = ("cpu", "cuda") if machine.has_cuda() else ("cpu",)
    if chosen.device == "cuda" and "cuda" not in available:
        told(NOT_RUN)
        return 1
    sections: dict[str, str] = {}
    failed = False
    with (
        tempfile.TemporaryDirectory(prefix="regrad-benchmarks-") as folder,
        patch.dict(os.environ, environment(Path(folder)), clear=True),
    ):
        places = {device: _place(Path(folder) / device, device, chosen) for device in available}
        for heading, name, device in _chosen(chosen):
            if device not in places:
                sections[heading] = section(name, device, NOT_RUN)
                continue
            try:
                sections[heading] = _measured(name, places[device])
            except Exception as error:  # the others are still worth having
                failed = True
                told(f"{heading} failed: {type(error).__name__}: {error}")
                continue
            print(sections[heading], flush=True)
    if chosen.write and sections:
        old = RESULTS.read_text(encoding="utf-8") if RESULTS.exists() else ""
        RESULTS.write_text(updated(old, sections, headings()), encoding="utf-8")
        told(f"written to {RESULTS}")
    return 1 if failed else 0


def _chosen(chosen: argparse.Namespace) -> Iterator[tuple[str, str, str]]:
    for name in NAMES:
        for device in module_of(name).DEVICES:
            if name in (chosen.only or NAMES) and chosen.device in (device, "all"):
                yield f"{name} · {device}", name, device


def _place(folder: Path, device: str, chosen: argparse.Namespace) -> Bench:
    folder.mkdir()
    sizes = None if chosen.sizes is None else tuple(chosen.sizes)
    names = ("model", "embedder", "rounds", "questions", "tasks", "real_rows", "graph_rows")
    kept = {field: getattr(chosen, field) for field in names}
    rows = None if chosen.rows is None else tuple(sorted(chosen.rows))
    return Bench(folder, Options(device=device, sizes=sizes, rows=rows, **kept))


def _measured(name: str, place: Bench) -> str:
    device = place.options.device
    told(f"{name} · {device} …")
    start = time.perf_counter()
    result = module_of(name).run(place, place.options)
    return section(name, device, body(result, machine.describe(device), time.perf_counter() - start))


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.run", description=(__doc__ or "").splitlines()[0])
    only = f"of {', '.join(NAMES)}"
    parser.add_argument("--only", nargs="+", action="extend", choices=NAMES, metavar="NAME", help=only)
    parser.add_argument("--device", default="all", choices=("cpu", "cuda", "all"))
    parser.add_argument("--write", action="store_true", help="keep the results in benchmarks/RESULTS.md")
    parser.add_argument("--sizes", nargs=2, type=int, metavar=("SMALL", "LARGE"), help="passages of ingest's two runs")
    parser.add_argument("--rounds", type=int, help="repetitions of whole processes")
    parser.add_argument("--questions", type=int, help="questions of answer, many and drift")
    parser.add_argument("--tasks", type=int, help="tasks that metatrain learns from; --rounds is how often each")
    parser.add_argument("--rows", nargs="+", type=int, metavar="N", help="rows of each of the banks of rows")
    parser.add_argument("--real-rows", type=int, metavar="N", help="rows of one more, as large as the starter's")
    parser.add_argument(
        "--graph-rows", type=int, default=1 << 30, metavar="N", help="most rows for which rows builds a graph"
    )
    parser.add_argument("--model", default="starter")
    parser.add_argument("--embedder", default="minilm")
    chosen = parser.parse_args(arguments)
    if chosen.sizes and not 4 < chosen.sizes[0] < chosen.sizes[1]:
        parser.error("--sizes: a smaller and a larger number of passages, both above 4")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
