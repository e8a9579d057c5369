"""Reading a bank and comparing it with what its snapshots say: every byte, or a random share of its rows. Knows all
formats; repairs nothing.

Read whole, a file is checked twice: against its name, and row by row, so that what is damaged can be told by document.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import numpy as np

from regrad_cli.bank import layout
from regrad_cli.bank.damage import DamagedFile, Finding
from regrad_cli.bank.manifest import BLOCKS, FileEntry, Manifest, ShardEntry
from regrad_cli.bank.opening import check_format, lost_snapshot, read_copy, read_manifest
from regrad_cli.bank.packed import Packed
from regrad_cli.bank.shards import ShardReader, parse_line
from regrad_cli.bank.store import Folder, Store
from regrad_cli.errors import NoBank, RegradError, UnknownFormat
from regrad_cli.records import BankSettings

Report = Callable[[int, int], None]


@dataclass(frozen=True, slots=True)
class Sample:
    """A random share of a bank's rows and of its shards' blocks: `percent` of them, above 0 and at most 100."""

    percent: float
    seed: int


@dataclass(slots=True)
class Checked:
    """How much of a bank was looked at; right once all findings are told. Removed rows count, for they are read too."""

    percent: float = 100.0
    seed: int | None = None
    snapshots: int = 0
    rows: int = 0
    rows_total: int = 0
    blocks: int = 0
    blocks_total: int = 0


def verify(
    path: Path, report: Report | None = None, *, sample: Sample | None = None, checked: Checked | None = None
) -> Iterator[Finding]:
    """Everything that is wrong with a bank, the newest snapshot's files first; notes (leftovers) last.

    report   told (bytes read, bytes in all)
    sample   read this share of the rows and blocks instead of every byte; manifests, priors and sizes are checked all
    checked  is told what was looked at
    raises   NoBank if there is no bank at all; UnknownFormat where a newer version wrote any of it
    """
    work = _Work(report, sample, checked or Checked())
    if path.is_file():
        yield from _packed(path, work)
        return
    newer: UnknownFormat | None = None
    try:
        check_format(path)
    except NoBank:
        raise
    except UnknownFormat as error:
        newer = error
    except RegradError as error:
        yield Finding(layout.FORMAT_FILE, error.finding.what if isinstance(error, DamagedFile) else error.message)
    for name, what in layout.strange_folders(path):
        yield Finding(name, what)
    store = Folder(path)
    numbers = layout.snapshot_numbers(path)
    if not numbers:
        yield Finding("snapshots", "holds no snapshot")
    manifests: list[Manifest] = []
    for number in reversed(numbers):
        name = layout.snapshot_name(number)
        try:
            with store.open(name) as region:
                manifests.append(read_manifest(region))
        except DamagedFile as error:
            yield error.finding
        except UnknownFormat:
            raise
        except RegradError as error:
            yield Finding(name, error.message)
    if newer is not None and not manifests:
        raise newer
    if newer is not None:  # FORMAT changes together with the newest manifest, so that a repair puts it back
        yield Finding(layout.FORMAT_FILE, f"{newer.message}, and its snapshots are not")
    yield from _copies(path, {manifest.number: manifest for manifest in manifests})
    yield from unfit(manifests)
    yield from work.contents(store, manifests)
    if len(manifests) == len(numbers) and lost_snapshot(path) is None:  # otherwise nobody knows what is named
        named = {name for manifest in manifests for name, _ in manifest.files()}
        for name in layout.content_files(path):
            if name not in named:
                yield Finding(name, "belongs to no snapshot; the next ingest clears it", note=True)
    if (path / "tmp").is_dir() and not (path / "tmp").is_symlink():
        for entry in sorted((path / "tmp").iterdir()):
            yield Finding(f"tmp/{entry.name}", "is a leftover; the next ingest clears it", note=True)


def contents(path: Path, manifests: Sequence[Manifest], report: Report | None = None) -> Iterator[Finding]:
    """What is wrong with the files that these snapshots of a live bank name, the newest first: every byte of them."""
    return _Work(report, None, Checked()).contents(Folder(path), manifests)


def _packed(path: Path, work: _Work) -> Iterator[Finding]:
    """A packed bank: its files, and every byte between them."""
    try:
        store = Packed(path)
    except DamagedFile as error:
        yield error.finding
        return
    with store:
        yield from store.after_files()
        yield from work.contents(store, [store.manifest])


def _copies(path: Path, manifests: Mapping[int, Manifest]) -> Iterator[Finding]:
    """Each manifest's copy, as far as there is one: the same bytes, or a manifest where that itself cannot be read."""
    lost, there = lost_snapshot(path), layout.snapshot_numbers(path)
    if lost is not None:
        yield Finding(layout.snapshot_name(lost), "is missing, and its copy is there")
    for number in reversed(layout.snapshot_numbers(path, "copy")):
        name = layout.copy_name(number)
        if number not in there and number != lost:
            yield Finding(name, "is a leftover; the next ingest clears it", note=True)
            continue
        try:
            found = read_copy(path, number)
        except DamagedFile as error:
            yield error.finding
            continue
        except UnknownFormat:
            raise
        except RegradError as error:
            yield Finding(name, error.message)
            continue
        if number in manifests and found != manifests[number]:
            yield Finding(name, "is not the same as its manifest")


