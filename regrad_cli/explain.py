"""What each passage's gradient did to an answer: the answer's log-probability with all of them, and with each left out.

The answer is the one that was generated; only the weights that judge it differ. Prints nothing, retrieves nothing.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from regrad_cli.adaptation import Adaptation
from regrad_cli.records import Effect, Explanation, Hit

if TYPE_CHECKING:
    from regrad_cli.learn.model import Model


def explain(
    model: Model, adaptation: Adaptation, hits: Sequence[Hit], prompt_ids: Sequence[int], answer_ids: Sequence[int]
) -> Explanation:
    """Leave-one-out: one forward pass with all gradients, one without each, one with none, one of the base model.

    hits        the passages of the adaptation's gradients, in the same order
    prompt_ids  the prompt that was answered; in mode both it shows the passages in every pass
    answer_ids  the answer's tokens, with the ending token where it ended by itself
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
