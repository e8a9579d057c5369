"""Writing to a bank: rows staged, committed in one link, leftovers cleared. Knows the commit rule (bank-format.md,
rules 2 and 3) and the writer's lock; not where rows come from.

The order of a commit: every file written in tmp/, synced, renamed to its content's name; their folders synced; the
manifest written in tmp/ twice, synced, one of them named as its copy, the other linked under the next number; their
folder synced. The link is the commit.
"""

from __future__ import annotations

import re
import secrets
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
import numpy.typing as npt

from regrad_cli.bank import cleanup, files, index, layout
from regrad_cli.bank.building import build_shard
from regrad_cli.bank.commit import link_manifest, sync_shards, write_shard
from regrad_cli.bank.counting import Counting
from regrad_cli.bank.create import TOOL, now
from regrad_cli.bank.locks import hold_lock
from regrad_cli.bank.manifest import SHARD_ROWS, Manifest, ShardEntry, spans
from regrad_cli.bank.merging import files_of, merge, tail
from regrad_cli.bank.opening import check_format, newest_manifest
from regrad_cli.bank.shards import ShardReader
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.bank.store import Folder
from regrad_cli.errors import Locked, NonFinite, RegradError, StorageFailed
from regrad_cli.records import BankSettings, Passage, RowRef

SHARD_BYTES = 256 << 20  # a commit's rows are cut into shards no larger than this, nor longer than SHARD_ROWS
_DOCUMENT = re.compile(r"[0-9a-f]{16}\Z")


