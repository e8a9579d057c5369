"""What came of many trials, counted: tables in Markdown, and the part of docs/reliability.md that they stand in. Knows
records; makes no fault.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

from faults import STEPS

from reliability import ROOT
from reliability.trial import HARMLESS, LOST, NAMED, NEW, NOTICED, OLD, REFUSED, VERIFIED, WHOLE, Trial

PAGE = ROOT / "docs" / "reliability.md"
BEGIN, END = "<!-- figures: python -m reliability --write -->\n\n", "\n<!-- end of the figures -->\n"


class Counted:
    """Trials as they come, of which only counts are kept, and all that went wrong."""

    def __init__(self) -> None:
        self.rows: Counter[tuple[str, str, str, str, int | None]] = Counter()
        self.lost: list[Trial] = []

    def add(self, trial: Trial) -> None:
        self.rows[trial.work, trial.fault, trial.where, trial.outcome, trial.code] += 1
        if trial.outcome == LOST:
            self.lost.append(trial)

    def count(self, **wanted: object) -> int:
        """Trials with these values; a value may be a set of them."""
        names = ("work", "fault", "where", "outcome", "code")
        total = 0
        for row, times in self.rows.items():
            values = dict(zip(names, row, strict=True))
            total += times * all(
                values[name] in value if isinstance(value, set | frozenset) else values[name] == value
                for name, value in wanted.items()
            )
        return total

    @property
    def faults(self) -> int:
        """Those that came about: what was stopped before it ended, and damage, which is read and repaired but once."""
        return self.count(where=set(STEPS)) + self.count(work="reading")

    def tables(self) -> str:
        """All of it, as Markdown."""
        return "\n\n".join([self._stopped(), self._landed(), self._damage()])

    def _stopped(self) -> str:
        """Each kind of fault that stops something."""
        head = ["what stopped it", "times", "as it was", "as it was to be", "told", "lost"]
        rows = []
        for fault in sorted({fault for _, fault, where, _, _ in self.rows if where in STEPS}):
            of: dict[str, object] = {"fault": fault, "where": set(STEPS)}
            hit = [self.count(**of, outcome=outcome) for outcome in (OLD, NEW, REFUSED, LOST)]
            codes = sorted({code for _, its, where, _, code in self.rows if its == fault and where in STEPS and code})
            told = ", ".join(f"exit {code}: {self.count(**of, code=code):,}" for code in codes)
            rows.append([fault, _n(sum(hit)), _n(hit[0] + hit[2]), _n(hit[1]), told, _n(hit[3])])
        return table(head, rows)

    def _landed(self) -> str:
        """Each work, and at which calls it was stopped."""
        names = sorted({work for work, _, where, _, _ in self.rows if where in STEPS})
        named = [(name, {name}) for name in names] + [("all", set(names))]
        rows = [
            [name, *(_n(self.count(work=these, where=where)) for where in (set(STEPS), *STEPS))]
            for name, these in named
        ]
        return table(["work", "stopped", *STEPS], rows)

    def _damage(self) -> str:
        head = ["file", "damage", "times", "a reader noticed", "only `verify` could", "of no consequence"]
        head += ["repaired whole", "rows gone, named", "refused by repair"]
        outcomes = (NOTICED, VERIFIED, HARMLESS)
        hurt = sorted({row[1:3] for row in self.rows if row[0] == "reading"}, key=lambda pair: (pair[1], pair[0]))
        rows = []
        for fault, where in hurt:
            of = {"fault": fault, "where": where}
            read = [self.count(work="reading", **of, outcome=outcome) for outcome in outcomes]
            mended = [self.count(work="bank repair", **of, outcome=outcome) for outcome in (WHOLE, NAMED, REFUSED)]
            rows.append([where, fault, _n(sum(read)), *map(_n, read), *map(_n, mended)])
        return table(head, rows)


def _n(number: int) -> str:
    return f"{number:,}"


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write(page: Path, figures: str) -> None:
    """Puts the figures into their place on the page."""
    before, rest = page.read_text(encoding="utf-8").split(BEGIN)
    page.write_text(f"{before}{BEGIN}{figures}\n{END}{rest.split(END)[1]}", encoding="utf-8")
