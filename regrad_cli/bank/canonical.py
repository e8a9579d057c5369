"""The canonical form of a bank: which live rows stand in which shard, and in which order. A function of the live rows
alone: not of when they came, together with what, or what was removed since. Reads shards; writes nothing.

Order   by document id, ordinal, offset, key, checksum. A row that is there twice, byte for byte, is there once.
Cut     rows that fit one shard are one. Otherwise they part by the first bit of their document ids, each half by the
        next, until a part fits. One document with more rows than fit is cut after every `most` of them.

So a document's shard depends on the documents whose ids begin like its own, and adding or removing one touches one
shard, or two where they part or meet. Halves of more rows than fit are rarely empty: shards are half full or more.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from regrad_cli.bank.building import shard_header
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.shards import ShardReader, parse_line
from regrad_cli.records import BankSettings

# How canonical JSON of a passage begins. Reading two numbers this way takes a tenth of the time of parsing the line.
_PLACE = re.compile(rb'\{"document":"[0-9a-f]{16}","offset":([0-9]{1,18}),"ordinal":([0-9]{1,18}),')


@dataclass(frozen=True, slots=True)
class CanonicalShard:
    """One shard of the canonical form, by where its rows lie today.

    shards, rows   (n,) int32: row i lies in row rows[i] of the manifest's shard shards[i]
    text_bytes     of its docs file
    standing       the position of the shard in the manifest that is this one already, byte for byte; or None
    """

    shards: npt.NDArray[np.int32]
    rows: npt.NDArray[np.int32]
    text_bytes: int
    standing: int | None


@dataclass(frozen=True, slots=True)
class Canonical:
    """All shards in order, how many documents are in them, and how many rows were there twice."""

    shards: tuple[CanonicalShard, ...]
    documents: int
    doubles: int

    @property
    def rows(self) -> int:
        return sum(len(shard.rows) for shard in self.shards)


def canonical_form(
    readers: Sequence[ShardReader],
    settings: BankSettings,
    most: int,
    report: Callable[[int, int], None] | None = None,
) -> Canonical:
    """The canonical form of these shards' live rows, at most `most` a shard. Reads their docs files and ids, no
    gradients; takes about 60 bytes of memory a row.

    settings   of the bank in that form; where they are others than the shards', none of those stands already
    report     told (shards read, shards in all)
    raises     DamagedFile
    """
    parts = []
    for position, reader in enumerate(readers):
        if reader.entry.live:
            parts.append(_places(position, reader))
        if report is not None:
            report(position + 1, len(readers))
    if not parts:
        return Canonical((), 0, 0)
    documents, ordinals, offsets, shards, rows, text = (np.concatenate(column) for column in zip(*parts, strict=True))
    order = np.lexsort((offsets, ordinals, documents))
    order, doubles = _without_doubles(order, (documents, ordinals, offsets), readers, shards, rows)
    documents, shards, rows, text = documents[order], shards[order], rows[order], text[order]
    found = []
    for start, end in cut(documents, most):
        part = slice(start, end)
        standing = _standing(readers, settings, shards[part], rows[part])
        found.append(CanonicalShard(shards[part], rows[part], int(text[part].sum(dtype=np.int64)), standing))
    return Canonical(tuple(found), len(np.unique(documents)), doubles)


def cut(documents: npt.NDArray[np.uint64], most: int) -> list[tuple[int, int]]:
    """Where shards begin and end in rows of these ascending document ids, as the module says."""
    found: list[tuple[int, int]] = []
    pending = [(0, len(documents), 63)]  # rows from, to, and the bit that would part them
    while pending:
        start, end, bit = pending.pop()
        if end - start <= most:
            if end > start:
                found.append((start, end))
        elif documents[start] == documents[end - 1]:
            found += [(at, min(at + most, end)) for at in range(start, end, most)]
        else:
            first = (int(documents[start]) >> bit | 1) << bit  # the smallest id of this beginning with the bit set
            middle = start + int(np.searchsorted(documents[start:end], np.uint64(first)))
            pending += [(middle, end, bit - 1), (start, middle, bit - 1)]
    return found


def _places(position: int, reader: ShardReader) -> tuple[npt.NDArray[np.generic], ...]:
    """Of one shard's live rows: document, ordinal, offset, shard, row, bytes of the line."""
    live = np.flatnonzero(reader.live()).astype(np.int32)
    documents = reader.documents()[live]
    places = np.empty((len(live), 3), np.int64)
    for row, line in enumerate(reader.chosen_lines(live.tolist())):
        ordinal, offset = _place(line, reader)
        places[row] = ordinal, offset, len(line)
    return documents, places[:, 0], places[:, 1], np.full(len(live), position, np.int32), live, places[:, 2]


def _place(line: bytes, reader: ShardReader) -> tuple[int, int]:
    """Ordinal and offset of a line."""
    match = _PLACE.match(line)
    if match is not None:
        return int(match[2]), int(match[1])
    try:
        passage = parse_line(line)
    except ValueError as error:
        raise DamagedFile(reader.entry.docs_name, f"a line is not a passage ({error})") from error
    if max(abs(passage.offset), abs(passage.ordinal)) >= 1 << 63:
        raise DamagedFile(reader.entry.docs_name, "a passage has a place that no document has")
    return passage.ordinal, passage.offset


def _without_doubles(
    order: npt.NDArray[np.intp],
    columns: tuple[npt.NDArray[np.generic], ...],
    readers: Sequence[ShardReader],
    shards: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int32],
) -> tuple[npt.NDArray[np.intp], int]:
    """The order with rows of one place put in the order of key and checksum, and each that is the same row left out.
    Ingest makes no such rows; whoever writes to a bank by other means may."""
    same = np.ones(len(order) - 1, np.bool_)
    for column in columns:
        same &= column[order][1:] == column[order][:-1]
    edges = np.flatnonzero(np.diff(np.concatenate(([False], same, [False])).astype(np.int8))).tolist()
    kept = np.ones(len(order), np.bool_)
    for start, end in zip(edges[::2], edges[1::2], strict=True):
        named: dict[tuple[bytes, bytes], int] = {}
        for place in order[start : end + 1].tolist():
            row = readers[shards[place]].row(int(rows[place]))
            named.setdefault((row.key, row.checksum), place)
        order[start : start + len(named)] = [named[name] for name in sorted(named)]
        kept[start + len(named) : end + 1] = False
    return order[kept], len(order) - int(kept.sum())


def _standing(
    readers: Sequence[ShardReader],
    settings: BankSettings,
    shards: npt.NDArray[np.int32],
    rows: npt.NDArray[np.int32],
) -> int | None:
    """The position of the shard that holds these rows in this order and nothing else, in our layout."""
    position = int(shards[0])
    reader = readers[position]
    if reader.settings != settings:
        return None
    whole = len(rows) == reader.entry.rows and bool((shards == position).all())
    if not whole or not np.array_equal(rows, np.arange(len(rows))):
        return None
    header = shard_header(settings, len(rows))
    return position if hashlib.sha256(header).hexdigest() == reader.entry.blocks["header"] else None
