"""Documents → passages → gradients → bank, resumable. Yields events; prints nothing and knows no file of the bank.

Rows are matched by what they are (document, place in it, key), so that ingesting again computes only what is missing,
and an interrupted ingest goes on where its last commit ended.
"""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Generator, Iterator
from contextlib import ExitStack, closing
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO

from regrad_cli.bank import Snapshot, Writer, create_bank, open_bank, write_bank
from regrad_cli.bank.create import refuse_what_is_there
from regrad_cli.batch import Batch
from regrad_cli.documents import read_documents, read_stream
from regrad_cli.engine import Engine, NewRows, narrated, open_engine
from regrad_cli.errors import UsageProblem
from regrad_cli.fingerprints import fingerprint
from regrad_cli.holdings import Holdings
from regrad_cli.models import ModelFolder, resolve_embedder, resolve_model
from regrad_cli.passages import split
from regrad_cli.priors import new_settings, shipped_prior
from regrad_cli.pruning import gone
from regrad_cli.records import (
    BankSettings,
    Document,
    DocumentDone,
    DocumentGone,
    IngestSummary,
    Notice,
    Passage,
    Progress,
    RowRef,
    Skipped,
    row_key,
)
from regrad_cli.tally import Tally

LOOK_AHEAD_PASSAGES = 20_000  # planned before computing begins, so that the time left is known (some 10 MB, compressed)
FINISHED = 1024  # documents of one batch, of which few or none may have changed
TRIAL_PASSAGES = 8  # computed by --dry-run to estimate the time

Event = Notice | Progress | DocumentDone | DocumentGone | Skipped | IngestSummary


@dataclass(frozen=True, slots=True)
class IngestOptions:
    """What to ingest and how. commit_rows: passages between commits; wait_s: how long to wait for another writer."""

    paths: tuple[Path, ...] = ()
    stdin: BinaryIO | None = None
    stdin_format: str = "text"
    stdin_name: str | None = None
    prune: bool = False
    dry_run: bool = False
    device: str = "auto"
    dtype: str = "auto"
    title_field: str = "title"
    text_field: str = "text"
    commit_rows: int = 256
    wait_s: float = 0.0


def initialise(
    path: Path,
    *,
    model: str = "starter",
    prior: Path | None = None,
    embedder: str = "minilm",
    codec: str = "auto",
    chunk_tokens: int = 192,
    chunk_overlap: int = 24,
    keep_text: bool = True,
    seed: int = 0,
) -> Iterator[Notice | BankSettings]:
    """Makes a bank at `path`; yields notices while models are fetched and, last, the settings.

    raises  UsageProblem where something is in the way, ModelUnavailable, Mismatch for a prior of another model
    """
    if not 16 <= chunk_tokens <= 4096 or not 0 <= chunk_overlap * 2 < chunk_tokens:
        raise UsageProblem(
            f"passages of {chunk_tokens} tokens with an overlap of {chunk_overlap} cannot be cut",
            "--chunk-tokens is between 16 and 4096, --chunk-overlap below half of it",
        )
    refuse_what_is_there(path)
    folders: list[tuple[ModelFolder, ModelFolder]] = []
    yield from narrated(
        lambda report: (resolve_model(model, report=report), resolve_embedder(embedder, report=report)), folders
    )
    language, vectors = folders[0]
    if prior is None and shipped_prior(fingerprint(language.path)) is None:
        yield Notice(
            "no prior has been learned for this model: starting from an untrained one "
            "(its step size is sought on the CPU, in fp32)"
        )
    settings, data, told = new_settings(
        model=language,
        embedder=vectors,
        prior_file=prior,
        codec=codec,
        chunk_tokens=chunk_tokens,
        chunk_overlap=chunk_overlap,
        keep_text=keep_text,
        seed=seed,
    )
    if told is not None:
        yield Notice(told)
    create_bank(path, settings, data)
    yield settings


def ingest(bank: Path, options: IngestOptions) -> Iterator[Event]:
    """Brings the bank up to date with the documents; commits as it goes. The last event is an IngestSummary.

    raises  NoBank, Locked, Mismatch, ModelUnavailable, Damaged, StorageFailed; what was committed before stays
    """
    started = time.perf_counter()
    with ExitStack() as stack:
        writer: Writer | None = None
        if options.dry_run:
            snapshot = stack.enter_context(open_bank(bank, for_writing=True))
        else:
            writer = stack.enter_context(write_bank(bank, wait_s=options.wait_s))
            snapshot = writer.snapshot
        engines: list[Engine] = []
        yield from open_engine(
            snapshot.settings,
            snapshot.prior_bytes(),
            snapshot.check,
            device=options.device,
            dtype=options.dtype,
            found=engines,
        )
        if snapshot.stats()["move"] is not None:
            yield Notice("this bank is on its way to another prior: `regrad ingest --stale` goes on with that")
        run = _Run(bank, options, snapshot, writer, engines[0])
        yield from run.work()
        yield run.summary(time.perf_counter() - started)


