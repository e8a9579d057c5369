"""Moving a bank to another prior: rows under it are collected beside the bank's own and take their place in one commit.
Knows rows, keys and the commit rule; not what a prior holds, nor how a gradient is made.

Until that commit the bank is what it was, to every reader and to other writers: the old prior answers, with its own
rows. What a killed move has made is named by the manifest under `move`, and the next one goes on from there.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from regrad_cli.bank import files, layout
from regrad_cli.bank.manifest import MOVE, FileEntry, Move, spans
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.bank.writer import Writer
from regrad_cli.errors import StorageFailed
from regrad_cli.records import BankSettings, RowRef, row_key, sha256_hex

UNDER_WAY, DONE, GIVEN_UP = "moving", "move", "move given up"  # what `bank log` calls them


def move_bank(path: Path, *, wait_s: float = 0.0) -> MovingWriter:
    """A writer that moves the bank to another prior, for a `with` block; clears what a crash left.

    wait_s   how long to wait for another writer
    raises   Locked, NoBank, DamagedFile, UnknownFormat, StorageFailed
    """
    return MovingWriter(path, wait_s)


def rows_to_move(snapshot: Snapshot, settings: BankSettings) -> list[RowRef]:
    """Live rows of the snapshot that have no row under `settings.prior` yet, in the order of the shards."""
    return _matched(snapshot, settings)[0]


def _matched(snapshot: Snapshot, settings: BankSettings) -> tuple[list[RowRef], dict[int, set[int]]]:
    """Each live row's counterpart among the moved ones: the same place of the same document, keyed by the new prior.

    A moved row whose passage was changed or removed meanwhile is nobody's; one that is damaged counts as not there.
    returns  the live rows that have none, and {position of a moved shard: its rows that have one}
    """
    moved = snapshot.moved()
    places: dict[tuple[str, int, int, bytes], RowRef] = {}
    if moved is not None and moved.settings == settings:
        for ref, passage, key in moved.passages(skip_damaged=True):
            places[passage.document, passage.ordinal, passage.offset, key] = ref
    missing: list[RowRef] = []
    kept: dict[int, set[int]] = {}
    for ref, passage, _ in snapshot.passages():
        key = row_key(passage, settings.model, settings.tokenizer, settings.prior)
        found = places.pop((passage.document, passage.ordinal, passage.offset, key), None)
        if found is None:
            missing.append(ref)
        else:
            kept.setdefault(found.shard, set()).add(found.row)
    return missing, kept


class MovingWriter(Writer):
    """Rows are added under the new prior: `begin`, then `add` and `commit` as often as wanted, then `switch`, `finish`.

    `rows_to_move` says what is missing; between `begin` and `switch` the snapshot's own rows stay as they are.
    """

    def __enter__(self) -> MovingWriter:
        super().__enter__()
        manifest = self.snapshot.manifest
        if manifest.operation == UNDER_WAY:  # go on in the run that was interrupted: one snapshot stays of both
            self._run = manifest.run
            self._own = [manifest]
        return self

    @property
    def _row_settings(self) -> BankSettings:
        move = self.snapshot.manifest.move
        return self.snapshot.settings if move is None else move.settings

    def remove(self, refs: Iterable[RowRef]) -> None:
        raise ValueError("a move removes nothing")

    def begin(self, settings: BankSettings, prior: bytes) -> None:
        """Commits that the bank is on its way to this prior; what an interrupted move to it has made is kept.

        settings   the bank's own, with the new prior and the shapes that follow from it
        prior      the prior's safetensors file
        raises     StorageFailed: the bank is as it was
        """
        if sha256_hex(prior) != settings.prior:
            raise ValueError("settings.prior is not the prior's SHA-256")
        if not settings.keep_text:
            raise ValueError("without text nothing can be computed anew")
        self._refuse_if_broken()
        name = layout.content_name("priors", settings.prior)
        with files.storage("write to the bank"):  # also where it is there: this heals one that was damaged
            files.publish(files.write_temporary(self.path / "tmp", [prior]), self.path / name)
            files.sync_folder(self.path / "priors")
        before = self.snapshot.manifest
        if before.move is None or before.move.settings != settings:
            move = Move(settings, FileEntry(settings.prior, len(prior)))
            self._publish(replace(before, operation=UNDER_WAY, move=move, writer_flags=(MOVE,)))

    def commit(self, operation: str = UNDER_WAY) -> int:
        """Makes the added rows part of the move. Returns the snapshot's number; with nothing added, the current one.

        raises  StorageFailed: the bank is as it was, what was added still is, and `commit` may be tried again
        """
        before = self.snapshot.manifest
        if before.move is None:
            raise ValueError("begin() comes first")
        self._refuse_if_broken()
        if not self.staged:
            return before.number
        shards = list(before.move.shards)
        with files.storage("write to the bank"):
            self._write_shards(shards)
        merged = self._merged(shards, before.move.settings, 0, len(before.move.shards))
        move = replace(before.move, shards=merged)
        number = self._publish(replace(before, operation=operation, move=move))
        self._forget_staged()
        return number

    def switch(self) -> int:
        """The one commit: the new prior and its rows take the place of the old. Returns the snapshot's number.

        raises  StorageFailed while a row of the bank has none under the new prior: the bank is as it was
        """
        before, move = self.snapshot.manifest, self.snapshot.manifest.move
        if move is None:
            raise ValueError("begin() comes first")
        self._refuse_if_broken()
        missing, kept = _matched(self.snapshot, move.settings)  # from the files, once more: they are what counts
        if missing:
            raise StorageFailed(
                f"{len(missing)} rows under the new prior are not there, or cannot be read back",
                "`regrad ingest --stale` computes them anew; the bank is as it was",
            )
        shards = tuple(
            replace(shard, removed=spans(set(range(shard.rows)) - kept[position]))
            for position, shard in enumerate(move.shards)
            if position in kept
        )
        self._tail = 0  # all of these shards are new: whichever are small may be merged
        return self._publish(
            replace(
                before,
                operation=DONE,
                settings=move.settings,
                prior=move.prior,
                shards=shards,
                index=None,
                counts=replace(before.counts, dead=sum(shard.dead for shard in shards)),
                move=None,
                writer_flags=(),
            )
        )

    def give_up(self) -> int:
        """Stays with the prior there is; what a move has made goes. Returns the snapshot's number."""
        self._refuse_if_broken()
        before = self.snapshot.manifest
        if before.move is None:
            return before.number
        return self._publish(replace(before, operation=GIVEN_UP, move=None, writer_flags=()))
