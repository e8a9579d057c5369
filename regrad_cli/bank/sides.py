"""One side of a comparison: the rows of a snapshot that the other may not have, and what is read of them. Knows readers
and digests; not what differs. Text is read once and kept as a digest.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import suppress
from typing import NamedTuple

import numpy as np
import numpy.typing as npt

from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.manifest import ShardEntry
from regrad_cli.bank.matching import NONE, Places, Words, as_words
from regrad_cli.bank.shards import Row, ShardReader, parse_line
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.records import BankSettings, Passage, RowRef, canonical_json, row_key, sha256_hex

Identify = Callable[[Passage, bytes], bytes]  # a row's passage and key → 16 bytes that only the same text has
_LARGEST = 2**63 - 1


class Heading(NamedTuple):
    """What a document is called, by its first passage that was read."""

    ordinal: int
    source: str
    title: str


class Lines(NamedTuple):
    """What stands in the lines of n rows.

    places (n,) among the side's rows · documents (n,) · ordinals (n,) · digests (n, 2): equal where the text is
    """

    places: Places
    documents: npt.NDArray[np.uint64]
    ordinals: npt.NDArray[np.int64]
    digests: Words

    @property
    def names(self) -> Words:
        """(n, 3): document and text."""
        return np.column_stack((self.documents, self.digests))

    def chosen(self, at: Places) -> Lines:
        return Lines(*(column[at] for column in self))  # type: ignore[arg-type]


class Side:
    """Rows are taken in with `take`; the arrays have an entry for each, in the order of the shards.

    documents   (n,) uint64 ids as numbers
    checksums   (n, 2) uint64, the first half of each row's checksum, which nothing proves here
    headings    of documents whose lines were read, by number
    """

    def __init__(self, snapshot: Snapshot, *, skip_damaged: bool) -> None:
        self.snapshot = snapshot
        self.settings: BankSettings = snapshot.settings
        self.headings: dict[int, Heading] = {}
        self._skip_damaged = skip_damaged
        self._parts: list[tuple[npt.NDArray[np.uint64], Words, Places]] = []
        self._places: list[int] = []
        self._elsewhere: list[npt.NDArray[np.uint64]] = []
        self._lost: set[int] = set()
        self._readers: dict[int, ShardReader] = {}

    def reader(self, position: int) -> ShardReader:
        reader = self._readers.get(position)
        if reader is None:
            entry = self.snapshot.manifest.shards[position]
            reader = self._readers[position] = ShardReader(self.snapshot.store, entry, self.settings)
        return reader

    def pass_over(self, error: DamagedFile) -> None:
        """Notes what is damaged, where that is to be skipped; raises it otherwise."""
        if not self._skip_damaged:
            raise error
        if error.finding not in self.snapshot.damaged:
            self.snapshot.damaged.append(error.finding)

    @property
    def damaged_documents(self) -> set[int]:
        """Whose rows could not all be read, as far as that is known."""
        return self._lost | {int(name, 16) for finding in self.snapshot.damaged for name in finding.documents}

    # ── taking rows in ───────────────────────────────────────────────────────────────────────────────────────────────

    def take(self, position: int, wanted: npt.NDArray[np.bool_]) -> None:
        """Takes these rows of a shard in; of its other live rows only the documents."""
        reader = self.reader(position)
        try:
            documents, checksums = reader.documents(), reader.unproved_checksums()
        except DamagedFile as error:
            self.pass_over(error)
            self._lost |= self._documents_of_lines(reader)
            return
        rows = np.flatnonzero(wanted)
        self._parts.append((documents[rows], as_words(checksums[rows], 32), rows))
        self._places.append(position)
        self._elsewhere.append(np.unique(documents[reader.live() & ~wanted]))

    @staticmethod
    def _documents_of_lines(reader: ShardReader) -> set[int]:
        """Whose rows a shard holds that cannot be read, by its docs file alone; none where that is damaged too."""
        with suppress(DamagedFile, ValueError, IndexError):
            with reader.store.open(reader.entry.docs_name, reader.entry.docs.bytes) as region:
                data = region.read(0, region.length)
            if sha256_hex(data) == reader.entry.docs.sha256:
                lines = data.splitlines()
                return {int(parse_line(lines[row]).document, 16) for row in np.flatnonzero(reader.live()).tolist()}
        return set()

    def end_taking(self) -> None:
        """Ends the taking in."""
        none = (np.zeros(0, np.uint64), np.zeros((0, 2), np.uint64), NONE)
        columns = zip(none, *self._parts, strict=True)
        self.documents, self.checksums, self._rows = (np.concatenate(column) for column in columns)
        self._shards = np.repeat(np.array(self._places, np.intp), [len(rows) for _, _, rows in self._parts])
        self.known = np.unique(np.concatenate([self.documents, *self._elsewhere]))
        self._parts, self._elsewhere = [], []

    def has(self, documents: npt.NDArray[np.uint64], shards: list[int]) -> npt.NDArray[np.bool_]:
        """Which of these documents, in ascending order, have live rows in shards that were not taken in."""
        found = np.zeros(len(documents), np.bool_)
        for position in shards:
            entry: ShardEntry = self.snapshot.manifest.shards[position]
            after_first = np.searchsorted(documents, np.uint64(int(entry.first, 16)), "left")
            if after_first == np.searchsorted(documents, np.uint64(int(entry.last, 16)), "right"):
                continue  # none of them lies between its first and its last
            try:
                reader = self.reader(position)
                found |= np.isin(documents, reader.live_documents())
            except DamagedFile as error:
                self.pass_over(error)
        return found

    # ── what is read of rows that were taken in ──────────────────────────────────────────────────────────────────────

    def ref(self, place: int) -> RowRef:
        return RowRef(int(self._shards[place]), int(self._rows[place]))

    def read(self, places: Places, identify: Identify | None, found: list[Lines]) -> Iterator[int]:
        """What stands in the lines of these rows, ordered by document and ordinal, is added to `found`; yields how many
        rows are done. Those that are damaged and passed over are left out. Fills `headings`.

        identify   None: all digests are zero
        """
        parts: list[Lines] = []
        offsets: list[npt.NDArray[np.int64]] = []
        done = 0
        for position, chosen in self._by_shard(places):
            kept: list[int] = []
            digests: list[bytes] = []
            numbers: list[list[int]] = []
            for place, passage, key in self._passages(position, chosen, with_keys=identify not in (None, by_text)):
                document = int(self.documents[place])
                before = self.headings.get(document)
                if before is None or passage.ordinal < before.ordinal:
                    self.headings[document] = Heading(passage.ordinal, passage.source, passage.title)
                kept.append(place)
                digests.append(bytes(16) if identify is None else identify(passage, key))
                numbers.append([max(-_LARGEST, min(number, _LARGEST)) for number in (passage.ordinal, passage.offset)])
            at = np.array(kept, np.intp)
            table = np.array(numbers, np.int64).reshape(-1, 2)
            parts.append(Lines(at, self.documents[at], table[:, 0], as_words(b"".join(digests), 16)))
            offsets.append(table[:, 1])
            done += len(chosen)
            yield done
        nothing = Lines(NONE, self.documents[NONE], np.zeros(0, np.int64), np.zeros((0, 2), np.uint64))
        all_lines = Lines(*(np.concatenate(column) for column in zip(nothing, *parts, strict=True)))
        order = np.lexsort((np.concatenate([nothing.ordinals, *offsets]), all_lines.ordinals, all_lines.documents))
        found.append(all_lines.chosen(order))

    def _by_shard(self, places: Places) -> Iterator[tuple[int, Places]]:
        """Ascending places, a shard's at a time."""
        ends = np.flatnonzero(np.diff(self._shards[places], append=-1)) + 1
        for chosen in np.split(places, ends)[:-1]:
            yield int(self._shards[chosen[0]]), chosen

    def _passages(self, position: int, places: Places, *, with_keys: bool) -> Iterator[tuple[int, Passage, bytes]]:
        """Each row's place, its passage, and its key where it is asked for; the rows are of one shard."""
        reader, refs = self.reader(position), {self.ref(place): place for place in places.tolist()}
        keys = np.zeros((0, 32), np.uint8)
        try:
            if with_keys:
                keys = reader.block("keys")
        except DamagedFile as error:
            self.pass_over(error)
            return
        for ref, passage in self.snapshot.texts(refs, skip_damaged=self._skip_damaged):
            place = refs[ref]
            if passage.document != f"{self.documents[place]:016x}":
                what = f"line {ref.row} names another document than its row"
                self.pass_over(DamagedFile(reader.entry.docs_name, what))
                continue
            yield place, passage, keys[ref.row].tobytes() if with_keys else b""

    def gradients(self, places: Places) -> tuple[npt.NDArray[np.uint8], npt.NDArray[np.float16], npt.NDArray[np.bool_]]:
        """Codes (n, C) and scales (n, S) of these rows, each proved by its checksum, and which could be read (n,)."""
        codes = np.zeros((len(places), self.settings.code_bytes), np.uint8)
        scales = np.zeros((len(places), self.settings.scale_count), np.float16)
        read = np.zeros(len(places), np.bool_)
        shards, rows = self._shards[places], self._rows[places]
        order = np.lexsort((rows, shards))
        for at, row in zip(order.tolist(), self._rows_of(shards[order], rows[order]), strict=True):
            if row is not None:
                codes[at] = np.frombuffer(row.codes, np.uint8)
                scales[at] = np.frombuffer(row.scales, "<f2")
                read[at] = True
        return codes, scales, read

    def _rows_of(self, shards: Places, rows: Places) -> Iterator[Row | None]:
        """These rows, ordered by shard; None in the place of one that is damaged."""
        ends = np.flatnonzero(np.diff(shards, append=-1)) + 1
        start = 0
        for end in ends.tolist():
            reader, wanted = self.reader(int(shards[start])), rows[start:end].tolist()
            start = end
            given = 0
            try:
                for row in reader.rows(wanted):
                    given += 1
                    yield row
            except DamagedFile as error:
                self.pass_over(error)
                yield None
                for row_number in wanted[given + 1 :]:
                    single = None
                    try:
                        single = reader.row(row_number)
                    except DamagedFile as another:
                        self.pass_over(another)
                    yield single

    def text(self, ref: RowRef) -> Passage | None:
        """One row's passage, proved by its checksum; None where it is damaged and that is to be skipped."""
        try:
            return self.reader(ref.shard).row(ref.row).passage
        except DamagedFile as error:
            self.pass_over(error)
            return None


def identities(old: BankSettings, new: BankSettings) -> tuple[Identify, Identify] | None:
    """How the text of either side's rows is told from another. None where it cannot be told.

    Where both keep their text, by title and text. Otherwise by the row's key, which is a hash of the text and of what
    its gradient depends on; where one side keeps its text and the other depends on something else, by the key that the
    text would have there.
    """
    if old.keep_text and new.keep_text:
        return by_text, by_text
    if (old.model, old.tokenizer, old.prior) == (new.model, new.tokenizer, new.prior):
        return _by_key, _by_key
    if old.keep_text:
        return _by_key_under(new), _by_key
    if new.keep_text:
        return _by_key, _by_key_under(old)
    return None


def by_text(passage: Passage, key: bytes) -> bytes:
    text = canonical_json([passage.title, passage.text]).encode("utf-8", "surrogatepass")
    return hashlib.blake2b(text, digest_size=16).digest()


def _by_key(passage: Passage, key: bytes) -> bytes:
    return key[:16]


def _by_key_under(settings: BankSettings) -> Identify:
    def identify(passage: Passage, key: bytes) -> bytes:
        return row_key(passage, settings.model, settings.tokenizer, settings.prior)[:16]

    return identify
