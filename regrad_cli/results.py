"""What an evaluation yields: answers with their scores, means with intervals, differences, drift. Plain records; knows
neither how a score is computed nor how it is shown.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from regrad_cli.records import Skipped


@dataclass(frozen=True, slots=True)
class Scored:
    """One answer of an evaluation, with its exact match and F1 (0 to 100).

    number      the question's place among all that are asked: answers of all modes to it belong together
    mode        how it was answered; with "@N", in a measurement of drift with N passages
    answers     the aliases that are right
    seconds     its share of the time of the batch it was answered in: gradients applied and tokens generated
    passages    sources or titles of what the answer was given from; empty where from nothing
    run         for mode random, which of its seeds
    """

    number: int
    dataset: str
    task: str
    question: str
    answers: tuple[str, ...]
    mode: str
    answer: str
    em: float
    f1: float
    seconds: float
    prompt_tokens: int
    answer_tokens: int
    passages: tuple[str, ...] = ()
    run: int | None = None


@dataclass(frozen=True, slots=True)
class ModeScore:
    """Means over questions: EM and F1 from 0 to 100, F1 with its bootstrap interval, seconds and tokens an answer."""

    em: float
    f1: float
    f1_low: float
    f1_high: float
    seconds: float
    prompt_tokens: float
    answer_tokens: float


@dataclass(frozen=True, slots=True)
class Difference:
    """Mean difference of two modes' F1 over the same questions, with its paired bootstrap interval."""

    f1: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Scores:
    """Every mode on one set of questions. differences: {"one - other": …}; retrieval: {"recall@1": share 0 to 1, …},
    None where passages were given."""

    tasks: int
    questions: int
    modes: dict[str, ModeScore]
    differences: dict[str, Difference]
    retrieval: dict[str, float] | None


@dataclass(frozen=True, slots=True)
class DriftPoint:
    """A method after it was given `passages` passages.

    distance    of the base weights from their start, relative to their norm; exactly 0.0 where no bit has changed
    perplexity  of a fixed text, by the model as it is between questions
    f1          on the same questions for every point, 0 to 100
    seconds     that adding the passages took, since the point before
    retrieval   {"recall@1": …} where the answers came from a bank
    """

    method: str
    passages: int
    distance: float
    perplexity: float
    em: float
    f1: float
    f1_low: float
    f1_high: float
    seconds: float
    retrieval: dict[str, float] | None = None


@dataclass(frozen=True, slots=True)
class Evaluated:
    """The end of an evaluation: all files pooled, each file by itself, and what it was run with."""

    pooled: Scores
    datasets: dict[str, Scores]
    drift: tuple[DriftPoint, ...]
    drift_questions: int
    settings: dict[str, Any]
    skipped: tuple[Skipped, ...]
    elapsed_s: float
