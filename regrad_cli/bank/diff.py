"""What differs between two snapshots, of one bank or of two: documents, passages, gradients, settings. Knows rows and
digests; how alike two gradients are is a function that it is handed.

Shards that both have are left out by their hash, of the others the rows whose checksums both have; of what is left the
text is compared, and of rows with the same text the gradients. So two snapshots of a bank cost what lies between them.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Generator, Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from itertools import zip_longest
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from regrad_cli.bank.manifest import Manifest, ShardEntry
from regrad_cli.bank.matching import NONE, others, paired
from regrad_cli.bank.sides import Lines, Side, identities
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.records import Passage, RowRef

BATCH_ROWS = 256  # whose gradients are in memory at a time, as bytes

Codes = npt.NDArray[np.uint8]
Scales = npt.NDArray[np.float16]
Figures = npt.NDArray[np.float64]
Likeness = Callable[[Codes, Scales, Codes, Scales], tuple[Figures, Figures]]
Step = tuple[str, int, int]
Row = tuple[int, RowRef]  # a passage's ordinal, and where it lies


class Change(NamedTuple):
    """One passage's place in a document, with its row before and after; None where it has none."""

    ordinal: int
    before: RowRef | None
    after: RowRef | None


@dataclass(frozen=True, slots=True)
class Spread:
    """A figure over a document's passages; `worst` is the one that says most of a difference."""

    worst: float | None
    mean: float | None


@dataclass(frozen=True, slots=True)
class DocumentChange:
    """A document that differs. `passages` counts those that do.

    changes       of one whose text has changed: its passages in order
    cosine        of one that was recomputed: between old and new gradients, from −1 to 1
    norm_ratio    of one that was recomputed: norm of the new gradient by that of the old
    """

    id: str
    source: str
    title: str
    passages: int
    changes: tuple[Change, ...] = ()
    cosine: Spread | None = None
    norm_ratio: Spread | None = None


@dataclass(slots=True)
class Difference:
    """From `before` to `after`, documents ordered by source.

    unknown      documents of which it cannot be told whether their text changed
    settings     {name: (before, after)} of what differs
    other        passages with the same text and gradient that differ in their place or their embedding
    passages     how many were "added", "removed", "recomputed", those of changed documents included
    comparable   whether gradients of both have the same tensors; otherwise there is no cosine
    left_out     what was damaged and passed over
    """

    settings: dict[str, tuple[Any, Any]] = field(default_factory=dict)
    added: list[DocumentChange] = field(default_factory=list)
    removed: list[DocumentChange] = field(default_factory=list)
    changed: list[DocumentChange] = field(default_factory=list)
    recomputed: list[DocumentChange] = field(default_factory=list)
    unknown: list[DocumentChange] = field(default_factory=list)
    other: int = 0
    passages: dict[str, int] = field(default_factory=lambda: {"added": 0, "removed": 0, "recomputed": 0})
    comparable: bool = True
    left_out: tuple[str, ...] = ()

    @property
    def identical(self) -> bool:
        """Whether nothing differs, as far as everything could be read."""
        lists = (self.added, self.removed, self.changed, self.recomputed, self.unknown)
        return not (any(lists) or self.settings or self.other)


def differing_settings(old: Manifest, new: Manifest) -> dict[str, tuple[Any, Any]]:
    """{name: (before, after)} of what the two were made for and do not share; a move that is under way among it."""
    before, after = _told(old), _told(new)
    return {name: (before[name], after[name]) for name in before if before[name] != after[name]}


def _told(manifest: Manifest) -> dict[str, Any]:
    settings, move = manifest.settings, manifest.move
    shapes = [[rows, cols] for _, rows, cols in settings.tensors]
    return {
        "model": {"name": settings.model_name, "fingerprint": settings.model},
        "tokenizer": {"fingerprint": settings.tokenizer},
        "prior": {"name": settings.prior_name, "fingerprint": settings.prior, "trained": settings.prior_trained},
        "tensors": {"count": len(shapes), "values": sum(rows * cols for rows, cols in shapes)},
        "codec": {"name": str(settings.codec), **asdict(settings.codec)},
        "embedder": {"name": settings.embedder_name, "fingerprint": settings.embedder, "size": settings.embedding_dim},
        "segments": settings.segments,
        "chunk_tokens": settings.chunk_tokens,
        "chunk_overlap": settings.chunk_overlap,
        "keep_text": settings.keep_text,
        "move": None if move is None else {"name": move.settings.prior_name, "passages": move.passages},
    }


