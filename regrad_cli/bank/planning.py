"""What compacting a bank comes to, before anything is written: which shards, which snapshots, how many bytes. Knows the
canonical form and what lies in the folder; writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np

from regrad_cli.bank import layout
from regrad_cli.bank.building import shard_header
from regrad_cli.bank.canonical import Canonical, CanonicalShard, canonical_form
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.manifest import Manifest
from regrad_cli.bank.opening import read_manifest
from regrad_cli.bank.shards import DTYPES, ShardReader, expected_tensors
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.bank.store import Folder
from regrad_cli.bank.writer import rows_a_shard
from regrad_cli.errors import Damaged, RegradError, UsageProblem
from regrad_cli.records import BankSettings


@dataclass(frozen=True, slots=True)
class Compacted:
    """What compacting a bank came to, or would come to.

    snapshot            the newest one, made now or there before
    dead                removed passages that the newest snapshot has no more
    shards              {"before", "after", "rewritten"}
    bytes               {"before", "after", "freed"} of all files of the bank
    dropped_snapshots   those that went; kept_snapshots those that stay as asked; held_snapshots those that go as soon
                        as nobody reads them
    quarantined         files that lay in quarantine/
    changed             False for a bank that was compact already
    """

    path: str
    snapshot: int
    documents: int
    passages: int
    dead: int
    shards: dict[str, int]
    bytes: dict[str, int]
    dropped_snapshots: tuple[int, ...]
    kept_snapshots: tuple[int, ...]
    held_snapshots: tuple[int, ...]
    quarantined: int
    codec: str
    changed: bool
    dry_run: bool
    seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What compacting a snapshot comes to, before anything is written.

    settings   of the bank as it will be
    keep       numbers of the older snapshots that stay, ascending
    drop       numbers of those that go, the snapshot's own among them where there will be a new one
    commits    whether a new snapshot is needed at all
    """

    snapshot: Snapshot
    readers: tuple[ShardReader, ...]
    settings: BankSettings
    form: Canonical
    keep: tuple[int, ...]
    drop: tuple[int, ...]
    commits: bool

    @property
    def written(self) -> list[CanonicalShard]:
        """The shards that are not there yet."""
        return [shard for shard in self.form.shards if shard.standing is None]

    @property
    def written_bytes(self) -> int:
        """What they take on disk, their docs files included."""
        total = 0
        for shard in self.written:
            rows = len(shard.rows)
            total += len(shard_header(self.settings, rows)) + shard.text_bytes
            for dtype, shape in expected_tensors(self.settings, rows).values():
                total += int(np.prod(shape)) * np.dtype(DTYPES[dtype]).itemsize
        return total

    def outcome(
        self,
        *,
        bytes: tuple[int, int],
        dropped: tuple[int, ...],
        quarantined: int,
        number: int | None = None,
        held: tuple[int, ...] = (),
        dry_run: bool = False,
    ) -> Compacted:
        """What was, or would be, made of it. bytes: of all files before and after; number: of the newest snapshot now;
        dropped, held: snapshots that went, and that a reader holds."""
        manifest = self.snapshot.manifest
        before, after = bytes
        return Compacted(
            path=str(self.snapshot.path),
            snapshot=manifest.number if number is None else number,
            documents=self.form.documents,
            passages=self.form.rows,
            dead=manifest.counts.dead + self.form.doubles,
            shards={"before": len(manifest.shards), "after": len(self.form.shards), "rewritten": len(self.written)},
            bytes={"before": before, "after": after, "freed": before - after},
            dropped_snapshots=dropped,
            kept_snapshots=self.keep,
            held_snapshots=held,
            quarantined=quarantined,
            codec=str(self.settings.codec),
            changed=self.commits or quarantined > 0,
            dry_run=dry_run,
        )


