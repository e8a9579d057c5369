"""Measures the peak memory of `regrad ingest` over 10,000 and 100,000 passages beside that of a thousand.

With the starter that takes a night; so model and embedder are the tiny ones of the tests, with embeddings of 384
dimensions. Reading, cutting, rows, commits and the graph are those of any ingest.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from unittest.mock import patch

from benchmarks.bench import EXAMPLES, Bench, Options, Result, told
from benchmarks.measure import Figure, Ran, Target, shown
from tests.tiny import write_embedder, write_model

TITLE = "Peak memory of an ingest"
DEVICES = ("cpu",)
SIZES = (1_000, 10_000, 100_000)
FLAT = 64  # bytes a passage: the shards' entries in the manifest


def run(place: Bench, options: Options) -> Result:
    model, embedder = place.folder / "tiny-model", place.folder / "tiny-embedder"
    place.python("memory", model, embedder)
    empty = place.folder / "tiny.gbank"
    place.regrad("init", empty, "--model", model, "--embedder", embedder)
    sizes = options.sizes or SIZES
    bank = place.folder / "memory.gbank"
    found: dict[int, Ran] = {}
    for size in sizes:
        shutil.rmtree(bank, ignore_errors=True)
        shutil.copytree(empty, bank)
        with patch.dict(os.environ, {"REGRAD_INDEX_FROM": str(10**12)}):
            found[size] = _ingest(place, bank, 0, size)
        told(f"  {size:,} passages: {found[size].seconds:.0f} s, {found[size].peak_bytes:,} bytes")
    first, last = sizes[0], sizes[-1]
    with patch.dict(os.environ, {"REGRAD_INDEX_FROM": "1"}):
        graph = _ingest(place, bank, last, 8)
    least = found[first].peak_bytes
    figures = [
        Figure(f"an ingest of {size:,} passages; baseline: of {first:,}", ran.peak_bytes / 1e6, "MB", least / 1e6)
        for size, ran in found.items()
    ]
    more = (found[last].peak_bytes - least) / (last - first)
    figures += [
        Figure(f"more a passage, from {first:,} to {last:,}", more, "B", target=Target("≤", FLAT, "value")),
        Figure(f"8 more into {last:,}, and the search graph of all at its end", graph.peak_bytes / 1e6, "MB"),
    ]
    speeds = ", ".join(shown(size / ran.seconds) for size, ran in found.items())
    return Result(
        figures,
        [
            f"One record of a JSONL file a passage, of one sentence; {speeds} passages a second, all of the process.",
            "The graph holds all embeddings and is built last, when nothing is computed any more.",
        ],
    )


def _ingest(place: Bench, bank: Path, begin: int, count: int) -> Ran:
    file = place.folder / f"from-{begin}.jsonl"
    with file.open("w", encoding="utf-8") as out:
        out.writelines(json.dumps(record) + "\n" for record in records(begin, count))
    ran = place.regrad("ingest", file, "--bank", bank, "--json")
    added = json.loads(ran.stdout.splitlines()[-1])["added"]
    if added != count:
        raise RuntimeError(f"ingest added {added} passages of {count}")
    return ran


def records(begin: int, count: int) -> Iterator[dict[str, str]]:
    """So many different short texts: a number each, and a sentence of the examples."""
    texts = (file.read_text(encoding="utf-8") for file in sorted(EXAMPLES.rglob("*.md")))
    sentences = [part.strip() for text in texts for part in text.split(". ") if 40 <= len(part.strip()) <= 60]
    for number in range(begin, begin + count):
        yield {"title": f"{number}", "text": f"{number}: {sentences[number % len(sentences)]}."}


if __name__ == "__main__":  # in a process of its own: a peak is never less than that of who starts it
    write_model(Path(sys.argv[1]))
    write_embedder(Path(sys.argv[2]), dimension=384)