def unfit(manifests: Sequence[Manifest]) -> Iterator[Finding]:
    """Manifests that do not go together, the newest first. Each names its parent's hash; a parent may be gone, but not
    be another one."""
    by_number = {manifest.number: manifest for manifest in manifests}
    for manifest in manifests:
        if manifest.parent is not None:
            parent = by_number.get(manifest.parent[0])
            if parent is not None and (parent.sha256 != manifest.parent[1] or parent.number >= manifest.number):
                yield Finding(manifest.name, f"names another parent than the snapshot {parent.number} there is")
        if manifest.bank != manifests[0].bank:
            yield Finding(manifest.name, "belongs to another bank")


class _Work:
    """Looking at what some snapshots name, whole or a share of it, and telling how far that is and what it came to."""

    def __init__(self, report: Report | None, sample: Sample | None, checked: Checked) -> None:
        self.report, self.sample, self.checked = report, sample, checked
        self._found: dict[str, str] = {}  # what is wrong with each file as a whole, until it is told
        self._seen: set[str] = set()
        self._done = self._total = 0  # bytes
        if sample is not None:
            checked.percent, checked.seed = sample.percent, sample.seed

    def contents(self, store: Store, manifests: Sequence[Manifest]) -> Iterator[Finding]:
        """What is wrong with each file that a snapshot names, each once; `manifests` the newest first."""
        entries: dict[str, FileEntry] = {}
        shards: dict[str, tuple[ShardEntry, BankSettings]] = {}
        for manifest in manifests:
            for name, entry in manifest.files():
                entries.setdefault(name, entry)
            for part in manifest.parts:
                shards |= {shard.name: (shard, part.settings) for shard in part.shards if shard.name not in shards}
        self.checked.snapshots = len(manifests)
        self._total = sum(entry.bytes for entry in entries.values())
        for name, entry in entries.items():
            if not name.startswith(("shards/", "docs/")):
                self._file(store, name, entry)
                self._tell()
        chosen = self._chosen([shard for shard, _ in shards.values()])
        for (shard, settings), (rows, blocks) in zip(shards.values(), chosen, strict=True):
            for name in (shard.name, shard.docs_name):
                self._file(store, name, entries[name])
            yield from self._shard(ShardReader(store, shard, settings), rows, blocks)
            self._tell()
        for manifest in manifests[:1] if self.sample is None else ():
            yield from _counts(store, manifest)
        newest_index = manifests[0].index if manifests else None
        for name, problem in self._found.items():
            if name.startswith("index/"):
                # A cache: without it the answers are the same. Older snapshots' graphs go when a newer one is built.
                if newest_index is not None and newest_index.sha256 in name:
                    yield Finding(name, f"{problem}; exact search is used instead", note=True)
            else:
                yield Finding(name, problem)

    def _tell(self) -> None:
        if self.report is not None:
            self.report(self._done, self._total)

    def _chosen(self, shards: Sequence[ShardEntry]) -> Iterator[tuple[Sequence[int], Sequence[str]]]:
        """The rows and the blocks of each shard that are looked at: all of them, or the sample's share."""
        checked, sample, blocks = self.checked, self.sample, BLOCKS[1:]
        checked.rows = checked.rows_total = sum(shard.rows for shard in shards)
        checked.blocks = checked.blocks_total = len(shards) * len(blocks)
        if sample is None:
            yield from ((range(shard.rows), blocks) for shard in shards)
            return
        chance = random.Random(sample.seed)
        rows = _share(chance, [shard.rows for shard in shards], sample.percent)
        numbers = _share(chance, [len(blocks)] * len(shards), sample.percent)
        checked.rows, checked.blocks = sum(map(len, rows)), sum(map(len, numbers))
        yield from zip(rows, ([blocks[number] for number in each] for each in numbers), strict=True)

    def _file(self, store: Store, name: str, entry: FileEntry) -> None:
        """Compares a file as a whole, once; of a sample its size alone, but for priors, which have no rows."""
        if name in self._seen:
            return
        self._seen.add(name)
        self._done += entry.bytes
        try:
            with store.open(name, entry.bytes) as region:
                if (self.sample is None or name.startswith("priors/")) and region.sha256() != entry.sha256:
                    self._found[name] = "does not match its checksum"
        except DamagedFile as error:
            self._found[name] = error.finding.what

    def _shard(self, reader: ShardReader, rows: Sequence[int], blocks: Sequence[str]) -> Iterator[Finding]:
        """One shard row by row; takes its own two files out of what was found and tells them with the documents that
        are touched."""
        entry, live = reader.entry, reader.live()
        looked_at = int(live[list(rows)].sum()) if self.sample is not None else entry.live
        documents: set[str] = set()
        damaged_rows = 0
        inside = ""
        for row, error in _wrong_rows(reader, rows):
            inside = inside or error.finding.what
            if live[row]:
                damaged_rows += 1
                documents.update(error.finding.documents)
        for block in blocks:
            try:
                reader.block(block)
            except DamagedFile as error:
                inside = inside or error.finding.what
                documents.update(error.finding.documents)
        if inside and not documents:
            documents = _documents_of_lines(reader)
        listed = f"; {damaged_rows} of {looked_at} passages" if damaged_rows else ""
        listed += " that were looked at" if listed and self.sample is not None else ""
        problems = {name: self._found.pop(name) for name in (entry.name, entry.docs_name) if name in self._found}
        for name, problem in problems.items():
            yield Finding(name, problem + listed, tuple(sorted(documents)))
        if inside and not problems:  # read in part; or the files are what was written, and do not agree with themselves
            yield Finding(entry.name, inside + (listed if self.sample is not None else ""), tuple(sorted(documents)))