def plan_compaction(
    snapshot: Snapshot,
    *,
    keep: int = 0,
    settings: BankSettings | None = None,
    report: Callable[[int, int], None] | None = None,
) -> Plan:
    """What compacting this snapshot, a bank's newest, comes to. Reads ids and docs files, and changes nothing.

    keep       how many of the older snapshots stay, the newest of them
    settings   of the bank as it is to be, if that is another codec
    report     told (shards read, shards in all)
    raises     UsageProblem while the bank is on its way to another prior; Damaged, also where a snapshot that is to
               stay cannot be read: nobody knows then which files it needs
    """
    manifest, path = snapshot.manifest, snapshot.path
    settings = settings or manifest.settings
    if manifest.move is not None:
        raise UsageProblem(
            f"the bank at {path} is on its way to the prior '{manifest.move.settings.prior_name}'",
            "`regrad ingest --stale` finishes that; compact it then",
        )
    readers = tuple(ShardReader(snapshot.store, shard, manifest.settings) for shard in manifest.shards)
    with nothing_changed():
        form = canonical_form(readers, settings, rows_a_shard(settings), report)
    there = tuple(n for n in layout.snapshot_numbers(path) if manifest.oldest <= n <= manifest.number)
    changed = settings != manifest.settings or [each.standing for each in form.shards] != list(range(len(readers)))
    commits = changed or len(there) > keep + 1
    kept = (there[-keep:] if keep else ()) if commits else there[:-1]
    for number in kept if commits else ():
        if _manifest(path, number) is None:
            raise Damaged(
                f"{layout.snapshot_name(number)} is to be kept and cannot be read, so nobody knows what it needs",
                "`regrad bank repair` may mend it; `regrad compact` without --keep drops it",
            )
    drop = tuple(number for number in there if number not in kept) if commits else ()
    return Plan(snapshot, readers, settings, form, kept, drop, commits)


class AtStake(NamedTuple):
    """What compacting would destroy: how many snapshots, removed passages, and files in quarantine."""

    snapshots: int
    passages: int
    files: int


def at_stake(snapshot: Snapshot, keep: int) -> AtStake:
    """For the question before it; reads names only. What a snapshot still has that stays is not destroyed, nor is the
    newest one, whose live rows are all carried over."""
    there = [number for number in layout.snapshot_numbers(snapshot.path) if number <= snapshot.number]
    snapshots = max(0, len(there) - keep) if len(there) > 1 else 0
    return AtStake(snapshots, 0 if keep else snapshot.manifest.counts.dead, len(quarantined_files(snapshot.path)))


def foreseen(plan: Plan) -> Compacted:
    """What compacting would come to. bytes["after"] is an estimate where there is a search graph to be built anew."""
    path, manifest = plan.snapshot.path, plan.snapshot.manifest
    stay = {layout.content_name("priors", manifest.prior.sha256): manifest.prior.bytes}
    for shard in plan.form.shards:
        if shard.standing is not None:
            entry = manifest.shards[shard.standing]
            stay |= {entry.name: entry.bytes, entry.docs_name: entry.docs.bytes}
    for older in filter(None, (_manifest(path, number) for number in plan.keep)):
        size = len(older.to_bytes()[0])
        stay |= {name: entry.bytes for name, entry in older.files()}
        stay |= {older.name: size, layout.copy_name(older.number): size}
    own = len(manifest.to_bytes()[0]) * (1 + len(plan.form.shards)) // (1 + len(manifest.shards))
    after = sum(stay.values()) + plan.written_bytes + 2 * own
    if manifest.index is not None:
        after += manifest.index.bytes * plan.form.rows // max(1, manifest.index.rows)
    before, quarantined = size_on_disk(path), len(quarantined_files(path))
    return plan.outcome(bytes=(before, after), dropped=plan.drop, quarantined=quarantined, dry_run=True)


def size_on_disk(path: Path) -> int:
    """Bytes of all files in the bank's folders."""
    total = 0
    for folder in layout.FOLDERS:
        for file in _files(path / folder):
            with suppress(OSError):
                total += file.stat().st_size
    return total


def quarantined_files(path: Path) -> list[Path]:
    return list(_files(path / "quarantine"))


def _files(folder: Path) -> Iterator[Path]:
    if folder.is_symlink():
        return iter(())
    return (file for file in folder.rglob("*") if file.is_file() and not file.is_symlink())


def _manifest(path: Path, number: int) -> Manifest | None:
    with suppress(RegradError), Folder(path).open(layout.snapshot_name(number)) as region:
        return read_manifest(region)
    return None


@contextmanager
def nothing_changed() -> Iterator[None]:
    """Damage that is met has another way out here than for a question."""
    try:
        yield
    except DamagedFile as error:
        error.hint = (
            "the bank is as it was: `regrad bank verify` lists all damage, `regrad bank repair` mends what it can"
        )
        raise
