"""A bank moves to another prior: every row's gradient is computed anew from the stored text. Yields events; prints
nothing and knows no file of the bank.

Text, embeddings and documents stay what they are. The bank answers under its old prior until the last row is there,
and one commit changes both; a move that was interrupted goes on where its last commit ended.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from regrad_cli.bank import MovingWriter, Snapshot, move_bank, open_bank, rows_to_move
from regrad_cli.engine import Engine, open_engine
from regrad_cli.errors import Damaged, NonFinite, UsageProblem
from regrad_cli.priors import settings_under
from regrad_cli.records import BankSettings, IngestSummary, Notice, Passage, Progress, RowRef, row_key

if TYPE_CHECKING:
    import numpy as np

TRIAL_PASSAGES = 8  # computed by --dry-run to estimate the time
NAMED = 5  # passages that an error names

Event = Notice | Progress | IngestSummary


@dataclass(frozen=True, slots=True)
class MoveOptions:
    """prior: the file of the prior to move to, None to finish what was begun; commit_rows: passages between commits;
    wait_s: how long to wait for another writer."""

    prior: Path | None = None
    dry_run: bool = False
    device: str = "auto"
    dtype: str = "auto"
    commit_rows: int = 256
    wait_s: float = 0.0


def move(bank: Path, options: MoveOptions) -> Iterator[Event]:
    """Brings every row of the bank under one prior; commits as it goes. The last event is an IngestSummary.

    raises  UsageProblem for a bank that keeps no text; Mismatch for a prior of another model; Damaged for a file that
            is no prior; NonFinite where a passage has no finite gradient under it (the bank stays with its prior);
            NoBank, Locked, ModelUnavailable, StorageFailed. What was computed and committed before stays
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        writer: MovingWriter | None = None
        if options.dry_run:
            snapshot = stack.enter_context(open_bank(bank, for_writing=True))
        else:
            writer = stack.enter_context(move_bank(bank, wait_s=options.wait_s))
            snapshot = writer.snapshot
        settings, prior = _target(snapshot, options.prior)
        if settings.prior == snapshot.settings.prior:
            yield from _stay(snapshot, writer)
            yield _summary(snapshot, settings, writer, time.perf_counter() - started)
            return
        stale = rows_to_move(snapshot, settings)
        engines: list[Engine] = []
        yield from open_engine(
            settings,
            prior,
            snapshot.check,
            with_embedder=settings.segments > 1,
            device=options.device,
            dtype=options.dtype,
            found=engines,
        )
        engine = engines[0]
        engine.prior.check(engine.model.projections)
        if stale:
            yield Notice(f"computing on {engine.description}")
        if writer is None:
            seconds = _trial(snapshot, engine, stale) * len(stale)
            yield _summary(snapshot, settings, None, time.perf_counter() - started, stale, seconds)
            return
        writer.begin(settings, prior)
        yield from _Move(writer, engine).work(stale, options.commit_rows)
        writer.switch()
        writer.finish()
        yield Notice(f"the bank's prior is now '{settings.prior_name}'; it was '{snapshot.settings.prior_name}'")
        if settings.codec != snapshot.settings.codec:
            yield Notice(f"its gradients are stored under {settings.codec}; they were under {snapshot.settings.codec}")
        yield _summary(snapshot, settings, writer, time.perf_counter() - started, stale)


def _target(snapshot: Snapshot, file: Path | None) -> tuple[BankSettings, bytes]:
    """The bank's settings as they are to be, and the prior's bytes."""
    if not snapshot.settings.keep_text:
        raise UsageProblem(
            f"the bank at {snapshot.path} keeps no text, so its gradients cannot be computed anew",
            "make a new bank with the prior, and ingest the documents there: regrad init PATH --prior FILE",
        )
    if file is not None:
        return settings_under(snapshot.settings, file)
    moved = snapshot.moved()
    if moved is None:
        return snapshot.settings, b""
    try:
        return moved.settings, moved.prior_bytes()
    except Damaged as error:
        error.hint = "give the prior again: regrad ingest --stale --prior FILE"
        raise


