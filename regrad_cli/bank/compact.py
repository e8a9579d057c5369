"""Rewriting a bank in its canonical form, without removed rows, and dropping what came before. Knows rows, the commit
rule and which snapshots are to stay; not how a gradient is decoded: that is a function it is handed.

Files are written beside those that are there, one snapshot is committed, and only then the older ones go. Until that
commit the bank is what it was, and what was written goes again if it does not come to one: on an error at once, after
a kill with the next writer. After it, whatever keeps an older snapshot from going (a reader, a kill, an error of the
disk), the manifest says that it is not meant to stay, and the next writer drops it.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Generator, Iterator
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from regrad_cli.bank import cleanup, files, index, layout
from regrad_cli.bank.building import lay_out
from regrad_cli.bank.canonical import CanonicalShard
from regrad_cli.bank.commit import sync_shards, write_shard
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.manifest import Counts, ShardEntry
from regrad_cli.bank.planning import Compacted, Plan, nothing_changed, quarantined_files, size_on_disk
from regrad_cli.bank.shards import DTYPES, Row, ShardReader, expected_tensors, row_checksum
from regrad_cli.bank.writer import Writer
from regrad_cli.errors import Damaged, NonFinite, StorageFailed
from regrad_cli.records import BankSettings

PROGRESS_ROWS = 256

Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float16]
Recode = Callable[[Codes, Scales], tuple[Codes, Scales]]


def compact_bank(path: Path, *, wait_s: float = 0.0) -> CompactingWriter:
    """A writer that compacts the bank, for a `with` block; clears what a crash left.

    wait_s   how long to wait for another writer
    raises   Locked, NoBank, DamagedFile, UnknownFormat, StorageFailed; UsageProblem for a packed bank
    """
    return CompactingWriter(path, wait_s)


class CompactingWriter(Writer):
    """`plan_compaction` of its snapshot, then `compact` to the end, then `end`."""

    def __enter__(self) -> CompactingWriter:
        super().__enter__()
        self._merging = False  # the canonical form decides which rows stand together
        self._bytes_before, self._quarantined = size_on_disk(self.path), len(quarantined_files(self.path))
        return self

    def compact(self, plan: Plan, recode: Recode | None = None) -> Generator[int, None, None]:
        """Rewrites what is to be rewritten, commits, and drops what is to go. Yields how many of the rows are done.

        recode   (n, C) codes and (n, S) scales of the bank's codec → the same gradients under plan.settings' codec
        raises   DamagedFile, NonFinite, StorageFailed: the bank is as it was, and so is the room it takes
        """
        self._refuse_if_broken()
        if plan.commits:
            yield from self._rewrite(plan, recode)
        cleanup.clear_leftovers(self.path, self.snapshot.manifest)
        cleanup.empty_folder(self.path / "quarantine")

    def end(self, plan: Plan, report: Callable[[int, int], None] | None = None) -> Compacted:
        """As `finish`; returns what it all came to."""
        number = self.finish(report)
        old = plan.snapshot.manifest.index
        if old is not None and not (self.path / layout.content_name("index", old.sha256)).exists():
            index.forget(old.sha256)
        left = set(layout.snapshot_numbers(self.path))
        dropped = tuple(number for number in plan.drop if number not in left)
        held = tuple(sorted(number for number in left if number < self.snapshot.manifest.oldest))
        return plan.outcome(
            bytes=(self._bytes_before, size_on_disk(self.path)),
            dropped=dropped,
            quarantined=self._quarantined - len(quarantined_files(self.path)),
            number=number,
            held=held,
        )

    def _rewrite(self, plan: Plan, recode: Recode | None) -> Generator[int, None, None]:
        before = self.snapshot.manifest
        self._refuse_without_room(plan)
        shards: list[ShardEntry] = []
        written: list[str] = []
        done = 0
        try:
            with files.storage("compact the bank"), nothing_changed():
                for shard in plan.form.shards:
                    if shard.standing is not None:
                        self._prove(plan.readers[shard.standing])
                        shards.append(before.shards[shard.standing])
                    else:
                        shards.append((yield from self._write_canonical(plan, shard, recode, done, written)))
                    done += len(shard.rows)
                    yield done
                sync_shards(self.path)
            counts = Counts(plan.form.documents, plan.form.rows, sum(shard.tokens for shard in shards))
            self._publish(
                replace(
                    before,
                    operation="compact",
                    settings=plan.settings,
                    shards=tuple(shards),
                    index=before.index if tuple(shards) == before.shards else None,
                    counts=counts,
                    oldest=plan.keep[0] if plan.keep else before.number + 1,
                )
            )
        except BaseException:  # Ctrl-C too
            cleanup.remove_unnamed(self.path, written)
            raise

    def _refuse_without_room(self, plan: Plan) -> None:
        """An estimate: what else fills the disk meanwhile is met where it happens."""
        needed = plan.written_bytes
        with suppress(OSError):
            disk = os.statvfs(self.path)
            if needed > (free := disk.f_bavail * disk.f_frsize):
                raise StorageFailed(
                    f"compacting {self.path} needs {needed:,} bytes beside what is there, and {free:,} are free",
                    "free some space, or `regrad bank pack` to another disk and unpack it there",
                )

    @staticmethod
    def _prove(reader: ShardReader) -> None:
        """A shard that stays as it is: older copies of its rows are about to go, so it must be whole."""
        entry = reader.entry
        with reader.store.open(entry.name, entry.bytes) as region:
            if region.sha256() == entry.sha256:
                return
        for _ in reader.rows(range(entry.rows)):  # names the document, if it is a row that is damaged
            pass
        raise DamagedFile(entry.name, "does not match its checksum")

    def _write_canonical(
        self, plan: Plan, shard: CanonicalShard, recode: Recode | None, done: int, written: list[str]
    ) -> Generator[int, None, ShardEntry]:
        """Writes one shard and its docs file; adds their names to `written` before they are there."""
        count = len(shard.rows)
        lines = [b""] * count
        tensors: dict[str, npt.NDArray[Any]] = {
            name: np.empty(shape, DTYPES[dtype])
            for name, (dtype, shape) in expected_tensors(plan.snapshot.settings, count).items()
            if name != "line_ends"
        }
        for number, (place, row) in enumerate(_read(plan, shard)):
            _put(row, place, tensors, lines)
            if number % PROGRESS_ROWS == 0:
                yield done + number
        if recode is not None:
            _recode(tensors, lines, recode, plan.settings)
        data, docs, entry = lay_out(plan.settings, lines, tensors)
        written += [entry.docs_name, entry.name]
        write_shard(self.path, entry, data, docs)
        return entry


def _read(plan: Plan, shard: CanonicalShard) -> Iterator[tuple[int, Row]]:
    """Each row of a canonical shard and its place there, in the order in which they lie on disk."""
    order = np.lexsort((shard.rows, shard.shards))
    for group in np.split(order, np.flatnonzero(np.diff(shard.shards[order])) + 1):
        reader = plan.readers[shard.shards[group[0]]]
        yield from zip(group.tolist(), reader.rows(shard.rows[group].tolist()), strict=True)


def _put(row: Row, place: int, tensors: dict[str, npt.NDArray[Any]], lines: list[bytes]) -> None:
    passage = row.passage
    if not 0 <= passage.tokens < 1 << 31:
        raise Damaged(f"passage {passage.id} says that it has {passage.tokens} tokens", "`regrad bank rm` removes it")
    lines[place] = row.line
    tensors["tokens"][place] = passage.tokens
    parts = {"keys": row.key, "codes": row.codes, "checksums": row.checksum}
    for name, data in (parts | {"documents": bytes.fromhex(passage.document)}).items():
        tensors[name][place] = np.frombuffer(data, np.uint8)
    tensors["scales"][place] = np.frombuffer(row.scales, "<f2")
    tensors["embeddings"][place] = np.frombuffer(row.embedding, "<f2")


def _recode(tensors: dict[str, npt.NDArray[Any]], lines: list[bytes], recode: Recode, settings: BankSettings) -> None:
    """Puts the codes and scales of another codec into `tensors`, and the checksums that follow from them."""
    codes, scales = recode(tensors["codes"], tensors["scales"])
    expected = expected_tensors(settings, len(lines))
    if (codes.shape, scales.shape) != (expected["codes"][1], expected["scales"][1]):
        raise ValueError(f"codes {codes.shape} and scales {scales.shape} are not those of {settings.codec}")
    bad = np.flatnonzero(~np.isfinite(scales).all(axis=1))
    if len(bad):
        document = tensors["documents"][bad[0]].tobytes().hex()
        raise NonFinite(
            f"{len(bad)} gradients are not finite under the codec {settings.codec}, one of document {document}",
            "the bank is as it was: choose another codec",
        )
    tensors["codes"], tensors["scales"] = codes, scales
    for place, line in enumerate(lines):
        key, embedding = tensors["keys"][place].tobytes(), tensors["embeddings"][place].tobytes()
        checksum = row_checksum(key, codes[place].tobytes(), scales[place].tobytes(), embedding, line)
        tensors["checksums"][place] = np.frombuffer(checksum, np.uint8)
