"""Targets: a bank's files and its packed form. Where a checksum would stop what was changed, it is made right again, as
whoever makes a hostile bank would do.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import struct
from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from faketerminal import call
from made_banks import make_bank, tree

from regrad_cli.bank import files, index, layout, log, open_bank, pack_bank, remove_documents, unpack_bank, verify
from regrad_cli.bank import write_bank as open_to_write
from regrad_cli.bank.building import lay_out
from regrad_cli.bank.diff import differences
from regrad_cli.bank.locks import _holder
from regrad_cli.bank.manifest import Manifest
from regrad_cli.bank.packed import END, header, looks_packed, padding
from regrad_cli.bank.parsing import parse
from regrad_cli.bank.planning import plan_compaction
from regrad_cli.bank.repair import no_priors
from regrad_cli.bank.salvage import salvage
from regrad_cli.bank.shards import DTYPES, ShardReader, expected_tensors, parse_line, row_checksum
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.bank.store import Folder
from regrad_cli.bank.survey import survey
from regrad_cli.errors import Damaged, RegradError
from regrad_cli.records import RowRef, canonical_json, sha256_hex

from .mutations import Choose, in_bytes, in_json, in_lines
from .targets import Target

QUESTION = np.ones((1, 16), np.float32) / 4
MOST_ROWS = 6  # of a docs file that is put into a bank


class Banks:
    """A small bank with everything in it that the format has, and a copy for each target to spoil."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    @cached_property
    def whole(self) -> Path:
        files.System.fsync = staticmethod(os.fstat)  # type: ignore[assignment,method-assign]
        os.environ["REGRAD_STATE"] = str(self.scratch / "state")
        before, os.environ["REGRAD_INDEX_FROM"] = os.environ.get("REGRAD_INDEX_FROM"), "4"
        try:
            bank = make_bank(self.scratch / "whole", [("a.md", 4), ("b.md", 2)], [("c.md", 3), ("d.md", 2)])
        finally:
            os.environ.pop("REGRAD_INDEX_FROM")
            if before is not None:
                os.environ["REGRAD_INDEX_FROM"] = before
        remove_documents(bank, ["b.md", "d.md"])
        with open_bank(bank) as opened:
            assert opened.manifest.index is not None
            self.record_file = index._record_path(opened.manifest.index.sha256)
            self.record = self.record_file.read_bytes()
        return bank

    @cached_property
    def manifest(self) -> Manifest:
        with open_bank(self.whole) as opened:
            assert opened.manifest.index is not None
            return opened.manifest

    @cached_property
    def body(self) -> dict[str, Any]:
        """The manifest as JSON, without its own hash."""
        return {key: value for key, value in json.loads(self.manifest.to_bytes()[0]).items() if key != "sha256"}

    @cached_property
    def rows(self) -> dict[str, tuple[Any, ...]]:
        """Every row, removed ones too: passage's id → what a reader may say of it."""
        found = {}
        with open_bank(self.whole) as opened:
            for ref in _refs(opened):
                row = opened.row(ref)
                found[row.passage.id] = (row.passage, row.key, row.codes, row.scales, row.embedding)
        return found

    @cached_property
    def packed(self) -> bytes:
        stream = io.BytesIO()
        pack_bank(self.whole, stream)
        return stream.getvalue()

    def copy(self, name: str) -> Path:
        """A copy that is as `whole` again, whatever was done to it."""
        path = self.scratch / name / "b"
        shutil.rmtree(path, ignore_errors=True)
        shutil.copytree(self.whole, path)
        self.record_file.write_bytes(self.record)  # of the graph, which a copy that is compacted takes along
        return path


def _refs(opened: Snapshot) -> Iterator[RowRef]:
    for position, shard in enumerate(opened.manifest.shards):
        yield from (RowRef(position, row) for row in range(shard.rows))


def sealed(body: Any) -> bytes:
    """A manifest with its own hash made right; bytes that are none as they are."""
    if not isinstance(body, dict):
        return json.dumps(body).encode()
    body = {key: value for key, value in body.items() if key != "sha256"}
    try:
        digest = sha256_hex(canonical_json(body))
        return (canonical_json(body | {"sha256": digest}) + "\n").encode("utf-8", "replace")
    except (ValueError, RecursionError):  # NaN, half a character
        return json.dumps(body).encode()


