"""Two banks, or two snapshots of one → what differs. Finds what is meant by `BANK@42`, and hands the store what decodes
gradients, loaded only if there are some to decode. Yields events; prints nothing and knows no file of the bank.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from regrad_cli.bank import Difference, Snapshot, changed_texts, differences, layout, locate_bank, open_bank
from regrad_cli.errors import UsageProblem
from regrad_cli.records import BankSettings, Notice, Passage, Progress

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    import torch

    from regrad_cli.bank.diff import Change
    from regrad_cli.learn.rows import RowLayout

DENSE_BYTES = 64 << 20  # of one side's decoded gradients at a time
_AT = re.compile(r"(?P<bank>.*)@(?P<number>-?[0-9]{1,12})", re.DOTALL)


class Version(NamedTuple):
    """A bank, and which snapshot of it; None for the newest."""

    bank: Path
    snapshot: int | None


@dataclass(frozen=True, slots=True)
class Compared:
    """What differs, with both snapshots, which are open as long as the use case waits."""

    before: Snapshot
    after: Snapshot
    difference: Difference
    skip_damaged: bool

    def passages(self, change: Change) -> list[Passage | None]:
        """A changed passage before and after, read now; None on a side that has none."""
        return changed_texts(self.before, self.after, change, skip_damaged=self.skip_damaged)


Event = Notice | Progress | Compared


def versions(words: Sequence[str], in_force: Callable[[], Path]) -> tuple[Version, Version]:
    """What to compare: two named versions, one with the bank in force, or that bank's newest snapshot with the one
    before it.

    words     at most two; each a bank, BANK@42, or @42 of the bank in force; below zero, counted back from the newest
    in_force  called only where that bank is meant
    raises    NoBank; UsageProblem where a word is none of these, or there is no such snapshot
    """
    if not words:
        return _version("@-1", in_force), _version("@-0", in_force)
    if len(words) == 1:
        return _version(words[0], in_force), Version(in_force(), None)
    before, after = words
    return _version(before, in_force), _version(after, in_force)


def _version(word: str, in_force: Callable[[], Path]) -> Version:
    if not word:
        raise UsageProblem("the name of a bank is empty", "write BANK, BANK@42, @42 for the bank in force, or @-1")
    match = None if os.path.exists(word) else _AT.fullmatch(word)  # noqa: PTH110 - False for any odd name, raises nothing
    if match is None:
        if "@" in word and not os.path.exists(word):  # noqa: PTH110
            raise UsageProblem(
                f"{word} is neither a bank nor a snapshot of one", "write BANK@42, @42 for the bank in force, or @-1"
            )
        return Version(locate_bank(word, Path.cwd()), None)
    bank = locate_bank(match["bank"], Path.cwd()) if match["bank"] else in_force()
    if not match["number"].startswith("-"):
        return Version(bank, int(match["number"]))
    with open_bank(bank) as newest:
        numbers = [newest.number] if bank.is_file() else layout.snapshot_numbers(bank)
    back = 1 - int(match["number"])
    if back > len(numbers):
        there = "there is one snapshot" if len(numbers) == 1 else f"there are {len(numbers)} snapshots"
        raise UsageProblem(
            f"{bank} has nothing {back - 1} before its newest: {there}",
            "name another bank to compare with; `regrad bank log` lists snapshots, and `regrad compact` drops them",
        )
    return Version(bank, numbers[-back])


def compare(before: Version, after: Version, *, device: str = "auto", skip_damaged: bool = False) -> Iterator[Event]:
    """Everything that differs between two versions; the last event is a Compared.

    device   where gradients are decoded; looked at only if there is something to decode
    raises   NoBank, UsageProblem, UnknownFormat, Damaged, ModelUnavailable
    """
    with ExitStack() as stack:
        old, new = (stack.enter_context(open_bank(version.bank, version.snapshot)) for version in (before, after))
        likeness = Likeness(old.settings, new.settings, device)
        with closing(differences(old, new, likeness, skip_damaged=skip_damaged)) as steps:
            for step in steps:
                if likeness.unsaid:
                    yield Notice(likeness.unsaid)
                    likeness.unsaid = ""
                if isinstance(step, Difference):
                    yield Compared(old, new, step, skip_damaged)
                else:
                    yield Progress(*step)


class Likeness:
    """How alike gradients of two banks are, which may have different codecs; a `bank.Likeness`. Nothing is loaded
    before the first call.

    unsaid   a sentence for people about where it computes, once it does
    """

    def __init__(self, old: BankSettings, new: BankSettings, device: str) -> None:
        self.unsaid = ""
        self._settings = old, new
        self._device_name = device
        row_bytes = 4 * max(old.segments, new.segments) * sum(rows * cols for _, rows, cols in old.tensors)
        self._rows = max(1, DENSE_BYTES // max(1, row_bytes))

    def __call__(
        self,
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float16],
        new_codes: npt.NDArray[np.uint8],
        new_scales: npt.NDArray[np.float16],
    ) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """Cosines (n,) and norms of the new by those of the old (n,). A row's gradient is the sum of its segments'. Two
        gradients of zeros are alike; beside one of zeros the cosine is 0, and the ratio to it infinite."""
        import numpy as np

        slices = [slice(start, start + self._rows) for start in range(0, len(codes), self._rows)]
        parts = [self._batch(codes[part], scales[part], new_codes[part], new_scales[part]) for part in slices]
        dots, old, new = np.concatenate(parts, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            cosines = np.where((old > 0) & (new > 0), dots / np.sqrt(old * new), (old == new).astype(float))
            ratios = np.where(old == new, 1.0, np.sqrt(new / old))
        return cosines.clip(-1, 1), ratios

    @cached_property
    def _device(self) -> torch.device:
        from regrad_cli.learn.model import choose_device

        device = choose_device(self._device_name)
        self.unsaid = f"decoding gradients on {device}"
        return device

    @cached_property
    def _layouts(self) -> list[RowLayout]:
        from regrad_cli.learn.rows import layout_of

        return [layout_of(settings) for settings in self._settings]

    def _batch(
        self,
        codes: npt.NDArray[np.uint8],
        scales: npt.NDArray[np.float16],
        new_codes: npt.NDArray[np.uint8],
        new_scales: npt.NDArray[np.float16],
    ) -> npt.NDArray[np.float64]:
        """(3, n): products, and squared norms of old and new."""
        import torch

        old = self._layouts[0].sums(codes, scales, self._device)
        new = self._layouts[1].sums(new_codes, new_scales, self._device)
        place = "cpu" if self._device.type == "mps" else self._device  # which has no float64
        sums = torch.zeros((3, len(codes)), dtype=torch.float64, device=place)
        for name, tensor in old.items():
            x, y = (each.flatten(1).to(place, torch.float64) for each in (tensor, new[name]))
            sums += torch.stack([(x * y).sum(1), x.square().sum(1), y.square().sum(1)])
        return sums.cpu().numpy()