def _share(chance: random.Random, sizes: Sequence[int], percent: float) -> list[list[int]]:
    """Per cent of all that parts of these sizes hold, drawn from the whole: numbers within each part, ascending."""
    ends = np.cumsum(sizes, dtype=np.int64)
    total = int(ends[-1]) if len(ends) else 0
    drawn = np.array(sorted(chance.sample(range(total), math.ceil(total * percent / 100))), np.int64)
    parts = np.split(drawn, np.searchsorted(drawn, ends))
    return [(part - end + size).tolist() for part, end, size in zip(parts, ends, sizes, strict=False)]


def _wrong_rows(reader: ShardReader, rows: Sequence[int]) -> Iterator[tuple[int, DamagedFile]]:
    """Those of the rows that are not what their checksums say, each with what is wrong."""
    position = 0
    while position < len(rows):
        try:
            for _ in reader.rows(islice(rows, position, None)):
                position += 1
        except DamagedFile as error:
            yield rows[position], error
            position += 1


def _documents_of_lines(reader: ShardReader) -> set[str]:
    """Whose rows a shard held, by its docs file alone."""
    try:
        with reader.store.open(reader.entry.docs_name, reader.entry.docs.bytes) as region:
            lines = region.read(0, region.length).splitlines()
        return {parse_line(lines[int(row)]).document for row in np.flatnonzero(reader.live())}
    except (DamagedFile, ValueError, IndexError):
        return set()


def _counts(store: Store, manifest: Manifest) -> Iterator[Finding]:
    """The manifest's counts against its shards' own."""
    documents: set[int] = set()
    tokens = 0
    try:
        for shard in manifest.shards:
            reader = ShardReader(store, shard, manifest.settings)
            live = reader.live()
            documents.update(reader.documents()[live].tolist())
            tokens += int(reader.block("tokens")[live].sum(dtype=np.int64))
    except DamagedFile:
        return  # reported already
    if (len(documents), tokens) != (manifest.counts.documents, manifest.counts.tokens):
        yield Finding(manifest.name, f"counts other documents or tokens than its shards ({len(documents)}, {tokens})")
