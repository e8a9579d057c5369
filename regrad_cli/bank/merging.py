"""Small shards merged into larger ones, so that a bank of many commits has few shards: which are due, and their rows as
one shard, byte for byte. Knows shards and their files; not when a writer merges, nor what names the shards.

The rule, after log-structured merge trees: there are two sizes, `most` rows and a 64th of it. Shards of at most half a
size are small for it. Neighbours that are small for a size and together hold as many rows are due: the first of them,
as many as fit, become one shard, which is not small for that size any more. Hence no row is copied more than twice,
once a size, and between two shards that are not small few stand that are.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regrad_cli.bank.building import lay_out
from regrad_cli.bank.cleanup import remove_unnamed
from regrad_cli.bank.commit import sync_shards, write_shard
from regrad_cli.bank.manifest import ShardEntry, spans
from regrad_cli.bank.shards import DTYPES, ShardReader, expected_tensors
from regrad_cli.bank.store import Folder, Store
from regrad_cli.records import BankSettings

STEP = 64  # between the sizes: 8 instead of it would copy a row four times, 4,096 leave thousands of tiny shards


def due(rows: Sequence[int], most: int, *, ended: bool = False, closed: bool = False) -> tuple[int, int] | None:
    """The first shards that should become one, as (start, end); None if none should.

    rows     of each shard, in the manifest's order
    most     rows that a shard may have
    ended    the run ends: neighbours that cannot get more, for a larger shard stands behind them, are due as well
    closed   the same holds for the last ones: nothing will be merged across this end (the search graph's)
    """
    for size in (most, most // STEP):
        start = 0
        for end in range(len(rows) + 1):
            if end < len(rows) and rows[end] <= size // 2:
                continue
            final = closed if end == len(rows) else ended
            if end - start > 1 and (final or sum(rows[start:end]) >= size):
                return start, start + _that_fit(rows[start:end], size)
            start = end + 1
    return None


def _that_fit(rows: Sequence[int], size: int) -> int:
    """How many of these shards, from the first on, fit into one of this size; two at least, where none is over half."""
    return int(np.searchsorted(np.cumsum(rows), size, side="right"))


def tail(rows: Sequence[int], most: int) -> int:
    """How many shards stand before the small ones at the end: nothing that came earlier is merged any more."""
    return max((place + 1 for place, count in enumerate(rows) if count > most // 2), default=0)


def files_of(shards: Iterable[ShardEntry]) -> set[str]:
    """The names of their files."""
    return {name for shard in shards for name in (shard.name, shard.docs_name)}


def merge(
    bank: Path,
    shards: Sequence[ShardEntry],
    settings: BankSettings,
    most: int,
    first: int,
    last: int,
    *,
    ended: bool = False,
    closed: bool = False,
) -> tuple[ShardEntry, ...]:
    """The shards with those of shards[first:last] that are due merged, about one full shard a call, so that no commit
    takes long. The new files have their names and are synced, with their folders.

    raises  OSError, MemoryError, DamagedFile, StorageFailed: then none of them is left
    """
    before, found, after = list(shards[:first]), list(shards[first:last]), list(shards[last:])
    written: list[ShardEntry] = []
    try:
        while sum(entry.rows for entry in written) < most and (
            group := due([shard.rows for shard in found], most, ended=ended, closed=closed)
        ):
            data, docs, entry = joined(Folder(bank), found[slice(*group)], settings)
            if entry.sha256 in {shard.sha256 for shard in (*before, *found, *after)}:
                break  # the very rows, dead by now, in a shard that is there: none is named twice
            written.append(entry)
            write_shard(bank, entry, data, docs)
            found[slice(*group)] = [entry]
        if written:
            sync_shards(bank)
    except BaseException:  # Ctrl-C too
        remove_unnamed(bank, files_of(written) - files_of(shards))
        raise
    return (*before, *found, *after)


def joined(store: Store, shards: Sequence[ShardEntry], settings: BankSettings) -> tuple[list[Any], bytes, ShardEntry]:
    """The rows of these shards, removed ones too, in this order as one: file, docs file, entry, as of `lay_out`.

    Memory for the new shard: the old ones are read into it.

    raises  DamagedFile: every file is proved by its name first, for the new one would bear a right name for wrong bytes
    """
    count = sum(shard.rows for shard in shards)
    lines: list[bytes] = []
    removed: list[int] = []
    tensors: dict[str, npt.NDArray[Any]] = {
        name: np.empty(shape, DTYPES[dtype])
        for name, (dtype, shape) in expected_tensors(settings, count).items()
        if name != "line_ends"
    }
    for shard in shards:
        reader, first = ShardReader(store, shard, settings), len(lines)
        reader.read_into({name: tensor[first : first + shard.rows] for name, tensor in tensors.items()})
        lines += [line for _, line in reader.lines()]
        removed += (first + np.flatnonzero(~reader.live())).tolist()
    data, docs, entry = lay_out(settings, lines, tensors)
    return data, docs, replace(entry, removed=spans(removed))
