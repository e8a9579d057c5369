"""Measures a bank of a million rows beside banks of a tenth and a hundredth: what each operation takes, how it grows.

Rows are synthetic (made_rows.py says which), and every operation runs as a process of its own, so that its peak memory
is its own. How something grows is told by CPU seconds, which other work on the machine disturbs less than the clock.
"""

from __future__ import annotations

import json
import math
import shutil
import statistics
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from benchmarks import machine
from benchmarks.bench import Bench, Options, Result, told
from benchmarks.measure import Figure, Ran, Target, interleaved, paired_ratio, shown

TITLE = "A million rows"
DEVICES = ("cpu",)
ROWS = (10_240, 102_400, 1_024_000)
PASSAGES_A_SECOND = 4.92  # that ingest computes on a CPU, by its own section: what a commit's time is held against
STATS_ROUNDS = 5
EXPONENTS = {"constant": 0.1, "linear": 1.1}  # up to which something counts as growing so, between the largest sizes
NANOSECONDS = {"manifest": 40, "ids": 100}  # of CPU for each row more: what reads a list that grows with the bank
MEMORY = {"constant": 64, "ids": 160, "embeddings": 1100, "graph": 2000}  # bytes a row, a manifest's shards included


class Step(NamedTuple):
    """One operation: its name in the tables, the function of rowwork.py (`stats`: the command itself) and what that is
    given; how its seconds and its memory may grow."""

    name: str
    operation: str
    given: tuple[str, ...] = ()
    seconds: str = "linear"
    memory: str = "constant"


STEPS = (
    Step("ingest: all rows added, 256 a commit", "ingest", ("{rows}",)),
    Step("the bank opened", "opening", (), "manifest"),
    Step("`bank stats`, whole process", "stats", (), "constant"),
    Step("one document of 8 passages added", "add", ("{rows}",), "ids", "ids"),
    Step("what is held already, as an ingest of one document asks", "holding", (), "linear", "ids"),
    Step("all passages read, as `bank ls` does", "reading"),
    Step("`query`, cold", "query", ("{rows}",)),
    Step("`ask`, its part of the bank, cold", "ask", ("{rows}",)),
    Step("a session of 50 questions, exact", "session", ("{rows}",), "linear", "embeddings"),
    Step("search graph built", "graph", (), "linear", "graph"),
    Step("a session of 50 questions, by the graph", "session", ("{rows}",), "linear", "graph"),
    Step("`bank rm` of one document", "removing", ("7",), "ids", "ids"),
    Step("`diff` of the two newest snapshots", "diff", (), "manifest"),
    Step("`bank verify --sample 1`", "verifying", ("1",)),
    Step("`bank verify --full`", "verifying", ("100",)),
    Step("`bank pack`", "packing"),
    Step("the packed bank opened", "opening", ("packed.gbank",), "manifest"),
    Step("`query` on the packed bank, cold", "query", ("{rows}", "packed.gbank")),
    Step("`compact`", "compacting", (), "linear", "ids"),
    Step("the compacted bank opened", "opening", (), "manifest"),
    Step("`bank stats` of it, whole process", "stats", (), "constant"),
    Step("`query` on it, cold", "query", ("{rows}",)),
    Step("`bank rm` of one document of it", "removing", ("8",), "manifest", "ids"),
    Step("`diff` of the two newest snapshots of it", "diff", (), "manifest"),
    Step("`compact` again, one document less", "compacting", (), "linear", "ids"),
    Step("`compact` of a compact bank", "compacting", (), "linear", "ids"),
)


@dataclass
class Column:
    """What one bank was measured to do. found: for each step, by its name, its process and what it said of itself."""

    rows: int
    kind: str = "small"
    found: dict[str, tuple[Ran, dict[str, float]]] = field(default_factory=dict)
    stats: list[tuple[Ran, Ran]] = field(default_factory=list)  # each beside `python -c pass`

    @property
    def heading(self) -> str:
        return f"{self.rows:,}" + (" of 179 kB" if self.kind == "starter" else "")

    def seconds(self, step: Step) -> tuple[float, float]:
        """By the clock and of CPU, of the operation itself; raises KeyError if it was not run."""
        ran, said = self.found[step.name]
        return said.get("seconds", ran.seconds), said.get("cpu_s", ran.cpu_s)

    def peak_bytes(self, step: Step) -> int:
        return self.found[step.name][0].peak_bytes

    def said(self, name: str, what: str) -> float | None:
        """One of the figures that a step told of itself."""
        return self.found[name][1].get(what) if name in self.found else None


