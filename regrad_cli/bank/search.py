"""Exact search over a bank's embeddings: the reference, and what answers one-shot queries. Knows vectors and shards'
rows; not the graph (index.py), nor what the vectors mean.

Ordering uses float32 products of float16 rows, in blocks; the score of what is returned is computed again in float64
by `cosine`, so it does not depend on how rows were blocked or found. Embeddings have unit norm, so a dot product is the
cosine.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import numpy as np
import numpy.typing as npt

from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.shards import ShardReader
from regrad_cli.records import RowRef

BLOCK_ROWS = 1024  # rows widened at a time: 1.5 MB of float32 at d = 384, which stays in the cache
MERGED_SHARDS = 64  # whose best rows are kept before they are put together
_LIFT = np.float32(2.0**112)


Item = TypeVar("Item")
Result = TypeVar("Result")


class Candidate(NamedTuple):
    """A row that may be among the best, with its float32 score."""

    score: float
    ref: RowRef


class _Ranked(NamedTuple):
    """Rows with their scores as columns of equal length: (n,) float32, int64, int64."""

    scores: npt.NDArray[np.float32]
    shards: npt.NDArray[np.int64]
    rows: npt.NDArray[np.int64]


def similarities(rows: npt.NDArray[np.float16], vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
    """(n, q) dot products of n float16 rows with q float32 vectors.

    numpy widens float16 one value at a time (57 ms for 100,000 × 384); moving the bits into place as integers gives
    2⁻¹¹² times the value, exactly, and takes 16 ms. The vectors carry the 2¹¹². Rows are finite: `add` saw to it.
    """
    scaled = np.ascontiguousarray((vectors * _LIFT).T)  # (d, q)
    result = np.empty((len(rows), len(vectors)), np.float32)
    wide = np.empty((min(BLOCK_ROWS, len(rows)), rows.shape[1]), np.int32)
    bits = rows.view(np.int16)
    for start in range(0, len(rows), BLOCK_ROWS):
        block = bits[start : start + BLOCK_ROWS]
        part = wide[: len(block)]
        np.left_shift(block, np.int32(13), out=part, dtype=np.int32)  # the sign is extended, so it fills bits 28 to 31
        np.bitwise_and(part, ~np.int32(0x70000000), out=part)
        np.matmul(part.view(np.float32), scaled, out=result[start : start + len(block)])
    return result


def cosine(vector: npt.NDArray[np.float32], row: npt.NDArray[np.float16]) -> float:
    """The score that is reported: float64, the same bits wherever the row lies; at most 1 in size, and always a number
    (a crafted bank may hold embeddings that are none; they come last)."""
    with np.errstate(invalid="ignore"):
        score = float(np.dot(vector.astype(np.float64), row.astype(np.float64)))
    return min(1.0, max(-1.0, score)) if math.isfinite(score) else -1.0


def best(scores: npt.NDArray[np.float32], count: int) -> npt.NDArray[np.int64]:
    """Positions of the `count` largest of (n,) scores, largest first, the earlier one where they are equal."""
    chosen = np.argpartition(-scores, count - 1)[:count] if count < len(scores) else np.arange(len(scores))
    return chosen[np.lexsort((chosen, -scores[chosen]))]


def scan(
    readers: Sequence[tuple[int, ShardReader]],
    vectors: npt.NDArray[np.float32],
    count: int,
    skip: Callable[[DamagedFile], None] | None,
) -> list[list[Candidate]]:
    """The best `count` live rows of these shards for each vector, reading each shard's embeddings once.

    readers  (position in the manifest, reader)
    skip     told of each damaged shard, which is then left out; None raises
    memory   one shard's embeddings a thread
    """

    def one(item: tuple[int, ShardReader]) -> list[_Ranked] | DamagedFile:
        position, reader = item
        try:
            rows = reader.embeddings()
        except DamagedFile as error:
            return error
        scores = similarities(rows, vectors)
        scores[~reader.live()] = -np.inf
        keep = min(count, reader.entry.live)
        chosen = [best(column, keep) for column in scores.T]
        return [
            _Ranked(column[rows], np.full(keep, position), rows) for column, rows in zip(scores.T, chosen, strict=True)
        ]

    found = [[_Ranked(np.zeros(0, np.float32), np.zeros(0, np.int64), np.zeros(0, np.int64))] for _ in vectors]
    wanted = [item for item in readers if item[1].entry.live]
    for result in _on_all_cores(one, wanted):
        if isinstance(result, DamagedFile):
            if skip is None:
                raise result
            skip(result)
            continue
        for parts, new in zip(found, result, strict=True):
            parts.append(new)
            if len(parts) == MERGED_SHARDS:
                parts[:] = [_best_of(parts, count)]
    return [
        [
            Candidate(score, RowRef(shard, row))
            for score, shard, row in zip(*(column.tolist() for column in part), strict=True)
        ]
        for part in (_best_of(parts, count) for parts in found)
    ]


def _best_of(parts: Sequence[_Ranked], count: int) -> _Ranked:
    """As `merge`, without an object a row: with those, half of a search over a million rows went into making them."""
    scores, shards, rows = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((rows, shards, -scores))[:count]
    return _Ranked(scores[order], shards[order], rows[order])


def _on_all_cores(work: Callable[[Item], Result], items: Sequence[Item]) -> Iterator[Result]:
    """work(item) for each, in order. Hashing, reading and multiplying leave the interpreter free, so threads help."""
    if len(items) < 2:
        yield from map(work, items)
        return
    pool = ThreadPoolExecutor(max_workers=min(8, os.cpu_count() or 1))
    try:
        yield from pool.map(work, items)
    finally:
        pool.shutdown(cancel_futures=True)


def merge(candidates: Sequence[Candidate], count: int) -> list[Candidate]:
    """The best `count`, largest score first, the earlier row where they are equal."""
    return sorted(candidates, key=lambda candidate: (-candidate.score, candidate.ref))[:count]


class Resident:
    """The live embeddings of some shards, proved once and kept as float16 for a session of many questions."""

    def __init__(
        self, readers: Sequence[tuple[int, ShardReader]], dimension: int, skip: Callable[[DamagedFile], None] | None
    ) -> None:
        starts = np.cumsum([0, *(reader.entry.live for _, reader in readers)]).tolist()
        self.rows = np.zeros((starts[-1], dimension), np.float16)  # (n, d); one allocation, filled shard by shard
        self.places = np.zeros((starts[-1], 2), np.int64)  # (n, 2) shard, row
        self._missing: list[slice] = []  # where a damaged shard's rows would be

        def fill(number: int) -> DamagedFile | None:
            position, reader = readers[number]
            part = slice(starts[number], starts[number + 1])
            try:
                rows = reader.embeddings()
            except DamagedFile as error:
                self._missing.append(part)
                return error
            live = np.flatnonzero(reader.live())
            self.rows[part] = rows[live]
            self.places[part, 0], self.places[part, 1] = position, live
            return None

        for error in _on_all_cores(fill, [number for number, (_, reader) in enumerate(readers) if reader.entry.live]):
            if error is not None:
                if skip is None:
                    raise error
                skip(error)

    def nearest(self, vectors: npt.NDArray[np.float32], count: int) -> list[list[Candidate]]:
        """The best `count` for each vector."""
        scores = similarities(self.rows, vectors)
        for part in self._missing:
            scores[part] = -np.inf
        return [
            [
                Candidate(float(scores[place, query]), RowRef(*self.places[place].tolist()))
                for place in best(scores[:, query], count)
                if scores[place, query] > -np.inf
            ]
            for query in range(len(vectors))
        ]
