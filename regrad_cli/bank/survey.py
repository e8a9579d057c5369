"""What is damaged in a live bank, and what can be made of it, before anything is changed. Knows manifests and their
copies, which files they name, and what follows from what; writes nothing.

The newest manifest decides what the bank is, read from its own file or from its copy. Where neither can be read the
newest older one does, and what that loses is said.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from regrad_cli.bank import layout, verification
from regrad_cli.bank.damage import DamagedFile, Finding
from regrad_cli.bank.manifest import FileEntry, Manifest, ShardEntry
from regrad_cli.bank.opening import check_format, lost_snapshot, read_copy, read_own
from regrad_cli.bank.salvage import Lost, readable, refuse_other_trouble, salvage
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.bank.store import Folder
from regrad_cli.errors import NoBank, UnknownFormat
from regrad_cli.records import BankSettings, sha256_hex

Priors = Callable[[BankSettings], Iterable[bytes]]

NO_PRIOR = "`regrad bank repair --prior FILE` puts it back from the file it came from"
OTHER_PRIOR = "; `regrad ingest --stale --prior FILE` moves the bank to another prior and keeps its text"
_COUNTS = re.compile(rb'"counts":\{"dead":[0-9]{1,12},"documents":([0-9]{1,12}),"passages":([0-9]{1,12}),')


class LostDocument(NamedTuple):
    """A document that loses passages: its id and its source as far as something proves them."""

    id: str | None
    source: str | None
    passages: int


class Back(NamedTuple):
    """The newest snapshot cannot be had any more, and an older one takes its place. `documents` and `passages` are what
    the lost one says that it held, unproved; None where it does not even say that."""

    lost: int
    to: int
    documents: int | None
    passages: int | None


class DamagedShard(NamedTuple):
    """A shard that is not as it was written.

    whole    whether both its files can be put back, byte for byte
    proved   its rows that are as they were; `lost` are the others; removed ones are among both
    """

    entry: ShardEntry
    settings: BankSettings
    whole: bool
    proved: frozenset[int]
    lost: tuple[Lost, ...]


@dataclass(slots=True)
class Plan:
    """What repairing a bank comes to.

    manifests   that can be read, by number, the newest first
    highest     the highest number that any file bears
    damage      everything that is wrong
    put_back    files whose content is known again, by name, with where it is from
    priors      the content of those among them that are priors
    shards      the damaged ones, by name
    retired     readable snapshots that cannot be what they were, by number, with why; they leave the history
    unreadable  numbers of manifests that cannot be read, nor their copies; they leave it too
    back        where the newest of these is newer than what can be read
    lost        documents that lose passages, those that can be named first
    no_index    the search graph is given up; no_move: the move to another prior is, for want of that prior
    left        what cannot be put right
    """

    path: Path
    manifests: dict[int, Manifest]
    highest: int
    damage: list[Finding] = field(default_factory=list)
    put_back: dict[str, str] = field(default_factory=dict)
    priors: dict[str, bytes] = field(default_factory=dict)
    shards: dict[str, DamagedShard] = field(default_factory=dict)
    retired: dict[int, str] = field(default_factory=dict)
    unreadable: list[int] = field(default_factory=list)
    back: Back | None = None
    lost: list[LostDocument] = field(default_factory=list)
    no_index: bool = False
    no_move: bool = False
    left: list[Finding] = field(default_factory=list)

    @property
    def base(self) -> Manifest:
        """The snapshot that counts."""
        return next(iter(self.manifests.values()))

    @property
    def number(self) -> int | None:
        """Of the snapshot that there will be; None where putting files back is enough."""
        commits = self.base.number in self.retired or self.back is not None or self.no_index
        return self.highest + 1 if commits else None

    @property
    def destroys(self) -> bool:
        """Whether anything is given up that the bank held."""
        return self.back is not None or bool(self.lost)

    def broken(self, shard: ShardEntry) -> DamagedShard | None:
        """What is left of a shard that has to be written anew; None for one that has not."""
        found = self.shards.get(shard.name)
        return None if found is None or found.whole else found

    def kept(self, shard: ShardEntry) -> list[int]:
        """Of such a shard the live rows that are proved."""
        return sorted(self.shards[shard.name].proved - _dead(shard))


def survey(path: Path, priors: Priors, report: verification.Report | None = None) -> Plan:
    """Reads every byte of a live bank and works out what can be done. The caller holds the writer's lock.

    priors  for settings whose prior is damaged: bytes that may be that prior
    report  told (bytes read, bytes in all)
    raises  NoBank; UnknownFormat where a newer version wrote any of it; DamagedFile where nothing says any more what
            the bank was; StorageFailed for what is no damage
    """
    pairs = dict(_pairs(path))
    manifests = [found for found in (pair.manifest for pair in pairs.values()) if found is not None]
    if not manifests:
        if not pairs and not any(name.startswith("shards/") for name in layout.content_files(path)):
            raise NoBank(f"the bank at {path} was never finished", f"run `regrad init {path}` again")
        raise DamagedFile(
            "snapshots",
            "holds no manifest that can be read, nor a copy of one",
            hint="put back that folder from a backup, or ingest into a new bank",
        )
    highest = max(max(layout.snapshot_numbers(path, kind), default=0) for kind in ("json", "copy"))
    plan = Plan(path, {manifest.number: manifest for manifest in manifests}, highest)
    _format(plan)
    _manifests(plan, pairs)
    _contents(plan, priors, report)
    plan.lost = list(_lost_documents(plan))
    plan.lost.sort(key=lambda lost: (lost.id is None, lost.source is None, lost.source or lost.id or ""))
    return plan


class _Pair(NamedTuple):
    """The two files of one snapshot: what each says, or why it cannot be read; None where it is not there."""

    own: Manifest | Finding | None
    copy: Manifest | Finding | None

    @property
    def manifest(self) -> Manifest | None:
        return next((found for found in self if isinstance(found, Manifest)), None)


def _pairs(path: Path) -> Iterator[tuple[int, _Pair]]:
    """Every snapshot, the newest first: those with a manifest, and one that lost it. Other copies are leftovers."""
    own, copies, lost = layout.snapshot_numbers(path), layout.snapshot_numbers(path, "copy"), lost_snapshot(path)
    for number in sorted({*own, *([] if lost is None else [lost])}, reverse=True):
        yield (
            number,
            _Pair(
                _read(read_own, path, number) if number in own else None,
                _read(read_copy, path, number) if number in copies else None,
            ),
        )


def _read(read: Callable[..., Manifest], path: Path, number: int) -> Manifest | Finding:
    try:
        return read(path, number, for_writing=True)
    except DamagedFile as error:
        refuse_other_trouble(error)
        return error.finding


def _format(plan: Plan) -> None:
    """FORMAT changes together with the newest manifest, and this one is proved to be of our format."""
    try:
        check_format(plan.path)
    except DamagedFile as error:
        refuse_other_trouble(error)
        plan.damage.append(error.finding)
    except UnknownFormat as error:
        plan.damage.append(Finding(layout.FORMAT_FILE, f"{error.message}, and its snapshots are not"))
    if plan.damage:
        plan.put_back[layout.FORMAT_FILE] = "its one line"


def _manifests(plan: Plan, pairs: dict[int, _Pair]) -> None:
    for number, (own, copy) in pairs.items():
        own_name, copy_name = layout.snapshot_name(number), layout.copy_name(number)
        plan.damage += [found for found in (own, copy) if isinstance(found, Finding)]
        if own is None:
            plan.damage.append(Finding(own_name, "is missing"))
        if pairs[number].manifest is None:
            plan.unreadable.append(number)
        elif not isinstance(own, Manifest):
            plan.put_back[own_name] = "from its copy"
        elif isinstance(copy, Finding):
            plan.put_back[copy_name] = "from its manifest"
        elif copy is not None and copy != own:
            plan.damage.append(Finding(copy_name, "is not the same as its manifest"))
            plan.put_back[copy_name] = "from its manifest"
    if plan.unreadable and plan.unreadable[0] > plan.base.number:
        plan.back = Back(plan.unreadable[0], plan.base.number, *_says_that_it_held(plan))


def _says_that_it_held(plan: Plan) -> tuple[int | None, int | None]:
    for name in (layout.snapshot_name(plan.unreadable[0]), layout.copy_name(plan.unreadable[0])):
        match = _COUNTS.search(readable(Folder(plan.path), name, 32 << 20) or b"")
        if match:
            return int(match[1]), int(match[2])
    return None, None


def _contents(plan: Plan, priors: Priors, report: verification.Report | None) -> None:
    """What the files that the manifests name have come to, and what follows for each of them."""
    manifests, base = list(plan.manifests.values()), plan.base
    findings = [*verification.unfit(manifests), *verification.contents(plan.path, manifests, report)]
    plan.damage += findings
    wrong = {finding.file: finding.what for finding in findings}
    tried: set[str] = set()
    for part in (part for manifest in manifests for part in manifest.parts):
        name = layout.content_name("priors", part.prior.sha256)
        if name in wrong and name not in tried:
            tried.add(name)
            _prior(plan, name, part.prior, part.settings, priors)
        for shard in part.shards:
            if {shard.name, shard.docs_name} & wrong.keys() and shard.name not in plan.shards:
                _shard(plan, shard, part.settings)
    own_prior = layout.content_name("priors", base.prior.sha256)
    beyond_help = {name for name in wrong if name.startswith("priors/") and name not in plan.priors}
    if own_prior in beyond_help:
        way_out = NO_PRIOR + (OTHER_PRIOR if base.settings.keep_text else "")
        plan.left.append(Finding(own_prior, f"{wrong[own_prior]}; {way_out}"))
    beyond_help.discard(own_prior)  # without it the bank still has its text
    beyond_help |= {name for name, shard in plan.shards.items() if not shard.whole}
    for manifest in manifests:
        lacks = next((name for name, _ in manifest.files() if name in beyond_help), None)
        if manifest.name in wrong or lacks is not None:
            plan.retired[manifest.number] = wrong.get(manifest.name) or f"needs {lacks}, which is damaged"
    if base.number in plan.retired:
        plan.retired[base.number] = f"snapshot {plan.number} takes its place"
    if base.move is not None:
        plan.no_move = layout.content_name("priors", base.move.prior.sha256) in beyond_help
    if base.index is not None:
        name = layout.content_name("index", base.index.sha256)
        plan.no_index = name in wrong
        readable(Folder(plan.path), name, 0)  # raises where that is no damage


def _prior(plan: Plan, name: str, entry: FileEntry, settings: BankSettings, priors: Priors) -> None:
    """The prior again, if one of the candidates is it: its name is its hash."""
    readable(Folder(plan.path), name, 0)  # raises where its absence is no damage
    for data in priors(settings):
        if sha256_hex(data) == entry.sha256:
            plan.priors[name], plan.put_back[name] = data, "the same prior, from elsewhere"
            return


def _shard(plan: Plan, shard: ShardEntry, settings: BankSettings) -> None:
    found = salvage(Folder(plan.path), shard, settings)
    plan.shards[shard.name] = DamagedShard(shard, settings, found.whole, frozenset(found.rows), found.lost)
    if found.whole:
        plan.put_back |= dict.fromkeys(found.files, "made again from what is left of it")


def _dead(shard: ShardEntry) -> set[int]:
    return {row for start, end in shard.removed for row in range(start, end)}


def _lost_documents(plan: Plan) -> Iterator[LostDocument]:
    """Whose live rows are lost. A source may be known from passages in other shards."""
    rows: dict[str | None, list[Lost]] = {}
    for shard in plan.base.shards:
        broken, dead = plan.broken(shard), _dead(shard)
        for lost in broken.lost if broken is not None else ():
            if lost.row not in dead:
                rows.setdefault(lost.document, []).append(lost)
    snapshot = Snapshot(Folder(plan.path), plan.base)
    for document, found in rows.items():
        source = next((lost.source for lost in found if lost.source is not None), None)
        if source is None and document is not None:
            with_it = snapshot.passages(document, skip_damaged=True)
            source = next((passage.source for _, passage, _ in with_it), None)
        yield LostDocument(document, source, len(found))
