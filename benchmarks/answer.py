"""Measures where a warm answer's time goes, and what applying gradients costs beside generating 20 tokens.

Each question is answered in the modes regrad, rag and direct in turn, by one loaded model, with exactly 20 tokens.
"""

from __future__ import annotations

import statistics
from collections.abc import Iterator
from typing import Any, cast
from unittest.mock import patch

from benchmarks.bench import Bench, Options, Result
from benchmarks.measure import Figure, Target, paired_ratio, shown

TITLE = "An answer's time, warm"
DEVICES = ("cpu", "cuda")
MODES = ("regrad", "rag", "direct")
STAGES = ("load", "retrieve", "adapt", "generate", "restore")
TOKENS = 20
WARM_UP = 2  # questions that load what is loaded once and are left out


def run(place: Bench, options: Options) -> Result:
    from regrad_cli.answer import Answerer, AskOptions
    from regrad_cli.learn.model import Model

    questions = place.questions[: (options.questions or 20) + WARM_UP]
    answers: dict[str, list[Any]] = {mode: [] for mode in MODES}
    bank = place.example_bank
    endless = patch.object(Model, "end_ids", property(lambda self: []))  # no answer ends before its 20th token
    with endless, Answerer(bank, modes=set(MODES), device=options.device, dtype="auto") as answerer:
        for question in questions:
            for mode in MODES:
                *_, answer = cast("Iterator[Any]", answerer.ask(question, AskOptions(mode=mode, max_tokens=TOKENS)))
                if answer.tokens["answer"] != TOKENS:
                    raise RuntimeError(f"{answer.tokens['answer']} tokens were generated, not {TOKENS}")
                answers[mode].append(answer)
    first = answers["regrad"][0].seconds["load"]
    warm = {mode: [answer.seconds for answer in found[WARM_UP:]] for mode, found in answers.items()}

    def typical(mode: str, stage: str) -> float:
        return 1000 * statistics.median(seconds[stage] for seconds in warm[mode])

    beside = [sum(seconds[stage] for stage in ("retrieve", "adapt", "restore")) for seconds in warm["regrad"]]
    generated = [seconds["generate"] for seconds in warm["regrad"]]
    untouched = [seconds["generate"] for seconds in warm["direct"]]
    added = [ours["total"] - ours["load"] - plain for ours, plain in zip(warm["regrad"], untouched, strict=True)]
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
        name = f"mode regrad: {stage}; baseline: mode rag"
        figures.append(Figure(name, typical("regrad", stage), "ms", typical("rag", stage)))
    prompts = {mode: statistics.median(answer.tokens["prompt"] for answer in answers[mode]) for mode in MODES}
    notes = [
        f"{len(questions) - WARM_UP} questions of the examples after {WARM_UP} for warm-up, k = 3; medians; ratios are "
        f"medians over the questions. Prompts: regrad {prompts['regrad']:.0f} tokens, rag {prompts['rag']:.0f}. "
        f"Loading, once a session: {shown(first, 's')}.",
    ]
    if options.device == "cuda":
        notes.append("On CUDA a stage ends when its work was handed over: part of adapt is counted under generate.")
    return Result(figures, notes)
