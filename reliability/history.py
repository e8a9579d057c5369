"""Random histories of one bank, with a fault in every work that is done to it. Knows what a bank must hold after each,
whatever the fault; not how works or faults are made.

After each work the bank is read whole and verified: it holds what it held before or after one of the work's commits,
and no less than was reported; an exit code of 0 means all of it; a failure is a sentence. At the end a writer comes,
and nothing may lie in the folder that no snapshot names.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from random import Random
from typing import Any, ClassVar

from faults import Child, Ended, die, fails, fill
from made_banks import content, tree
from test_bank_move import named

from regrad_cli.bank import create_bank, layout, open_bank, verify, write_bank, writer
from regrad_cli.bank.manifest import SHARD_ROWS
from regrad_cli.errors import RegradError, StorageFailed
from reliability import works
from reliability.hurt import damaged, hurt_and_repaired
from reliability.trial import LOST, NEW, OLD, REFUSED, Trial, what_went_wrong
from reliability.works import Held, Work, unexpected

WORKS = 12  # of a history, before it is packed and damaged
FULL = "a full disk"
CALLS = {
    "killed at a call": (die, False),
    "disk full at a call": (fails(errno.ENOSPC), False),
    "no room from a call on": (fails(errno.ENOSPC), True),
    "I/O error at a call": (fails(errno.EIO), False),
    "read-only at a call": (fails(errno.EROFS), False),
}
KILLED_AT_A_MOMENT, CTRL_C = "killed at a moment", "Ctrl-C at a moment"
FAULTS = (*["killed at a call"] * 3, *CALLS, KILLED_AT_A_MOMENT, KILLED_AT_A_MOMENT, CTRL_C)


@dataclass(slots=True)
class Usual:
    """How many calls a work makes, and how long it takes, as far as one has been seen to end."""

    calls: int = 60
    seconds: float = 0.1


class History:
    """One bank from `init` on, in a folder of its own.

    disk  the folder is a file system of its own, small enough to be filled
    """

    usual: ClassVar[dict[str, Usual]] = {}

    def __init__(self, seed: int, folder: Path, disk: bool) -> None:
        self.seed, self.folder, self.disk = seed, folder, disk
        self.chance = Random(seed)
        self.bank = folder / "b"
        self.held = Held({})
        self.last = ("init", "", "")  # work, fault and step of what was tried last

    def trials(self) -> Iterator[Trial]:
        """Everything that is tried, in turn. What goes wrong is a Trial too, and ends the history."""
        try:
            yield self._made()
            for number in range(WORKS):
                yield from self._reading(number)
            yield self._two_writers()
            yield from self._packing()
            self._no_litter()
            right, self.last = self.held.content(), ("reading", "damage", "")
            for place in (self.bank, self.folder / "x.gbank"):
                yield from damaged(self.seed, place, right, self.chance, self.folder)
            yield from hurt_and_repaired(self.seed, self.bank, right, self.chance, self.folder, self._faulty)
        except Exception as error:
            yield Trial(self.seed, *self.last, LOST, None, what_went_wrong(error))

    # ── one work ─────────────────────────────────────────────────────────────────────────────────────────────────────

    def _faulty(self, name: str, work: Callable[..., int | None]) -> tuple[str, Ended]:
        """Runs a work in a process of its own and has one fault come about."""
        usual = self.usual.setdefault(name, Usual())
        fault = self.chance.choice((*FAULTS, *[FULL] * 4) if self.disk else FAULTS)
        if fault in CALLS:
            then, lasting = CALLS[fault]
            at, links = self.chance.randint(1, usual.calls), self.chance.random() < 0.8
            ended = Child(work, at=at, then=then, lasting=lasting, links=links).wait()
        elif fault == FULL:
            ballast = fill(self.folder, self.chance.randrange(0, 1 << 15))
            ended = Child(work).wait()
            ballast.unlink()
            ended = replace(ended, step="write" if ended.code == StorageFailed.exit_code else "")
        else:
            child = Child(work)
            child.stop_after(self.chance.uniform(0, 1.2 * usual.seconds), interrupt=fault == CTRL_C)
            ended = child.wait()
        if ended.code in (0, 3) and not ended.step:
            usual.calls, usual.seconds = max(1, ended.calls), ended.seconds
        self.last = name, fault, ended.step
        return fault, ended

    def _try(self, work: Work) -> Trial:
        before = layout.snapshot_numbers(self.bank)
        fault, ended = self._faulty(work.name, work.run)
        reached = self._reached(work, ended)
        self.held = work.states[reached]
        went_on = layout.snapshot_numbers(self.bank)[-1:] != before[-1:]
        outcome = NEW if reached or went_on else OLD if ended.code in (None, 0, 130) else REFUSED
        return Trial(self.seed, work.name, fault, ended.step, outcome, ended.code)

    def _reached(self, work: Work, ended: Ended) -> int:
        """Which state the bank is in. raises AssertionError if in none that it may be in"""
        assert not unexpected(ended.said), ended.said
        found = content(self.bank)
        may = range(ended.reported, len(work.states)) if ended.code != 0 else (len(work.states) - 1,)
        reached = [number for number in may if work.states[number].content() == found]
        assert reached, f"after {work.name}, at {ended.step}, code {ended.code}: neither old nor new; {ended.said}"
        wrong = [finding for finding in verify(self.bank) if not finding.note]
        assert not wrong, f"after {work.name}, at {ended.step}: {wrong}"
        return reached[0]

    def _made(self) -> Trial:
        work = works.init(self.bank)
        fault, ended = self._faulty(work.name, work.run)
        assert not unexpected(ended.said), ended.said
        try:
            outcome = NEW if content(self.bank) == {} else LOST
        except RegradError as error:
            assert ended.code != 0 and error.exit_code == 10, error
            work.run(lambda number: None)  # doing it again finishes it
            outcome = OLD if ended.code in (None, 130) else REFUSED
        assert content(self.bank) == {}
        return Trial(self.seed, work.name, fault, ended.step, outcome, ended.code)

    def _next(self) -> Work:
        few = len(self.held.documents) < 3
        choices = [works.ingest] if few else [works.ingest, works.remove, works.compact, works.to_other_prior]
        return self.chance.choice(choices)(self.bank, self.held, self.chance)

    def _reading(self, number: int) -> Iterator[Trial]:
        """A work; now and then somebody reads meanwhile, and must see one snapshot from start to end."""
        if number % 4:
            yield self._try(self._next())
            return
        right = self.held.content()
        with open_bank(self.bank) as snapshot:
            yield self._try(self._next())
            seen = {passage.id: (passage, key) for _, passage, key in snapshot.passages()}
            rows = {passage: snapshot.row(ref).checksum for ref, passage, _ in snapshot.passages()}
        assert seen == {name: row[:2] for name, row in right.items()} and len(rows) == len(right)
        yield Trial(self.seed, "a reader meanwhile", "the bank changes", "", OLD, 0)

    def _two_writers(self) -> Trial:
        """Both wait for one another; one is killed. What either reported is there, and of the rest whole commits."""
        names = [[f"{writer}-{number}.md" for number in range(3)] for writer in "ab"]

        def writing(sources: list[str]) -> Callable[..., None]:
            def work(told: Callable[[int], None]) -> None:
                with write_bank(self.bank, wait_s=60) as writer:
                    for number, source in enumerate(sources, start=1):
                        writer.add(*works.rows_under(source, 2, "", self.held.prior))
                        writer.commit("ingest")
                        told(number)
                    writer.finish()

            return work

        children = [Child(writing(sources)) for sources in names]
        usual = self.usual.setdefault("two writers", Usual())
        children[0].stop_after(self.chance.uniform(0, 1.2 * usual.seconds))
        ended = [child.wait() for child in children]
        usual.seconds = ended[1].seconds
        assert ended[1].code == 0 and ended[1].reported == 3, ended[1].said
        found = content(self.bank)
        for reached in range(ended[0].reported, 4):
            added = dict.fromkeys([*names[1], *names[0][:reached]], (2, ""))
            held = Held({**self.held.documents, **added}, self.held.prior)
            if held.content() == found:
                self.held = held
                break
        else:
            raise AssertionError("of two writers' commits not all are there")
        assert not [finding for finding in verify(self.bank) if not finding.note]
        return Trial(self.seed, "two writers", KILLED_AT_A_MOMENT, ended[0].step, NEW, ended[0].code)

    # ── packed banks ─────────────────────────────────────────────────────────────────────────────────────────────────

    def _packing(self) -> Iterator[Trial]:
        """What is written is there whole or not at all; a packed bank that was there before stays until then."""
        out, folder, right = self.folder / "x.gbank", self.folder / "u", self.held.content()
        create_bank(other := self.folder / "other", works.settings_under(self.held.prior), self.held.prior)
        before = {path.name for path in self.folder.iterdir()}
        for there in (False, True):
            if there:
                works.regrad("bank", "pack", str(out), "--force", "--bank", str(other))
            work = works.pack(self.bank, out, self.held)
            fault, ended = self._faulty(work.name, work.run)
            assert not unexpected(ended.said), ended.said
            is_new = out.exists() and content(out) == right
            assert is_new or (ended.code != 0 and ((content(out) == {}) if there else not out.exists())), ended.said
            yield self._trial(work.name, fault, ended, is_new)
        work.run(lambda number: None)
        work = works.unpack(out, folder, self.held)
        fault, ended = self._faulty(work.name, work.run)
        assert not unexpected(ended.said), ended.said
        is_new = folder.exists()
        assert is_new or ended.code != 0
        yield self._trial(work.name, fault, ended, is_new)
        if not is_new:
            work.run(lambda number: None)
        assert content(folder) == right and not [finding for finding in verify(folder) if not finding.note]
        shutil.rmtree(folder)
        assert {path.name for path in self.folder.iterdir()} == before | {"x.gbank"}, "something was left behind"
        shutil.rmtree(other)

    def _trial(self, name: str, fault: str, ended: Ended, is_new: bool) -> Trial:
        outcome = NEW if is_new else OLD if ended.code in (None, 130) else REFUSED
        return Trial(self.seed, name, fault, ended.step, outcome, ended.code)

    def _no_litter(self) -> None:
        with write_bank(self.bank):
            pass
        litter = set(tree(self.bank)) - named(self.bank)
        assert not litter, f"left behind: {sorted(litter)}"


def history(seed: int, folder: Path, disk: bool) -> dict[str, Any]:
    """All trials of one history, and what it learned of how long works take, as JSON takes it."""
    os.environ["REGRAD_STATE"] = str(folder / "state")
    os.environ["REGRAD_INDEX_FROM"] = "6" if seed % 3 == 0 else "1000000"
    writer.SHARD_ROWS = 5 if seed % 2 else SHARD_ROWS
    trials = list(History(seed, folder, disk).trials())
    return {"trials": trials, "usual": {name: asdict(usual) for name, usual in History.usual.items()}}
