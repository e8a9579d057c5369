"""A snapshot's manifest: what a bank is at one moment, the authority over every other file. Knows JSON and the checks
that make a hostile or damaged one harmless; opens no file.

A manifest is canonical JSON on one line, with its own SHA-256 (over the canonical JSON without that field) inside.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any, NoReturn

from regrad_cli.bank import layout
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.errors import UnknownFormat
from regrad_cli.records import BankSettings, canonical_json, canonical_object, sha256_hex

FORMAT_VERSION = 1
READER_FLAGS: frozenset[str] = frozenset()  # features a reader must know; none yet
MOVE = "move"
WRITER_FLAGS = frozenset({MOVE})  # features only a writer must know: that a move is under way
MANIFEST_LIMIT = 32 << 20  # bytes; about 30,000 shards. What a hostile manifest can cost is bounded by it.
SHARD_ROWS = 4096
MAX_DIMENSION = 1 << 16
MAX_BYTES = 1 << 40
BLOCKS = ("header", "line_ends", "tokens", "embeddings", "documents", "keys")

_HASH = re.compile(r"[0-9a-f]{64}\Z")
_DOCUMENT = re.compile(r"[0-9a-f]{16}\Z")


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
        return canonical_json(asdict(self))


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
    reader_flags: tuple[str, ...] = ()
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


def parse(data: bytes, name: str, *, for_writing: bool = False) -> Manifest:
    """A manifest from its file's bytes, with every part checked.

    raises  DamagedFile if it is not what was written; UnknownFormat if a newer version wrote it
    """
    body = _load(data, name)
    digest = body.pop("sha256", None)
    try:  # what stands before the hash and after it, spelled out once: with 4,000 shards that takes 0.03 s
        halves = [canonical_json({k: body[k] for k in body if (k < "sha256") is low})[1:-1] for low in (True, False)]
        canonical = f'{{{halves[0]},"sha256":{canonical_json(digest)},{halves[1]}}}\n'
        own = sha256_hex(f"{{{','.join(halves)}}}")
    except (ValueError, RecursionError) as error:
        raise DamagedFile(name, "is not a manifest") from error
    if digest != own or canonical.encode("utf-8", "replace") != data:
        raise DamagedFile(name, "does not match its own checksum")
    _refuse_newer(body, name, for_writing)
    try:
        return _Checked(body, name).manifest(own)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise DamagedFile(name, f"is not a manifest of format {FORMAT_VERSION} ({error!r})") from error


def refuse_newer_format(path: Path, found: bytes) -> None:
    """raises UnknownFormat where the text of FORMAT tells of another format than this version's"""
    if found != layout.FORMAT_TEXT and re.fullmatch(rb"gbank [0-9]{1,9}\n", found):
        raise UnknownFormat(f"{path} is of format {found[6:-1].decode()}", "install a newer regrad")


def _load(data: bytes, name: str) -> dict[str, Any]:
    if len(data) > MANIFEST_LIMIT:
        raise DamagedFile(name, f"is larger than any manifest ({len(data)} bytes)")

    def refuse(text: str) -> NoReturn:
        raise ValueError(f"number {text}")

    try:
        body = json.loads(data, parse_constant=refuse, parse_float=refuse)
    except (ValueError, RecursionError) as error:
        raise DamagedFile(name, "is not JSON") from error
    if not isinstance(body, dict):
        raise DamagedFile(name, "is not a manifest")
    return body


def _refuse_newer(body: dict[str, Any], name: str, for_writing: bool) -> None:
    """A format or a feature that this version does not know is refused, never guessed at."""
    if body.get("format") != FORMAT_VERSION:
        found = body.get("format")
        raise UnknownFormat(
            f"{name} is of format {found!r}; this version reads format {FORMAT_VERSION}", "install a newer regrad"
        )
    for key, known, use in (("reader_flags", READER_FLAGS, "read"), ("writer_flags", WRITER_FLAGS, "write to")):
        flags = body.get(key)
        if not isinstance(flags, list) or not all(isinstance(flag, str) for flag in flags):
            raise DamagedFile(name, f"has no list of {key}")
        unknown = sorted(set(flags) - known)
        if unknown and (use == "read" or for_writing):
            raise UnknownFormat(
                f"this version cannot {use} the bank: it uses {', '.join(unknown)}", "install a newer regrad"
            )