def run(place: Bench, options: Options) -> Result:
    busy = machine.busy()
    columns = [Column(rows) for rows in options.rows or ROWS]
    if options.real_rows:
        columns.append(Column(options.real_rows, "starter"))
    for column in columns:
        folder = place.folder / f"rows-{column.kind}-{column.rows}"
        folder.mkdir()
        try:
            for step in STEPS:
                if step.name.endswith(("built", "by the graph")) and column.rows > options.graph_rows:
                    continue
                _take(place, column, step, folder)
                told(
                    "  {} rows: {}: {:.3g} s, {:.3g} s CPU, {:,} bytes".format(
                        column.heading, step.name, *column.seconds(step), column.peak_bytes(step)
                    )
                )
        finally:
            shutil.rmtree(folder)
    small = [column for column in columns if column.kind == "small"]
    return Result(_figures(small[-1]), _notes(columns, options, busy), growth(columns))


def _take(place: Bench, column: Column, step: Step, folder: Path) -> None:
    if step.operation == "stats":
        turns = interleaved(
            {
                "pass": lambda: place.run(sys.executable, "-c", "pass"),
                "stats": lambda: place.regrad("bank", "stats", "--bank", folder / "bank"),
            },
            STATS_ROUNDS,
            warm_up=True,
        )
        column.stats = list(zip(turns["stats"], turns["pass"], strict=True))
        middle = sorted(turns["stats"], key=lambda ran: ran.seconds)[STATS_ROUNDS // 2]
        column.found[step.name] = middle, {"cpu_s": statistics.median(ran.cpu_s for ran in turns["stats"])}
        return
    given = [each.format(rows=column.rows) for each in step.given]
    if step.operation in ("ingest", "add"):
        given.append(column.kind)
    ran = place.python("rowwork", step.operation, folder, *given)
    column.found[step.name] = ran, json.loads(ran.stdout)


# ── what is made of it ──────────────────────────────────────────────────────────────────────────────────────────────


def exponent(small: tuple[int, float], large: tuple[int, float]) -> float:
    """The slope between two (rows, amount) where both axes are logarithms: 0 constant, 1 linear."""
    return math.log(large[1] / small[1]) / math.log(large[0] / small[0])


def growth(columns: Sequence[Column]) -> str:
    """Two Markdown tables: seconds and peak memory of each step at each size, how they grow, and whether they may."""
    return f"{_table(columns, _seconds)}\n\nPeak memory of each process:\n\n{_table(columns, _memory)}"


def _table(columns: Sequence[Column], line: object) -> str:
    head = ["operation", *(f"{column.heading} rows" for column in columns), "grows", "may", ""]
    lines = [head, ["---"] * len(head), *(line(columns, step) for step in STEPS)]  # type: ignore[operator]
    return "\n".join("| " + " | ".join(each) + " |" for each in lines)


def _grown(columns: Sequence[Column], step: Step) -> list[Column]:
    """The two largest banks of small rows that it was run on."""
    return [column for column in columns if column.kind == "small" and step.name in column.found][-2:]


def _seconds(columns: Sequence[Column], step: Step) -> list[str]:
    cells = [
        "{} ({} CPU)".format(*(shown(each, "s") for each in column.seconds(step)))
        if step.name in column.found
        else "not run"
        for column in columns
    ]
    pair = [(column.rows, column.seconds(step)[1]) for column in _grown(columns, step)]
    if len(pair) < 2 or pair[0][0] == pair[1][0]:
        return [step.name, *cells, "", _allowed(step.seconds), ""]
    told_as = f"rows^{(power := exponent(*pair)):.2f}"
    if step.seconds in NANOSECONDS:
        more = 1e9 * (pair[1][1] - pair[0][1]) / (pair[1][0] - pair[0][0])
        told_as, met = f"{told_as}, {more:.0f} ns a row", more <= NANOSECONDS[step.seconds]
    else:
        met = power <= EXPONENTS[step.seconds]
    return [step.name, *cells, told_as, _allowed(step.seconds), _verdict(met)]


def _allowed(growth: str) -> str:
    return growth if growth in EXPONENTS else f"with the {growth}"


def _memory(columns: Sequence[Column], step: Step) -> list[str]:
    cells = [
        f"{column.peak_bytes(step) / 1e6:,.0f} MB" if step.name in column.found else "not run" for column in columns
    ]
    pair = _grown(columns, step)
    more = None
    if len(pair) == 2 and pair[0].rows != pair[1].rows:
        more = (pair[1].peak_bytes(step) - pair[0].peak_bytes(step)) / (pair[1].rows - pair[0].rows)
    met = "" if more is None else _verdict(more <= MEMORY[step.memory])
    return [step.name, *cells, "" if more is None else f"{more:,.0f} B a row", _allowed(step.memory), met]


def _verdict(met: bool) -> str:
    return "as it may" if met else "**grows**"


def _figures(column: Column) -> list[Figure]:
    """The figures of docs/bank-format.md's design, at the largest bank."""
    rows, compute_s = f"{column.rows:,} rows", 256 / PASSAGES_A_SECOND
    pairs = [[ran.seconds for ran in side] for side in zip(*column.stats, strict=True)]
    stats_cpu = [stats.cpu_s for stats, _ in column.stats]
    query = column.found["`query`, cold"][0]
    by_graph = column.said("a session of 50 questions, by the graph", "p50_s")
    exact = column.said("a session of 50 questions, exact", "p50_s")
    commit = column.said(STEPS[0].name, "last_s") or 0.0
    return [
        Figure(
            f"`bank stats`, {rows}, compacted, whole process; baseline `python -c pass`",
            statistics.median(pairs[0]),
            "s",
            statistics.median(pairs[1]),
            paired_ratio(*pairs),
            Target("≤", 0.4, "value"),
        ),
        Figure("the same, seconds of CPU", statistics.median(stats_cpu), "s", target=Target("≤", 0.4, "value")),
        Figure(
            f"`query`, {rows}, whole process without the embedder", query.seconds, "s", target=Target("≤", 2, "value")
        ),
        Figure("the same, seconds of CPU", query.cpu_s, "s", target=Target("≤", 2, "value")),
        Figure(
            f"a question in a warm session, {rows}, by the graph; baseline exact, p50 of CPU",
            None if by_graph is None else 1000 * by_graph,
            "ms",
            None if exact is None else 1000 * exact,
            None if by_graph is None or exact is None else by_graph / exact,
            Target("≤", 20, "value"),
        ),
        Figure(
            "recall@10 of the graph against exact search",
            column.said("a session of 50 questions, by the graph", "recall"),
            target=Target("≥", 0.99, "value"),
        ),
        Figure(
            f"the last commit of 256 rows into {rows}, against the time ingest computes for them on a CPU",
            commit,
            "s",
            compute_s,
            commit / compute_s,
            Target("≤", 0.03),
        ),
    ]


def _notes(columns: Sequence[Column], options: Options, busy: str) -> list[str]:
    largest = [column for column in columns if column.kind == "small"][-1]
    manifest = largest.said("the bank opened", "manifest_bytes") or 0
    compacted = largest.said("the compacted bank opened", "manifest_bytes") or 0
    real = (
        "" if options.real_rows else " Rows of the starter's shapes, 179 kB each: not run here (`--real-rows 102400`)."
    )
    graph = "" if largest.rows <= options.graph_rows else f" No graph above {options.graph_rows:,} rows was built."
    return [
        "Documents of 8 passages with about 1 kB of text, r1-int4 gradients of 1 kB, 384 dimensions, files in the page "
        f"cache as far as it reaches.{real}{graph}",
        "Times are of the operation inside its process (`bank stats`: of the whole process), by the clock and of CPU. "
        f"`grows` is the exponent of CPU seconds between the two largest banks of such rows; constant is up to "
        f"{EXPONENTS['constant']}, linear up to {EXPONENTS['linear']}. What reads a list of all that a bank has may "
        f"take more with each row: the manifest, which names every file, up to {NANOSECONDS['manifest']} ns; the ids "
        f"of rows' documents, without which nobody knows where a document's rows lie, up to {NANOSECONDS['ids']}.",
        "Memory counts as constant up to {constant} bytes a row, with the ids up to {ids}, with the embeddings up to "
        "{embeddings}, with the graph, whose vectors are float32, up to {graph}: a manifest's shards and a document's "
        "id are in that, so a constant one may still grow a little.".format(**MEMORY),
        "`query` opens the bank, searches by meaning and words, and proves three passages; the question's vector is "
        "given. `ask`'s part reads and decodes three gradients besides; model and generation are not in it.",
        "What opens a bank reads its manifest, about 0.8 kB a shard: "
        f"{manifest:,.0f} bytes as ingest left it, {compacted:,.0f} compacted. Adding reads all document ids once, 8 "
        "bytes a row, to count documents; removing, those of shards that may hold the document, one where compacted.",
        *([f"When it began, {busy}; seconds of CPU are what to go by."] if busy else []),
    ]