def _loaded(data: bytes) -> Any:
    try:
        return json.loads(data)
    except (ValueError, RecursionError):
        return None


def _put_manifest(bank: Path, data: bytes) -> str:
    """Puts a manifest in the newest one's place, under the number that it says it has."""
    value = _loaded(data)
    content = data if value is None else sealed(value)
    number = value.get("number") if isinstance(value, dict) else None
    if type(number) is not int or not 0 < number < 10**12:
        number = layout.snapshot_numbers(bank)[-1]
    for kept in (bank / "snapshots").iterdir():
        kept.unlink()
    for name in (layout.snapshot_name(number), layout.copy_name(number)):
        (bank / name).write_bytes(content)
    return layout.snapshot_name(number)


# ── everything that reads a bank ────────────────────────────────────────────────────────────────────────────────────


def use(
    path: Path, right: dict[str, tuple[Any, ...]] | None, other: Path | None = None, *, shown: bool = False
) -> None:
    """All readers of a bank, and what plans a write; whatever does not raise must be right, where that is known.

    other   a bank to compare it with
    shown   through the commands as well, which print what it says of itself
    """
    attempts: list[Any] = [lambda: log(path), lambda: list(verify(path))]
    if path.is_dir():
        attempts.append(lambda: survey(path, no_priors))
    for attempt in attempts:
        _attempt(attempt)
    try:
        opened = open_bank(path)
    except RegradError:
        return
    with opened:
        attempts = [opened.stats, opened.prior_bytes, lambda: list(opened.documents()), lambda: opened.moved()]
        attempts += [lambda: opened.find_document("a.md"), lambda: plan_compaction(opened), lambda: _pack(path)]
        attempts += [lambda: _rows(opened, right), lambda: _passages(opened, right), lambda: _texts(opened, right)]
        attempts += [lambda: _search(opened, right), lambda: _salvage(opened, right)]
        if other is not None:
            attempts.append(lambda: _differences(opened, other))
        for attempt in attempts:
            _attempt(attempt)
    for words in (["stats"], ["ls"], ["log"], ["show", "a.md"]) if shown else ():
        _call("bank", *words, "--bank", path, tty=len(words[0]) % 2 == 0, COLUMNS="60")


def _call(*words: str | Path, **how: Any) -> None:
    shown = call(*words, **how)
    assert "please report it" not in shown.err and "Traceback" not in shown.err, shown.err


def _attempt(work: Any) -> None:
    try:
        work()
    except RegradError as error:
        assert error.message and error.kind != "unexpected", repr(error)


def _same(row: Any, right: dict[str, tuple[Any, ...]] | None) -> None:
    if right is not None:
        assert (row.passage, row.key, row.codes, row.scales, row.embedding) == right[row.passage.id]


def _rows(opened: Snapshot, right: dict[str, tuple[Any, ...]] | None) -> None:
    for ref in _refs(opened):
        try:
            _same(opened.row(ref), right)
        except Damaged:
            continue


def _passages(opened: Snapshot, right: dict[str, tuple[Any, ...]] | None) -> None:
    for _, passage, key in opened.passages(skip_damaged=True):
        assert right is None or right[passage.id][:2] == (passage, key)


def _texts(opened: Snapshot, right: dict[str, tuple[Any, ...]] | None) -> None:
    for _, passage in opened.texts(_refs(opened), skip_damaged=True):
        assert right is None or right[passage.id][0] == passage


def _search(opened: Snapshot, right: dict[str, tuple[Any, ...]] | None) -> None:
    if opened.settings.embedding_dim != QUESTION.shape[1]:
        return
    for warm in (False, True):
        for hit in opened.search(QUESTION, 3, warm=warm, skip_damaged=True)[0]:
            assert -1 <= hit.score <= 1
            assert right is None or right[hit.passage.id][0] == hit.passage


def _salvage(opened: Snapshot, right: dict[str, tuple[Any, ...]] | None) -> None:
    for shard in opened.manifest.shards:
        for row in salvage(opened.store, shard, opened.settings).rows.values():
            _same(row, right)


