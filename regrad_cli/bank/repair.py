"""Bringing a damaged live bank back to where every command works: what is known again is put back, rows that are proved
are kept, the rest is given up by name. Knows the commit rule; what can be done is survey.py's.

Files that are put back get the very bytes that their names or their manifests prove, at any time: a bank is never worse
for that. Whatever changes what the bank says is one new snapshot, whose link is the commit; only after it do damaged
files leave their places, for quarantine/. So a repair that is killed or fails can be run again.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

import numpy as np

from regrad_cli.bank import cleanup, files, layout, quarantine
from regrad_cli.bank.building import lay_out
from regrad_cli.bank.commit import link_manifest
from regrad_cli.bank.create import TOOL, now
from regrad_cli.bank.damage import DamagedFile, Finding
from regrad_cli.bank.locks import hold_lock
from regrad_cli.bank.manifest import MOVE, Counts, Manifest, Move, ShardEntry
from regrad_cli.bank.opening import check_format
from regrad_cli.bank.salvage import Salvaged, salvage
from regrad_cli.bank.shards import Row, ShardReader
from regrad_cli.bank.store import Folder
from regrad_cli.bank.survey import Back, DamagedShard, LostDocument, Plan, Priors, survey
from regrad_cli.bank.verification import Report
from regrad_cli.records import BankSettings, sha256_hex


class PutBack(NamedTuple):
    """A file that is as it was written again."""

    file: str
    whence: str


class Rewritten(NamedTuple):
    """A shard that was written anew with the rows that are proved."""

    file: str
    kept: int
    live: int


class Dropped(NamedTuple):
    """A snapshot that left the history."""

    snapshot: int
    why: str


class Quarantined(NamedTuple):
    """A file, and what it is called in quarantine/."""

    file: str
    name: str


@dataclass(frozen=True, slots=True)
class Repaired:
    """What a repair came to, or would come to.

    snapshot, passages   the newest snapshot now, and the live passages in it
    damage               what was wrong
    lost                 documents that lost passages; they can be ingested again
    left                 what is still wrong
    """

    path: str
    snapshot: int
    passages: int
    damage: tuple[Finding, ...]
    put_back: tuple[PutBack, ...]
    rewritten: tuple[Rewritten, ...]
    lost: tuple[LostDocument, ...]
    back: Back | None
    dropped_snapshots: tuple[Dropped, ...]
    index_dropped: bool
    move_given_up: bool
    quarantined: tuple[Quarantined, ...]
    left: tuple[Finding, ...]
    dry_run: bool


def no_priors(settings: BankSettings) -> Iterator[bytes]:
    """No candidate for a damaged prior."""
    yield from ()


def repair_bank(
    path: Path,
    *,
    priors: Priors = no_priors,
    wait_s: float = 0.0,
    dry_run: bool = False,
    report: Report | None = None,
) -> Repairer:
    """A repair of the live bank, for a `with` block: `plan` tells what it comes to, `carry_out` does it.

    priors   for settings whose prior is damaged: bytes that may be that prior; those whose hash fits are put back
    wait_s   how long to wait for another writer
    dry_run  only the plan is wanted: no byte is changed, not of the lock either
    report   told (bytes read, bytes in all) while the bank is read
    raises   as survey does; Locked, UsageProblem for a packed bank
    """
    return Repairer(path, priors, wait_s, dry_run, report)


class Repairer:
    """The one process that writes, with a way in of its own: a writer would refuse what is to be repaired here."""

    plan: Plan

    def __init__(self, path: Path, priors: Priors, wait_s: float, dry_run: bool, report: Report | None) -> None:
        self.path = path
        self._priors, self._wait_s, self._dry_run, self._report = priors, wait_s, dry_run, report
        self._stack = ExitStack()
        self._quarantined: list[Quarantined] = []

    def __enter__(self) -> Repairer:
        if self.path.is_file():
            check_format(self.path)
        if not layout.looks_like_a_bank(self.path):
            raise layout.no_bank(self.path)
        with ExitStack() as stack:
            stack.enter_context(hold_lock(self.path, self._wait_s, dry_run=self._dry_run))
            self.plan = survey(self.path, self._priors, self._report)
            self._stack = stack.pop_all()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._stack.close()

    def carry_out(self) -> Repaired:
        """Does what the plan says.

        raises  StorageFailed, DamagedFile (it got worse meanwhile): no worse than it was, and it can be run again
        """
        assert not self._dry_run
        newest, held = self.plan.base, list[int]()
        with files.storage("repair the bank"):
            if not self.plan.damage:
                return self._result(newest.number, newest.counts.passages, held, dry_run=False)
            for name in layout.FOLDERS:
                files.make_folder(self.path / name)
            cleanup.clear_claims(self.path)
            self._put_back()
            if self.plan.number is not None:
                newest = self._commit(self.plan.number)
            held = self._clear_away(newest)
        return self._result(newest.number, newest.counts.passages, held, dry_run=False)

    def foreseen(self) -> Repaired:
        """What it would come to; nothing is changed."""
        base = self.plan.base
        lost = sum(each.passages for each in self.plan.lost)
        return self._result(self.plan.number or base.number, base.counts.passages - lost, [], dry_run=True)

    def _result(self, number: int, passages: int, held: list[int], *, dry_run: bool) -> Repaired:
        plan = self.plan
        rewritten = (
            Rewritten(shard.name, len(plan.kept(shard)), shard.live)
            for part in plan.base.parts
            for shard in part.shards
            if plan.broken(shard) is not None
        )
        dropped = plan.retired | dict.fromkeys(plan.unreadable, "cannot be read")
        again = "is being read: when that has ended, run `regrad bank repair` again to drop it"
        return Repaired(
            path=str(self.path),
            snapshot=number,
            passages=passages,
            damage=tuple(plan.damage),
            put_back=tuple(PutBack(*each) for each in plan.put_back.items()),
            rewritten=tuple(rewritten),
            lost=tuple(plan.lost),
            back=plan.back,
            dropped_snapshots=tuple(Dropped(*each) for each in sorted(dropped.items()) if each[0] not in held),
            index_dropped=plan.no_index,
            move_given_up=plan.no_move,
            quarantined=tuple(self._quarantined),
            left=(*plan.left, *(Finding(layout.snapshot_name(number), again) for number in held)),
            dry_run=dry_run,
        )

    # ── what is known again ──────────────────────────────────────────────────────────────────────────────────────────

    def _put_back(self) -> None:
        """Every file whose content is known again; the manifests last, so that what they name is there before."""
        for name, data in self._known():
            self._note(name, quarantine.keep(self.path, name))
            temporary = files.write_temporary(self.path / "tmp", [data], layout.PUT_BACK)
            files.publish(temporary, self.path / name)
            files.sync_folder((self.path / name).parent)

    def _known(self) -> Iterator[tuple[str, bytes]]:
        plan = self.plan
        for shard in plan.shards.values():
            for name, data in self._salvaged(shard).files.items() if shard.whole else ():
                if data is not None:
                    assert sha256_hex(data) in name
                    yield name, data
        yield from plan.priors.items()
        if layout.FORMAT_FILE in plan.put_back:
            yield layout.FORMAT_FILE, layout.FORMAT_TEXT
        for number, manifest in plan.manifests.items():
            for name in (layout.copy_name(number), manifest.name):
                if name in plan.put_back:
                    yield name, manifest.to_bytes()[0]

    def _salvaged(self, shard: DamagedShard) -> Salvaged:
        """What is left of it, read once more: a bank's worth of rows is not kept in memory."""
        found = salvage(Folder(self.path), shard.entry, shard.settings)
        if not shard.proved <= found.rows.keys() or (shard.whole and None in found.files.values()):
            raise DamagedFile(shard.entry.name, "got worse while it was repaired", hint="run the same command again")
        return found

    def _note(self, name: str, new: str | None) -> None:
        if new is not None:
            self._quarantined.append(Quarantined(name, new))

    # ── the new snapshot ─────────────────────────────────────────────────────────────────────────────────────────────

    def _commit(self, number: int) -> Manifest:
        plan, base = self.plan, self.plan.base
        shards = self._shards(base, base.settings)
        move = base.move
        if move is not None:
            move = None if plan.no_move else replace(move, shards=self._shards(move, move.settings))
        for folder in ("docs", "shards"):
            files.sync_folder(self.path / folder)
        manifest = replace(
            base,
            number=number,
            parent=(base.number, base.sha256),
            time=now(),
            tool=TOOL,
            operation="repair",
            run=secrets.token_hex(8),
            shards=shards,
            index=None if plan.no_index or shards != base.shards else base.index,
            counts=self._counts(shards),
            writer_flags=base.writer_flags if move is not None else tuple(set(base.writer_flags) - {MOVE}),
            move=move,
        )
        manifest = link_manifest(self.path, manifest)
        files.sync_folder(self.path / "snapshots")
        return manifest

    def _shards(self, part: Manifest | Move, settings: BankSettings) -> tuple[ShardEntry, ...]:
        """The part's shards, those that are broken written anew; one of which nothing is left is left out."""
        found: dict[str, ShardEntry] = {}
        for shard in part.shards:
            broken = self.plan.broken(shard)
            if broken is None:
                found.setdefault(shard.sha256, shard)
                continue
            rows = self._salvaged(broken).rows
            kept = [rows[row] for row in self.plan.kept(shard)]
            if kept:
                new = self._write(settings, kept)
                found[new.sha256] = new  # also where an older shard of dead rows is the same: it lives again
        return tuple(found.values())

    def _write(self, settings: BankSettings, rows: list[Row]) -> ShardEntry:
        """Rows as they are, to the last byte, as a shard of their own."""
        columns = {
            "tokens": np.array([row.passage.tokens for row in rows], np.int32),
            "embeddings": np.frombuffer(b"".join(row.embedding for row in rows), "<f2"),
            "scales": np.frombuffer(b"".join(row.scales for row in rows), "<f2"),
            "checksums": np.frombuffer(b"".join(row.checksum for row in rows), np.uint8),
            "codes": np.frombuffer(b"".join(row.codes for row in rows), np.uint8),
            "documents": np.frombuffer(bytes.fromhex("".join(row.passage.document for row in rows)), np.uint8),
            "keys": np.frombuffer(b"".join(row.key for row in rows), np.uint8),
        }
        data, docs, entry = lay_out(settings, [row.line for row in rows], columns)
        for name, parts in ((entry.docs_name, [docs]), (entry.name, data)):
            files.publish(files.write_temporary(self.path / "tmp", parts), self.path / name)
        return entry

    def _counts(self, shards: tuple[ShardEntry, ...]) -> Counts:
        documents: set[int] = set()
        tokens = 0
        for shard in shards:
            reader = ShardReader(Folder(self.path), shard, self.plan.base.settings)
            live = reader.live()
            documents.update(reader.documents()[live].tolist())
            tokens += int(reader.block("tokens")[live].sum(dtype=np.int64))
        live_rows, dead = sum(shard.live for shard in shards), sum(shard.dead for shard in shards)
        return Counts(len(documents), live_rows, tokens, dead)

    # ── what leaves its place ────────────────────────────────────────────────────────────────────────────────────────

    def _clear_away(self, newest: Manifest) -> list[int]:
        """Snapshots that leave the history, and the files that only they named, or that nobody can say who named; their
        files first, so that a manifest is there as long as what it names. Returns the snapshots that readers hold."""
        plan, bank = self.plan, self.path
        going = [*plan.unreadable, *plan.retired]
        with ExitStack() as stack:
            held = [number for number in going if not stack.enter_context(self._free(number))]
            stay = [manifest for manifest in plan.manifests.values() if manifest.number not in set(going) - set(held)]
            named = {name for manifest in stay for name, _ in manifest.files() if not name.startswith("index/")}
            named |= {name for name, _ in newest.files()}
            left = [name for number in plan.retired for name, _ in plan.manifests[number].files()]
            if plan.no_index:
                left += [name for name, _ in plan.base.files() if name.startswith("index/")]
            if plan.unreadable and not set(plan.unreadable) & set(held):
                left += layout.content_files(bank)
            for name in dict.fromkeys(left):
                if name not in named:
                    self._note(name, quarantine.move(bank, name))
            for number in going:
                if number not in held:
                    self._drop(number)
        return held

    def _free(self, number: int) -> AbstractContextManager[bool]:
        """Keeps readers from a snapshot that goes; one without a file has none."""
        if (self.path / layout.snapshot_name(number)).is_file():
            return cleanup.unread(self.path, number)
        return nullcontext(True)

    def _drop(self, number: int) -> None:
        """A manifest that can be read leaves as a copy: one that opened it in this moment sees that it is gone."""
        manifest, name, copy = self.plan.manifests.get(number), layout.snapshot_name(number), layout.copy_name(number)
        if manifest is None:
            self._note(copy, quarantine.move(self.path, copy))
            self._note(name, quarantine.move(self.path, name))
            return
        self._note(name, quarantine.put(self.path, name, manifest.to_bytes()[0]))
        for each in (name, copy):
            with suppress(FileNotFoundError):
                files.SYSTEM.unlink(self.path / each)
        files.sync_folder(self.path / "snapshots")
