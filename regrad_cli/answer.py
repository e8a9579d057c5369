"""Question → hits → adapted model → tokens. Yields events; prints nothing.

Weights change only between the first piece of an answer and its last, inside `adapted`, and are the base model's again
however that ends.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack, nullcontext
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from regrad_cli.bank import Snapshot, open_bank
from regrad_cli.engine import Engine, narrated, open_engine
from regrad_cli.errors import UsageProblem
from regrad_cli.models import ModelFolder, resolve_model
from regrad_cli.records import Answer, Hit, Notice, Piece, Used
from regrad_cli.settings import MODES

if TYPE_CHECKING:
    from regrad_cli.learn.model import Model

GRADIENT_MODES = frozenset({"regrad", "both"})
PASSAGES_FOUND = 3  # by `query`, where no number is given
PROMPT_MODES = frozenset({"rag", "both"})


@dataclass(frozen=True, slots=True)
class AskOptions:
    """How one question is answered. k: None for as many passages as the prior was made for; gamma: multiplies the
    prior's own step; min_score: leaves out what fits less.
    """

    mode: str = "regrad"
    k: int | None = None
    gamma: float = 1.0
    min_score: float | None = None
    max_tokens: int = 128


class _Opened:
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
        **needs: bool,
    ) -> None:
        self._bank = bank
        self._number = snapshot
        self._options: dict[str, Any] = {"device": device, "dtype": dtype, "model": model} | needs
        self._stack = ExitStack()
        self.skip_damaged = skip_damaged
        self.snapshot: Snapshot
        self.engine: Engine | None = None
        self.left_out: tuple[str, ...] = ()  # what the last retrieval did without because it is damaged

    def open(self) -> None:
        self.snapshot = self._stack.enter_context(open_bank(self._bank, self._number))

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

    def retrieve(self, question: str, k: int, min_score: float | None, *, warm: bool) -> list[Hit]:
        assert self.engine is not None, "prepare() comes first"
        vector = self.engine.question_embedder.encode_query(question)
        # Damaged rows are met anew by each question; a whole shard is missed once and then missing for the session.
        damaged = self.snapshot.damaged
        damaged[:] = [finding for finding in damaged if not finding.what.startswith("row ")]
        hits = self.snapshot.search(vector[None], k, warm=warm, skip_damaged=self.skip_damaged)[0]
        self.left_out = tuple(
            f"{finding.file}: {finding.what}" + "".join(f", document {name}" for name in finding.documents)
            for finding in damaged
        )
        return [hit for hit in hits if min_score is None or hit.score >= min_score]


class Finder:
    """Retrieval alone, for one question or many; no language model is loaded. Used in a `with` block."""

    def __init__(
        self, bank: Path, *, snapshot: int | None = None, device: str = "auto", skip_damaged: bool = False
    ) -> None:
        self._opened = _Opened(
            bank, snapshot=snapshot, device=device, dtype="auto", skip_damaged=skip_damaged, with_model=False
        )
        self._asked = 0

    def __enter__(self) -> Finder:
        self._opened.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._opened.close()

    def query(self, question: str, *, k: int | None = None, min_score: float | None = None) -> list[Hit]:
        """The passages nearest to the question, best first.

        raises  Damaged where what it needs is damaged, Mismatch for another embedder
        """
        list(self._opened.prepare())
        self._asked += 1
        return self._opened.retrieve(question, k or PASSAGES_FOUND, min_score, warm=self._asked > 1)


def query(
    bank: Path,
    question: str,
    *,
    k: int | None = None,
    min_score: float | None = None,
    snapshot: int | None = None,
    device: str = "auto",
    skip_damaged: bool = False,
) -> list[Hit]:
    """One question to a `Finder`."""
    with Finder(bank, snapshot=snapshot, device=device, skip_damaged=skip_damaged) as finder:
        return finder.query(question, k=k, min_score=min_score)


class Answerer:
    """Answers questions with one loaded model, in any of the given modes. Used in a `with` block.

    bank    None to ask a model alone (mode "direct")
    model   another place of the bank's model; without a bank, the model to ask
    """

    def __init__(
        self,
        bank: Path | None,
        *,
        modes: set[str],
        device: str = "auto",
        dtype: str = "auto",
        snapshot: int | None = None,
        skip_damaged: bool = False,
        model: str | None = None,
    ) -> None:
        unknown = modes - set(MODES)
        if unknown:
            raise UsageProblem(f"there is no mode {', '.join(sorted(unknown))}", f"use one of {', '.join(MODES)}")
        if bank is None and modes != {"direct"}:
            raise UsageProblem("without a bank only mode direct answers")
        self._modes = modes
        self._device, self._dtype, self._model_name = device, dtype, model or "starter"
        self._opened: _Opened | None = None
        if bank is not None:
            self._opened = _Opened(
                bank,
                snapshot=snapshot,
                device=device,
                dtype=dtype,
                skip_damaged=skip_damaged,
                model=model,
                with_embedder=modes != {"direct"},
            )
        self._alone: Model | None = None
        self._asked = 0
        self._changes = ExitStack()  # of the answer that is being generated

    def __enter__(self) -> Answerer:
        if self._opened is None:
            return self
        self._opened.open()
        settings = self._opened.snapshot.settings
        if self._modes & PROMPT_MODES and not settings.keep_text:
            self._opened.close()
            raise UsageProblem(
                "this bank keeps no text, so no passage can be put into a prompt", "use --mode regrad or direct"
            )
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._end_answer(ExitStack())
        if self._opened is not None:
            self._opened.close()

    def ask(self, question: str, options: AskOptions) -> Iterator[Notice | Piece | Answer]:
        """Answers one question; the last event is the Answer. One answer at a time: an earlier one that was left in the
        middle is over when the next begins.

        raises  UsageProblem for an empty or too long question; Damaged where a passage it needs is damaged
        """
        if not question.strip():
            raise UsageProblem("the question is empty")
        if options.mode not in self._modes:
            raise UsageProblem(f"this session answers in {', '.join(sorted(self._modes))}, not in {options.mode}")
        clock = _Clock()
        model = yield from self._loaded_model()
        clock.lap("load")
        hits: list[Hit] = []
        opened = self._opened
        left_out: tuple[str, ...] = ()
        if opened is not None and options.mode != "direct":
            assert opened.engine is not None
            k = options.k or int(opened.engine.prior.card["k"])
            hits = opened.retrieve(question, k, options.min_score, warm=self._asked > 0)
            left_out = opened.left_out
        self._asked += 1
        clock.lap("retrieve")
        yield from self._generate(model, question, options, hits, clock, left_out)

    def _loaded_model(self) -> Generator[Notice, None, Model]:
        """Loads what every answer needs, once; returns the model."""
        if self._opened is not None:
            first = self._opened.engine is None
            yield from self._opened.prepare()
            engine = self._opened.engine
            assert engine is not None
            model = engine.model
            if first:
                yield Notice(f"computing on {engine.description}")
                if self._modes & GRADIENT_MODES and not engine.settings.prior_trained:
                    yield Notice(
                        "this bank's prior is untrained: gradients of passages are not yet knowledge, "
                        "expect poor answers in modes regrad and both (mode rag reads the passages)"
                    )
            return model
        if self._alone is None:
            from regrad_cli.learn.model import load_model

            folders: list[ModelFolder] = []
            yield from narrated(lambda report: resolve_model(self._model_name, report=report), folders)
            self._alone = load_model(folders[0].path, device=self._device, dtype=self._dtype)
        return self._alone

    def _generate(
        self,
        model: Model,
        question: str,
        options: AskOptions,
        hits: list[Hit],
        clock: _Clock,
        left_out: tuple[str, ...],
    ) -> Iterator[Piece | Answer]:
        from regrad_cli.learn.prompt import greedy, pieces, prompt_ids

        mode = options.mode
        weights: list[float] = []
        context: Any = nullcontext()
        if hits and mode in GRADIENT_MODES:
            context, weights = self._adaptation(model, hits, options.gamma)
        shown = [hit.passage.training_text for hit in hits] if mode in PROMPT_MODES else []
        prompt = prompt_ids(model, question, shown)
        limit = model.positions
        if limit is not None and len(prompt) + options.max_tokens > limit:
            raise UsageProblem(
                f"the prompt takes {len(prompt)} tokens and the answer up to {options.max_tokens}: more than {limit}",
                "ask a shorter question, use a smaller -k, or mode regrad",
            )
        count, text = 0, []

        def counted(tokens: Iterator[int]) -> Iterator[int]:
            nonlocal count
            for token in tokens:
                if self._changes is not changes:
                    raise RuntimeError("another question was asked before this answer's end")
                count += 1
                yield token

        with ExitStack() as changes:
            self._end_answer(changes)  # a consumer may still hold an earlier one that it left in the middle
            changes.enter_context(context)
            clock.lap("adapt")
            for piece in pieces(model, counted(greedy(model, prompt, options.max_tokens))):
                text.append(piece)
                yield Piece(piece)
            clock.lap("generate")
        clock.lap("restore")
        yield Answer(
            question=question,
            answer="".join(text).strip(),
            mode=mode,
            grounded=bool(hits),
            passages=tuple(
                Used(p.id, p.source, p.title, hit.score, weights[place] if weights else None, p.text)
                for place, hit in enumerate(hits)
                for p in (hit.passage,)
            ),
            tokens={"prompt": len(prompt), "answer": count},
            seconds=clock.seconds(),
            model=self._opened.snapshot.settings.model_name if self._opened else self._model_name,
            prior=self._opened.snapshot.settings.prior_name if self._opened else None,
            bank=str(self._opened.snapshot.path) if self._opened else None,
            partial=bool(left_out),
            notices=left_out,
        )

    def _end_answer(self, following: ExitStack) -> None:
        """Takes off what an answer in the middle of its tokens has put on the model; it cannot go on."""
        self._changes.close()
        self._changes = following

    def _adaptation(self, model: Model, hits: list[Hit], gamma: float) -> tuple[Any, list[float]]:
        """The context in which the model answers with these passages' gradients, and their weights."""
        from regrad_cli.learn.adapt import adapted, combine

        assert self._opened is not None and self._opened.engine is not None
        engine = self._opened.engine
        rows = self._opened.snapshot.read_rows([hit.ref for hit in hits])
        gradients = engine.codec.decode(rows.codes, rows.scales, model.device)
        weights = engine.prior.weights_for([hit.score for hit in hits])
        change = combine(gradients, weights, engine.prior.step_sizes, gamma * float(engine.prior.card["gamma"]))
        return adapted(model, engine.prior, change), weights


class _Clock:
    """Seconds of an answer's stages, by wall clock. On CUDA a stage ends when its work was handed over, not done."""

    def __init__(self) -> None:
        self._start = self._last = time.perf_counter()
        self._laps = dict.fromkeys(("load", "retrieve", "adapt", "generate", "restore"), 0.0)

    def lap(self, stage: str) -> None:
        """Ends a stage: what passed since the last end is its own."""
        now = time.perf_counter()
        self._laps[stage] += now - self._last
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._laps | {"total": self._last - self._start}