def differences(
    old: Snapshot, new: Snapshot, likeness: Likeness, *, skip_damaged: bool = False
) -> Generator[Step | Difference, None, None]:
    """Everything that differs. Yields (what is done, done, in all) as it goes, and the Difference at last.

    likeness      codes and scales of n rows of the old snapshot, and of n of the new one → cosines (n,) and ratios of
                  norms, new by old (n,); called only if there is something recomputed and both have the same tensors
    skip_damaged  leave out what is damaged: rows that cannot be read count as not there, but documents of which that is
                  known are left out as a whole
    raises        DamagedFile
    """
    comparison = _Comparison(old, new, skip_damaged)
    yield from comparison.take_rows()
    yield from comparison.read_texts()
    yield from comparison.compare_gradients(likeness)
    comparison.tell_documents()
    yield comparison.result


def changed_texts(old: Snapshot, new: Snapshot, change: Change, *, skip_damaged: bool = False) -> list[Passage | None]:
    """A changed passage before and after, proved; None where there is none, or where it is damaged and passed over."""
    found: list[Passage | None] = []
    for snapshot, ref in ((old, change.before), (new, change.after)):
        found.append(None if ref is None else Side(snapshot, skip_damaged=skip_damaged).text(ref))
    return found


class _Figures:
    """Cosines and ratios of norms of one document's recomputed passages, as they come."""

    def __init__(self) -> None:
        self.count = 0
        self._cosines: list[float] = []
        self._ratios: list[float] = []

    def add(self, cosine: float | None = None, ratio: float | None = None) -> None:
        self.count += 1
        if cosine is not None and ratio is not None:
            self._cosines.append(cosine)
            self._ratios.append(ratio)

    def spreads(self) -> tuple[Spread, Spread]:
        cosines, ratios = self._cosines, [ratio for ratio in self._ratios if math.isfinite(ratio)]
        worst = max(ratios, key=lambda ratio: abs(math.log(ratio)) if ratio > 0 else math.inf, default=None)
        return (
            Spread(min(cosines, default=None), sum(cosines) / len(cosines) if cosines else None),
            Spread(worst, sum(ratios) / len(ratios) if ratios else None),
        )


