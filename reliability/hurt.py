"""Bits flipped, files cut and files taken away, in banks of both forms: noticed or harmless, and repaired or told.
Knows what a reader may return; not how damage is found.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from faults import Ended, Told, run_and_kill
from made_banks import PRIOR, content, copy_of, tree

from regrad_cli.bank import Repaired, layout, open_bank, repair_bank, verify, write_bank
from regrad_cli.errors import Damaged, RegradError
from regrad_cli.records import RowRef, sha256_hex
from reliability import works
from reliability.trial import HARMLESS, NAMED, NEW, NOTICED, OLD, REFUSED, VERIFIED, WHOLE, Trial
from reliability.works import Content, unexpected

KINDS = ("flip", "flip", "flip", "cut", "missing", "zeros")
TIMES = 8  # for each form of a bank
FAULT = {"flip": "a flipped bit", "cut": "a file cut short", "missing": "a missing file", "zeros": "a sector of zeros"}


def hurt(file: Path, kind: str, chance: Random) -> bool:
    """Does this to a file. False where it changes nothing."""
    data = bytearray(file.read_bytes())
    place = chance.randrange(len(data)) if data else 0
    before = bytes(data)
    if kind == "missing" or not data:
        file.unlink()
        return True
    if kind == "flip":
        data[place] ^= 1 << chance.randrange(8)
    elif kind == "cut":
        del data[place:]
    else:
        data[place : place + 512] = bytes(len(data[place : place + 512]))
    file.write_bytes(data)
    return bytes(data) != before


def damaged(seed: int, place: Path, right: Content, chance: Random, folder: Path) -> Iterator[Trial]:
    """Damage to a bank, live or packed, each to a new copy: all that a reader returns is right or an error, verify
    names the file, and of a live bank a repair makes one that says what it lost."""
    target = folder / "hurt"
    for _ in range(TIMES):
        if place.is_dir():
            copy_of(place, target)
            if chance.random() < 0.5:
                _killed_before_its_commit(target, place, chance)
            name = chance.choice([name for name in tree(place) if not name.startswith(("tmp/", "quarantine/"))])
        else:
            shutil.copy(place, target)
            name = ""
        kind = chance.choice(KINDS if name else ("flip", "cut", "zeros"))
        if hurt(target / name if name else target, kind, chance):
            outcome = _noticed(target, place, name, right)
            where = name.split("/")[0].replace("snapshots", f"snapshots/*.{name[-4:]}") or "a packed bank"
            yield Trial(seed, "reading", FAULT[kind], where, outcome, None)
            if name:
                yield Trial(seed, "bank repair", FAULT[kind], where, _repaired(target, right, name), None)
        shutil.rmtree(target) if target.is_dir() else target.unlink(missing_ok=True)


def _killed_before_its_commit(target: Path, place: Path, chance: Random) -> None:
    """Leaves in a copy of a bank what a writer leaves that is killed: damage must be told from that."""

    def remove(told: Told) -> None:
        with write_bank(target) as writer:
            writer.remove(ref for ref, _, _ in list(writer.snapshot.passages())[:1])
            writer.commit("rm")

    run_and_kill(remove, chance.randint(1, 30), chance.random() < 0.8)
    if layout.snapshot_numbers(target) != layout.snapshot_numbers(place):
        shutil.rmtree(target)
        copy_of(place, target)


def _noticed(bank: Path, whole: Path, name: str, right: Content) -> str:
    """Who notices the damage. raises AssertionError if something wrong is returned, or nobody does"""
    refused = _refused(bank, whole, right)
    try:
        findings = list(verify(bank))
    except RegradError:
        assert refused
        return NOTICED
    told = [finding for finding in findings if not finding.note]
    assert told or not refused, f"{name}: a reader refuses what verify finds right"
    assert findings or _of_no_consequence(name), f"{name}: nobody noticed"
    return NOTICED if refused else VERIFIED if told else HARMLESS


def _of_no_consequence(name: str) -> bool:
    """What holds nothing; a graph, for an older snapshot's is not used any more; a copy, for it may be missing."""
    return name in (".gitignore", "lock") or name.startswith("index/") or name.endswith(".copy")


