"""Reading every byte of a bank and comparing it with what its snapshots say. Knows all formats; repairs nothing.

A file is checked twice: as a whole against its name, and row by row, so that what is damaged can be told by document.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np

from regrad_cli.bank import layout
from regrad_cli.bank.damage import DamagedFile, Finding
from regrad_cli.bank.manifest import BLOCKS, FileEntry, Manifest, ShardEntry
from regrad_cli.bank.opening import check_format, read_manifest
from regrad_cli.bank.shards import ShardReader, parse_line
from regrad_cli.bank.store import Folder, Store
from regrad_cli.errors import NoBank, RegradError
from regrad_cli.records import BankSettings


def verify(path: Path, report: Callable[[int, int], None] | None = None) -> Iterator[Finding]:
    """Everything that is wrong with a bank, the newest snapshot's files first; notes (leftovers) last.

    report  told (bytes read, bytes in all)
    raises  NoBank if there is no bank at all
    """
    try:
        check_format(path)
    except NoBank:
        raise
    except RegradError as error:
        yield Finding(layout.FORMAT_FILE, error.finding.what if isinstance(error, DamagedFile) else error.message)
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
        except RegradError as error:
            yield Finding(name, error.message)
    yield from _chain(manifests)
    yield from _files(store, manifests, report)
    if len(manifests) == len(numbers):  # otherwise nobody knows what is named
        named = {name for manifest in manifests for name, _ in manifest.files()}
        for name in layout.content_files(path):
            if name not in named:
                yield Finding(name, "belongs to no snapshot; the next ingest clears it", note=True)
    if (path / "tmp").is_dir():
        for entry in sorted((path / "tmp").iterdir()):
            yield Finding(f"tmp/{entry.name}", "is a leftover; the next ingest clears it", note=True)


def _chain(manifests: list[Manifest]) -> Iterator[Finding]:
    """Each snapshot names its parent's hash; a parent may be gone, but not be another one."""
    by_number = {manifest.number: manifest for manifest in manifests}
    for manifest in manifests:
        if manifest.parent is not None:
            parent = by_number.get(manifest.parent[0])
            if parent is not None and (parent.sha256 != manifest.parent[1] or parent.number >= manifest.number):
                yield Finding(manifest.name, f"names another parent than the snapshot {parent.number} there is")
        if manifest.bank != manifests[0].bank:
            yield Finding(manifest.name, "belongs to another bank")


def _files(store: Store, manifests: list[Manifest], report: Callable[[int, int], None] | None) -> Iterator[Finding]:
    """Each file that a snapshot names, once."""
    entries: dict[str, FileEntry] = {}
    shards: dict[str, tuple[ShardEntry, BankSettings]] = {}
    for manifest in manifests:
        for name, entry in manifest.files():
            entries.setdefault(name, entry)
        for part in manifest.parts:
            for shard in part.shards:
                shards.setdefault(shard.name, (shard, part.settings))
    total = sum(entry.bytes for entry in entries.values())
    done = 0
    found: dict[str, str] = {}
    for name, entry in entries.items():
        problem = _whole_file(store, name, entry)
        if problem is not None:
            found[name] = problem
        done += entry.bytes
        if report is not None:
            report(done, total)
    for shard, settings in shards.values():
        yield from _shard(ShardReader(store, shard, settings), found)
    for manifest in manifests[:1]:
        yield from _counts(store, manifest)
    newest_index = manifests[0].index if manifests else None
    for name, problem in found.items():
        if name.startswith("index/"):
            # A cache: without it the answers are the same. Older snapshots' graphs go when a newer one is built.
            if newest_index is not None and newest_index.sha256 in name:
                yield Finding(name, f"{problem}; exact search is used instead", note=True)
        else:
            yield Finding(name, problem)


def _whole_file(store: Store, name: str, entry: FileEntry) -> str | None:
    try:
        with store.open(name, entry.bytes) as region:
            if region.sha256() != entry.sha256:
                return "does not match its checksum"
    except DamagedFile as error:
        return error.finding.what
    return None


def _shard(reader: ShardReader, found: dict[str, str]) -> Iterator[Finding]:
    """One shard row by row; takes its own two files out of `found` and reports them with the documents they touch."""
    entry, live = reader.entry, reader.live()
    documents: set[str] = set()
    damaged_rows = 0
    inside = ""
    for row in range(entry.rows):
        try:
            reader.row(row)
        except DamagedFile as error:
            inside = inside or error.finding.what
            if live[row]:
                damaged_rows += 1
                documents.update(error.finding.documents)
    for block in BLOCKS[1:]:
        try:
            reader.block(block)
        except DamagedFile as error:
            inside = inside or error.finding.what
            documents.update(error.finding.documents)
    if inside and not documents:
        documents = _documents_of_lines(reader)
    problems = {name: found.pop(name) for name in (entry.name, entry.docs_name) if name in found}
    for name, problem in problems.items():
        listed = f"; {damaged_rows} of {entry.live} passages" if damaged_rows else ""
        yield Finding(name, problem + listed, tuple(sorted(documents)))
    if inside and not problems:  # the files are what was written, but what was written does not agree with itself
        yield Finding(entry.name, inside, tuple(sorted(documents)))


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
