"""Tasks × modes → scores: every way of answering and every control on the same questions.

Yields events; prints nothing. What is needed for it is made ready by `preparation`, answers come from `trials`.
"""

from __future__ import annotations

import time
from collections.abc import Generator, Iterator
from contextlib import ExitStack

from regrad_cli.drift import continued, measure
from regrad_cli.errors import UsageProblem
from regrad_cli.evidence import Asked, Evidence, read_questions, read_texts, recall
from regrad_cli.preparation import MODES, OBJECTIVES, SHOWING, Bench, EvaluateOptions
from regrad_cli.records import Notice, Progress, Skipped
from regrad_cli.results import DriftPoint, Evaluated, Scored, Scores
from regrad_cli.settings import COMBINES
from regrad_cli.trials import Way, answers, noise, summary

__all__ = ["MODES", "EvaluateOptions", "evaluate"]

RANDOM_RUNS = 5

Event = Notice | Progress | Skipped | Scored | Evaluated


def evaluate(options: EvaluateOptions) -> Iterator[Event]:
    """Answers every question in every mode. Yields each answer as it is scored; the last event is an Evaluated.

    raises  UsageProblem, NoBank, Mismatch, ModelUnavailable, Damaged
    """
    started = time.perf_counter()
    _check(options)
    asked, skipped = read_questions(options.tasks, options.limit)
    corpus, wrong = read_texts(options.corpus)
    skipped += wrong
    yield from skipped
    with ExitStack() as stack:
        bench = Bench(options, asked, corpus)
        yield from bench.prepare(stack)
        yield from bench.left_out
        results: list[Scored] = []
        yield from _answers(bench, results)
        drift: list[DriftPoint] = []
        if options.drift:
            yield from measure(bench.growth, drift)
        pooled, datasets = _scores(bench, results)
        yield Evaluated(
            pooled=pooled,
            datasets=datasets,
            drift=tuple(drift),
            drift_questions=len(bench.growth.asked) if drift else 0,
            settings=bench.settings(),
            skipped=(*skipped, *bench.left_out),
            elapsed_s=time.perf_counter() - started,
        )


def _check(options: EvaluateOptions) -> None:
    """raises UsageProblem for what no model is needed to see"""
    unknown = [mode for mode in options.modes or () if mode not in MODES]
    if unknown:
        raise UsageProblem(f"there is no mode {', '.join(unknown)}", f"use some of {','.join(MODES)}")
    if options.modes is not None and not options.modes:
        raise UsageProblem("no mode was named", f"use some of {','.join(MODES)}")
    if options.combine not in COMBINES:
        raise UsageProblem(f"there is no way '{options.combine}' to combine", f"use one of {', '.join(COMBINES)}")
    chooses = options.k is not None or {options.min_score, options.search, options.combine} != {"auto"}
    if chooses and options.bank is None and not options.drift:
        hint = "use them with --retrieval bank"
        raise UsageProblem("-k, --search, --min-score and --combine choose among a bank's passages", hint)


def _answers(bench: Bench, results: list[Scored]) -> Iterator[Scored | Progress | Notice]:
    """Every mode in its turn; what is yielded is appended to `results`."""
    total = len(bench.asked) * sum(RANDOM_RUNS if mode == "random" else 1 for mode in bench.modes)
    for mode in bench.modes:
        first = len(results)
        for way in (yield from _ways(bench, mode)):
            yield Progress("answers", len(results), total)
            for scored in answers(bench.model, bench.asked, bench.evidence, way, bench.options.max_tokens):
                results.append(scored)
                yield scored
                yield Progress("answers", len(results), total)
        own = results[first:]
        em, f1 = (sum(getattr(one, name) for one in own) / len(own) for name in ("em", "f1"))
        yield Notice(f"{mode}: F1 {f1:.1f}, EM {em:.1f}")


def _ways(bench: Bench, mode: str) -> Generator[Progress, None, list[Way]]:
    """The mode as one way of answering or, for random, as one a seed."""

    def own(one: Asked) -> Evidence:
        return bench.evidence[one.number]

    def others(one: Asked) -> Evidence:
        return bench.partners[one.task.id]

    shows = mode in SHOWING
    if mode in ("direct", "rag"):
        return [Way(mode, shows=shows)]
    if mode in OBJECTIVES:
        return [Way(mode, shows=shows, lora=bench.tuned[OBJECTIVES[mode]])]
    if mode == "cpt":
        growth = bench.growth
        return [Way(mode, lora=(yield from continued(growth, growth.fresh, growth.passages)))]
    if mode == "prior":
        return [Way(mode, lora=bench.prior)]
    if mode == "random":
        seeds = [(run, noise(bench.codec, bench.options.seed, run)) for run in range(RANDOM_RUNS)]
        return [Way(mode, lora=bench.prior, source=own, alter=alter, run=run) for run, alter in seeds]
    lora = bench.prior.among_passages() if shows else bench.prior
    return [Way(mode, shows=shows, lora=lora, source=others if mode == "other" else own)]


def _scores(bench: Bench, results: list[Scored]) -> tuple[Scores, dict[str, Scores]]:
    """All files pooled, and each by itself."""

    def part(asked: list[Asked]) -> Scores:
        numbers = {one.number for one in asked}
        found = None if bench.options.bank is None else recall(asked, bench.evidence)
        own = [one for one in results if one.number in numbers]
        return summary(own, seed=bench.options.seed, retrieval=found)

    names = dict.fromkeys(one.dataset for one in bench.asked)
    return part(bench.asked), {name: part([one for one in bench.asked if one.dataset == name]) for name in names}
