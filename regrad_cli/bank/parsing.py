"""A manifest's file → its parts, each checked: what a hostile one says can ask for nothing that a bank could not.

Knows the parts and their limits; reads no file.
"""

from __future__ import annotations

import json
import re
from dataclasses import fields
from pathlib import Path
from typing import Any, NoReturn

from regrad_cli.bank import layout
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.manifest import (
    BLOCKS,
    FORMAT_VERSION,
    MANIFEST_LIMIT,
    MOVE,
    SEGMENTS,
    SHARD_ROWS,
    Counts,
    FileEntry,
    IndexEntry,
    Manifest,
    Move,
    ShardEntry,
)
from regrad_cli.errors import UnknownFormat
from regrad_cli.records import BankSettings, canonical_json, sha256_hex

READER_FLAGS = frozenset({SEGMENTS})  # features a reader must know: that a row has the gradients of several segments
WRITER_FLAGS = frozenset({MOVE})  # features only a writer must know: that a move is under way
MAX_DIMENSION = 1 << 16
MAX_BYTES = 1 << 40

_HASH = re.compile(r"[0-9a-f]{64}\Z")
_DOCUMENT = re.compile(r"[0-9a-f]{16}\Z")


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
            writer_flags=tuple(body["writer_flags"]),
            move=_move(body[MOVE]) if MOVE in body else None,
            oldest=_whole(body["oldest"], "oldest", number) if "oldest" in body else 0,
            sha256=digest,
        )
        if (made.move is not None) != (MOVE in made.writer_flags):
            raise ValueError(MOVE)
        if made.reader_flags != tuple(body["reader_flags"]):
            raise ValueError("reader_flags")
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
    sizes += [settings.scale_count, settings.chunk_tokens, settings.chunk_overlap, settings.segments]
    for number in (*sizes, settings.codec.rank, settings.codec.bits, settings.codec.group):
        _whole(number, "settings", 1 << 32)
    if settings.chunk_tokens < 16 or 2 * settings.chunk_overlap >= settings.chunk_tokens:
        raise ValueError("chunk_tokens, chunk_overlap")
    if settings.segments == 0 or (settings.segments > 1) != ("segments" in value):
        raise ValueError("segments")
    if not all(type(flag) is bool for flag in (settings.prior_trained, settings.keep_text)):
        raise ValueError("settings")
    return settings