class _Run:
    """One ingest: the plan of what is missing, and the commits that add it."""

    def __init__(
        self, bank: Path, options: IngestOptions, snapshot: Snapshot, writer: Writer | None, engine: Engine
    ) -> None:
        self.options = options
        self.base = bank.absolute().parent
        self.settings = snapshot.settings
        self.writer = writer
        self.engine = engine
        self.skipped: list[Skipped] = []
        self.heard: deque[Skipped] = deque()  # skipped while planning, not yet told
        self.seen = Tally()  # ids of documents
        self.sources: list[str] = []  # of these, where pruning asks for them
        self.documents = self.passages = self.added = self.unchanged = self.replaced = self.removed = 0
        self.seconds_a_passage = 0.0
        self.described = False
        self.bad: Counter[str] = Counter()  # passages whose loss or gradient is not finite, by document
        self.snapshot = snapshot
        self.held = Holdings(snapshot)

    def work(self) -> Iterator[Event]:
        batches = self._plan()
        ahead: deque[bytes] = deque()  # batches that are planned, packed
        planned, more = 0, True
        # Standard input may come slowly: each full batch is committed without waiting for its end.
        limit = 1 if self.options.stdin else LOOK_AHEAD_PASSAGES
        done = 0
        while more or ahead:
            while more and (not ahead or planned - done < limit):
                batch = next(batches, None)
                yield from self._told()
                if batch is None:
                    more = False
                else:
                    ahead.append(batch.packed())
                    planned += len(batch.rows)
            if ahead:
                batch = Batch.unpacked(ahead.popleft(), self._key)
                if self.writer is None:
                    yield from self._estimate(batch)
                else:
                    yield from self._commit(self.writer, batch, done, None if more else planned)
                done += len(batch.rows)
                for document in batch.finished:
                    bad = self.bad[document.id]
                    yield replace(document, passages=document.passages - bad, added=document.added - bad)
                yield from batch.gone
        if self.writer is not None:
            self.writer.finish()

    def summary(self, seconds: float) -> IngestSummary:
        dry = self.writer is None
        return IngestSummary(
            documents=self.documents,
            passages=self.passages,
            added=self.added,
            unchanged=self.unchanged,
            replaced=self.replaced,
            removed=self.removed,
            skipped=tuple(self.skipped),
            seconds=seconds,
            snapshot=None if self.writer is None else self.writer.snapshot.number,
            dry_run=dry,
            estimated_bytes=self.added * self.settings.estimated_row_bytes if dry else 0,
            estimated_seconds=self.added * self.seconds_a_passage,
        )

    # ── planning ────────────────────────────────────────────────────────────────────────────────────────────────────

    def _plan(self) -> Iterator[Batch]:
        batch = Batch()
        for item in self._inputs():
            if isinstance(item, Skipped):
                self._skip(item)
                continue
            if not self.seen.add(int(item.id, 16)):
                self._skip(Skipped(item.source, "another document of this ingest has the same name"))
                continue
            if self.options.prune:
                self.sources.append(item.source)
            have = self.held.of_document(item.id)
            count = added = 0
            for passage in self._passages(item):
                if passage.tokens < 2:
                    self._skip(Skipped(item.source, f"passage {passage.ordinal}: one token has no next one to learn"))
                    continue
                key = self._key(passage)
                count += 1
                if have.pop((passage.ordinal, passage.offset, key), None) is None:
                    batch.rows.append((passage, key))
                    added += 1
                    if len(batch.rows) >= self.options.commit_rows:
                        yield batch
                        batch = Batch()
            if not count:
                if not self.skipped or self.skipped[-1].source != item.source:
                    stays = "; its earlier passages stay, `regrad bank rm` removes them" if have else ""
                    self._skip(Skipped(item.source, f"no text in it{stays}"))
                continue
            batch.removals += have.values()
            done = DocumentDone(item.id, item.source, item.title, count, added, count - added, len(have))
            batch.finished.append(done)
            self.documents += 1
            self.passages += count
            self.unchanged += count - added
            self.replaced += bool(have)
            if len(batch.finished) >= FINISHED:
                yield batch
                batch = Batch()
        if self.options.prune:
            batch.gone += self._gone()
            batch.removals += [ref for document in batch.gone for ref in self.held.refs(document.id)]
            self.removed = len(batch.gone)
        yield batch

    def _inputs(self) -> Iterator[Document | Skipped]:
        options = self.options
        fields: dict[str, Any] = {"title_field": options.title_field, "text_field": options.text_field}
        streamed: Iterator[Document | Skipped] = iter(())
        if options.stdin is not None:
            streamed = read_stream(options.stdin, format=options.stdin_format, name=options.stdin_name, **fields)
        return chain(read_documents(options.paths, base=self.base, **fields), streamed)

    def _passages(self, document: Document) -> Iterator[Passage]:
        settings = self.settings
        return split(
            document,
            self.engine.tokenizer.spans,
            max_tokens=settings.chunk_tokens,
            overlap=settings.chunk_overlap,
        )

    def _key(self, passage: Passage) -> bytes:
        settings = self.settings
        return row_key(passage, settings.model, settings.tokenizer, settings.prior)

    def _gone(self) -> Iterator[DocumentGone]:
        """What is to be pruned."""
        documents = {passage.source: passage.document for _, passage, _ in self.snapshot.passages()}
        for source in gone(
            [source for source, document in documents.items() if not self.seen[int(document, 16)]],
            base=self.base,
            paths=self.options.paths,
            read=self.sources,
            skipped=[one.source for one in self.skipped],
        ):
            yield DocumentGone(documents[source], source)

    def _skip(self, skipped: Skipped) -> None:
        self.skipped.append(skipped)
        self.heard.append(skipped)

    def _told(self) -> Iterator[Skipped]:
        while self.heard:
            yield self.heard.popleft()

    # ── computing ───────────────────────────────────────────────────────────────────────────────────────────────────

    def _commit(self, writer: Writer, batch: Batch, done: int, total: int | None) -> Iterator[Event]:
        copied: dict[bytes, RowRef] = {}
        missing: dict[bytes, Passage] = {}
        for passage, key in batch.rows:
            if key in copied:
                continue
            if held := self.held.row_of(key):
                copied[key] = held
            else:
                missing.setdefault(key, passage)
        if missing and not self.described:
            self.described = True
            yield Notice(f"computing on {self.engine.description}")
        found = dict(zip(copied, range(len(copied)), strict=True))
        blocks = []
        if copied:  # the same passage, elsewhere or at another place: its row is the same
            old = writer.snapshot.read_rows(list(copied.values()))
            blocks.append((old.codes, old.scales, old.embeddings))
        bad: set[bytes] = set()
        if missing:
            new = yield from self._computed(list(missing.values()), done + len(copied), total)
            found |= {key: len(copied) + place for place, key in enumerate(missing)}
            bad = {key for place, key in enumerate(missing) if not new.finite[place]}
            blocks.append((new.codes, new.scales, new.embeddings))
        good = [(passage, key) for passage, key in batch.rows if key not in bad]
        for passage, key in batch.rows:
            if key in bad:
                reason = "its loss, gradient or embedding is not finite"
                self._skip(Skipped(passage.source, f"passage {passage.ordinal}: {reason}"))
                self.bad[passage.document] += 1
                self.passages -= 1
        yield from self._told()
        if good:
            import numpy as np

            order = [found[key] for _, key in good]
            codes, scales, embeddings = (np.concatenate(parts)[order] for parts in zip(*blocks, strict=True))
            writer.add([passage for passage, _ in good], [key for _, key in good], codes, scales, embeddings)
        if batch.changes:
            writer.remove(batch.removals)
            writer.commit("ingest")
        self.added += len(good)
        yield Progress("passages", done + len(batch.rows), total)

    def _computed(self, passages: list[Passage], done: int, total: int | None) -> Generator[Progress, None, NewRows]:
        with closing(self.engine.rows(passages)) as steps:  # the model is whole again before the lock is given back
            while True:
                try:
                    yield Progress("passages", done + next(steps), total)
                except StopIteration as end:
                    return end.value

    def _estimate(self, batch: Batch) -> Iterator[Progress]:
        trial = [passage for passage, key in batch.rows if self.held.row_of(key) is None][:TRIAL_PASSAGES]
        if trial and not self.seconds_a_passage:
            deque(self.engine.rows(trial[:1]), maxlen=0)  # loads what is loaded once
            start = time.perf_counter()
            deque(self.engine.rows(trial), maxlen=0)
            self.seconds_a_passage = (time.perf_counter() - start) / len(trial)
        self.added += len(batch.rows)
        yield Progress("planned", self.added, None)
