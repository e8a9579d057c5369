"""Continued pretraining, the baseline `cpt`: next-token training on a corpus, with the tensors that a prior has.

Knows models and priors; knows no tasks, no bank and no scores. What it measures of the trained model: how far the
weights have moved, and the perplexity of a text that it was not trained on.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from math import exp, sqrt

import torch
import torch.nn.functional as F

from regrad_cli.errors import UsageProblem
from regrad_cli.learn.adapt import Tensors
from regrad_cli.learn.gradients import PassageGradients, map_gradients
from regrad_cli.learn.model import Model
from regrad_cli.learn.prior import Prior


def continue_training(
    model: Model,
    start: Prior,
    passages: Sequence[Sequence[int]],
    *,
    learning_rate: float,
    batch: int = 8,
    seed: int = 0,
    at: Sequence[int],
) -> Iterator[tuple[int, Prior]]:
    """One pass over the passages in a seeded order: AdamW on θ, a step for each batch's mean document loss.

    The learning rate is constant, without warm-up or decay: training on documents as they come does not know when it
    ends, and what stands after n passages is to be the same whatever follows. A batch is cut short at each n of `at`.

    start       θ before the first step; `seeded_prior` (B = 0) starts at the base model itself
    passages    token ids; at least two each, at most the model's positions
    at          numbers of passages, each from 0 to all of them
    yields      (n, the prior after n passages) for each n of `at`, ascending; its tensors are copies on the CPU.
                The model is not hooked while one is out: it may be used
    raises      UsageProblem where `at` asks for more passages than there are, for a passage that has no document
                loss, and where a batch has no finite loss any more (the learning rate was too large)
    """
    if any(n < 0 or n > len(passages) for n in at):
        raise UsageProblem(f"'at' names {sorted(at)} passages; there are {len(passages)}")
    generator = torch.Generator().manual_seed(seed)
    order = torch.randperm(len(passages), generator=generator).tolist()
    tensors = {name: tensor.detach().to(model.device, copy=True) for name, tensor in start.tensors.items()}
    current = replace(start, tensors=tensors)
    optimizer = torch.optim.AdamW(tensors.values(), lr=learning_rate)
    card = start.card | {"name": "cpt", "trained": True, "objective": "cpt"}
    card |= {"learning_rate": learning_rate, "batch": batch, "seed": seed}
    done = 0
    for n in sorted(set(at)):
        while done < n:
            chosen = order[done : min(done + batch, n)]
            for name, gradient in _mean_gradient(model, current, [passages[place] for place in chosen]).items():
                tensors[name].grad = gradient
            optimizer.step()
            done += len(chosen)
        copies = {name: tensor.detach().to("cpu", copy=True) for name, tensor in tensors.items()}
        yield n, replace(start, tensors=copies, card=card | {"passages": n})


def _mean_gradient(model: Model, prior: Prior, passages: Sequence[Sequence[int]]) -> Tensors:
    """∇θ of the mean document loss; passages without a finite loss are left out of it."""

    def total(done: PassageGradients) -> tuple[int, Tensors]:
        return int(done.finite.sum()), {name: tensor.sum(dim=0) for name, tensor in done.tensors.items()}

    count = 0
    sums: Tensors = {}
    for rows, tensors in map_gradients(model, prior, passages, total):
        count += rows
        sums = {name: sums[name] + tensor for name, tensor in tensors.items()} if sums else tensors
    if not count:
        raise UsageProblem("continued pretraining left the finite numbers", "try a smaller learning rate")
    return {name: tensor / count for name, tensor in sums.items()}


def weight_distance(model: Model, start: Prior, prior: Prior) -> float:
    """How far the effective weights W + s·BA of the adapted projections have moved, relative to the base weights.

    √(Σ ‖s · (BA − B₀A₀)‖²) / √(Σ ‖W‖²), Frobenius, over all adapted projections; where B₀ = 0 this is the distance
    from the base model. Exactly 0 where nothing has moved. Never builds an (outputs, inputs) matrix:
    BA − B₀A₀ = [B − B₀, B] · [A₀; A − A₀], and ‖PQ‖² = ⟨PᵀP, QQᵀ⟩ is an inner product of (2r, 2r) matrices.

    raises  PriorMismatch where a prior is not of this model
    """
    start.check(model.projections)
    prior.check(model.projections)
    moved = base = 0.0
    for projection in model.projections:
        a0, a = (p.tensors[projection.name_a].double().cpu() for p in (start, prior))  # (r, inputs)
        b0, b = (p.tensors[projection.name_b].double().cpu() for p in (start, prior))  # (outputs, r)
        left = torch.cat([b - b0, b], dim=1)  # (outputs, 2r)
        right = torch.cat([a0, a - a0])  # (2r, inputs)
        squared = ((left.T @ left) * (right @ right.T)).sum().item()
        moved += prior.scale**2 * max(squared, 0.0)
        weight = projection.module.get_parameter("weight")
        base += torch.linalg.vector_norm(weight.detach().float()).item() ** 2
    return sqrt(moved) / sqrt(base)


def perplexity(model: Model, text: str) -> float:
    """exp of the mean next-token cross-entropy of a text, as the model answers now (inside `adapted`, with its θ).

    A text longer than the model's positions is read in windows of that length, none of which sees another.
    raises  UsageProblem for a text of fewer than two tokens
    """
    ids = model.token_ids(text)
    if len(ids) < 2:
        raise UsageProblem("a text of fewer than two tokens has no perplexity")
    window = model.positions or len(ids)
    total, count = 0.0, 0
    for begin in range(0, len(ids) - 1, window):
        part = torch.tensor([ids[begin : begin + window]], device=model.device)
        if part.shape[1] < 2:
            continue
        with torch.inference_mode():
            logits = model.network(input_ids=part, use_cache=False).logits[0, :-1].float()  # (L − 1, V)
        total += F.cross_entropy(logits, part[0, 1:], reduction="sum").item()
        count += part.shape[1] - 1
    mean = total / count
    return exp(mean) if mean < 700 else float("inf")  # a larger one is no float
