"""One operation on a bank of synthetic rows, in this process, timed from inside: what rows.py runs as processes.

python -m benchmarks.rowwork OPERATION FOLDER [NUMBER …]   prints one line of JSON: seconds, cpu_s, and what it counted

FOLDER holds the bank and what is made of it.
"""

from __future__ import annotations

import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.made_rows import COMMIT_ROWS, PASSAGES, PRIOR, questions, rows, settings
from regrad_cli.bank import create_bank, differences, open_bank, pack_bank, remove_documents, verify, write_bank

FOUND = 3  # passages that a question takes


# ── operations: each returns what it counted, and times its own part with `clock` ───────────────────────────────────


class Clock:
    """Seconds by the clock and of this process's CPU, of what is done inside its `with` blocks; of each in `turns` by
    the clock, in `cpu_turns` of CPU."""

    def __init__(self) -> None:
        self.seconds = self.cpu_s = 0.0
        self.turns: list[float] = []
        self.cpu_turns: list[float] = []

    def __enter__(self) -> Clock:
        self._began = time.perf_counter(), time.process_time()
        return self

    def __exit__(self, *error: object) -> None:
        self.turns.append(time.perf_counter() - self._began[0])
        self.cpu_turns.append(time.process_time() - self._began[1])
        self.seconds += self.turns[-1]
        self.cpu_s += self.cpu_turns[-1]


