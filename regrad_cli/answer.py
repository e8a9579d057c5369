"""Question → hits → adapted model → tokens. Yields events; prints nothing.

Weights change only between the first piece of an answer and its last, inside `adapted`, and are the base model's again
however that ends.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING

from regrad_cli.adaptation import Adaptation, adaptation_by
from regrad_cli.candidates import Candidate, candidates, weights
from regrad_cli.engine import narrated
from regrad_cli.errors import UsageProblem
from regrad_cli.finding import Opened, Retrieved, fitting
from regrad_cli.models import ModelFolder, resolve_model
from regrad_cli.records import Answer, BankSettings, Explanation, Hit, Notice, Piece, Refused, Used
from regrad_cli.settings import COMBINE_AUTO, COMBINES, MODES

if TYPE_CHECKING:
    from regrad_cli.learn.model import Model
    from regrad_cli.retrieval import MinScore

GRADIENT_MODES = frozenset({"regrad", "both"})
PROMPT_MODES = frozenset({"rag", "both"})


@dataclass(frozen=True, slots=True)
class AskOptions:
    """How one question is answered. k: None for as many passages as the prior was made for; gamma: multiplies the
    prior's own step; min_score: leaves out passages that score less, "auto" what was measured to be too little, None
    none; combine: what is made of several passages' gradients (candidates.py); explain: measures what each passage's
    gradient did.
    """

    mode: str = "regrad"
    k: int | None = None
    gamma: float = 1.0
    min_score: MinScore = "auto"
    combine: str = COMBINE_AUTO
    max_tokens: int = 128
    explain: bool = False

    def __post_init__(self) -> None:
        if self.combine not in COMBINES:
            raise UsageProblem(f"there is no way '{self.combine}' to combine", f"use one of {', '.join(COMBINES)}")
        if self.explain and self.mode not in GRADIENT_MODES:
            raise UsageProblem(
                f"mode {self.mode} applies no gradients, so there is nothing to explain", "use --mode regrad or both"
            )


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question with the ways in which it may be answered.

    shown       the passages as they stand in a prompt; none in modes that show none
    adaptation  by the gradients of all its passages; None where none are applied
    """

    question: str
    mode: str
    found: Retrieved
    shown: tuple[str, ...]
    adaptation: Adaptation | None
    candidates: tuple[Candidate, ...]

    def adaptation_of(self, candidate: Candidate) -> Adaptation | None:
        """By the gradients that this candidate applies."""
        return None if self.adaptation is None else self.adaptation.alone(candidate.place)


