"""A shard: the rows of one commit in one safetensors file, their passages beside it as JSON lines. Knows bytes, shapes
and checksums; not what a gradient or an embedding means.

Row i of a shard belongs to line i of its docs file. Tensors, each one large matrix:

    line_ends   (rows,)    int64     where line i ends in the docs file, newline included
    tokens      (rows,)    int32
    embeddings  (rows, d)  float16
    scales      (rows, S)  float16
    checksums   (rows, 32) uint8     SHA-256 of the row: key, codes, scales, embedding, line
    codes       (rows, C)  uint8
    documents   (rows, 8)  uint8     the document's id
    keys        (rows, 32) uint8

One row is read with a few small reads and is proved by its own checksum; a block that is read whole (BLOCKS in
manifest.py) is proved by its hash in the manifest. Nothing is used before that.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, fields
from operator import attrgetter
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from regrad_cli.bank.damage import DamagedFile, DamagedRow
from regrad_cli.bank.manifest import ShardEntry
from regrad_cli.bank.store import Region, Store
from regrad_cli.records import BankSettings, Passage, canonical_json, document_id

HEADER_LIMIT = 1 << 16  # bytes; ours is under 1 kB, and a reader never believes a larger one
LINE_LIMIT = 16 << 20  # bytes of one passage with its source and title
ROW_COST_BYTES = 64 << 10  # what is read and hashed in the time that a row of its own takes beside its bytes (60 µs)
_ROW = b"gbank row 1\0"
DTYPES = {"I64": "<i8", "I32": "<i4", "F16": "<f2", "U8": "|u1"}
_FIELDS = tuple(field.name for field in fields(Passage))
_NAMES = frozenset(_FIELDS)
_KINDS = {(str, str, str, int, int, int, text) for text in (str, type(None))}  # exactly: JSON's true is an int too
_values = attrgetter(*_FIELDS)


class TensorPlace(NamedTuple):
    """Where a tensor lies in its file."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    size_bytes: int

    @property
    def row_bytes(self) -> int:
        return self.size_bytes // self.shape[0]


@dataclass(frozen=True, slots=True)
class Row:
    """One row, proved by its checksum. `line` is the passage as it stands in the docs file."""

    key: bytes
    codes: bytes
    scales: bytes
    embedding: bytes
    passage: Passage
    line: bytes
    checksum: bytes


def expected_tensors(settings: BankSettings, rows: int) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What a shard of this bank must hold, by name: dtype and shape."""
    return {
        "line_ends": ("I64", (rows,)),
        "tokens": ("I32", (rows,)),
        "embeddings": ("F16", (rows, settings.embedding_dim)),
        "scales": ("F16", (rows, settings.scale_count)),
        "checksums": ("U8", (rows, 32)),
        "codes": ("U8", (rows, settings.code_bytes)),
        "documents": ("U8", (rows, 8)),
        "keys": ("U8", (rows, 32)),
    }


def passage_line(passage: Passage) -> bytes:
    """A passage as its line in a docs file, newline included. Lone surrogates (odd file names) become JSON escapes."""
    text = canonical_json({field: getattr(passage, field) for field in _FIELDS})
    return text.encode("utf-8", "backslashreplace") + b"\n"


def parse_line(line: bytes) -> Passage:
    """raises ValueError if it is not a line that passage_line wrote"""
    try:
        value = json.loads(line.decode())
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
    if not isinstance(value, dict) or value.keys() != _NAMES:
        raise ValueError("other fields than a passage's")
    passage = Passage(**value)
    if tuple(map(type, _values(passage))) not in _KINDS:
        raise ValueError("a field is of another type")
    return passage


def row_checksum(key: bytes, codes: bytes, scales: bytes, embedding: bytes, line: bytes) -> bytes:
    """SHA-256 over all of a row; every part but the last is of the bank's fixed size, so none can run into another."""
    digest = hashlib.sha256(_ROW)
    for part in (key, codes, scales, embedding, line):
        digest.update(part)
    return digest.digest()


