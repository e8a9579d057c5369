"""One fault that was tried, and what came of it, as a record. Knows nothing else."""

from __future__ import annotations

import traceback
from typing import NamedTuple

# What came of it. Kept: the bank is what it was, or what it was to become; nothing in between.
OLD, NEW, REFUSED = "old", "new", "refused"
# Of damage: the reader noticed; only verify could notice (no reader looks there); what was damaged can be done without.
NOTICED, VERIFIED, HARMLESS = "noticed", "verified", "harmless"
# Of a repair: all of it is back; rows are gone, each told by name.
WHOLE, NAMED = "whole", "named"
LOST = "lost"


class Trial(NamedTuple):
    """What was done, and how it ended.

    seed     of the history it belongs to: `python -m reliability --seed N --rounds 1` does it again
    work     what was being done
    fault    what came meanwhile
    where    the system call it came at, or the file that was hurt; "" if the work ended before
    outcome  one of the above
    code     the exit code; None for a process that was killed
    detail   of what was lost
    """

    seed: int
    work: str
    fault: str
    where: str
    outcome: str
    code: int | None
    detail: str = ""


def what_went_wrong(error: BaseException) -> str:
    return "".join(traceback.format_exception(error))[-3000:]
