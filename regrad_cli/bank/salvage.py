"""What can still be proved of a damaged shard: its rows one by one, and all of it where the rest follows from them.
Knows the layout and the checksums; writes nothing, and believes nothing that no checksum proves.

Of a shard's blocks only `embeddings`, `scales` and `codes` say what nothing else says. The header follows from shapes;
where lines end, tokens and documents from the docs file; keys from text; checksums from all of these. So whatever else
is damaged is made again and the whole is compared with the file's name, which proves what no row's checksum can.
"""

from __future__ import annotations

import errno
import hashlib
import struct
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass

from regrad_cli.bank.building import shard_header
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.files import storage_failed
from regrad_cli.bank.manifest import ShardEntry
from regrad_cli.bank.shards import (
    HEADER_LIMIT,
    LINE_LIMIT,
    Row,
    TensorPlace,
    expected_tensors,
    parse_header,
    parse_line,
    row_checksum,
)
from regrad_cli.bank.store import Region, Store
from regrad_cli.records import BankSettings, Passage, document_id, row_key, sha256_hex

SECTOR = 4096  # bytes; what a disk that cannot read one of them loses
_GONE = {errno.ENOENT, errno.ENOTDIR, errno.ELOOP, errno.ENXIO, errno.EIO}
_UNIQUE = ("codes", "scales", "embeddings")
_ROW_REST = 32 + 8 + 32  # bytes a row of what follows the codes, or lies before them, and can be made again


@dataclass(frozen=True, slots=True)
class Lost:
    """A row that nothing proves any more: whose it was, as far as something tells."""

    row: int
    document: str | None
    source: str | None


@dataclass(frozen=True, slots=True)
class Salvaged:
    """What is left of a shard.

    rows   those that are proved, removed ones too
    lost   the others
    files  names of its files that are not what they are named after, with their content as it was written; None where
           that cannot be made again
    """

    rows: dict[int, Row]
    lost: tuple[Lost, ...]
    files: dict[str, bytes | None]

    @property
    def whole(self) -> bool:
        """Whether putting its files back, byte for byte, makes it right."""
        return bool(self.files) and None not in self.files.values() and not self.lost


def salvage(store: Store, entry: ShardEntry, settings: BankSettings) -> Salvaged:
    """Reads both files of a shard as far as they can be read, and proves what can be proved.

    raises  StorageFailed for what is no damage: a missing permission, a file system that does not answer
    """
    return _Wreck(store, entry, settings).salvage()


def readable(store: Store, name: str, most_bytes: int) -> bytes | None:
    """The beginning of a file, with zeros where the disk cannot read it; None if there is no such file.

    raises  StorageFailed for what is no damage
    """
    try:
        with store.open(name) as region:
            return b"".join(_pieces(region, min(region.length, most_bytes)))
    except DamagedFile as error:
        refuse_other_trouble(error)
        return None


def _pieces(region: Region, length: int) -> Iterator[bytes]:
    for start in range(0, length, 1 << 20):
        count = min(1 << 20, length - start)
        try:
            yield region.read(start, count)
            continue
        except DamagedFile as error:
            refuse_other_trouble(error)
        for at in range(start, start + count, SECTOR):
            size = min(SECTOR, start + count - at)
            try:
                yield region.read(at, size)
            except DamagedFile as error:
                refuse_other_trouble(error)
                yield bytes(size)


def _beginning(store: Store, name: str, size_bytes: int) -> tuple[bytearray, bool]:
    """What there is of the first bytes of a file that should have so many, and whether it has more."""
    data = bytearray(readable(store, name, size_bytes + 1) or b"")
    is_longer = len(data) > size_bytes
    del data[size_bytes:]
    return data, is_longer


def refuse_other_trouble(error: DamagedFile) -> None:
    """raises StorageFailed for what is no damage (too many open files, a network file system that is away)"""
    cause: BaseException | None = error
    while isinstance(cause, DamagedFile):
        cause = cause.__cause__
    if isinstance(cause, OSError) and cause.errno not in _GONE:
        raise storage_failed("read the bank", cause) from error