def parse_header(
    header: bytes, file_bytes: int, expected: dict[str, tuple[str, tuple[int, ...]]], name: str
) -> dict[str, TensorPlace]:
    """A safetensors header (its 8 length bytes included) as the places of exactly the expected tensors, as they lie.

    raises  DamagedFile on any other tensor, dtype or shape, and on places that overlap, leave a hole or leave the file
    """
    try:
        body: Any = json.loads(header[8:])
    except (ValueError, RecursionError) as error:
        raise DamagedFile(name, "has a header that is not JSON") from error
    if not isinstance(body, dict) or body.keys() - {"__metadata__"} != expected.keys():
        raise DamagedFile(name, "does not hold a shard's tensors")
    places: dict[str, TensorPlace] = {}
    for tensor, (dtype, shape) in expected.items():
        entry = body[tensor]
        size = int(np.dtype(DTYPES[dtype]).itemsize)
        for dimension in shape:
            size *= dimension
        if not isinstance(entry, dict) or entry.get("dtype") != dtype or entry.get("shape") != list(shape):
            raise DamagedFile(name, f"{tensor} is not {dtype} {list(shape)}")
        offsets = entry.get("data_offsets")
        if not isinstance(offsets, list) or len(offsets) != 2 or any(type(offset) is not int for offset in offsets):
            raise DamagedFile(name, f"{tensor} has no place")
        if offsets[1] - offsets[0] != size or offsets[0] < 0:
            raise DamagedFile(name, f"{tensor} lies at {offsets}, which is not {size} bytes")
        places[tensor] = TensorPlace(dtype, shape, len(header) + offsets[0], size)
    position = len(header)
    places = dict(sorted(places.items(), key=lambda item: (item[1].start, item[1].size_bytes)))
    for place in places.values():
        if place.start != position:
            raise DamagedFile(name, "has tensors that overlap or leave a hole")
        position += place.size_bytes
    if position != file_bytes:
        raise DamagedFile(name, f"has {file_bytes} bytes, its tensors end at {position}")
    return places


def _line_digest(line: bytes) -> bytes:
    return hashlib.blake2b(line, digest_size=16).digest()


