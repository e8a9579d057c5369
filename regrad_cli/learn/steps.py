"""Which tensors have a step size, how long steps along normalized gradients are, and which step where nothing has been
learned: a short search on fixed texts that ship with regrad, never on the user's, or rows of a bank would depend on
them. Knows models and priors only.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from math import log

import torch

from regrad_cli.errors import UsageProblem
from regrad_cli.learn.adapt import adapted, combine
from regrad_cli.learn.gradients import passage_gradients
from regrad_cli.learn.model import Model, decoder_layers
from regrad_cli.learn.prior import Prior

MIN_POWER, START_POWER, MAX_POWER, MARGIN = -6, 5, 12, 2


def fixed_texts() -> list[str]:
    """The texts of the search, one a paragraph; changing one changes every untrained prior."""
    text = (files("regrad_cli") / "data" / "step_texts.txt").read_text(encoding="utf-8")
    return [part.strip() for part in text.split("\n\n") if part.strip()]


def with_found_step_size(model: Model, prior: Prior) -> Prior:
    """The prior with one α for all tensors: a quarter of the power of two that lowers the texts' own loss the most.

    A measure of how far a step may go, not of how much an answer gains: that is learned. A quarter, because at the
    full step answers fall into loops (seen on the starter, 2026-11: one word over and over at 1, rarely at 1/4).
    """
    passages = [model.token_ids(text)[: model.positions] for text in fixed_texts()]
    found = {}
    for done in passage_gradients(model, prior, passages):
        for row, position in enumerate(done.positions):
            found[position] = {name: tensor[row : row + 1] for name, tensor in done.tensors.items()}
    totals: dict[int, float] = {}

    def total(power: int) -> float:
        if power not in totals:
            totals[power] = 0.0
            for position, ids in enumerate(passages):
                change = combine(found[position], [1.0], dict.fromkeys(prior.log_step_sizes, 2.0**power))
                with adapted(model, prior, change):
                    totals[power] += _loss(model, ids)
        return totals[power]

    # The loss falls and then rises along the step: walk downhill from a step that is usually near.
    best = START_POWER
    direction = 1 if total(best + 1) < total(best) else -1
    while MIN_POWER <= best + direction <= MAX_POWER and total(best + direction) < total(best):
        best += direction
    return replace(prior, log_step_sizes=dict.fromkeys(prior.log_step_sizes, log(2.0 ** (best - MARGIN))))


def with_normalized_gradients(model: Model, prior: Prior, passages: Sequence[Sequence[int]]) -> Prior:
    """The prior for gradients of norm 1, its steps as long as they were on average over these passages' (token ids).

    raises  UsageProblem where there is no passage, or a tensor has no gradient, as at a start that nothing was learned
            into
    """
    if not passages:
        raise UsageProblem("--normalized measures gradients, and no task has a passage that one can be taken of")
    norms = dict.fromkeys(prior.log_step_sizes, 0.0)
    for done in passage_gradients(model, prior, passages):
        for name, tensor in done.tensors.items():
            norms[name] += float(torch.linalg.vector_norm(tensor.flatten(1).cpu().double(), dim=1).sum()) / len(
                passages
            )
    if not all(norm > 0 for norm in norms.values()):
        raise UsageProblem(
            "--normalized needs a prior whose gradients are not zero", "learn one without it first, then --init it"
        )
    return prior.with_normalized(norms)


def of_uppermost(model: Model, prior: Prior, layers: int) -> Prior:
    """The prior with gradients of so many of the uppermost layers alone; the rest of θ is as it was.

    raises  UsageProblem where gradients of those layers are not all in the prior
    """
    path, every = decoder_layers(model.network)
    wanted = tuple(f"{path}.{number}." for number in range(max(0, len(every) - layers), len(every)))
    kept = {name: log for name, log in prior.log_step_sizes.items() if name.startswith(wanted)}
    there = len({name.removeprefix(f"{path}.").split(".")[0] for name in kept})
    if there < layers:
        raise UsageProblem(
            f"gradients of {layers} layers are wanted, and there are some of {there}",
            "give --gradient-layers a lower number, or leave it out",
        )
    return replace(prior, log_step_sizes=kept)


def _loss(model: Model, ids: list[int]) -> float:
    batch = torch.tensor([ids], device=model.device)
    with torch.inference_mode():
        logits = model.network(input_ids=batch, use_cache=False).logits[0, :-1].float()
    loss = torch.nn.functional.cross_entropy(logits, batch[0, 1:]).item()
    return loss if loss == loss else float("inf")
