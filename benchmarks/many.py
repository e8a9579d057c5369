"""Measures many questions that wait against one question at a time: in a command each, and in one warm session.

The questions of the examples, in their own lengths. In the session 16 of them are answered one by one and together in
turns, which also shows how often the answers are equal.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

from benchmarks.bench import Bench, Options, Result
from benchmarks.measure import Figure, Target, paired_ratio, spread

TITLE = "Many questions at once"
DEVICES = ("cpu", "cuda")
MODES = ("regrad", "both")
COLD = 5  # commands of one question
FEW = 48  # questions where a model in fp32 is asked, or passages are in the prompt
TOGETHER = 16


def run(place: Bench, options: Options) -> Result:
    questions = place.questions[: options.questions or 100]
    bank, device = place.example_bank, options.device
    fixed = ("--bank", bank, "--device", device, "--json")
    alone = [place.regrad("ask", question, *fixed) for question in questions[: (options.rounds or COLD) + 1]][1:]
    waiting = place.regrad("ask", "-", *fixed, given="\n".join(questions))
    if len(waiting.stdout.splitlines()) != len(questions):
        raise RuntimeError(f"{len(waiting.stdout.splitlines())} answers to {len(questions)} questions")
    a_question = waiting.seconds / len(questions)
    ratios = [ran.seconds / a_question for ran in alone]
    figures = [
        Figure(
            "a question of many by `ask -`, whole process; baseline: a command of its own",
            a_question,
            "s",
            sorted(ran.seconds for ran in alone)[len(alone) // 2],
            sorted(ratios)[len(ratios) // 2],
            Target("≥", 8),
        ),
        Figure("peak memory", waiting.peak_bytes / 1e6, "MB", max(ran.peak_bytes for ran in alone) / 1e6),
    ]
    notes = [
        f"{len(questions)} questions of the examples, mode regrad, k = 3; {len(alone)} of them in a command of "
        f"their own, after one for warm-up (ratios {spread(ratios)}).",
        f"In one session (loaded, warm) blocks of {TOGETHER} are answered one by one and together in turns.",
    ]
    for mode in MODES:
        for dtype in ("auto", "fp32"):
            asked = questions if (mode, dtype) == ("regrad", "auto") else questions[:FEW]
            figures += _session(place, asked, mode, dtype)
    return Result(figures, notes)


def _session(place: Bench, questions: Sequence[str], mode: str, dtype: str) -> list[Figure]:
    """Speed and equal answers of a session that answers blocks of questions one by one, then together."""
    from regrad_cli.answer import Answerer, AskOptions
    from regrad_cli.records import Answer

    wanted = AskOptions(mode=mode)
    one_by_one: list[float] = []
    together: list[float] = []
    equal = 0
    with Answerer(place.example_bank, modes={mode}, device=place.options.device, dtype=dtype) as answerer:

        def timed(events: Any) -> tuple[list[Answer], float]:
            start = time.perf_counter()
            return [event for event in events if isinstance(event, Answer)], time.perf_counter() - start

        list(answerer.ask_many(questions[:2], wanted))  # loads what is loaded once
        for first in range(0, len(questions), TOGETHER):
            block = questions[first : first + TOGETHER]
            single, seconds = timed(event for question in block for event in answerer.ask(question, wanted))
            one_by_one.append(seconds / len(block))
            batch, seconds = timed(answerer.ask_many(block, wanted))
            together.append(seconds / len(block))
            equal += sum(a.answer == b.answer for a, b in zip(single, batch, strict=True))
    described = f"mode {mode}, {'the dtype of this device' if dtype == 'auto' else dtype}"
    return [
        Figure(
            f"a question in a session, together; baseline: one by one ({described})",
            sorted(together)[len(together) // 2],
            "s",
            sorted(one_by_one)[len(one_by_one) // 2],
            paired_ratio(one_by_one, together),
            Target("≥", 8),
        ),
        Figure(
            f"share of its answers that are equal ({described})",
            100 * equal / len(questions),
            "%",
            target=Target("≥", 99 if dtype == "auto" else 100, "value"),
        ),
    ]
