"""A snapshot's manifest: what a bank is at one moment, the authority over every other file, and its one spelling. Opens
no file; `parsing` reads it back, with the checks that make a hostile or damaged one harmless.

A manifest is canonical JSON on one line, with its own SHA-256 (over the canonical JSON without that field) inside.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

from regrad_cli.bank import layout
from regrad_cli.records import BankSettings, canonical_json, canonical_object, sha256_hex

FORMAT_VERSION = 1
SEGMENTS = "segments"
MOVE = "move"
MANIFEST_LIMIT = 32 << 20  # bytes; about 30,000 shards. What a hostile manifest can cost is bounded by it.
SHARD_ROWS = 4096
BLOCKS = ("header", "line_ends", "tokens", "embeddings", "documents", "keys")


@dataclass(frozen=True, slots=True)
class FileEntry:
    """A file named by its content."""

    sha256: str
    bytes: int


@dataclass(frozen=True)
class ShardEntry:
    """One shard: its file, its text file, and what a reader checks without hashing all of it.

    blocks      SHA-256 of the file's header and of its blocks that are read whole (BLOCKS)
    first, last smallest and largest document id in it
    tokens      of all its rows, removed ones too
    removed     rows that are no longer live: ascending, disjoint (start, end) ranges
    """

    sha256: str
    bytes: int
    rows: int
    first: str
    last: str
    tokens: int
    blocks: dict[str, str]
    docs: FileEntry
    removed: tuple[tuple[int, int], ...] = ()

    @property
    def name(self) -> str:
        return layout.content_name("shards", self.sha256)

    @property
    def docs_name(self) -> str:
        return layout.content_name("docs", self.docs.sha256)

    @property
    def dead(self) -> int:
        return sum(end - start for start, end in self.removed)

    @property
    def live(self) -> int:
        return self.rows - self.dead

    @cached_property
    def spelled(self) -> str:
        """In canonical JSON. Kept: a commit spells out all shards, most of them those of the one before."""
        return canonical_json(vars(self) | {"docs": asdict(self.docs)})


def spans(rows: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Rows as ascending (start, end) ranges that do not touch."""
    found: list[tuple[int, int]] = []
    for row in sorted(rows):
        if found and found[-1][1] == row:
            found[-1] = (found[-1][0], row + 1)
        else:
            found.append((row, row + 1))
    return tuple(found)


@dataclass(frozen=True, slots=True)
class IndexEntry:
    """The search graph over the first `shards` shards, `rows` rows, removed ones included."""

    sha256: str
    bytes: int
    shards: int
    rows: int
    dimension: int
    links: int
    build_width: int


@dataclass(frozen=True, slots=True)
class Move:
    """A move to another prior that is under way: what the bank will be made for, and the rows it has there so far.
    They count for nothing until one commit puts all of it in the place of the bank's own."""

    settings: BankSettings
    prior: FileEntry
    shards: tuple[ShardEntry, ...] = ()

    @property
    def passages(self) -> int:
        """Rows so far; some may be of passages that were changed or removed since."""
        return sum(shard.live for shard in self.shards)


@dataclass(frozen=True, slots=True)
class Counts:
    """Live documents, passages and their tokens; rows that are removed but still there."""

    documents: int = 0
    passages: int = 0
    tokens: int = 0
    dead: int = 0


@dataclass(frozen=True, slots=True)
class Manifest:
    """One snapshot.

    run      the writer's own mark: of the snapshots of one run only the last is kept when it ends
    oldest   the oldest snapshot that is meant to stay; a writer drops those before it as soon as nobody reads them
    """

    bank: str
    number: int
    parent: tuple[int, str] | None
    time: str
    tool: str
    operation: str
    run: str
    settings: BankSettings
    prior: FileEntry
    shards: tuple[ShardEntry, ...]
    index: IndexEntry | None
    counts: Counts
    writer_flags: tuple[str, ...] = ()
    move: Move | None = None
    oldest: int = 0
    sha256: str = ""

    @property
    def name(self) -> str:
        return layout.snapshot_name(self.number)

    @property
    def parts(self) -> tuple[Manifest | Move, ...]:
        """What holds rows, each under a prior of its own: the bank, and the move that is under way."""
        return (self,) if self.move is None else (self, self.move)

    @property
    def reader_flags(self) -> tuple[str, ...]:
        """What one must know to read this bank."""
        return (SEGMENTS,) if any(part.settings.segments > 1 for part in self.parts) else ()

    def files(self) -> Iterator[tuple[str, FileEntry]]:
        """Every file the snapshot names: (name inside the bank, its hash and size)."""
        for part in self.parts:
            yield layout.content_name("priors", part.prior.sha256), part.prior
            for shard in part.shards:
                yield shard.name, FileEntry(shard.sha256, shard.bytes)
                yield shard.docs_name, shard.docs
        if self.index is not None:
            yield layout.content_name("index", self.index.sha256), FileEntry(self.index.sha256, self.index.bytes)

    def to_bytes(self) -> tuple[bytes, Manifest]:
        """The file's content, and the manifest with its own hash filled in."""
        body: dict[str, Any] = {
            "format": FORMAT_VERSION,
            "reader_flags": list(self.reader_flags),
            "writer_flags": list(self.writer_flags),
            "bank": self.bank,
            "number": self.number,
            "parent": None if self.parent is None else {"number": self.parent[0], "sha256": self.parent[1]},
            "time": self.time,
            "tool": self.tool,
            "operation": self.operation,
            "run": self.run,
            "index": None if self.index is None else asdict(self.index),
            "counts": asdict(self.counts),
        }
        if self.oldest:
            body["oldest"] = self.oldest
        spelled = {name: canonical_json(value) for name, value in body.items()} | _part_of(self)
        if self.move is not None:
            spelled[MOVE] = canonical_object(_part_of(self.move))
        digest = sha256_hex(canonical_object(spelled))
        data = canonical_object(spelled | {"sha256": canonical_json(digest)}) + "\n"
        return data.encode(), replace(self, sha256=digest)


def _part_of(part: Manifest | Move) -> dict[str, str]:
    """What a manifest and a move both have, in canonical JSON."""
    shards = "[" + ",".join([shard.spelled for shard in part.shards]) + "]"
    settings, prior = canonical_json(part.settings.to_json()), canonical_json(asdict(part.prior))
    return {"settings": settings, "prior": prior, "shards": shards}
