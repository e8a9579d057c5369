"""The search graph (hnswlib): a cache beside the shards, for warm sessions over large banks. Knows how to build, trust
and ask one; answers nothing that exact search would not, and never fails: whatever is wrong, the caller gets None.

hnswlib believes its files: a flipped bit crashes it, a crafted file overflows its heap (nmslib/hnswlib issue 673), a
full disk is not reported. So a file is loaded only if this machine wrote it: `build` records its SHA-256 in the user's
state folder, and `load` compares it with that of every byte on disk.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regrad_cli.bank import files, layout
from regrad_cli.bank.manifest import IndexEntry, Manifest
from regrad_cli.bank.search import Candidate
from regrad_cli.bank.shards import ShardReader
from regrad_cli.bank.store import Folder, Store
from regrad_cli.errors import RegradError
from regrad_cli.places import state_folder
from regrad_cli.records import RowRef, canonical_json, sha256_hex

# Below that exact search takes 8 ms in a warm session; a graph costs 0.3 to 0.5 ms of CPU a row to build (d = 384).
INDEX_FROM_ROWS = 50_000  # REGRAD_INDEX_FROM overrides
LINKS = 24
BUILD_WIDTH = 280  # with 160 some rows of a million cannot be reached, however wide a search looks
SEARCH_WIDTH = 1024
MOST_NEIGHBOURS = 1024
EXTEND_SHARE = 0.1  # rows that are not covered yet, as a share of the live ones, before an ingest adds them
REBUILD_SHARE = 0.3  # rows of the graph that are dead before it is built from nothing
_ADD_ROWS = 2048


def threshold() -> int:
    try:
        return max(1, int(os.environ["REGRAD_INDEX_FROM"]))
    except (KeyError, ValueError):
        return INDEX_FROM_ROWS


def _record_path(sha256: str) -> Path:
    return state_folder() / "indexes" / f"{sha256}.json"


def _coverage(manifest: Manifest, entry: IndexEntry) -> str:
    """What a graph is of: bank, shards in order, and its shape. A file of another bank, or of other rows, differs."""
    shards = [shard.sha256 for shard in manifest.shards[: entry.shards]]
    return sha256_hex(canonical_json([manifest.bank, shards, entry.rows, entry.dimension]))


def lies_in(bank: Path, manifest: Manifest) -> bool:
    """Whether the manifest has a graph and its file is there: in a bank that was packed and unpacked it is not."""
    return manifest.index is not None and (bank / layout.content_name("index", manifest.index.sha256)).exists()


def due(bank: Path, manifest: Manifest) -> bool:
    """Whether an ingest that ends now should build a graph: the bank is large, and too much is not covered."""
    live = manifest.counts.passages
    if live < threshold():
        return False
    entry = manifest.index
    if entry is None or not lies_in(bank, manifest):
        return True
    outside = sum(shard.live for shard in manifest.shards[entry.shards :])
    return outside > EXTEND_SHARE * live or _worn(manifest, entry)


def _worn(manifest: Manifest, entry: IndexEntry) -> bool:
    return sum(shard.dead for shard in manifest.shards[: entry.shards]) > REBUILD_SHARE * entry.rows


def build(
    bank: Path,
    manifest: Manifest,
    readers: Sequence[ShardReader],
    report: Callable[[int, int], None] | None = None,
) -> IndexEntry | None:
    """Makes and publishes the graph over all shards of the manifest, and records it as this machine's. The graph there
    is gets the new rows, if it is to be trusted and not too many of its rows are dead.

    report   told (rows done, rows in all)
    returns  its entry for the next manifest; None if anything went wrong (then there is none, and exact search serves)
    """
    try:
        import hnswlib

        rows = sum(shard.rows for shard in manifest.shards)
        dimension = manifest.settings.embedding_dim
        old = manifest.index
        graph = None if old is None or _worn(manifest, old) else _trusted(Folder(bank), manifest, rows)
        covered = old.shards if old is not None and graph is not None else 0
        if graph is None:
            graph = hnswlib.Index(space="ip", dim=dimension)
            graph.init_index(max_elements=rows, ef_construction=BUILD_WIDTH, M=LINKS, random_seed=7)
        first = sum(shard.rows for shard in manifest.shards[:covered])
        for reader in readers[covered:]:
            embeddings = reader.embeddings()
            live = np.flatnonzero(reader.live())
            for start in range(0, len(live), _ADD_ROWS):
                chosen = live[start : start + _ADD_ROWS]
                graph.add_items(embeddings[chosen].astype(np.float32), first + chosen)
                if report is not None:
                    report(first + int(chosen[-1]) + 1, rows)
            first += reader.entry.rows
        return _publish(bank, manifest, graph, rows, dimension)
    except (OSError, RuntimeError, ValueError, MemoryError, ImportError, RegradError):
        return None


def _publish(bank: Path, manifest: Manifest, graph: Any, rows: int, dimension: int) -> IndexEntry:
    folder = bank / "tmp"
    temporary = files.write_temporary(folder, [])  # takes a free name
    try:
        graph.save_index(str(temporary))
        if temporary.stat().st_size != graph.index_file_size():
            raise OSError("hnswlib could not write all of its file")
        files.sync_file(temporary)
        with Folder(folder).open(temporary.name) as region:
            size_bytes, sha256 = region.length, region.sha256()
        built = graph.M, graph.ef_construction  # another version may have begun it
        entry = IndexEntry(sha256, size_bytes, len(manifest.shards), rows, dimension, *built)
        record = _record_path(sha256)
        record.parent.mkdir(parents=True, exist_ok=True)
        record.write_text(json.dumps({"coverage": _coverage(manifest, entry)}), encoding="utf-8")
        files.make_folder(bank / "index")
        files.publish(temporary, bank / layout.content_name("index", sha256))
        files.sync_folder(bank / "index")
        return entry
    except BaseException:
        files.discard(temporary)
        raise


def forget(sha256: str) -> None:
    """Drops the record of a graph whose file is gone."""
    with suppress(OSError):
        _record_path(sha256).unlink()


class Graph:
    """A loaded graph. `shards` of the manifest's shards are covered; its labels number their rows in order."""

    def __init__(self, graph: Any, manifest: Manifest, entry: IndexEntry) -> None:
        self._graph, self.shards = graph, entry.shards
        covered = manifest.shards[: entry.shards]
        self._starts = np.cumsum([0, *(shard.rows for shard in covered)])
        self._live = np.ones(entry.rows, np.bool_)
        for first, shard in zip(self._starts.tolist(), covered, strict=False):
            for start, end in shard.removed:
                self._live[first + start : first + end] = False
        self.live_rows = int(self._live.sum())

    def nearest(self, vectors: npt.NDArray[np.float32], count: int) -> list[list[Candidate]] | None:
        """The best `count` live rows it finds for each vector; None where it finds too few.

        hnswlib raises when asked for more neighbours than it can reach, so that is asked for only what must be there.
        """
        wanted = min(count, self.live_rows)
        ask = wanted
        total = int(self._graph.element_count)
        while 0 < ask <= min(total, MOST_NEIGHBOURS):
            try:
                self._graph.set_ef(max(SEARCH_WIDTH, 2 * ask))
                labels, distances = self._graph.knn_query(vectors, k=ask)
            except (RuntimeError, ValueError):
                return None
            found = [self._candidates(*pair, wanted) for pair in zip(labels, distances, strict=True)]
            if all(len(candidates) == wanted for candidates in found):
                return found
            ask = 2 * ask if ask == total else min(2 * ask, total)
        return None if wanted else [[] for _ in vectors]

    def _candidates(
        self, labels: npt.NDArray[np.uint64], distances: npt.NDArray[np.float32], wanted: int
    ) -> list[Candidate]:
        alive = labels < len(self._live)  # before they are made signed: a label of a foreign file may be any number
        alive[alive] = self._live[labels[alive].astype(np.int64)]
        places, distances = labels[alive][:wanted].astype(np.int64), distances[alive][:wanted]
        shards = np.searchsorted(self._starts, places, side="right") - 1
        refs = map(RowRef, shards.tolist(), (places - self._starts[shards]).tolist())
        return list(map(Candidate, (1.0 - distances.astype(np.float64)).tolist(), refs))


