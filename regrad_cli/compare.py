"""One question in several modes, side by side: one loaded model, one retrieval. Yields events; prints nothing."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import TracebackType

from regrad_cli.answer import PROMPT_MODES, Answerer, AskOptions
from regrad_cli.bank import open_bank
from regrad_cli.errors import UsageProblem
from regrad_cli.records import Answer, Comparison, Notice, Progress

MODES_COMPARED = ("direct", "rag", "regrad", "both")  # from nothing to everything


class Comparer:
    """Answers each question in every mode that works on this bank. Used in a `with` block.

    modes   those modes; a bank that keeps no text has none that put passages into the prompt
    """

    def __init__(
        self,
        bank: Path,
        *,
        device: str = "auto",
        dtype: str = "auto",
        snapshot: int | None = None,
        skip_damaged: bool = False,
        model: str | None = None,
        search: str = "auto",
    ) -> None:
        with open_bank(bank, snapshot) as opened:
            keeps_text = opened.settings.keep_text
        self.modes = tuple(mode for mode in MODES_COMPARED if keeps_text or mode not in PROMPT_MODES)
        self._answerer = Answerer(
            bank,
            modes=set(self.modes),
            device=device,
            dtype=dtype,
            snapshot=snapshot,
            skip_damaged=skip_damaged,
            model=model,
            search=search,
        )
        self._told = False

    def __enter__(self) -> Comparer:
        self._answerer.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self._answerer.__exit__(kind, error, traceback)

    def compare(self, question: str, options: AskOptions) -> Iterator[Notice | Progress | Comparison]:
        """The question in every mode; the last event is the Comparison. The mode in `options` does not count.

        raises  UsageProblem for an empty or too long question; Damaged where a passage it needs is damaged
        """
        if not question.strip():
            raise UsageProblem("the question is empty")
        if len(self.modes) < len(MODES_COMPARED) and not self._told:
            self._told = True
            missing = " and ".join(mode for mode in MODES_COMPARED if mode not in self.modes)
            yield Notice(f"this bank keeps no text, so no passage can be put into a prompt: without modes {missing}")
        start = time.perf_counter()
        yield from self._answerer.load()
        loaded = time.perf_counter()
        found = yield from self._answerer.retrieve(question, options)
        answers: list[Answer] = []
        for place, mode in enumerate(self.modes):
            yield Progress("modes", place, len(self.modes))
            for event in self._answerer.ask(question, replace(options, mode=mode), found):
                if isinstance(event, Answer):
                    answers.append(event)
                elif isinstance(event, Notice):
                    yield event
        yield Progress("modes", len(self.modes), len(self.modes))
        yield Comparison(question, tuple(answers), {"load": loaded - start, "retrieve": found.seconds})
