"""Compacting a bank: the store rewrites itself, and here is what decodes and encodes where the codec changes. Yields
events; prints nothing and knows no file of the bank.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from regrad_cli.bank import (
    AtStake,
    Compacted,
    at_stake,
    compact_bank,
    foreseen,
    open_bank,
    plan_compaction,
)
from regrad_cli.priors import worse_under
from regrad_cli.records import BankSettings, Notice, Progress

if TYPE_CHECKING:
    import numpy as np

    from regrad_cli.bank.compact import CompactingWriter

DENSE_BYTES = 64 << 20  # of decoded gradients at a time

Event = Notice | Progress | Compacted


@dataclass(frozen=True, slots=True)
class CompactOptions:
    """keep: how many older snapshots stay; codec: another one for all gradients; device: where those are decoded and
    encoded; wait_s: how long to wait for another writer."""

    keep: int = 0
    codec: str | None = None
    device: str = "auto"
    dry_run: bool = False
    wait_s: float = 0.0


def stake(bank: Path, keep: int) -> AtStake:
    """What compacting would destroy, told from names alone.

    raises  UsageProblem for a packed bank; NoBank, Damaged, UnknownFormat
    """
    with open_bank(bank, for_writing=True) as snapshot:
        return at_stake(snapshot, keep)


def compact(
    bank: Path, options: CompactOptions, tell: Callable[[Progress], None] = lambda progress: None
) -> Iterator[Event]:
    """Rewrites a bank in its canonical form, without removed rows, and drops older snapshots. The last event is a
    Compacted.

    tell    told how far the steps are that yield nothing: reading what is there, building the search graph
    raises  UsageProblem for a packed bank, one that moves to another prior, or what is no codec; Damaged, NonFinite,
            StorageFailed: the bank is as it was. NoBank, Locked, UnknownFormat, ModelUnavailable
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        writer: CompactingWriter | None = None
        if options.dry_run:
            snapshot = stack.enter_context(open_bank(bank, for_writing=True))
        else:
            writer = stack.enter_context(compact_bank(bank, wait_s=options.wait_s))
            snapshot = writer.snapshot
        settings, recode = snapshot.settings, None
        if options.codec is not None:
            from regrad_cli.learn.prior import Prior

            recoder = Recoder(snapshot.settings, options.codec, options.device)
            yield Notice(recoder.description)
            if told := worse_under(Prior.from_bytes(snapshot.prior_bytes()), recoder.settings.codec):
                yield Notice(told)
            if recoder.settings != snapshot.settings:
                settings, recode = recoder.settings, recoder.recode
        plan = plan_compaction(snapshot, keep=options.keep, settings=settings, report=_stage(tell, "shards read"))
        if writer is None:
            result = foreseen(plan)
        else:
            with closing(writer.compact(plan, recode)) as steps:
                for done in steps:
                    yield Progress("passages", done, plan.form.rows)
            result = writer.end(plan, _stage(tell, "search graph"))
        yield replace(result, seconds=round(time.perf_counter() - started, 3))


def _stage(tell: Callable[[Progress], None], name: str) -> Callable[[int, int], None]:
    return lambda done, total: tell(Progress(name, done, total))


class Recoder:
    """Gradients of a bank's codec as gradients of another, on a device.

    settings   the bank's, with the other codec and the row's layout that follows from it
    raises     UsageProblem for what is no codec; Damaged where the bank's own is none; ModelUnavailable where the
               device is not there
    """

    def __init__(self, settings: BankSettings, name: str, device: str) -> None:
        from regrad_cli.learn.codec import parse_codec
        from regrad_cli.learn.model import choose_device
        from regrad_cli.learn.rows import RowLayout, layout_of

        self._old = layout_of(settings)
        self._new = RowLayout(parse_codec(name), settings.tensors, settings.segments, settings.embedding_dim)
        self._device = choose_device(device)
        layout = {"code_bytes": self._new.code_bytes, "scale_count": self._new.scale_count}
        self.settings = replace(settings, codec=self._new.codec.settings, **layout)  # type: ignore[arg-type]
        row_bytes = 4 * settings.segments * sum(rows * cols for _, rows, cols in settings.tensors)
        self._rows = max(1, DENSE_BYTES // max(1, row_bytes))

    @property
    def description(self) -> str:
        """What it does, and where, for people."""
        old, new = self._old, self._new
        codecs = old.codec.settings, new.codec.settings
        if codecs[0] == codecs[1]:
            return f"the bank's codec is {codecs[0]} already"
        more = new.code_bytes + 2 * new.scale_count > old.code_bytes + 2 * old.scale_count
        gained = f"; nothing is gained by it, what {codecs[0]} left out stays lost" if more else ""
        return f"re-encoding from {codecs[0]} to {codecs[1]} on {self._device}{gained}"

    def recode(self, codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """(n, C) uint8 codes and (n, S) float16 scales of the old codec → those of the new one, in batches."""
        import numpy as np

        parts = [
            self._batch(codes[start : start + self._rows], scales[start : start + self._rows])
            for start in range(0, len(codes), self._rows)
        ]
        return np.concatenate([codes for codes, _ in parts]), np.concatenate([scales for _, scales in parts])

    def _batch(self, codes: np.ndarray, scales: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        parts = self._old.split(codes, scales)
        new_codes, new_scales = self._old.codec.recoded(parts.codes, parts.scales, self._new.codec, self._device)
        return self._new.join(replace(parts, codes=new_codes, scales=new_scales), len(codes))