class _Checked:
    """Builds the manifest's parts from JSON; anything unexpected is a ValueError that names the field."""

    def __init__(self, body: dict[str, Any], name: str) -> None:
        self.body, self.name = body, name

    def manifest(self, digest: str) -> Manifest:
        body = self.body
        number = _whole(body["number"], "number")
        if layout.snapshot_name(number) != self.name:
            raise ValueError(f"number {number}")
        parent = body["parent"]
        made = Manifest(
            bank=_text(body["bank"]),
            number=number,
            parent=None if parent is None else (_whole(parent["number"], "parent"), _hash(parent["sha256"])),
            time=_text(body["time"]),
            tool=_text(body["tool"]),
            operation=_text(body["operation"]),
            run=_text(body["run"]),
            settings=_settings(body["settings"]),
            prior=_file(body["prior"]),
            shards=tuple(_shard(shard) for shard in _list(body["shards"])),
            index=None if body["index"] is None else _index(body["index"]),
            counts=Counts(**{key: _whole(value, key) for key, value in body["counts"].items()}),
            reader_flags=tuple(body["reader_flags"]),
            writer_flags=tuple(body["writer_flags"]),
            move=_move(body[MOVE]) if MOVE in body else None,
            oldest=_whole(body["oldest"], "oldest", number) if "oldest" in body else 0,
            sha256=digest,
        )
        if (made.move is not None) != (MOVE in made.writer_flags):
            raise ValueError(MOVE)
        for part in made.parts:
            if part.prior.sha256 != part.settings.prior:
                raise ValueError("prior")
            if len({shard.sha256 for shard in part.shards}) != len(part.shards):
                raise ValueError("a shard named twice")
        counts, dead = made.counts, sum(shard.dead for shard in made.shards)
        if counts.dead != dead or counts.passages != sum(shard.rows for shard in made.shards) - dead:
            raise ValueError("counts")
        index = made.index
        if index is not None and (
            index.shards > len(made.shards) or index.rows != sum(shard.rows for shard in made.shards[: index.shards])
        ):
            raise ValueError("index")
        return made


def _whole(value: Any, field: str, limit: int = MAX_BYTES) -> int:
    if type(value) is not int or not 0 <= value <= limit:
        raise ValueError(f"{field}: {value!r:.40}")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError(f"not a text: {value!r:.40}")
    return value


def _hash(value: Any) -> str:
    if not isinstance(value, str) or not _HASH.match(value):
        raise ValueError(f"not a SHA-256: {value!r:.80}")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise ValueError(f"not a list: {value!r:.40}")
    return value


def _file(value: Any) -> FileEntry:
    return FileEntry(_hash(value["sha256"]), _whole(value["bytes"], "bytes"))


def _index(value: Any) -> IndexEntry:
    names = [field.name for field in fields(IndexEntry) if field.name != "sha256"]
    return IndexEntry(sha256=_hash(value["sha256"]), **{name: _whole(value[name], name) for name in names})


def _move(value: Any) -> Move:
    shards = tuple(_shard(shard) for shard in _list(value["shards"]))
    return Move(_settings(value["settings"]), _file(value["prior"]), shards)


def _shard(value: Any) -> ShardEntry:
    rows = _whole(value["rows"], "rows", SHARD_ROWS)
    if rows == 0:
        raise ValueError("a shard without rows")
    removed, previous = [], -1
    for start, end in _list(value["removed"]):
        # Ranges that touch must be one: a set of rows has one spelling.
        if not previous < _whole(start, "removed") < _whole(end, "removed") <= rows:
            raise ValueError("removed")
        removed.append((start, end))
        previous = end
    first, last = _text(value["first"]), _text(value["last"])
    if not (_DOCUMENT.match(first) and _DOCUMENT.match(last)):
        raise ValueError("first, last")
    blocks = {block: _hash(value["blocks"][block]) for block in BLOCKS}
    return ShardEntry(
        sha256=_hash(value["sha256"]),
        bytes=_whole(value["bytes"], "bytes"),
        rows=rows,
        first=first,
        last=last,
        tokens=_whole(value["tokens"], "tokens"),
        blocks=blocks,
        docs=_file(value["docs"]),
        removed=tuple(removed),
    )


def _settings(value: Any) -> BankSettings:
    settings = BankSettings.from_json(value)
    for digest in (settings.model, settings.tokenizer, settings.prior, settings.embedder):
        _hash(digest)
    names = [tensor.name for tensor in settings.tensors]
    for text in (*names, settings.model_name, settings.prior_name, settings.embedder_name, settings.codec.kind):
        _text(text)
    dimension, code_bytes = settings.embedding_dim, settings.code_bytes
    if 0 in (_whole(dimension, "embedding_dim", MAX_DIMENSION), _whole(code_bytes, "code_bytes", 1 << 32)):
        raise ValueError("embedding_dim, code_bytes")
    sizes = [size for tensor in settings.tensors for size in (tensor.rows, tensor.cols)]
    sizes += [settings.scale_count, settings.chunk_tokens, settings.chunk_overlap]
    for number in (*sizes, settings.codec.rank, settings.codec.bits, settings.codec.group):
        _whole(number, "settings", 1 << 32)
    if settings.chunk_tokens < 16 or 2 * settings.chunk_overlap >= settings.chunk_tokens:
        raise ValueError("chunk_tokens, chunk_overlap")
    for flag in (settings.prior_trained, settings.keep_text):
        if type(flag) is not bool:
            raise ValueError("settings")
    return settings