class _Wreck:
    """A shard's two files as they are, and the proofs tried on them.

    data    of the shard's file, as far as there is any; docs likewise
    lines   every line by its row, where the docs file is what its name says
    """

    def __init__(self, store: Store, entry: ShardEntry, settings: BankSettings) -> None:
        self.entry, self.settings = entry, settings
        self.data, self.data_are_longer = _beginning(store, entry.name, entry.bytes)
        docs, self.docs_are_longer = _beginning(store, entry.docs_name, entry.docs.bytes)
        self.docs = bytes(docs)
        self.header, self.places = self._layout()
        self.split = [line + b"\n" for line in self.docs.split(b"\n")[:-1]]
        self.docs_are_right = sha256_hex(self.docs) == entry.docs.sha256
        self.lines = self.split if self.docs_are_right and len(self.split) == entry.rows else None

    def _layout(self) -> tuple[bytes, dict[str, TensorPlace] | None]:
        """The header that the manifest proves, and the places it gives; without one, that of our own layout."""
        length = int.from_bytes(self.data[:8], "little")
        own = shard_header(self.settings, self.entry.rows)
        stored = bytes(self.data[: 8 + length]) if length <= HEADER_LIMIT else b""
        candidates = sorted((stored, own), key=lambda each: sha256_hex(each) != self.entry.blocks["header"])
        for header in candidates:
            with suppress(DamagedFile):
                expected = expected_tensors(self.settings, self.entry.rows)
                return header, parse_header(header, self.entry.bytes, expected, self.entry.name)
        return own, None

    def salvage(self) -> Salvaged:
        rows = dict(self._proved_rows())
        files: dict[str, bytes | None] = {}
        if not self._is_named_right():
            files[self.entry.name] = None
            if self._make_again(rows):
                files[self.entry.name], rows = bytes(self.data), dict(self._proved_rows())
        elif self.data_are_longer:
            files[self.entry.name] = bytes(self.data)
        if not self.docs_are_right or self.docs_are_longer:
            docs = self.docs if self.docs_are_right else b"".join(rows[row].line for row in sorted(rows))
            files[self.entry.docs_name] = docs if sha256_hex(docs) == self.entry.docs.sha256 else None
        return Salvaged(rows, tuple(self._lost(rows)), files)

    def _is_named_right(self) -> bool:
        return hashlib.sha256(self.data).hexdigest() == self.entry.sha256

    # ── one row ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _part(self, tensor: str, row: int) -> bytes:
        if self.places is None:
            return b""
        place = self.places[tensor]
        start = place.start + row * place.row_bytes
        return bytes(self.data[start : start + place.row_bytes])

    def _block_is_right(self, tensor: str) -> bool:
        if self.places is None:
            return False
        place = self.places[tensor]
        block = memoryview(self.data)[place.start : place.start + place.size_bytes]
        return hashlib.sha256(block).hexdigest() == self.entry.blocks[tensor]

    def _proved_rows(self) -> Iterator[tuple[int, Row]]:
        for number in range(self.entry.rows):
            row = self._proved_row(number)
            if row is not None:
                yield number, row

    def _proved_row(self, number: int) -> Row | None:
        codes, scales, embedding = (self._part(name, number) for name in _UNIQUE)
        key, checksum = self._part("keys", number), self._part("checksums", number)
        if len(checksum) < 32:
            return None
        for line in self._lines_for(number):
            passage = _passage(line)
            if passage is None:
                continue
            for each in dict.fromkeys((key, *self._made_key(passage))):
                if row_checksum(each, codes, scales, embedding, line) == checksum:
                    return Row(each, codes, scales, embedding, passage, line, checksum)
        return None

    def _lines_for(self, number: int) -> Iterable[bytes]:
        """What may be this row's line: the one of its number, and the one where the shard says that it lies."""
        if self.lines is not None:
            return (self.lines[number],)
        start = int.from_bytes(self._part("line_ends", number - 1), "little", signed=True) if number else 0
        end = int.from_bytes(self._part("line_ends", number), "little", signed=True)
        stored = self.docs[start:end] if 0 <= start < end <= start + LINE_LIMIT else b""
        return dict.fromkeys(line for line in (stored, *self.split[number : number + 1]) if line)

    def _made_key(self, passage: Passage) -> tuple[bytes, ...]:
        """The row's key from its text, where the bank keeps one."""
        if passage.text is None:
            return ()
        return (row_key(passage, self.settings.model, self.settings.tokenizer, self.settings.prior),)

    # ── the whole file ───────────────────────────────────────────────────────────────────────────────────────────────

    def _make_again(self, rows: dict[int, Row]) -> bool:
        """Makes what follows from the rest again, first with the checksums that are there, then with those that fit
        what is there; keeps the first that gives the file its name."""
        missing = self.entry.bytes - len(self.data)
        if self.places is None or missing > self.entry.rows * _ROW_REST:
            return False
        before = bytes(self.data)
        self.data[: len(self.header)] = self.header
        self.data.extend(bytes(missing))
        keys_are_right = self._block_is_right("keys")
        end = 0
        for number in range(self.entry.rows):
            row = rows.get(number)
            line = row.line if row is not None else self.lines[number] if self.lines is not None else None
            passage = None if line is None else _passage(line)
            if line is None or passage is None:
                end = -1  # where later lines end is not known either, but as the shard says it
                continue
            if end >= 0:
                end += len(line)
                self._put("line_ends", number, struct.pack("<q", end))
            self._put("documents", number, bytes.fromhex(passage.document))
            self._put("tokens", number, struct.pack("<i", passage.tokens))
            made = (row.key,) if row is not None else () if keys_are_right else self._made_key(passage)
            for key in made:
                self._put("keys", number, key)
        if self._is_named_right():
            return True
        for number, line in enumerate(self.lines or ()):
            key, codes, scales, embedding = (self._part(name, number) for name in ("keys", *_UNIQUE))
            self._put("checksums", number, row_checksum(key, codes, scales, embedding, line))
        if self._is_named_right():
            return True
        self.data = bytearray(before)
        return False

    def _put(self, tensor: str, row: int, value: bytes) -> None:
        assert self.places is not None
        place = self.places[tensor]
        start = place.start + row * place.row_bytes
        self.data[start : start + place.row_bytes] = value

    # ── whose a lost row was ─────────────────────────────────────────────────────────────────────────────────────────

    def _lost(self, rows: dict[int, Row]) -> Iterator[Lost]:
        """The other rows. A line of a docs file that is right says whose it is; of another one a source proves itself,
        for the id is its hash."""
        sources = {row.passage.document: row.passage.source for row in rows.values()}
        ids_are_right = self._block_is_right("documents")
        for number in (number for number in range(self.entry.rows) if number not in rows):
            document = self.entry.first if self.entry.first == self.entry.last else None
            if ids_are_right:
                document = self._part("documents", number).hex()
            source = sources.get(document or "")
            for passage in map(_passage, self._lines_for(number)):
                if passage is None or document not in (None, passage.document):
                    continue
                if self.lines is not None or document_id(passage.source) == passage.document:
                    document, source = passage.document, passage.source
            yield Lost(number, document, source)


def _passage(line: bytes) -> Passage | None:
    """The passage of a line, if it is one that a shard has room for."""
    with suppress(ValueError):
        passage = parse_line(line)
        if 0 <= passage.tokens < 1 << 31 and len(bytes.fromhex(passage.document)) == 8:
            return passage
    return None
