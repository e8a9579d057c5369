"""What a bank holds after a commit, counted from what that changes. Knows snapshots and the ids of rows' documents.

Passages and tokens are sums over shards. Of documents one must know who has a row elsewhere: of a single commit that is
looked up in those shards that may hold one, of a run of commits all ids are read once, 8 bytes a row.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Collection, Sequence

import numpy as np
import numpy.typing as npt

from regrad_cli.bank.manifest import Counts, ShardEntry
from regrad_cli.bank.shards import ShardReader
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.tally import Tally


class Counting:
    """The counts of one writer's commits: for each `prepare`, then `counts`, and `committed` once it is one."""

    def __init__(self) -> None:
        self._all: npt.NDArray[np.uint64] | None = None  # of every live row when they were read
        self._since = Tally()  # live rows of documents that came, or below 0 went, since then
        self._held = np.zeros(0, np.uint64)  # as `_all`, for the commit at hand
        self._changed: Counter[int] = Counter()  # by it

    def prepare(self, snapshot: Snapshot, staged: Collection[str] | None) -> None:
        """Reads whose rows there are before a commit.

        staged  ids of the documents whose rows the commit brings or takes; None to be ready for any, and for later ones
        raises  DamagedFile
        """
        if self._all is None:
            entries = snapshot.manifest.shards
            wanted: Sequence[int] = range(len(entries))
            if staged is not None:
                ordered = sorted(staged)
                wanted = [place for place, entry in enumerate(entries) if _may_hold(entry, ordered)]
            read = [snapshot.reader(place).live_documents() for place in wanted]
            self._held = np.sort(np.concatenate([np.zeros(0, np.uint64), *read]))
            self._since = Tally()
            if len(wanted) == len(entries):
                self._all = self._held

    def counts(self, before: Snapshot, shards: Sequence[ShardEntry]) -> Counts:
        """Those of a bank whose shards are these, the first of them in the places of those before.

        raises  DamagedFile
        """
        old = before.manifest
        self._changed = Counter()
        tokens = old.counts.tokens
        for place, shard in enumerate(shards):
            if place >= len(old.shards):
                tokens += self._count(ShardReader(before.store, shard, before.settings), 1)
            elif shard != old.shards[place]:
                changed = ShardReader(before.store, shard, before.settings)
                tokens += self._count(changed, 1) - self._count(before.reader(place), -1)
        return Counts(
            documents=old.counts.documents + self._documents_more(),
            passages=sum(shard.live for shard in shards),
            tokens=tokens,
            dead=sum(shard.dead for shard in shards),
        )

    def committed(self) -> None:
        """What was counted last is part of the bank now."""
        self._since.update(self._changed)

    def _count(self, reader: ShardReader, sign: int) -> int:
        """Notes a shard's live rows as changed, `sign` times, and returns their tokens."""
        if not reader.entry.live:
            return 0
        numbers, rows = np.unique(reader.live_documents(), return_counts=True)
        for number, count in zip(numbers.tolist(), rows.tolist(), strict=True):
            self._changed[number] += sign * count
        return int(reader.block("tokens")[reader.live()].sum(dtype=np.int64))

    def _documents_more(self) -> int:
        """How many documents more have a live row, once so many rows of each came or went."""
        numbers = np.fromiter(self._changed, np.uint64, len(self._changed))
        rows = np.searchsorted(self._held, numbers, "right") - np.searchsorted(self._held, numbers, "left")
        before = [had + self._since[number] for had, number in zip(rows.tolist(), self._changed, strict=True)]
        return sum((had + more > 0) - (had > 0) for had, more in zip(before, self._changed.values(), strict=True))


def _may_hold(shard: ShardEntry, documents: Sequence[str]) -> bool:
    """Whether one of these ids, ascending, lies between a shard's smallest and largest."""
    place = bisect_left(documents, shard.first)
    return place < len(documents) and documents[place] <= shard.last