def _refused(bank: Path, whole: Path, right: Content) -> bool:
    """Whether any way to read the bank refuses. raises AssertionError if one returns what was never written"""
    try:
        snapshot = open_bank(bank)
    except RegradError as error:
        assert error.exit_code in (10, 14), error
        return True
    with snapshot, open_bank(whole) as undamaged:
        if snapshot.number != undamaged.number:  # the newest manifest is gone: an older one, as it was
            right = content(whole, snapshot.number)
        refused = []

        def attempt(read: Callable[..., Iterable[tuple]], *given: Any) -> None:
            try:
                for passage, *row in read(*given):
                    assert right[passage.id][0] == passage
                    assert not row or tuple(row) == right[passage.id][1:], passage.id
            except Damaged:
                refused.append(read)

        def passages(skip: bool) -> Iterator[tuple]:
            yield from ((passage,) for _, passage, _ in snapshot.passages(skip_damaged=skip))

        def row(ref: RowRef) -> Iterator[tuple]:
            found = snapshot.row(ref)
            yield found.passage, found.key, found.codes, found.scales, found.embedding

        def search(warm: bool, skip: bool) -> Iterator[tuple]:
            dimension = snapshot.settings.embedding_dim
            question = np.full((1, dimension), dimension**-0.5, np.float32)
            yield from ((hit.passage,) for hit in snapshot.search(question, 5, warm=warm, skip_damaged=skip)[0])

        def prior() -> Iterator[tuple]:
            assert sha256_hex(snapshot.prior_bytes()) == snapshot.settings.prior
            yield from ()

        attempt(prior)
        for skip in (False, True):
            attempt(passages, skip)
            attempt(search, False, skip)
            attempt(search, True, skip)
        for position, shard in enumerate(snapshot.manifest.shards):
            dead = {number for start, end in shard.removed for number in range(start, end)}
            for number in set(range(shard.rows)) - dead:
                attempt(row, RowRef(position, number))
        return bool(refused)


def _repaired(bank: Path, right: Content, name: str) -> str:
    """What a repair made of a bank with one damaged file. raises AssertionError if a row is gone and not named"""
    try:
        with repair_bank(bank, priors=lambda made_for: (PRIOR, works.NEXT)) as work:
            done = work.carry_out()
    except Damaged:
        assert name.startswith("snapshots/") or not right, name
        return REFUSED
    assert not [finding for finding in verify(bank) if not finding.note] and not done.left
    found = content(bank)
    assert found.items() <= right.items() and done.back is None, name
    assert _all_told(done, set(right) - set(found)), f"{name}: a row is gone, and no document was named"
    return WHOLE if found == right else NAMED


def _all_told(done: Repaired, gone: set[str]) -> bool:
    named = {each.id for each in done.lost}
    return sum(each.passages for each in done.lost) == len(gone) and (
        None in named or named == {passage.split(":")[0] for passage in gone}
    )


def hurt_and_repaired(
    seed: int,
    bank: Path,
    right: Content,
    chance: Random,
    folder: Path,
    faulty: Callable[[str, Callable[..., int | None]], tuple[str, Ended]],
) -> Iterator[Trial]:
    """Repairs that are stopped: done again, each comes to what one comes to that nothing stops."""
    target, model = folder / "hurt", folder / "model"
    for _ in range(3):
        copy_of(bank, target)
        for name in _some(tree(target), chance):
            hurt(target / name, chance.choice(KINDS), chance)
        copy_of(target, model)
        work = works.repair(target)
        works.repair(model)(lambda number: None)
        fault, ended = faulty("bank repair", work)
        assert not unexpected(ended.said), ended.said
        is_new = not [finding for finding in verify(target) if not finding.note]
        assert is_new or ended.code not in (0, 3), "a repair that was done leaves damage"
        work(lambda number: None)
        assert content(target) == content(model), f"after {fault} at {ended.step} a repair comes to something else"
        assert content(target).items() <= right.items()
        outcome = NEW if is_new else OLD if ended.code in (None, 130) else REFUSED
        yield Trial(seed, "bank repair", fault, ended.step, outcome, ended.code)
        shutil.rmtree(target)
        shutil.rmtree(model)


def _some(names: Iterable[str], chance: Random) -> list[str]:
    """One to three files that a repair can do something about: of each manifest and its copy one."""
    pairs: dict[str, str] = {}
    for name in sorted(names, key=lambda name: chance.random()):
        if name.startswith(("shards/", "docs/", "snapshots/", "FORMAT")):
            pairs.setdefault(name.rpartition(".")[0] if name.startswith("snapshots/") else name, name)
    return list(pairs.values())[: chance.randint(1, 3)]
