"""Questions answered in one way after another, in batches, and what each answer is worth.

Every way gets the same prompt (but for the passages it shows), the same questions and greedy decoding, so that what
differs are the weights and the context alone. What an answer is does not depend on which ways were tried before.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING

from regrad_cli.adaptation import Adaptation, Dense
from regrad_cli.candidates import Candidate, answered, candidates
from regrad_cli.evidence import Asked, Evidence
from regrad_cli.results import Difference, ModeScore, Scored, Scores
from regrad_cli.scores import exact_match, f1, interval, resampled_means

if TYPE_CHECKING:
    from regrad_cli.learn.codec import Codec
    from regrad_cli.learn.model import Model
    from regrad_cli.learn.prior import Prior

# Whose difference is worth an interval, where both were measured.
PAIRS = (
    ("regrad", "direct-tuned"), ("both", "rag-tuned"), ("regrad", "rag"), ("regrad", "direct"), ("both", "rag"),
    ("both", "regrad"), ("regrad", "cpt"), ("prior", "direct-tuned"), ("other", "direct-tuned"),
    ("random", "direct-tuned"), ("regrad", "prior"), ("regrad", "other"), ("regrad", "random"),
)  # fmt: skip


@dataclass(frozen=True)
class Way:
    """One way of answering.

    shows   passages stand in the prompt
    lora    what the model answers with: θ, or a fine-tuned baseline's; None for the untouched model
    source  whose passages' gradients change `lora` for a question; None where none do. A question for which there are
            none is answered by the untouched model, as `ask` does
    alter   what is made of that adaptation before it is applied: of the passage in a place, or of all
    run     for mode random: which of its seeds
    """

    mode: str
    shows: bool = False
    lora: Prior | None = None
    source: Callable[[Asked], Evidence] | None = None
    alter: Callable[[Evidence, Adaptation, int | None], Adaptation] | None = None
    run: int | None = None


def noise(codec: Codec | None, seed: int, run: int) -> Callable[[Evidence, Adaptation, int | None], Adaptation]:
    """Replaces gradients by noise that is as strong, the same for the same evidence and passage."""
    from regrad_cli.learn.controls import Noise

    drawn = Noise(codec, seed=int.from_bytes(hashlib.sha256(f"{seed} {run}".encode()).digest()[:7], "big"))

    def alter(evidence: Evidence, adaptation: Adaptation, place: int | None) -> Adaptation:
        whose = evidence.name if place is None else f"{place} {evidence.name}"
        digest = hashlib.sha256(f"{seed} {run} {whose}".encode("utf-8", "surrogatepass")).digest()
        own = int.from_bytes(digest[:7], "big")
        return replace(adaptation, gradients=Dense(drawn.like(adaptation.gradients.dense(), seed=own)))

    return alter


def answers(
    model: Model, asked: Sequence[Asked], evidence: Mapping[int, Evidence], way: Way, max_tokens: int
) -> Iterator[Scored]:
    """Every question answered in this way, each scored, in the order in which answers are known."""

    ways = [_candidates(model, one, evidence, way) for one in asked]
    for place, given in answered(model, ways, max_tokens):
        one = asked[place]
        text = model.tokenizer.decode(given.ids, skip_special_tokens=True).strip()
        source = way.source(one) if way.source else evidence[one.number] if way.shows else None
        untouched = way.source is not None and given.candidate.prior is None
        yield Scored(
            number=one.number,
            dataset=one.dataset,
            task=one.task.id,
            question=one.question.question,
            answers=one.question.answers,
            mode=way.mode,
            answer=text,
            em=exact_match(text, one.question.answers),
            f1=f1(text, one.question.answers),
            seconds=given.seconds,
            prompt_tokens=len(given.candidate.prompt),
            answer_tokens=len(given.ids),
            passages=source.titles if source and not untouched else (),
            run=way.run,
        )


def _candidates(model: Model, one: Asked, evidence: Mapping[int, Evidence], way: Way) -> tuple[Candidate, ...]:
    """The ways in which a question may be answered. Gradients are read when they are needed: those of all questions
    would not fit into memory."""
    from regrad_cli.learn.prompt import prompt_ids

    question = one.question.question
    shown = evidence[one.number].shown if way.shows else ()
    source = None if way.source is None else way.source(one)
    if way.lora is None or source is None or source.adapt is None:
        lora = way.lora if source is None else None
        return (Candidate(tuple(prompt_ids(model, question, shown)), lora),)

    alter = None if way.alter is None else partial(way.alter, source)
    return candidates(model, question, shown, way.lora, partial(source.adapt, question), source.combine, alter)


def summary(results: Sequence[Scored], *, seed: int, retrieval: dict[str, float] | None = None) -> Scores:
    """Means, intervals and differences of all modes over the same questions; a mode's runs count as one, their mean."""
    modes = list(dict.fromkeys(one.mode for one in results))
    numbers = sorted({one.number for one in results})
    means: dict[str, dict[str, list[float]]] = {}
    for mode in modes:
        own: dict[int, list[Scored]] = {number: [] for number in numbers}
        for one in results:
            if one.mode == mode:
                own[one.number].append(one)
        means[mode] = {
            field: [sum(getattr(one, field) for one in own[number]) / len(own[number]) for number in numbers]
            for field in ("em", "f1", "seconds", "prompt_tokens", "answer_tokens")
        }
    resampled = resampled_means({mode: values["f1"] for mode, values in means.items()}, seed=seed)
    scores = {}
    for mode, values in means.items():
        low, high = interval(resampled[mode])
        over = {field: sum(column) / len(numbers) for field, column in values.items()}
        scores[mode] = ModeScore(f1_low=low, f1_high=high, **over)
    differences = {}
    for one_mode, other in PAIRS:
        if one_mode in scores and other in scores:
            low, high = interval(resampled[one_mode] - resampled[other])
            gap = scores[one_mode].f1 - scores[other].f1
            differences[f"{one_mode} - {other}"] = Difference(gap, low, high)
    tasks = len({(one.dataset, one.task) for one in results})
    return Scores(tasks, len(numbers), scores, differences, retrieval)