def _differences(opened: Snapshot, other: Path) -> None:
    with open_bank(other) as old:
        ones = np.ones(1 << 12)
        for pair in ((old, opened), (opened, old)):
            for _ in differences(*pair, lambda a, *_: (ones[: len(a)], ones[: len(a)]), skip_damaged=True):
                pass


def _pack(path: Path) -> None:
    stream = io.BytesIO()
    pack_bank(path, stream)
    again = io.BytesIO(stream.getvalue())
    target = path.parent / "unpacked"
    shutil.rmtree(target, ignore_errors=True)
    unpack_bank(again, target)
    shutil.rmtree(target)


# ── the targets ─────────────────────────────────────────────────────────────────────────────────────────────────────


def targets(scratch: Path) -> list[Target]:
    banks = Banks(scratch)

    def manifest_seeds() -> list[bytes]:
        moving = banks.body | {"move": {key: banks.body[key] for key in ("settings", "prior", "shards")}}
        moving |= {"writer_flags": ["move"], "oldest": 2}
        return [json.dumps(body).encode() for body in (banks.body, moving)]

    def manifest(data: bytes) -> None:
        for content in (data, sealed(_loaded(data))):
            for name in (banks.manifest.name, "snapshots/00000001.json"):
                for for_writing in (False, True):
                    _attempt(lambda c=content, n=name, w=for_writing: parse(c, n, for_writing=w))

    def bank(data: bytes) -> None:
        path = banks.copy("bank")
        _put_manifest(path, data)
        use(path, banks.rows, banks.whole, shown=True)

    def repair(data: bytes) -> None:
        """A writer and a repair on what a manifest says: nothing right may be lost, nothing may be written outside."""
        path = banks.copy("repair")
        _put_manifest(path, data)
        beside = _outside(path)

        def write() -> None:
            with open_to_write(path) as writer:
                writer.remove([ref for ref, _, _ in writer.snapshot.passages(skip_damaged=True)][:1])
                writer.commit("rm")
                writer.finish()

        _attempt(write)
        for words in (["bank", "repair", "--yes"], ["compact", "--yes"], ["bank", "repair", "--yes"]):
            _call(*words, "--bank", path)
        use(path, banks.rows)
        assert _outside(path) == beside

    def shard_header(data: bytes) -> None:
        """A safetensors header of somebody's choice before the rows of a shard, every hash right."""
        path, entry = banks.copy("header"), banks.manifest.shards[0]
        old = (path / entry.name).read_bytes()
        body = old[8 + int.from_bytes(old[:8], "little") :]
        start = struct.pack("<Q", len(data)) + data
        _forge(path, banks.manifest, start + body, (path / entry.docs_name).read_bytes(), {"header": _hash(start)})
        use(path, banks.rows)

    def shard_header_seeds() -> list[bytes]:
        old = (banks.whole / banks.manifest.shards[0].name).read_bytes()
        return [old[8 : 8 + int.from_bytes(old[:8], "little")]]

    def tensors(data: bytes) -> None:
        """What stands behind a shard's header, of somebody's choice, with every hash right but those of rows."""
        path, entry = banks.copy("tensors"), banks.manifest.shards[0]
        old = (path / entry.name).read_bytes()
        start = 8 + int.from_bytes(old[:8], "little")
        whole = old[:start] + data[: len(old) - start].ljust(len(old) - start, b"\0")
        blocks, position = {}, start
        for name, (dtype, shape) in expected_tensors(banks.manifest.settings, entry.rows).items():
            size = int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
            blocks[name] = _hash(whole[position : position + size])
            position += size
        _forge(path, banks.manifest, whole, (path / entry.docs_name).read_bytes(), blocks)
        use(path, None)

    def tensors_seeds() -> list[bytes]:
        old = (banks.whole / banks.manifest.shards[0].name).read_bytes()
        return [old[8 + int.from_bytes(old[:8], "little") :]]

    def docs(data: bytes) -> None:
        """Lines of somebody's choice as a shard's passages, every hash right, those of rows too."""
        lines = [line for line in data.splitlines(keepends=True)[:MOST_ROWS] if line]
        for line in lines:
            try:
                parse_line(line)
            except ValueError:
                continue
        if not lines:
            return
        path, settings = banks.copy("docs"), banks.manifest.settings
        with open_bank(banks.whole) as opened:
            rows = [opened.row(RowRef(0, number % 6)) for number in range(len(lines))]
        checks = [
            row_checksum(r.key, r.codes, r.scales, r.embedding, line) for r, line in zip(rows, lines, strict=True)
        ]
        columns = {
            "tokens": np.array([row.passage.tokens for row in rows], np.int32),
            "embeddings": np.frombuffer(b"".join(row.embedding for row in rows), "<f2"),
            "scales": np.frombuffer(b"".join(row.scales for row in rows), "<f2"),
            "checksums": np.frombuffer(b"".join(checks), np.uint8),
            "codes": np.frombuffer(b"".join(row.codes for row in rows), np.uint8),
            "documents": np.frombuffer(bytes.fromhex("".join(row.passage.document for row in rows)), np.uint8),
            "keys": np.frombuffer(b"".join(row.key for row in rows), np.uint8),
        }
        parts, text, entry = lay_out(settings, lines, columns)
        (path / entry.name).write_bytes(b"".join(parts))
        (path / entry.docs_name).write_bytes(text)
        counts = replace(banks.manifest.counts, passages=len(lines), dead=0)
        made = replace(banks.manifest, shards=(entry,), counts=counts, index=None)
        (path / made.name).write_bytes(made.to_bytes()[0])
        use(path, None, banks.whole, shown=True)

    def docs_seeds() -> list[bytes]:
        return [(banks.whole / shard.docs_name).read_bytes() for shard in banks.manifest.shards]

    def damage(data: bytes) -> None:
        """One file of a bank, named by the first byte, with other bytes: without an error only what is right."""
        names = _names(banks)
        path = banks.copy("damage")
        (path / names[data[0] % len(names) if data else 0]).write_bytes(data[1:])
        use(path, banks.rows)
        _call("bank", "repair", "--yes", "--bank", path)
        use(path, banks.rows)

    def damage_seeds() -> list[bytes]:
        names = _names(banks)
        return [bytes([number]) + (banks.whole / name).read_bytes() for number, name in enumerate(names)]

    def packed(data: bytes, *, signed: bool = False) -> None:
        path = banks.scratch / "packed" / "b.gbank"
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(data)
        looks_packed(data[:1536])
        _attempt(lambda: use(path, banks.rows))
        target = path.parent / "made"
        shutil.rmtree(target, ignore_errors=True)
        beside = _outside(target)
        try:
            unpack_bank(io.BytesIO(data), target)
        except RegradError:
            assert not target.exists()
        else:
            assert signed or [finding for finding in verify(target) if not finding.note] == []
        assert _outside(target) == beside

    def packed_manifest(data: bytes) -> None:
        """A packed bank whose manifest is of somebody's choice, its own hash and every header right."""
        value = _loaded(data)
        content = sealed(value) if isinstance(value, dict) else data
        try:
            found = parse(content, banks.manifest.name)
            names = {name: entry.bytes for name, entry in replace(found, index=None).files()}
        except RegradError:
            names = {name: entry.bytes for name, entry in replace(banks.manifest, index=None).files()}
        parts = [("FORMAT", layout.FORMAT_TEXT), (banks.manifest.name, content)]
        for name, size in names.items():
            file = banks.whole / name
            if size <= 1 << 16:
                parts.append((name, (file.read_bytes() if file.is_file() else b"").ljust(size, b"\0")[:size]))
        made = b"".join(header(name, len(part)) + part + padding(len(part)) for name, part in parts) + END
        packed(made, signed=True)

    def graph(data: bytes) -> None:
        """A search graph of somebody's choice is never given to hnswlib; nor is any without this machine's record."""
        path, manifest = banks.copy("graph"), banks.manifest
        assert manifest.index is not None
        file = path / layout.content_name("index", manifest.index.sha256)
        right = (banks.whole / layout.content_name("index", manifest.index.sha256)).read_bytes()
        file.write_bytes(data)
        with open_bank(path) as opened:
            assert (index.load(Folder(path), manifest) is None) == (data != right)
            _search(opened, banks.rows)
        if data != right:  # the manifest agrees with it, and still this machine did not write it
            forged = replace(manifest, index=replace(manifest.index, sha256=_hash(data), bytes=len(data)))
            (path / layout.content_name("index", _hash(data))).write_bytes(data)
            (path / forged.name).write_bytes(forged.to_bytes()[0])
            assert index.load(Folder(path), forged) is None
            with open_bank(path) as opened:
                _search(opened, banks.rows)

    def graph_seeds() -> list[bytes]:
        assert banks.manifest.index is not None
        return [(banks.whole / layout.content_name("index", banks.manifest.index.sha256)).read_bytes()]

    def graph_record(data: bytes) -> None:
        """This machine's record of a graph, damaged: no trust, no crash."""
        path = banks.copy("record")
        banks.record_file.write_bytes(data)
        loaded = index.load(Folder(path), banks.manifest)
        value, right = _loaded(data), json.loads(banks.record)
        assert (loaded is not None) == (isinstance(value, dict) and value.get("coverage") == right["coverage"])

    def graph_record_seeds() -> list[bytes]:
        assert banks.whole
        return [banks.record]

    def marker(data: bytes) -> None:
        """FORMAT, and the lock's signature, of somebody's choice."""
        path = banks.copy("marker")
        (path / "lock").write_bytes(data)
        assert len(_holder(path / "lock")) < 200
        (path / "FORMAT").write_bytes(data)
        use(path, banks.rows)

    return [
        Target("manifest", "a snapshot's manifest", manifest, manifest_seeds, in_json),
        Target("bank", "a bank whose manifest is signed anew, to every reader", bank, manifest_seeds, in_json),
        Target("repair", "the same to writers, `compact` and `bank repair`", repair, manifest_seeds, in_json),
        Target("shard-header", "a shard's safetensors header, signed", shard_header, shard_header_seeds, in_json),
        Target("shard-tensors", "a shard's tensors, signed", tensors, tensors_seeds),
        Target("docs", "a shard's passages, signed", docs, docs_seeds, in_lines),
        Target(
            "damage", "any file of a bank, unsigned, to readers and to `bank repair`", damage, damage_seeds, _damage
        ),
        Target("packed", "a packed bank, to readers and to `bank unpack`", packed, lambda: [banks.packed]),
        Target("packed-manifest", "a packed bank's manifest, signed", packed_manifest, manifest_seeds, in_json),
        Target("graph", "a search graph", graph, graph_seeds),
        Target("graph-record", "this machine's record of one", graph_record, graph_record_seeds, in_json),
        Target(
            "marker", "FORMAT and the lock's signature", marker, lambda: [layout.FORMAT_TEXT, b'{"pid":1,"host":"x"}']
        ),
    ]


def _damage(data: bytes, choose: Choose) -> bytes:
    return data[:1] + in_bytes(data[1:], choose)


def _hash(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _names(banks: Banks) -> list[str]:
    return ["FORMAT", banks.manifest.name, *(name for name, _ in banks.manifest.files())]


def _outside(path: Path) -> dict[str, bytes]:
    """Everything beside a bank, and the names of what lies there."""
    return {name: data for name, data in tree(path.parent).items() if not name.startswith(f"{path.name}/")}


def _forge(path: Path, manifest: Manifest, data: bytes, docs: bytes, blocks: dict[str, str]) -> None:
    """Puts a first shard of somebody's choice into a bank, with the hashes of file and blocks right."""
    entry = manifest.shards[0]
    made = replace(entry, sha256=_hash(data), bytes=len(data), blocks=entry.blocks | blocks)
    (path / made.name).write_bytes(data)
    (path / made.docs_name).write_bytes(docs)
    forged = replace(manifest, shards=(made, *manifest.shards[1:]), index=None)
    (path / manifest.name).write_bytes(forged.to_bytes()[0])
    with open_bank(path) as opened:
        for each in opened.manifest.shards:
            ShardReader(opened.store, each, opened.settings)
