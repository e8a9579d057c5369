"""Measures where a warm answer's time goes, mode regrad against mode rag, and what applying gradients costs.

Each question is answered in the modes regrad, rag and direct in turn, by one loaded model, with answers of one length:
a short answer's, with few and with many passages, and 20 tokens.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from typing import Any, NamedTuple
from unittest.mock import patch

from benchmarks.bench import Bench, Options, Result
from benchmarks.measure import Figure, Target, paired_ratio, shown

TITLE = "An answer's time, warm"
DEVICES = ("cpu", "cuda")
MODES = ("regrad", "rag", "direct")
STAGES = ("load", "retrieve", "adapt", "generate", "restore")
SHORT = 5  # tokens of a usual answer
TOKENS = 20
PASSAGES = {3: 0.8, 10: 0.5}  # k: what of mode rag's time mode regrad may take
WARM_UP = 2  # questions that load what is loaded once and are left out


class Timed(NamedTuple):
    """An answer's seconds by stage, seconds to its first piece of text (both without loading), tokens of its prompt."""

    seconds: dict[str, float]
    first: float
    prompt: int

    @property
    def total(self) -> float:
        return self.seconds["total"] - self.seconds["load"]


def run(place: Bench, options: Options) -> Result:
    from regrad_cli.answer import Answerer
    from regrad_cli.learn.model import Model

    questions = place.questions[: (options.questions or 20) + WARM_UP]
    # No answer ends before its last token, also where it only repeats itself.
    endless = patch.object(Model, "end_ids", property(lambda self: []))
    repeating = patch("regrad_cli.learn.prompt.said_once", lambda ids: None)
    with (
        endless,
        repeating,
        Answerer(place.example_bank, modes=set(MODES), device=options.device, dtype="auto") as answerer,
    ):
        load_s = _answers(answerer, questions[:WARM_UP], MODES, 3, TOKENS)["regrad"][0].seconds["load"]
        asked = questions[WARM_UP:]
        figures = [
            figure
            for k, bound in PASSAGES.items()
            for figure in _against_rag(_answers(answerer, asked, ("regrad", "rag"), k, SHORT), k, bound)
        ]
        long = _answers(answerer, asked, MODES, 3, TOKENS)
    figures += _beside_generating(long)
    notes = [
        f"{len(asked)} questions of the examples after {WARM_UP} for warm-up; medians; ratios are medians over the "
        f"questions. The stages are those of {TOKENS} tokens with k = 3. Prompts there: regrad "
        f"{_typical(long['regrad'], 'prompt'):.0f} tokens, rag {_typical(long['rag'], 'prompt'):.0f}. Loading, once a "
        f"session: {shown(load_s, 's')}.",
    ]
    if options.device == "cuda":
        notes.append("On CUDA a stage ends when its work was handed over: part of adapt is counted under generate.")
    return Result(figures, notes)


def _answers(
    answerer: Any, questions: Sequence[str], modes: Sequence[str], k: int, tokens: int
) -> dict[str, list[Timed]]:
    """Every question's answer of so many tokens, in all modes in turn. Passages that fit too little count too."""
    from regrad_cli.answer import AskOptions
    from regrad_cli.records import Answer, Piece

    found: dict[str, list[Timed]] = {mode: [] for mode in modes}
    for question in questions:
        for mode in modes:
            begun, first, answer = time.perf_counter(), 0.0, None
            for event in answerer.ask(question, AskOptions(mode=mode, k=k, min_score=None, max_tokens=tokens)):
                if isinstance(event, Piece):
                    first = first or time.perf_counter() - begun
                elif isinstance(event, Answer):
                    answer = event
            if answer is None or answer.tokens["answer"] != tokens:
                raise RuntimeError(f"an answer is not of {tokens} tokens")
            found[mode].append(Timed(answer.seconds, first - answer.seconds["load"], answer.tokens["prompt"]))
    return found


def _typical(answers: Sequence[Timed], field: str) -> float:
    return statistics.median(getattr(answer, field) for answer in answers)


def _against_rag(answers: dict[str, list[Timed]], k: int, bound: float) -> list[Figure]:
    ours, rag = answers["regrad"], answers["rag"]
    return [
        Figure(
            f"{name}, k = {k}, answers of {SHORT} tokens; baseline: mode rag",
            1000 * _typical(ours, field),
            "ms",
            1000 * _typical(rag, field),
            paired_ratio([getattr(one, field) for one in ours], [getattr(one, field) for one in rag]),
            Target("≤", limit),
        )
        for name, field, limit in (("mode regrad in all", "total", bound), ("its first piece of text", "first", 1.0))
    ]


def _beside_generating(answers: dict[str, list[Timed]]) -> list[Figure]:
    ours, untouched = answers["regrad"], [one.seconds["generate"] for one in answers["direct"]]
    beside = [sum(one.seconds[stage] for stage in ("retrieve", "adapt", "restore")) for one in ours]
    generated = [one.seconds["generate"] for one in ours]
    added = [one.total - plain for one, plain in zip(ours, untouched, strict=True)]
    figures = [
        Figure(
            f"retrieve + read + decode + apply + restore, against generating {TOKENS} tokens",
            1000 * statistics.median(beside),
            "ms",
            1000 * statistics.median(generated),
            paired_ratio(beside, generated),
            Target("≤", 0.05),
        ),
        Figure(
            "all that mode regrad takes longer, its slower tokens included, against the untouched model's "
            f"{TOKENS} tokens",
            1000 * statistics.median(added),
            "ms",
            1000 * statistics.median(untouched),
            paired_ratio(added, untouched),
        ),
    ]
    for stage in (*STAGES, "total"):
        value, baseline = (statistics.median(one.seconds[stage] for one in answers[mode]) for mode in ("regrad", "rag"))
        figures.append(Figure(f"mode regrad: {stage}; baseline: mode rag", 1000 * value, "ms", 1000 * baseline))
    return figures
