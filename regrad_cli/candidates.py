"""The ways in which a question may be answered: from all the passages it found at once, or from each by itself, of
which the likeliest answer is given. Knows prompts and weights; retrieves nothing and prints nothing.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

from regrad_cli.settings import COMBINE_AUTO, COMBINE_SUM

if TYPE_CHECKING:
    from regrad_cli.adaptation import Adaptation
    from regrad_cli.learn.adapt import Change
    from regrad_cli.learn.model import Model
    from regrad_cli.learn.prior import Prior

LEAST_CHANCE = 0.1  # a passage that is less likely the right one does not answer by itself
MOST = 16  # passages that answer by themselves: what one batch takes on a CPU


@dataclass(frozen=True, eq=False, slots=True)
class Candidate:
    """One way to answer a question.

    prior   what the model answers with; None for the untouched model
    change  what is added to the prior, computed when it is needed; None where nothing is
    place   of the one passage that it answers from, among those found; None for all of them
    chance  how likely this is the way, of 1, before it has answered
    """

    prompt: tuple[int, ...]
    prior: Prior | None = None
    change: Callable[[], Change] | None = None
    place: int | None = None
    chance: float = 1.0


@dataclass(frozen=True, slots=True)
class Given:
    """An answer as it was generated: the candidate that gave it, its tokens, and its share of the batches' seconds."""

    candidate: Candidate
    ids: list[int]
    seconds: float


def ways(adaptation: Adaptation, combine: str) -> list[tuple[int | None, float]]:
    """(place, chance) of the passages that answer by themselves, likely enough; (None, 1) where all answer at once.

    combine  "sum": all at once; "likeliest": by themselves; "auto": the second, where the prior weighs passages by how
             well they fit
    """
    if adds_up(adaptation.prior, combine):
        return [(None, 1.0)]
    shares = adaptation.shares(max(adaptation.owners) + 1)
    chances = [share / sum(shares) for share in shares]
    least = min(LEAST_CHANCE, max(chances))
    places = [place for place, chance in enumerate(chances) if chance >= least][:MOST]
    return [(place, chances[place]) for place in places]


def adds_up(prior: Prior, combine: str) -> bool:
    """Whether all passages answer at once."""
    return combine == COMBINE_SUM or (combine == COMBINE_AUTO and not prior.weighs_by_score)


def candidates(
    model: Model,
    question: str,
    shown: Sequence[str],
    prior: Prior,
    adapt: Callable[[], Adaptation],
    combine: str,
    alter: Callable[[Adaptation, int | None], Adaptation] | None = None,
) -> tuple[Candidate, ...]:
    """The ways to answer a question by the gradients of the passages that it found, at least one.

    shown    the passages as the prompt has them, of which one that answers by itself sees its own; none where the
             prompt has none
    prior    what is applied; adapt: the gradients, called again whenever their change is needed
    combine  as in `ways`
    alter    what is made of the gradients that are applied, of the passage in this place or of all
    """
    from regrad_cli.learn.prompt import prompt_ids

    def change(place: int | None) -> Change:
        adaptation = adapt().alone(place)
        return (adaptation if alter is None else alter(adaptation.applied(), place)).change()

    def seen(place: int | None) -> Sequence[str]:
        return shown if place is None else shown[place : place + 1]

    found = [(None, 1.0)] if adds_up(prior, combine) else ways(adapt(), combine)
    return tuple(
        Candidate(tuple(prompt_ids(model, question, seen(place))), prior, partial(change, place), place, chance)
        for place, chance in found
    )


def answered(model: Model, asked: Sequence[Sequence[Candidate]], max_tokens: int) -> Iterator[tuple[int, Given]]:
    """(place, its answer) of every question, each by the likeliest of its candidates, in batches of all their rows: in
    the order in which they are known.

    asked  the candidates of each question, at least one; all that have a prior have the same
    """
    from regrad_cli.learn.generate import Beginnings, batches, greedy_batch, likeliest

    for untouched in (False, True):
        rows = [
            (place, turn)
            for place, candidates in enumerate(asked)
            for turn, candidate in enumerate(candidates)
            if (candidate.prior is None) is untouched
        ]
        found: dict[int, dict[int, tuple[list[int], float]]] = {}
        seconds = dict.fromkeys((place for place, _ in rows), 0.0)
        for batch in batches(model, [len(asked[place][turn].prompt) for place, turn in rows], max_tokens):
            chosen = [asked[place][turn] for place, turn in (rows[each] for each in batch)]
            start = time.perf_counter()
            with weights(model, chosen):
                beginnings = Beginnings(model, len(chosen))
                answers = greedy_batch(model, [candidate.prompt for candidate in chosen], max_tokens, beginnings)
            share = (time.perf_counter() - start) / len(chosen)
            for each, ids, beginning in zip(batch, answers, beginnings.log_probabilities, strict=True):
                place, turn = rows[each]
                own = found.setdefault(place, {})
                own[turn] = ids, beginning
                seconds[place] += share
                if len(own) == len(asked[place]):
                    del found[place]
                    turns = range(len(own))
                    chances = [asked[place][turn].chance for turn in turns]
                    best = likeliest(chances, [own[turn][1] for turn in turns])
                    yield place, Given(asked[place][best], own[best][0], seconds[place])


def weights(model: Model, chosen: Sequence[Candidate]) -> AbstractContextManager[Any]:
    """The context in which candidates of one prior, or of none, are answered, a row each or the only one by itself."""
    from regrad_cli.learn.adapt import adapted
    from regrad_cli.learn.generate import adapted_rows

    prior = chosen[0].prior
    if prior is None:
        return nullcontext()
    changes = [None if each.change is None else each.change() for each in chosen]
    return adapted(model, prior, changes[0]) if len(changes) == 1 else adapted_rows(model, prior, changes)
