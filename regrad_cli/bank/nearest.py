"""The rows of one snapshot that are nearest to a vector: by exact search, cold or in memory, or by the search graph.
Knows shards' readers and the graph; proves no row and reads no text.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import numpy as np
import numpy.typing as npt

from regrad_cli.bank import index, search
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.manifest import Manifest
from regrad_cli.bank.search import Candidate
from regrad_cli.bank.shards import ShardReader
from regrad_cli.bank.store import Store
from regrad_cli.errors import NonFinite


class Nearest:
    """Keeps what a session of many questions needs: the graph, and the embeddings that it does not cover."""

    def __init__(self, store: Store, manifest: Manifest, reader: Callable[[int], ShardReader]) -> None:
        self._store, self._manifest, self._reader = store, manifest, reader
        self._graph: index.Graph | Literal["not tried"] | None = "not tried"
        self._resident: dict[tuple[int, bool], search.Resident] = {}

    def __call__(
        self, vectors: npt.NDArray[np.float32], count: int, warm: bool, skip: Callable[[DamagedFile], None] | None
    ) -> list[list[Candidate]]:
        """The `count` candidates nearest to each vector, best first.

        vectors  (q, d) float32, unit norm
        warm     many questions will follow
        skip     told of each damaged shard, which is then left out; None raises
        """
        vectors = self._checked(vectors)
        if not warm:
            return search.scan(self._readers(0), vectors, count, skip)
        if self._graph == "not tried":
            self._graph = index.load(self._store, self._manifest)
        near = self._graph.nearest(vectors, count) if self._graph is not None else None
        first = self._graph.shards if self._graph is not None and near is not None else 0
        kept = first, skip is not None
        if kept not in self._resident:
            dimension = self._manifest.settings.embedding_dim
            self._resident[kept] = search.Resident(self._readers(first), dimension, skip)
        found = self._resident[kept].nearest(vectors, count)
        if near is None:
            return found
        return [search.merge([*graphed, *exact], count) for graphed, exact in zip(near, found, strict=True)]

    def _checked(self, vectors: npt.NDArray[np.float32]) -> npt.NDArray[np.float32]:
        vectors = np.ascontiguousarray(vectors, np.float32)
        if vectors.ndim != 2 or vectors.shape[1] != self._manifest.settings.embedding_dim:
            raise ValueError(f"vectors are (q, {self._manifest.settings.embedding_dim}), not {vectors.shape}")
        if not np.isfinite(vectors).all():
            raise NonFinite("the question's embedding is not finite")
        if vectors.size and np.abs(vectors).max() > 1.001:  # larger ones would overflow in `similarities`
            raise ValueError("vectors have unit norm")
        return vectors

    def _readers(self, first: int) -> list[tuple[int, ShardReader]]:
        return [(position, self._reader(position)) for position in range(first, len(self._manifest.shards))]