def rows_a_shard(settings: BankSettings) -> int:
    """Most rows that one shard may have."""
    row_bytes = settings.code_bytes + 2 * (settings.scale_count + settings.embedding_dim)
    return max(1, min(SHARD_ROWS, SHARD_BYTES // row_bytes))


def write_bank(path: Path, *, wait_s: float = 0.0) -> Writer:
    """A writer on the bank's newest snapshot, for a `with` block; clears what a crash left.

    wait_s   how long to wait for another writer
    raises   Locked, NoBank, DamagedFile, UnknownFormat, StorageFailed
    """
    return Writer(path, wait_s)


class Writer:
    """The one process that writes. Rows are staged by `add` and `remove` and become part of the bank in `commit`.

    snapshot   the bank as of the last commit. RowRefs of what was there before this writer stay valid until `finish`;
               those of rows that it added until the next commit, which may merge their shards
    """

    snapshot: Snapshot

    def __init__(self, path: Path, wait_s: float, *, once: bool = False) -> None:
        """`once`: it will commit once, so that less of a large bank has to be read."""
        self.path = path
        self._wait_s, self._once = wait_s, once
        self._run = secrets.token_hex(8)
        self._stack = ExitStack()
        self._own: list[Manifest] = []  # of the snapshots this writer committed; the older ones are dropped again
        self._broken = False
        self._merging = True  # small shards, until one cannot be
        self._counting = Counting()
        self._forget_staged()

    def __enter__(self) -> Writer:
        check_format(self.path)
        with ExitStack() as stack:
            stack.enter_context(hold_lock(self.path, self._wait_s))
            self.snapshot = Snapshot(Folder(self.path), newest_manifest(self.path, for_writing=True))
            with files.storage("write to the bank"):
                for name in layout.FOLDERS:
                    files.make_folder(self.path / name)
            cleanup.clear_leftovers(self.path, self.snapshot.manifest)
            self._stack = stack.pop_all()
        self._begin_run()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    # ── staging ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _forget_staged(self) -> None:
        self._passages: list[Passage] = []
        self._keys: list[bytes] = []
        self._codes: list[npt.NDArray[np.uint8]] = []
        self._scales: list[npt.NDArray[np.float16]] = []
        self._embeddings: list[npt.NDArray[np.float16]] = []
        self._removals: dict[int, set[int]] = {}

    @property
    def _row_settings(self) -> BankSettings:
        """What added rows are made for."""
        return self.snapshot.settings

    @property
    def staged(self) -> int:
        """Rows added since the last commit."""
        return len(self._passages)

    def add(
        self,
        passages: Sequence[Passage],
        keys: Sequence[bytes],
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float16],
        embeddings: npt.NDArray[np.float16],
    ) -> None:
        """Stages n rows: keys n × 32 bytes, codes (n, C) uint8, scales (n, S) float16, embeddings (n, d) float16.

        raises  NonFinite if a scale or an embedding is no finite number (nothing of the call is staged)
        """
        count, settings = len(passages), self._row_settings
        expected = (
            ("codes", codes, np.uint8, settings.code_bytes),
            ("scales", scales, np.float16, settings.scale_count),
            ("embeddings", embeddings, np.float16, settings.embedding_dim),
        )
        for name, array, dtype, width in expected:
            if array.dtype != dtype or array.shape != (count, width):
                raise ValueError(f"{name} are ({count}, {width}) {np.dtype(dtype)}, not {array.shape} {array.dtype}")
        if len(keys) != count or any(len(key) != 32 for key in keys):
            raise ValueError(f"keys are {count} × 32 bytes")
        if not all(_DOCUMENT.match(passage.document) for passage in passages):
            raise ValueError("a passage's document is 16 hex digits")
        for row, passage in enumerate(passages):
            if not (np.isfinite(scales[row]).all() and np.isfinite(embeddings[row]).all()):
                raise NonFinite(f"passage {passage.id} of {passage.source}: its gradient or embedding is not finite")
        if not settings.keep_text:
            passages = [replace(passage, text=None) for passage in passages]
        self._passages.extend(passages)
        self._keys.extend(map(bytes, keys))
        # Copies: what is committed must not change when the caller uses its buffers again.
        self._codes.append(codes.copy())
        self._scales.append(scales.copy())
        self._embeddings.append(embeddings.copy())

    def remove(self, refs: Iterable[RowRef]) -> None:
        """Stages the removal of rows of `snapshot`; one that is removed already is left so."""
        shards = self.snapshot.manifest.shards
        for ref in refs:
            if not (0 <= ref.shard < len(shards) and 0 <= ref.row < shards[ref.shard].rows):
                raise ValueError(f"{ref} is no row of snapshot {self.snapshot.number}")
            self._removals.setdefault(ref.shard, set()).add(ref.row)

    # ── committing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def commit(self, operation: str) -> int:
        """Makes what is staged part of the bank. Returns the snapshot's number; with nothing staged, the current one.

        raises  StorageFailed: the bank is as it was, what was staged still is, and `commit` may be tried again
        """
        self._refuse_if_broken()
        before = self.snapshot.manifest
        shards = [self._without(position, shard) for position, shard in enumerate(before.shards)]
        if not self._passages and tuple(shards) == before.shards:
            self._forget_staged()
            return before.number
        # Read before anything is written: a bank that is damaged there is noticed here.
        self._counting.prepare(self.snapshot, self._staged_documents() if self._once else None)
        with files.storage("write to the bank"):
            self._write_shards(shards)
        counts = self._counting.counts(self.snapshot, shards)
        merged = self._merged(shards, before.settings, self._found, len(before.shards))
        number = self._publish(replace(before, operation=operation, shards=merged, counts=counts))
        self._counting.committed()
        self._forget_staged()
        return number

    def _staged_documents(self) -> set[str]:
        """Those of the rows that are to come or to go."""
        found = {passage.document for passage in self._passages}
        for place, rows in self._removals.items():
            found |= {f"{number:016x}" for number in self.snapshot.reader(place).documents()[sorted(rows)].tolist()}
        return found

    def _without(self, position: int, shard: ShardEntry) -> ShardEntry:
        """The shard's entry with its staged removals as ranges."""
        staged = self._removals.get(position)
        if not staged:
            return shard
        return replace(shard, removed=spans(staged.union(*(range(start, end) for start, end in shard.removed))))

    def _write_shards(self, shards: list[ShardEntry]) -> None:
        """Writes the staged rows' files under their final names, syncs their folders, and lists them in `shards`."""
        if not self._passages:
            return
        codes, scales = np.concatenate(self._codes), np.concatenate(self._scales)
        embeddings = np.concatenate(self._embeddings)
        settings = self._row_settings
        most_rows = rows_a_shard(settings)
        for start in range(0, len(self._passages), most_rows):
            part = slice(start, start + most_rows)
            data, docs, entry = build_shard(
                settings, self._passages[part], self._keys[part], codes[part], scales[part], embeddings[part]
            )
            write_shard(self.path, entry, data, docs)
            known = [position for position, shard in enumerate(shards) if shard.sha256 == entry.sha256]
            if known:  # the very rows of an old shard, added again: it lives again instead of being named twice
                shards[known[0]] = entry
            else:
                shards.append(entry)
        sync_shards(self.path)

    def _publish(self, manifest: Manifest) -> int:
        """Links the manifest under the next number: the commit."""
        before = self.snapshot.manifest
        manifest = replace(
            manifest,
            number=before.number + 1,
            parent=(before.number, before.sha256),
            time=now(),
            tool=TOOL,
            run=self._run,
        )
        with files.storage("write to the bank"):
            # From the link until the folder is synced nobody can say which snapshot survives a power cut; a writer that
            # is stopped in between (a disk error, Ctrl-C) does not go on.
            self._broken = True
            try:
                manifest = link_manifest(self.path, manifest)
            except FileExistsError as error:
                raise Locked(
                    f"another process took snapshot {manifest.number}", "run the same command again: its work is kept"
                ) from error
            except BaseException:
                self._broken = (self.path / manifest.name).exists()
                raise
            self.snapshot = Snapshot(Folder(self.path), manifest)
            self._own.append(manifest)
            files.sync_folder(self.path / "snapshots")
            self._broken = False
        if len(self._own) > 2:  # one older snapshot stays beside the newest while the work goes on
            cleanup.drop_snapshots(self.path, self._own[:-2], manifest)
            del self._own[:-2]
        return manifest.number

    def _refuse_if_broken(self) -> None:
        if self._broken:
            raise StorageFailed(
                "the last commit could not be confirmed, so this writer stops", "run the same command again"
            )

    # ── merging ──────────────────────────────────────────────────────────────────────────────────────────────────────

    def _begin_run(self) -> None:
        """Notes which shards are there: their places stay until the run ends, and the small ones at the end until then
        are merged with its own."""
        manifest = self.snapshot.manifest
        self._found = len(manifest.shards)
        self._tail = tail([shard.rows for shard in manifest.shards], rows_a_shard(manifest.settings))

    def _merged(
        self,
        shards: Sequence[ShardEntry],
        settings: BankSettings,
        first: int,
        last: int,
        *,
        ended: bool = False,
        closed: bool = False,
    ) -> tuple[ShardEntry, ...]:
        """The shards with what is due of shards[first:last] merged. Where that fails (no room, or damage, which must
        not get a right name) nothing is merged any more: the rows stay where they are."""
        if self._merging:
            most = rows_a_shard(settings)
            try:
                return merge(self.path, shards, settings, most, first, last, ended=ended, closed=closed)
            except (OSError, MemoryError, RegradError):
                self._merging = False
        return tuple(shards)

    # ── ending ───────────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, report: Callable[[int, int], None] | None = None) -> int:
        """Ends the work: merges small shards at the end of the bank, builds the search graph if one is due, drops this
        writer's intermediate snapshots and the files only they named. Returns the number of the snapshot that stays.

        report  told (rows done, rows in all) while the graph is built
        """
        self._refuse_if_broken()
        manifest = self.snapshot.manifest
        covered: tuple[ShardEntry, ...] = ()
        if index.due(self.path, manifest) and (self._own or not index.lies_in(self.path, manifest)):
            covered = self._merged_at_end(closed=True)  # what a graph covers is merged before, for it cannot be after
            self._rebuild_index(replace(manifest, shards=covered), report)
        shards = self._merged_at_end()
        if shards != self.snapshot.manifest.shards:
            self._publish_besides(replace(self.snapshot.manifest, shards=shards))
        self._begin_run()
        cleanup.drop_snapshots(self.path, self._own[:-1], self.snapshot.manifest)
        del self._own[:-1]
        cleanup.remove_unnamed(self.path, files_of((*covered, *shards)) - files_of(self.snapshot.manifest.shards))
        return self.snapshot.number

    def _merged_at_end(self, *, closed: bool = False) -> tuple[ShardEntry, ...]:
        manifest = self.snapshot.manifest
        if not self._own:
            return manifest.shards  # nothing came in
        first = max(self._tail, manifest.index.shards if manifest.index is not None else 0)
        shards = manifest.shards
        return self._merged(shards, manifest.settings, first, len(shards), ended=True, closed=closed)

    def _publish_besides(self, manifest: Manifest) -> bool:
        """A snapshot of the same rows. They are committed, so where it finds no room that is no failure."""
        try:
            self._publish(manifest)
        except StorageFailed:
            if self._broken:
                raise
            return False
        return True

    def _rebuild_index(self, manifest: Manifest, report: Callable[[int, int], None] | None) -> None:
        readers = [ShardReader(Folder(self.path), shard, manifest.settings) for shard in manifest.shards]
        entry = index.build(self.path, manifest, readers, report)
        if entry is None or entry == manifest.index or not self._publish_besides(replace(manifest, index=entry)):
            return
        if manifest.index is not None:  # older snapshots that name it answer exactly, as they do on any other machine
            files.discard(self.path / layout.content_name("index", manifest.index.sha256))
            index.forget(manifest.index.sha256)


def remove_documents(path: Path, names: Sequence[str], *, wait_s: float = 0.0) -> dict[str, Any]:
    """Takes documents out of the bank; names are ids, unique beginnings of ids, or sources.

    returns  {"documents": [{"id", "source", "title", "passages"}], "passages", "snapshot"}
    raises   UsageProblem if a name fits none or several: then nothing is removed
    """
    with Writer(path, wait_s, once=True) as writer:
        removed = []
        for document in dict.fromkeys(writer.snapshot.find_document(name) for name in names):
            rows = list(writer.snapshot.passages(document))
            writer.remove(ref for ref, _, _ in rows)
            first = rows[0][1]
            removed.append({"id": document, "source": first.source, "title": first.title, "passages": len(rows)})
        writer.commit("rm")
        number = writer.finish()
    return {"documents": removed, "passages": sum(entry["passages"] for entry in removed), "snapshot": number}
