"""Question → the passages of a bank that fit it, with all that takes: a snapshot, its embedder, a retriever. Knows no
language model; prints nothing.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from regrad_cli.bank import Snapshot, open_bank
from regrad_cli.engine import Engine, open_engine
from regrad_cli.errors import UsageProblem
from regrad_cli.records import Hit, Notice

if TYPE_CHECKING:
    from regrad_cli.retrieval import MinScore, Retriever

PASSAGES_FOUND = 3  # by `query`, where no number is given


@dataclass(frozen=True, slots=True)
class Retrieved:
    """What a question found, best first, and the damaged files and rows that were passed over."""

    hits: tuple[Hit, ...] = ()
    left_out: tuple[str, ...] = ()
    seconds: float = 0.0


class Opened:
    """A snapshot and what computes for it, open while its `with` block lasts."""

    def __init__(
        self,
        bank: Path,
        *,
        snapshot: int | None,
        device: str,
        dtype: str,
        skip_damaged: bool,
        model: str | None = None,
        search: str = "auto",
        **needs: bool,
    ) -> None:
        self._bank = bank
        self._number = snapshot
        self._search = search
        self._options: dict[str, Any] = {"device": device, "dtype": dtype, "model": model} | needs
        self._stack = ExitStack()
        self.skip_damaged = skip_damaged
        self.snapshot: Snapshot
        self.engine: Engine | None = None
        self._retriever: Retriever | None = None
        self.left_out: tuple[str, ...] = ()  # what the last retrieval did without because it is damaged

    def open(self) -> None:
        self.snapshot = self._stack.enter_context(open_bank(self._bank, self._number))
        try:
            from regrad_cli.retrieval import way_for

            self._way = way_for(self.snapshot.settings, self._search)
        except UsageProblem:
            self.close()
            raise
        if self._way == "lexical":
            self._options["with_embedder"] = False

    def close(self) -> None:
        self._stack.close()

    def prepare(self) -> Iterator[Notice]:
        """Finds and proves model and embedder, once; yields notices while something is fetched."""
        if self.engine is None:
            engines: list[Engine] = []
            snapshot = self.snapshot
            prior = snapshot.prior_bytes()
            yield from open_engine(snapshot.settings, prior, snapshot.check, found=engines, **self._options)
            self.engine = engines[0]

    def retrieve(self, question: str, k: int, min_score: MinScore, *, warm: bool) -> list[Hit]:
        """The best k, those that do not fit among them."""
        engine = self.engine
        assert engine is not None, "prepare() comes first"
        if self._retriever is None:
            from regrad_cli.retrieval import Retriever

            self._retriever = Retriever(self.snapshot, self._way, skip_damaged=self.skip_damaged)
        # Damaged rows are met anew by each question; a whole shard is missed once and then missing for the session.
        damaged = self.snapshot.damaged
        damaged[:] = [finding for finding in damaged if not finding.what.startswith("row ")]
        hits = self._retriever.find(question, engine.question_vector, k, min_score=min_score, warm=warm)
        self.left_out = tuple(
            f"{finding.file}: {finding.what}" + "".join(f", document {name}" for name in finding.documents)
            for finding in damaged
        )
        return hits


class Finder:
    """Retrieval alone, for one question or many; no language model is loaded. Used in a `with` block."""

    def __init__(
        self,
        bank: Path,
        *,
        snapshot: int | None = None,
        device: str = "auto",
        skip_damaged: bool = False,
        search: str = "auto",
    ) -> None:
        options: dict[str, Any] = {"device": device, "dtype": "auto", "skip_damaged": skip_damaged, "search": search}
        self._opened = Opened(bank, snapshot=snapshot, with_model=False, **options)
        self._asked = 0

    def __enter__(self) -> Finder:
        self._opened.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def query(self, question: str, *, k: int | None = None, min_score: MinScore = "auto") -> list[Hit]:
        """The passages that fit the question best, best first; a number as `min_score` leaves out what scores less,
        "auto" leaves nothing out and marks what `ask` would leave out.

        raises  Damaged where what it needs is damaged, Mismatch for another embedder
        """
        list(self._opened.prepare())
        self._asked += 1
        hits = self._opened.retrieve(question, k or PASSAGES_FOUND, min_score, warm=self._asked > 1)
        return hits if min_score == "auto" else fitting(hits)


def query(
    bank: Path,
    question: str,
    *,
    k: int | None = None,
    min_score: MinScore = "auto",
    **options: Any,
) -> list[Hit]:
    """One question to a `Finder`; `options` are its own."""
    with Finder(bank, **options) as finder:
        return finder.query(question, k=k, min_score=min_score)


def fitting(hits: list[Hit]) -> list[Hit]:
    """Those that are not known not to fit."""
    return [hit for hit in hits if hit.fits is not False]
