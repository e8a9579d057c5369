"""What each passage's gradient did to an answer: the answer's log-probability with all of them and with each left out,
or, where passages answered one by one, with each by itself and with none.

The answer is the one that was generated; only the weights that judge it differ. Prints nothing, retrieves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrad_cli.adaptation import Adaptation
from regrad_cli.records import Effect, Explanation, Hit

if TYPE_CHECKING:
    from regrad_cli.answer import Prepared
    from regrad_cli.candidates import Candidate
    from regrad_cli.learn.model import Model


def explain(model: Model, asked: Prepared, given: Candidate, answer_ids: Sequence[int]) -> Explanation:
    """What the gradients of the passages that a question found did to the answer that this candidate gave.

    answer_ids  the answer's tokens, with the ending token where it ended by itself
    """
    assert asked.adaptation is not None
    hits = asked.found.hits
    if given.place is None:
        return explain_sum(model, asked.adaptation, hits, given.prompt, answer_ids)
    from regrad_cli.learn.prompt import prompt_ids

    prompts = [prompt_ids(model, asked.question, asked.shown[place : place + 1]) for place in range(len(hits))]
    return explain_alone(model, asked.adaptation, hits, prompts, given.place, answer_ids)


def explain_alone(
    model: Model,
    adaptation: Adaptation,
    hits: Sequence[Hit],
    prompts: Sequence[Sequence[int]],
    applied: int,
    answer_ids: Sequence[int],
) -> Explanation:
    """Where each passage answered by itself: one forward pass with each one's gradients, and one without any.

    prompts  that of each passage, which shows it in mode both
    applied  the place of the passage that gave the answer
    """
    from regrad_cli.learn.adapt import adapted
    from regrad_cli.learn.likelihood import answer_log_probability

    without: dict[tuple[int, ...], float] = {}
    alone = []
    for place, prompt in enumerate(prompts):
        with adapted(model, adaptation.prior, adaptation.alone(place).change()):
            alone.append(answer_log_probability(model, prompt, answer_ids))
        if tuple(prompt) not in without:
            with adapted(model, adaptation.prior):
                without[tuple(prompt)] = answer_log_probability(model, prompt, answer_ids)
    weights = adaptation.alone(applied).of_passages(len(hits))
    return Explanation(
        log_probability=alone[applied],
        without_gradients=without[tuple(prompts[applied])],
        base_model=answer_log_probability(model, prompts[applied], answer_ids),
        passages=tuple(
            Effect(hit.passage.id, weight, each - without[tuple(prompt)])
            for hit, weight, each, prompt in zip(hits, weights, alone, prompts, strict=True)
        ),
    )


def explain_sum(
    model: Model, adaptation: Adaptation, hits: Sequence[Hit], prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> Explanation:
    """Leave-one-out: one forward pass with all gradients, one without each, one with none, one of the base model.

    hits        the passages of the adaptation's gradients, in the same order
    prompt_ids  the prompt that was answered; in mode both it shows the passages in every pass
    """
    from regrad_cli.learn.adapt import adapted
    from regrad_cli.learn.likelihood import answer_log_probability

    def under(change: dict | None) -> float:
        with adapted(model, adaptation.prior, change):
            return answer_log_probability(model, prompt_ids, answer_ids)

    together = under(adaptation.change())
    without = [under(adaptation.change(without=place)) for place in range(len(hits))]
    return Explanation(
        log_probability=together,
        without_gradients=under(None),
        base_model=answer_log_probability(model, prompt_ids, answer_ids),
        passages=tuple(
            Effect(hit.passage.id, weight, together - alone)
            for hit, weight, alone in zip(hits, adaptation.of_passages(len(hits)), without, strict=True)
        ),
    )