class Answerer:
    """Answers questions with one loaded model, in any of the given modes. Used in a `with` block.

    bank    None to ask a model alone (mode "direct")
    model   another place of the bank's model; without a bank, the model to ask
    search  how passages are found: "auto", "fused", "dense" or "lexical" (retrieval.py)
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
        search: str = "auto",
    ) -> None:
        unknown = modes - set(MODES)
        if unknown:
            raise UsageProblem(f"there is no mode {', '.join(sorted(unknown))}", f"use one of {', '.join(MODES)}")
        if bank is None and modes != {"direct"}:
            raise UsageProblem("without a bank only mode direct answers")
        self._modes = modes
        self._device, self._dtype, self._model_name = device, dtype, model or "starter"
        self._opened: Opened | None = None
        if bank is not None:
            self._opened = Opened(
                bank,
                snapshot=snapshot,
                device=device,
                dtype=dtype,
                skip_damaged=skip_damaged,
                model=model,
                search=search,
                with_embedder=modes != {"direct"},
            )
        self._alone: Model | None = None
        self._asked = 0
        self._told = False
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

    def ask(
        self, question: str, options: AskOptions, found: Retrieved | None = None
    ) -> Iterator[Notice | Piece | Answer]:
        """Answers one question; the last event is the Answer. One answer at a time: an earlier one that was left in the
        middle is over when the next begins.

        found   what `retrieve` gave for this question; None to look for passages now
        raises  UsageProblem for an empty or too long question; Damaged where a passage it needs is damaged
        """
        if not question.strip():
            raise UsageProblem("the question is empty")
        if options.mode not in self._modes:
            raise UsageProblem(f"this session answers in {', '.join(sorted(self._modes))}, not in {options.mode}")
        clock = Clock()
        model = yield from self.load()
        clock.lap("load")
        if options.mode == "direct":
            found = Retrieved()
        if found is None:
            found = yield from self.retrieve(question, options)
        clock.lap("retrieve", found.seconds)
        yield from self._generate(model, question, options, found, clock)

    def ask_many(self, questions: Sequence[str], options: AskOptions) -> Iterator[Notice | Answer | Refused]:
        """Answers questions together, as one batch where it can: an Answer or a Refused for each, in order.

        raises  what `ask` raises but for UsageProblem, once the questions before are answered
        """
        from regrad_cli.together import ask_together

        self._end_answer(ExitStack())
        return ask_together(self, questions, options)

    def retrieve(self, question: str, options: AskOptions) -> Generator[Notice, None, Retrieved]:
        """What the question finds in the bank; loads no language model."""
        opened = self._opened
        assert opened is not None, "without a bank there is nothing to retrieve from"
        yield from opened.prepare()
        assert opened.engine is not None
        start = time.perf_counter()
        k = options.k or int(opened.engine.prior.card["k"])
        hits = fitting(opened.retrieve(question, k, options.min_score, warm=self._asked > 0))
        self._asked += 1
        return Retrieved(tuple(hits), opened.left_out, time.perf_counter() - start)

    def adaptation(self, question: str, found: Retrieved, gamma: float) -> Adaptation:
        """What the passages found for a question make of the prior; at least one. Loads no language model."""
        assert self._opened is not None and self._opened.engine is not None, "retrieve() comes first"
        return adaptation_by(self._opened.engine, self._opened.snapshot, question, found.hits, gamma, self._device)

    @property
    def settings(self) -> BankSettings:
        """What the bank was made with."""
        assert self._opened is not None
        return self._opened.snapshot.settings

    @property
    def passages(self) -> int:
        """How many passages the bank holds."""
        assert self._opened is not None
        return self._opened.snapshot.manifest.counts.passages

    @property
    def model_folder(self) -> Path:
        """Where the bank's model lies, once something was retrieved."""
        assert self._opened is not None and self._opened.engine is not None, "retrieve() comes first"
        return self._opened.engine.model_folder

    def load(self) -> Generator[Notice, None, Model]:
        """Loads what every answer needs, once; returns the model."""
        if self._opened is not None:
            yield from self._opened.prepare()
            engine = self._opened.engine
            assert engine is not None
            model = engine.model
            if not self._told:
                self._told = True
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

    def prepared(self, model: Model, question: str, options: AskOptions, found: Retrieved) -> Prepared:
        """The ways in which a question may be answered.

        raises  UsageProblem where the model cannot read so much at once
        """
        from regrad_cli.learn.prompt import prompt_ids

        mode, hits = options.mode, found.hits
        adaptation = None
        if hits and mode in GRADIENT_MODES:
            adaptation = self.adaptation(question, found, options.gamma)
            if mode in PROMPT_MODES:
                adaptation = adaptation.among_passages()
        shown = tuple(hit.passage.training_text for hit in hits) if mode in PROMPT_MODES else ()
        ways: tuple[Candidate, ...]
        if adaptation is None:
            ways = (Candidate(tuple(prompt_ids(model, question, shown))),)
        else:
            ways = candidates(model, question, shown, adaptation.prior, lambda: adaptation, options.combine)
        prompts = [way.prompt for way in ways]
        if options.explain and ways[0].place is not None:  # then every passage is judged, also one that does not answer
            prompts += [tuple(prompt_ids(model, question, (each,))) for each in shown]
        tokens, limit = max(map(len, prompts)), model.positions
        if limit is not None and tokens + options.max_tokens > limit:
            raise UsageProblem(
                f"the prompt takes {tokens} tokens and the answer up to {options.max_tokens}: more than {limit}",
                "ask a shorter question, use a smaller -k, or mode regrad",
            )
        return Prepared(question, mode, found, shown, adaptation, ways)

    def told(
        self,
        asked: Prepared,
        given: Candidate,
        text: str,
        tokens: int,
        seconds: dict[str, float],
        explanation: Explanation | None = None,
    ) -> Answer:
        """The record of an answer of so many tokens, given by this candidate."""
        hits, adaptation = asked.found.hits, asked.adaptation_of(given)
        weights = [None] * len(hits) if adaptation is None else adaptation.of_passages(len(hits))
        snapshot = self._opened.snapshot if self._opened else None
        return Answer(
            question=asked.question,
            answer=text.strip(),
            mode=asked.mode,
            grounded=bool(hits),
            passages=tuple(used(hit, weight) for hit, weight in zip(hits, weights, strict=True)),
            tokens={"prompt": len(given.prompt), "answer": tokens},
            seconds=seconds,
            model=snapshot.settings.model_name if snapshot else self._model_name,
            prior=snapshot.settings.prior_name if snapshot else None,
            bank=str(snapshot.path) if snapshot else None,
            partial=bool(asked.found.left_out),
            notices=asked.found.left_out,
            explain=explanation,
        )

    def _generate(
        self, model: Model, question: str, options: AskOptions, found: Retrieved, clock: Clock
    ) -> Iterator[Piece | Answer]:
        from regrad_cli.learn.generate import Race
        from regrad_cli.learn.prompt import Kept, pieces

        asked = self.prepared(model, question, options, found)
        ways = asked.candidates
        context = weights(model, ways)
        text: list[str] = []
        race = Race(model, [way.prompt for way in ways], [way.chance for way in ways], options.max_tokens)
        tokens = Kept(race.answer())
        with ExitStack() as changes:
            self._end_answer(changes)  # a consumer may still hold an earlier one that it left in the middle
            changes.enter_context(context)
            clock.lap("adapt")
            for piece in pieces(model, iter(tokens)):
                text.append(piece)
                yield Piece(piece)
                if self._changes is not changes:
                    raise RuntimeError("another question was asked before this answer's end")
            clock.lap("generate")
        clock.lap("restore")
        explanation = None
        given = ways[race.winner]
        if options.explain and asked.adaptation is not None:
            from regrad_cli.explain import explain

            explanation = explain(model, asked, given, [*tokens.ids, *tokens.end])
            clock.lap("explain")
        yield self.told(asked, given, "".join(text), len(tokens.ids), clock.seconds(), explanation)

    def _end_answer(self, following: ExitStack) -> None:
        """Takes off what an answer in the middle of its tokens has put on the model; it cannot go on."""
        self._changes.close()
        self._changes = following


def used(hit: Hit, weight: float | None) -> Used:
    """A hit as an answer names it; `weight` is what its gradient got."""
    passage = hit.passage
    return Used(passage.id, passage.source, passage.title, hit.score, weight, passage.text)


class Clock:
    """Seconds of an answer's stages, by wall clock; "explain" only where there was one. On CUDA a stage ends when its
    work was handed over, not done."""

    def __init__(self) -> None:
        self._last = time.perf_counter()
        self._laps = dict.fromkeys(("load", "retrieve", "adapt", "generate", "restore"), 0.0)

    def lap(self, stage: str, seconds: float | None = None) -> None:
        """Ends a stage: what passed since the last end is its own, or `seconds` where that was done before."""
        now = time.perf_counter()
        self._laps[stage] = now - self._last if seconds is None else seconds
        self._last = now

    def seconds(self) -> dict[str, float]:
        return self._laps | {"total": sum(self._laps.values())}