class ShardReader:
    """Reads one shard of a snapshot, opening its files for each call; safe to use from several threads.

    Every method raises DamagedFile (DamagedRow for one row) rather than returning what no checksum proves, but for
    `unproved_…`.
    """

    def __init__(self, store: Store, entry: ShardEntry, settings: BankSettings) -> None:
        self.store, self.entry, self.settings = store, entry, settings
        self._places: dict[str, TensorPlace] | None = None
        self._documents: npt.NDArray[np.uint64] | None = None
        self._line_digests: tuple[npt.NDArray[np.int64], list[bytes]] | None = (
            None  # where lines end, what they hash to
        )

    def _layout(self, region: Region) -> dict[str, TensorPlace]:
        if self._places is None:
            if region.length < 8:
                raise DamagedFile(region.name, "has no header")
            length = int.from_bytes(region.read(0, 8), "little")
            if length > HEADER_LIMIT:
                raise DamagedFile(region.name, f"has a header of {length} bytes, which no shard has")
            header = region.read(0, 8 + length)
            if hashlib.sha256(header).hexdigest() != self.entry.blocks["header"]:
                raise DamagedFile(region.name, "has a damaged header")
            expected = expected_tensors(self.settings, self.entry.rows)
            self._places = parse_header(header, region.length, expected, region.name)
        return self._places

    def block(self, tensor: str) -> npt.NDArray[Any]:
        """A whole tensor, proved by its hash in the manifest; `tensor` is one of BLOCKS but the header."""
        with self.store.open(self.entry.name, self.entry.bytes) as region:
            place = self._layout(region)[tensor]
            buffer = np.empty(place.size_bytes, np.uint8)
            region.read_into(place.start, buffer.data)
        if hashlib.sha256(buffer.data).hexdigest() != self.entry.blocks[tensor]:
            raise DamagedFile(self.entry.name, f"{tensor} are damaged", self._known_documents(tensor))
        return buffer.view(DTYPES[place.dtype]).reshape(place.shape)

    def read_into(self, targets: Mapping[str, npt.NDArray[Any]]) -> None:
        """Fills these arrays, by tensor: contiguous, of its dtype and shape. The whole file is proved by its name;
        where that fails they hold what nothing proves."""
        with self.store.open(self.entry.name, self.entry.bytes) as region:
            places = self._layout(region)
            digest = hashlib.sha256(region.read(0, min(place.start for place in places.values())))
            for name, place in places.items():
                target = targets.get(name)
                data = np.empty(place.size_bytes, np.uint8) if target is None else target.reshape(-1).view(np.uint8)
                region.read_into(place.start, data.data)
                digest.update(data.data)
        if digest.hexdigest() != self.entry.sha256:
            raise DamagedFile(self.entry.name, "does not match its checksum")

    def embeddings(self) -> npt.NDArray[np.float16]:
        """(rows, d) float16"""
        return self.block("embeddings")

    def documents(self) -> npt.NDArray[np.uint64]:
        """(rows,) document ids as numbers, in the order of their hex digits. Kept: who looks for a document's rows asks
        twice."""
        if self._documents is None:
            self._documents = self.block("documents").view(">u8").reshape(-1).astype(np.uint64)
            self._documents.setflags(write=False)
        return self._documents

    def live_documents(self) -> npt.NDArray[np.uint64]:
        """Those of the rows that are not removed, in their order."""
        return self.documents()[self.live()]

    def _known_documents(self, damaged: str) -> tuple[str, ...]:
        """Whose rows lie here, as far as that can still be read."""
        if damaged == "documents":
            return ()
        try:
            return tuple(sorted({f"{number:016x}" for number in self.live_documents().tolist()}))
        except DamagedFile:
            return ()

    def live(self) -> npt.NDArray[np.bool_]:
        """(rows,) True where the row is not removed."""
        mask = np.ones(self.entry.rows, np.bool_)
        for start, end in self.entry.removed:
            mask[start:end] = False
        return mask

    def unproved_embeddings(self, rows: Sequence[int]) -> npt.NDArray[np.float16]:
        """(n, d) float16, straight from the file: for ordering candidates, never for an answer."""
        with self.store.open(self.entry.name, self.entry.bytes) as region:
            place = self._layout(region)["embeddings"]
            data = b"".join(region.read(place.start + row * place.row_bytes, place.row_bytes) for row in rows)
        return np.frombuffer(data, "<f2").reshape(len(rows), -1)

    def unproved_checksums(self) -> npt.NDArray[np.uint8]:
        """(rows, 32) uint8, straight from the file: for telling which rows to look at. A wrong one fails its row."""
        with self.store.open(self.entry.name, self.entry.bytes) as region:
            place = self._layout(region)["checksums"]
            return np.frombuffer(region.read(place.start, place.size_bytes), np.uint8).reshape(place.shape)

    def lines(self) -> Iterator[tuple[int, bytes]]:
        """(row, line) of all rows, the docs file proved by its name."""
        data, ends = self._docs()
        start = 0
        for row, end in enumerate(ends.tolist()):
            yield row, data[start:end]
            start = end

    def record_of(self, source: str) -> str | None:
        """The source of a live row that may be a record of this one, as `a.jsonl#7` of `a.jsonl`; None without one."""
        begin = canonical_json({"source": f"{source}#"})[1:-2].encode("utf-8", "surrogateescape")
        live = self.live()
        return next((parse_line(line).source for row, line in self.lines() if live[row] and begin in line), None)

    def chosen_lines(self, rows: Sequence[int], *, warm: bool = False) -> list[bytes]:
        """The lines of these rows, proved by the docs file's name, or each by its row where they are few. With `warm`,
        each line's digest is kept, and what is asked for later is read alone and proved by that."""
        settings = self.settings
        row_bytes = settings.code_bytes + 2 * (settings.scale_count + settings.embedding_dim)
        if not warm and len(rows) * (row_bytes + ROW_COST_BYTES) < self.entry.docs.bytes:
            return [row.line for row in self.rows(rows)]
        if self._line_digests is None:
            data, ends = self._docs()
            starts = np.append(0, ends[:-1])
            if warm:
                lines = (data[start:end] for start, end in zip(starts.tolist(), ends.tolist(), strict=True))
                self._line_digests = ends, [_line_digest(line) for line in lines]
            return [data[starts[row] : ends[row]] for row in rows]
        ends, digests = self._line_digests
        found = []
        with self.store.open(self.entry.docs_name, self.entry.docs.bytes) as region:
            for row in rows:
                start = int(ends[row - 1]) if row else 0
                found.append(region.read(start, int(ends[row]) - start))
                if _line_digest(found[-1]) != digests[row]:
                    raise DamagedFile(self.entry.docs_name, "is damaged", self._known_documents("docs"))
        return found

    def _docs(self) -> tuple[bytes, npt.NDArray[np.int64]]:
        """The docs file, proved by its name, and where its lines end."""
        ends = self.block("line_ends").reshape(-1)
        with self.store.open(self.entry.docs_name, self.entry.docs.bytes) as region:
            data = region.read(0, region.length)
        if hashlib.sha256(data).hexdigest() != self.entry.docs.sha256:
            raise DamagedFile(self.entry.docs_name, "is damaged", self._known_documents("docs"))
        wrong = np.flatnonzero((np.diff(ends, prepend=0) <= 0) | (ends > len(data)))
        if len(wrong):
            raise DamagedFile(self.entry.name, f"line_ends of row {wrong[0]} leave the docs file")
        if len(ends) and ends[-1] != len(data):
            raise DamagedFile(self.entry.docs_name, "has more lines than its shard has rows")
        return data, ends

    def row(self, row: int) -> Row:
        """One row with its passage, proved by its checksum. Reads that row only."""
        (found,) = self.rows([row])
        return found

    def rows(self, wanted: Iterable[int]) -> Iterator[Row]:
        """These rows in turn, each read when it is asked for and proved by its checksum; both files are opened once."""
        with ExitStack() as stack:
            region = stack.enter_context(self.store.open(self.entry.name, self.entry.bytes))
            places = self._layout(region)
            docs: Region | None = None

            def part(tensor: str, row: int) -> bytes:
                place = places[tensor]
                return region.read(place.start + row * place.row_bytes, place.row_bytes)

            for row in wanted:
                if not 0 <= row < self.entry.rows:
                    raise IndexError(f"row {row} of {self.entry.rows}")
                start = int.from_bytes(part("line_ends", row - 1), "little", signed=True) if row else 0
                end = int.from_bytes(part("line_ends", row), "little", signed=True)
                if not 0 <= start < end <= self.entry.docs.bytes or end - start > LINE_LIMIT:
                    raise self._damaged(row, "its place in the docs file is damaged")
                try:
                    if docs is None:
                        docs = stack.enter_context(self.store.open(self.entry.docs_name, self.entry.docs.bytes))
                    line = docs.read(start, end - start)
                except DamagedFile as error:
                    raise self._damaged(row, f"{error.finding.file} {error.finding.what}") from error
                parts = part("keys", row), part("codes", row), part("scales", row), part("embeddings", row)
                checksum = part("checksums", row)
                if row_checksum(*parts, line) != checksum:
                    raise self._damaged(row, "its checksum does not match", line)
                try:
                    passage = parse_line(line)
                except ValueError as error:
                    raise self._damaged(row, f"its line is not a passage ({error})") from error
                if passage.document != part("documents", row).hex():
                    raise self._damaged(row, "it names another document", line)
                yield Row(*parts, passage, line, checksum)

    def _damaged(self, row: int, what: str, line: bytes = b"") -> DamagedRow:
        """The error for one row, with its document's id as far as something still proves it."""
        document = source = None
        with suppress(DamagedFile):
            document = f"{int(self.documents()[row]):016x}"
        with suppress(ValueError):
            passage = parse_line(line)
            # A source proves itself: the id is its hash.
            if passage.document == document_id(passage.source) and document in (None, passage.document):
                document, source = passage.document, passage.source
        return DamagedRow(self.entry.name, row, what, document, source)
