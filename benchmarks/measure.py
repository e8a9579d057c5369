"""What every benchmark needs: timed processes, slopes, paired ratios, figures with targets. Knows no benchmark.

Nothing here imports torch: a process that is timed runs beside an idle one.
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple


class Target(NamedTuple):
    """What a figure has to reach: `sign` is "≥" or "≤", `of` tells whether the ratio or the value is held to it."""

    sign: str
    bound: float
    of: str = "ratio"

    def met(self, number: float) -> bool:
        return number >= self.bound if self.sign == "≥" else number <= self.bound


@dataclass(frozen=True)
class Figure:
    """One row of a benchmark's table.

    value      what was measured for regrad, in `unit`; None where nothing was measured
    baseline   the same of what it is compared to, where there is one
    ratio      value against baseline as the paired runs gave it (a median of ratios, not the ratio of medians), in
               the direction that the row's name says
    """

    what: str
    value: float | None
    unit: str = ""
    baseline: float | None = None
    ratio: float | None = None
    target: Target | None = None

    @property
    def met(self) -> bool | None:
        """Whether the target is reached; None without a target or without its number."""
        number = None if self.target is None else self.ratio if self.target.of == "ratio" else self.value
        return None if self.target is None or number is None else self.target.met(number)

    def cells(self) -> list[str]:
        target = ""
        if self.target is not None:
            unit = " ×" if self.target.of == "ratio" else f" {self.unit}"
            target = f"{self.target.sign} {self.target.bound:g}{unit.rstrip()}"
        met = {True: "met", False: "not met", None: "not measured" if self.target else ""}[self.met]
        return [
            self.what,
            shown(self.value, self.unit),
            shown(self.baseline, self.unit),
            "" if self.ratio is None else f"{shown(self.ratio)} ×",
            target,
            met,
        ]


def shown(value: float | None, unit: str = "") -> str:
    """A number with three significant digits and its unit; empty for None."""
    if value is None:
        return ""
    digits = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{digits} {unit}".strip()


HEADINGS = ("figure", "regrad", "baseline", "ratio", "target", "")


def table(figures: Sequence[Figure]) -> str:
    """The figures as a Markdown table."""
    rows = [HEADINGS, ["---"] * len(HEADINGS), *(figure.cells() for figure in figures)]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows)


# ── arithmetic ──────────────────────────────────────────────────────────────────────────────────────────────────────


def slope(small: tuple[int, float], large: tuple[int, float]) -> float:
    """Seconds a unit, from two (count, seconds): whatever both take once, such as loading, cancels.

    raises  ValueError where the sizes do not ascend, or the larger run was no slower: it then measured noise
    """
    (few, quick), (many, slow) = small, large
    if many <= few:
        raise ValueError(f"a slope needs a smaller and a larger size, not {few} and {many}")
    if slow <= quick:
        raise ValueError(f"{many} took {slow:.2f} s and {few} took {quick:.2f} s: choose sizes further apart")
    return (slow - quick) / (many - few)


def paired_ratio(numerators: Sequence[float], denominators: Sequence[float]) -> float:
    """The median of round-by-round ratios, so that a slow minute weighs on both sides of a pair.

    raises  ValueError where there are no pairs
    """
    if not numerators or len(numerators) != len(denominators):
        raise ValueError(f"{len(numerators)} and {len(denominators)} measurements are no pairs")
    return statistics.median(a / b for a, b in zip(numerators, denominators, strict=True))


def spread(values: Sequence[float]) -> str:
    """The range of repeated measurements, for a note."""
    return f"{shown(min(values))}–{shown(max(values))}"


# ── processes ───────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True)
class Ran:
    """A finished process: its seconds by the clock and of CPU (children included), peak resident bytes, its stdout.

    On Linux a peak is never less than what the process that started it held then: benchmarks start theirs before they
    load anything large.
    """

    seconds: float
    cpu_s: float
    peak_bytes: int
    stdout: str


def run_process(command: Sequence[str | Path], *, cwd: Path, env: Mapping[str, str], given: str = "") -> Ran:
    """Run a command to its end, with `given` on its standard input, and say what it took.

    raises  RuntimeError with the end of its stderr where it fails
    """
    with tempfile.TemporaryFile() as source, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
        source.write(given.encode())
        source.seek(0)
        words = [str(word) for word in command]
        start = time.perf_counter()
        process = subprocess.Popen(words, cwd=cwd, env=dict(env), stdin=source, stdout=out, stderr=err)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except BaseException:  # Ctrl-C: what we started ends with us
            process.kill()
            process.wait()
            raise
        seconds = time.perf_counter() - start
        process.returncode = os.waitstatus_to_exitcode(status)
        out.seek(0)
        err.seek(0)
        if process.returncode != 0:
            tail = err.read().decode(errors="replace")[-2000:]
            raise RuntimeError(f"{' '.join(words)[:300]} ended with {process.returncode}:\n{tail}")
        peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)
        return Ran(seconds, usage.ru_utime + usage.ru_stime, peak, out.read().decode(errors="replace"))


def interleaved(
    contenders: Mapping[str, Callable[[], Ran]], rounds: int, *, warm_up: bool = False
) -> dict[str, list[Ran]]:
    """`rounds` times A B C A B C …; with `warm_up`, once more before, which is left out of the results."""
    results: dict[str, list[Ran]] = {name: [] for name in contenders}
    for turn in range(-1 if warm_up else 0, rounds):
        for name, run in contenders.items():
            ran = run()
            if turn >= 0:
                results[name].append(ran)
    return results


def folder_bytes(folder: Path) -> int:
    """Bytes of all files in a folder and below."""
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