def ingest(clock: Clock, folder: Path, total: int, kind: str = "small") -> dict[str, Any]:
    """Rows added and committed 256 at a time, by one writer, as a long ingest does; no graph."""
    os.environ["REGRAD_INDEX_FROM"] = str(10**12)
    made_for = settings(kind)
    create_bank(folder / "bank", made_for, PRIOR)
    with write_bank(folder / "bank") as writer:
        for block in range(total // COMMIT_ROWS):
            batch = rows(made_for, block)
            with clock:
                writer.add(*batch)
                writer.commit("ingest")
        commits = clock.turns[:]
        with clock:
            writer.finish()
        counts = asdict(writer.snapshot.manifest.counts)
    return counts | {"first_s": statistics.median(commits[:16]), "last_s": statistics.median(commits[-16:])}


def add(clock: Clock, folder: Path, total: int, kind: str = "small") -> dict[str, Any]:
    """One new document into the bank: a writer opened, one commit, the end."""
    os.environ["REGRAD_INDEX_FROM"] = str(10**12)
    made_for = settings(kind)
    batch = rows(made_for, 10**9 // PASSAGES + total, PASSAGES)
    with clock, write_bank(folder / "bank") as writer:
        writer.add(*batch)
        writer.commit("ingest")
        writer.finish()
    return {}


def opening(clock: Clock, folder: Path, name: str = "bank") -> dict[str, Any]:
    """A snapshot opened and its figures told, five times: the median."""
    for _ in range(5):
        with clock, open_bank(folder / name) as bank:
            bank.stats()
    clock.seconds, clock.cpu_s = statistics.median(clock.turns), statistics.median(clock.cpu_turns)
    return {"manifest_bytes": len(bank.manifest.to_bytes()[0]), "shards": len(bank.manifest.shards)}


def holding(clock: Clock, folder: Path) -> dict[str, Any]:
    """What an ingest asks of the bank before it computes: all identities of rows, and the texts of one document."""
    from regrad_cli.holdings import Holdings

    with open_bank(folder / "bank") as bank:
        _, passage, key = next(bank.passages())
    with clock, open_bank(folder / "bank") as bank:
        held = Holdings(bank)
        found = len(held.of_document(passage.document))
    return {"passages": found, "right": int(held.row_of(key) is not None)}


def reading(clock: Clock, folder: Path) -> dict[str, Any]:
    """Every passage read and proved: what `bank ls` does, and an ingest with --prune."""
    with clock, open_bank(folder / "bank") as bank:
        return {"passages": sum(1 for _ in bank.passages())}


def query(clock: Clock, folder: Path, total: int, name: str = "bank") -> dict[str, Any]:
    """One question in a fresh process: all of `regrad query` but the command line and the question's embedding."""
    from regrad_cli.retrieval import Retriever

    text, vector, wanted = next(questions(total))
    with clock, open_bank(folder / name) as bank:
        hits = Retriever(bank, "fused").find(text, lambda _: vector, FOUND)
    return {"right": int(hits[0].passage.id == wanted)}


def ask(clock: Clock, folder: Path, total: int) -> dict[str, Any]:
    """What one cold `ask` does with the bank: opened, searched, three rows read, proved and decoded on the CPU."""
    from regrad_cli.learn.rows import layout_of
    from regrad_cli.retrieval import Retriever

    text, vector, wanted = next(questions(total))
    with clock, open_bank(folder / "bank") as bank:
        hits = Retriever(bank, "fused").find(text, lambda _: vector, FOUND)
        found = bank.read_rows([hit.ref for hit in hits])
        layout = layout_of(bank.settings)
        parts = layout.split(found.codes, found.scales)
        layout.codec.decode(parts.codes, parts.scales)
    return {"right": int(hits[0].passage.id == wanted)}


def session(clock: Clock, folder: Path, total: int) -> dict[str, Any]:
    """Many questions in one process, by whichever search is there; the first ones, which load, are told apart. Recall
    is that of the ten nearest, against exact search."""
    from regrad_cli.retrieval import Retriever

    asked = list(questions(total))
    with open_bank(folder / "bank") as bank:
        retriever = Retriever(bank, "fused")
        for text, vector, _ in asked:
            with clock:
                retriever.find(text, lambda _, vector=vector: vector, FOUND, warm=True)
        vectors = np.stack([vector for _, vector, _ in asked])
        near = bank.nearest(vectors, 10, warm=True)
        exact = bank.nearest(vectors, 10)
    same = [len({c.ref for c in a} & {c.ref for c in b}) for a, b in zip(near, exact, strict=True)]
    later = slice(len(asked) // 2, None)
    return {
        "load_s": clock.turns[0],
        "p50_s": statistics.median(clock.cpu_turns[later]),
        "p50_clock_s": statistics.median(clock.turns[later]),
        "recall": sum(same) / (10 * len(asked)),
    }


def graph(clock: Clock, folder: Path) -> dict[str, Any]:
    """The search graph over all rows, built from nothing as at the end of an ingest."""
    os.environ["REGRAD_INDEX_FROM"] = "1"
    with write_bank(folder / "bank") as writer, clock:
        writer.finish()
    entry = writer.snapshot.manifest.index
    return {"graph_bytes": 0 if entry is None else entry.bytes}


def removing(clock: Clock, folder: Path, number: int) -> dict[str, Any]:
    """One document taken out, by its source: `bank rm`."""
    os.environ["REGRAD_INDEX_FROM"] = str(10**12)
    with clock:
        return {"passages": remove_documents(folder / "bank", [f"notes/{number % 97:02d}/{number:07d}.md"])["passages"]}


def diff(clock: Clock, folder: Path) -> dict[str, Any]:
    """The newest snapshot against the one before it."""
    from regrad_cli.bank import Difference, layout

    older, newer = layout.snapshot_numbers(folder / "bank")[-2:]
    with clock, open_bank(folder / "bank", older) as old, open_bank(folder / "bank", newer) as new:
        *_, found = differences(old, new, _never)
    assert isinstance(found, Difference)
    return {"removed": len(found.removed), "added": len(found.added)}


def _never(*_: Any) -> Any:
    raise AssertionError("nothing was recomputed, so nothing is decoded")


def verifying(clock: Clock, folder: Path, percent: float) -> dict[str, Any]:
    """`bank verify`, of every byte at 100 per cent."""
    from regrad_cli.bank import Checked, Sample

    checked = Checked()
    with clock:
        found = list(verify(folder / "bank", sample=Sample(percent, 1) if percent < 100 else None, checked=checked))
    return {"rows": checked.rows, "findings": sum(not finding.note for finding in found)}


def packing(clock: Clock, folder: Path) -> dict[str, Any]:
    """`bank pack`."""
    with clock:
        return {"bytes": pack_bank(folder / "bank", folder / "packed.gbank", force=True)["bytes"]}


def compacting(clock: Clock, folder: Path) -> dict[str, Any]:
    """`compact`, no graph."""
    from regrad_cli.bank import Compacted
    from regrad_cli.maintain import CompactOptions, compact

    os.environ["REGRAD_INDEX_FROM"] = str(10**12)
    with clock:
        *_, done = compact(folder / "bank", CompactOptions())
    assert isinstance(done, Compacted)
    return {"shards": done.shards["after"], "rewritten": done.shards["rewritten"]}


OPERATIONS: dict[str, Callable[..., dict[str, Any]]] = {
    each.__name__: each
    for each in (ingest, add, opening, holding, reading, query, ask, session, graph, removing, diff, verifying, packing)
} | {"compacting": compacting}


def given(words: Sequence[str]) -> list[int | str]:
    """An operation's arguments as they stand on a command line."""
    return [int(word) if word.isdigit() else word for word in words]


def main(name: str, folder: str, *words: str) -> None:
    clock = Clock()
    counted = OPERATIONS[name](clock, Path(folder), *given(words))
    print(json.dumps({"seconds": clock.seconds, "cpu_s": clock.cpu_s} | counted))


if __name__ == "__main__":
    main(*sys.argv[1:])