def _stay(snapshot: Snapshot, writer: MovingWriter | None) -> Iterator[Notice]:
    """Nothing is stale under the prior that the bank has; a move to another one that was begun is given up."""
    name = snapshot.settings.prior_name
    moved = snapshot.moved()
    if moved is None:
        yield Notice(f"no passage is stale: the bank's prior is '{name}'")
    elif writer is not None:
        writer.give_up()
        writer.finish()
        yield Notice(f"the bank stays with its prior '{name}'; the move to '{moved.settings.prior_name}' is given up")


def _summary(
    snapshot: Snapshot,
    settings: BankSettings,
    writer: MovingWriter | None,
    seconds: float,
    stale: list[RowRef] | None = None,
    estimated_s: float = 0.0,
) -> IngestSummary:
    counts, recomputed = snapshot.stats(), len(stale or ())
    return IngestSummary(
        documents=counts["documents"],
        passages=counts["passages"],
        unchanged=counts["passages"] - recomputed,
        recomputed=recomputed,
        seconds=seconds,
        snapshot=None if writer is None else writer.snapshot.number,
        dry_run=writer is None,
        estimated_bytes=recomputed * settings.estimated_row_bytes if writer is None else 0,
        estimated_seconds=estimated_s,
    )


def _trial(snapshot: Snapshot, engine: Engine, stale: list[RowRef]) -> float:
    """Seconds a passage, by computing a few."""
    trial = list(snapshot.read_rows(stale[:TRIAL_PASSAGES]).passages) if stale else []
    if not trial:
        return 0.0
    deque(engine.gradients(trial[:1]), maxlen=0)  # loads what is loaded once
    start = time.perf_counter()
    deque(engine.gradients(trial), maxlen=0)
    return (time.perf_counter() - start) / len(trial)


class _Move:
    """The rows that are missing under the new prior, batch by batch."""

    def __init__(self, writer: MovingWriter, engine: Engine) -> None:
        self.writer = writer
        self.engine = engine
        self.bad: list[Passage] = []

    def work(self, stale: list[RowRef], commit_rows: int) -> Iterator[Progress]:
        for start in range(0, len(stale), commit_rows):
            refs = stale[start : start + commit_rows]
            yield from self._commit(refs, start, len(stale))
            yield Progress("passages", start + len(refs), len(stale))
        if self.bad:
            settings = self.writer.snapshot.settings
            named = ", ".join(f"passage {passage.ordinal} of {passage.source}" for passage in self.bad[:NAMED])
            raise NonFinite(
                f"under the prior '{self.engine.settings.prior_name}' {len(self.bad)} of {len(stale)} passages have "
                f"no finite gradient ({named}{', …' if len(self.bad) > NAMED else ''}): the bank stays with its prior "
                f"'{settings.prior_name}'",
                "--dtype fp32 may help, or `regrad bank rm` for those documents; "
                "`regrad ingest --stale` goes on, and keeps what was computed",
            )

    def _commit(self, refs: list[RowRef], done: int, total: int) -> Iterator[Progress]:
        settings = self.engine.settings
        old = self.writer.snapshot.read_rows(refs)
        keys = [row_key(passage, settings.model, settings.tokenizer, settings.prior) for passage in old.passages]
        places: dict[bytes, int] = {}  # a passage that two documents share is computed once
        for key in keys:
            places.setdefault(key, len(places))
        passages = dict(zip(keys, old.passages, strict=True))
        codes, scales, finite = yield from self._computed([passages[key] for key in places], done, total)
        good = []
        for row, key in enumerate(keys):
            if finite[places[key]]:
                good.append(row)
            else:
                self.bad.append(old.passages[row])
        order = [places[keys[row]] for row in good]
        self.writer.add(
            [old.passages[row] for row in good],
            [keys[row] for row in good],
            codes[order],
            scales[order],
            old.embeddings[good],
        )
        self.writer.commit()

    def _computed(
        self, passages: list[Passage], done: int, total: int
    ) -> Generator[Progress, None, tuple[np.ndarray, np.ndarray, list[bool]]]:
        with closing(self.engine.gradients(passages)) as steps:  # the model is whole again before the lock goes back
            while True:
                try:
                    yield Progress("passages", done + next(steps), total)
                except StopIteration as end:
                    return end.value
