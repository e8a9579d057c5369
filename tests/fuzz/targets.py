"""Every reader of foreign bytes as a function of these bytes. Knows which they are, and what may come of it.

A target returns for a value and for an error of errors.py, and lets anything else out. It checks what it was given:
nothing wrong may come from a bank, and nothing may change outside of where a reader may write.
"""

from __future__ import annotations

import signal
import tracemalloc
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .mutations import Mutate, in_bytes

SECONDS = 5.0  # of the processor, the longest that a few kilobytes may take
WAITING = 120.0  # seconds on the clock, on a machine that is busy with other things
MEMORY = 96 << 20  # bytes that Python and numpy may take for them


class Overrun(BaseException):
    """It took too long; no reader's `except Exception` swallows this."""


@dataclass(frozen=True)
class Target:
    """One reader.

    reads    whose bytes they are
    run      reads them
    seeds    bytes that it takes, to begin with
    mutate   a change of them that is not stopped at the gate
    """

    name: str
    reads: str
    run: Callable[[bytes], None]
    seeds: Callable[[], list[bytes]]
    mutate: Mutate = in_bytes


@contextmanager
def within(seconds: float = SECONDS, waiting: float = WAITING) -> Iterator[None]:
    """raises Overrun where the block takes longer: of the processor, or by the clock; in the main thread only"""

    def late(*_: Any) -> None:
        raise Overrun(f"longer than {seconds} s of work, or {waiting} s in all")

    timers = ((signal.ITIMER_PROF, signal.SIGPROF, seconds), (signal.ITIMER_REAL, signal.SIGALRM, waiting))
    before = [signal.signal(each, late) for _, each, _ in timers]
    for timer, _, limit in timers:
        signal.setitimer(timer, limit)
    try:
        yield
    finally:
        for (timer, each, _), old in zip(timers, before, strict=True):
            signal.setitimer(timer, 0)
            signal.signal(each, old)


@contextmanager
def within_memory(size_bytes: int = MEMORY) -> Iterator[None]:
    """Asserts that the block takes no more at once."""
    tracemalloc.start()
    try:
        yield
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < size_bytes, f"{peak:,} bytes at once"


def all_targets(scratch: Path) -> dict[str, Target]:
    """By name. What they need is made in `scratch` when the first of them runs, and they write there only."""
    from . import bank_targets, document_targets, learning_targets, model_targets

    found: list[Target] = []
    for module in (bank_targets, document_targets, learning_targets, model_targets):
        found += module.targets(scratch)
    return {target.name: target for target in found}