class _Comparison:
    """The stages of one comparison, in the order of its methods."""

    def __init__(self, old: Snapshot, new: Snapshot, skip_damaged: bool) -> None:
        self.old, self.new = Side(old, skip_damaged=skip_damaged), Side(new, skip_damaged=skip_damaged)
        self.result = Difference(
            settings=differing_settings(old.manifest, new.manifest),
            comparable=old.settings.tensors == new.settings.tensors,
        )
        self._shared: list[tuple[int, int]] = []  # shards that neither side looked into
        self._recomputed: dict[int, _Figures] = defaultdict(_Figures)

    def take_rows(self) -> Iterator[Step]:
        """Takes in the live rows that are not in a shard that both have."""
        old, new = self.old.snapshot.manifest.shards, self.new.snapshot.manifest.shards
        places = {(shard.sha256, shard.docs.sha256): place for place, shard in enumerate(new)}
        twins = {place: places.pop(name) for place, name in enumerate(map(_name, old)) if name in places}
        tasks: list[tuple[Side, int, npt.NDArray[np.bool_]]] = []
        for place, shard in enumerate(old):
            twin = twins.get(place)
            if twin is None:
                tasks.append((self.old, place, self.old.reader(place).live()))
            elif shard.removed == new[twin].removed:
                self._shared.append((place, twin))
            else:
                before, after = self.old.reader(place).live(), self.new.reader(twin).live()
                tasks += [(self.old, place, before & ~after), (self.new, twin, after & ~before)]
        tasks += [(self.new, place, self.new.reader(place).live()) for place in places.values()]
        done, total = 0, sum(int(wanted.sum()) for _, _, wanted in tasks)
        for side, place, wanted in tasks:
            side.take(place, wanted)
            done += int(wanted.sum())
            yield "rows", done, total
        self.old.end_taking()
        self.new.end_taking()

    def read_texts(self) -> Iterator[Step]:
        """Leaves out rows whose checksums both have, and pairs those of the others that have the same text."""
        old, new = self.old, self.new
        in_old, in_new = paired(old.checksums, new.checksums)
        rest = others(len(old.documents), in_old), others(len(new.documents), in_new)
        ways = identities(old.settings, new.settings)
        self._told_apart = ways is not None
        lines: list[Lines] = []
        for side, places, way in zip((old, new), rest, ways or (None, None), strict=True):
            before = len(rest[0]) if lines else 0
            for done in side.read(places, way, lines):
                yield "passages", before + done, len(rest[0]) + len(rest[1])
        first, second = paired(lines[0].names, lines[1].names) if ways is not None else (NONE, NONE)
        self._same = lines[0].chosen(first), lines[1].chosen(second)
        self._only = tuple(
            line.chosen(others(len(line.places), chosen)) for line, chosen in zip(lines, (first, second), strict=True)
        )

    def compare_gradients(self, likeness: Likeness) -> Iterator[Step]:
        """Of rows with the same text, tells which have another gradient, and how far it is from the old one."""
        before, after = self._same
        same_codec = self.old.settings.codec == self.new.settings.codec
        for start in range(0, len(before.places), BATCH_ROWS):
            part = slice(start, start + BATCH_ROWS)
            documents = before.documents[part].tolist()
            if not self.result.comparable:
                for document in documents:
                    self._recomputed[document].add()
                continue
            codes, scales, read = self.old.gradients(before.places[part])
            new_codes, new_scales, new_read = self.new.gradients(after.places[part])
            differs = read & new_read
            if same_codec:
                alike = (codes == new_codes).all(axis=1) & (_bits(scales) == _bits(new_scales)).all(axis=1)
                self.result.other += int((differs & alike).sum())
                differs &= ~alike
            chosen = np.flatnonzero(differs)
            if len(chosen):
                figures = likeness(codes[chosen], scales[chosen], new_codes[chosen], new_scales[chosen])
                for place, cosine, ratio in zip(chosen.tolist(), *(each.tolist() for each in figures), strict=True):
                    self._recomputed[documents[place]].add(cosine, ratio)
            yield "gradients", start + len(documents), len(before.places)

    def tell_documents(self) -> None:
        """Puts what was found together by document."""
        left_out = self.old.damaged_documents | self.new.damaged_documents
        rows: dict[int, tuple[list[Row], list[Row]]] = defaultdict(lambda: ([], []))
        for number, (side, lines) in enumerate(zip((self.old, self.new), self._only, strict=True)):
            for place, document, ordinal in zip(*(column.tolist() for column in lines[:3]), strict=True):
                if document not in left_out:
                    rows[document][number].append((ordinal, side.ref(place)))
        whole = self._whole(rows)
        result = self.result
        for document, (before, after) in rows.items():
            if document in whole:
                count, where = len(before) + len(after), result.removed if before else result.added
                where.append(self._document(document, count))
            elif not self._told_apart:
                result.unknown.append(self._document(document, len(after)))
                continue
            else:
                changes = tuple(_aligned(before, after))
                result.changed.append(replace(self._document(document, len(changes)), changes=changes))
            result.passages["removed"] += len(before)
            result.passages["added"] += len(after)
        for document, figures in self._recomputed.items():
            if document not in left_out:
                cosine, ratio = figures.spreads()
                told = self._document(document, figures.count)
                result.recomputed.append(replace(told, cosine=cosine, norm_ratio=ratio))
                result.passages["recomputed"] += figures.count
        for documents in (result.added, result.removed, result.changed, result.recomputed, result.unknown):
            documents.sort(key=lambda document: (document.source, document.id))
        findings = dict.fromkeys(self.old.snapshot.damaged + self.new.snapshot.damaged)
        result.left_out = tuple(f"{finding.file}: {finding.what}" for finding in findings)

    def _document(self, number: int, passages: int) -> DocumentChange:
        heading = self.new.headings.get(number) or self.old.headings[number]
        return DocumentChange(f"{number:016x}", heading.source, heading.title, passages)

    def _whole(self, rows: Mapping[int, tuple[list[Row], list[Row]]]) -> set[int]:
        """Those of the documents that are on one side only.

        Their rows that were looked at tell, but for what may lie in shards that both have. To look into those would
        cost the whole bank. A document begins with passage 0: where that is among the rows, all of it is. What follows
        from that must agree with the manifests' counts of documents; where it does not (a passage 0 that was never
        made), the shards are looked into after all.
        """
        numbers = np.array(sorted(rows), np.uint64)
        one_sided = numbers[~(np.isin(numbers, self.old.known) & np.isin(numbers, self.new.known))]
        if not self._shared:
            return set(one_sided.tolist())
        found = {number for number in one_sided.tolist() if min(rows[number][0] + rows[number][1])[0] == 0}
        growth = sum(-1 if rows[number][0] else 1 for number in found)
        counts = self.old.snapshot.manifest.counts.documents, self.new.snapshot.manifest.counts.documents
        if growth == counts[1] - counts[0]:
            return found
        return set(one_sided[~self.old.has(one_sided, [place for place, _ in self._shared])].tolist())


def _name(shard: ShardEntry) -> tuple[str, str]:
    return shard.sha256, shard.docs.sha256


def _bits(scales: Scales) -> npt.NDArray[np.uint16]:
    return scales.view(np.uint16)


def _aligned(before: list[Row], after: list[Row]) -> Iterator[Change]:
    """Passages of one document that are not the same, by their places in it: what stood there and what stands there."""
    old: dict[int, list[RowRef]] = defaultdict(list)
    new: dict[int, list[RowRef]] = defaultdict(list)
    for found, rows in ((old, before), (new, after)):
        for ordinal, ref in rows:
            found[ordinal].append(ref)
    for ordinal in sorted(old.keys() | new.keys()):
        for pair in zip_longest(old[ordinal], new[ordinal]):
            yield Change(ordinal, *pair)