def load(store: Store, manifest: Manifest) -> Graph | None:
    """The manifest's graph if there is one that this machine wrote, whole and of these rows; otherwise None."""
    entry = manifest.index
    graph = _trusted(store, manifest, entry.rows) if entry is not None else None
    return Graph(graph, manifest, entry) if graph is not None and entry is not None else None


def _trusted(store: Store, manifest: Manifest, most_rows: int) -> Any:
    """hnswlib's own object from the manifest's file, with room for `most_rows`; None unless it is as it was written."""
    entry = manifest.index
    if entry is None:
        return None
    try:
        record = json.loads(_record_path(entry.sha256).read_text(encoding="utf-8"))
        if not isinstance(record, dict) or record.get("coverage") != _coverage(manifest, entry):
            return None
        name = layout.content_name("index", entry.sha256)
        with store.open(name, entry.bytes) as region:
            if region.sha256() != entry.sha256:
                return None
        import hnswlib

        graph = hnswlib.Index(space="ip", dim=entry.dimension)
        graph.load_index(str(store.path / name), max_elements=most_rows)
        return graph if graph.element_count <= entry.rows and graph.index_file_size() == entry.bytes else None
    except (OSError, RuntimeError, ValueError, MemoryError, ImportError, RegradError, RecursionError):
        return None
