"""The meta-gradient of production against plain backpropagation through both levels, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from regrad_cli.learn.meta import Episode, MetaLearner, Prompted
from regrad_cli.learn.model import Model, find_projections
from regrad_cli.learn.prior import seeded_prior

PASSAGES = ((5, 9, 30, 41, 7, 12, 100, 18), (60, 61, 62, 7, 9), (44, 13, 80, 81, 82, 83, 84, 90, 91, 92, 15))
CLOSE = 1e-6  # transformers computes norms and softmax in fp32 even in a float64 model
QUESTIONS = (Prompted((3, 8, 22, 50, 51, 2), 4), Prompted((3, 8, 23, 24, 25, 26, 70, 2), 6))


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def model(request: pytest.FixtureRequest, family: Callable[[str], Model]) -> Model:
    """In float64, so that equal means equal."""
    ours = family(request.param)
    network = copy.deepcopy(ours.network).double()
    return Model(network, ours.tokenizer, ours.device, torch.float64, find_projections(network))


def start(model: Model) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    """A θ whose B is not zero, and a step size of its own for every tensor."""
    generator = torch.Generator().manual_seed(1)
    tensors = seeded_prior(model, "any", rank=2).tensors
    theta = {
        name: tensor.double() + 0.1 * torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        for name, tensor in tensors.items()
    }
    return theta, {name: 0.3 + 0.1 * place for place, name in enumerate(theta)}


def by_both_levels(
    model: Model, theta: dict[str, torch.Tensor], steps: dict[str, float], episodes: list[Episode]
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """Losses, ∇θ and ∂/∂log α by autograd through the whole model: one graph, nothing kept, nothing shared."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in theta.items()}
    logs = {name: torch.tensor(math.log(step), dtype=torch.float64, requires_grad=True) for name, step in steps.items()}

    def logits(ids: tuple[int, ...], tensors: dict[str, torch.Tensor]) -> torch.Tensor:
        def hook(projection: Any) -> Any:
            a, b = tensors[projection.name_a], tensors[projection.name_b]
            return lambda _module, inputs, output: output + 2.0 * (inputs[0] @ a.T @ b.T)

        handles = [projection.module.register_forward_hook(hook(projection)) for projection in model.projections]
        out = model.network(input_ids=torch.tensor([ids]), use_cache=False).logits[0]
        for handle in handles:
            handle.remove()
        return out

    model.network.set_attn_implementation("eager")
    losses = []
    for episode in episodes:
        adapted = dict(leaves)
        for ids, weight in zip(episode.passages, episode.weights, strict=True):
            loss = F.cross_entropy(logits(ids, leaves)[:-1], torch.tensor(ids[1:]))
            gradients = torch.autograd.grad(loss, list(leaves.values()), create_graph=True)
            for name, gradient in zip(leaves, gradients, strict=True):
                adapted[name] = adapted[name] - logs[name].exp() * weight * gradient
        each = [
            F.cross_entropy(
                logits(q.ids, adapted)[q.start - 1 : len(q.ids) - 1], torch.tensor(q.ids[q.start :])
            )
            for q in episode.questions
        ]
        losses.append(torch.stack(each).mean())
    total = torch.stack(losses).sum()
    found = torch.autograd.grad(total, [*leaves.values(), *logs.values()], materialize_grads=True)
    tensors = dict(zip(leaves, found[: len(leaves)], strict=True))
    return torch.stack(losses).detach(), tensors, dict(zip(logs, map(float, found[len(leaves) :]), strict=True))


def episodes_of(k: int) -> list[Episode]:
    weights = {0: (), 1: (1.0,), 3: (0.6, 0.3, 0.1)}[k]
    last = len(PASSAGES)
    return [
        Episode("one", PASSAGES[:k], weights, QUESTIONS),
        Episode("two", PASSAGES[last - k :], weights, QUESTIONS[1:]),
    ]


@pytest.mark.parametrize("held", [10_000, 1], ids=["graph held", "graph made again"])
@pytest.mark.parametrize("together", [True, False], ids=["one group", "one by one"])
@pytest.mark.parametrize("k", [0, 1, 3])
def test_meta_gradient_equals_backpropagation_through_both_levels(
    model: Model, k: int, together: bool, held: int
) -> None:
    theta, steps = start(model)
    episodes = episodes_of(k)
    losses, tensors, logs = by_both_levels(model, theta, steps, episodes)

    learner = MetaLearner(model, 2.0, held_tokens=held)
    kept: dict[tuple[int, ...], torch.Tensor] = {}

    def lower_of(ids: Any) -> torch.Tensor:
        if tuple(ids) not in kept:
            kept[tuple(ids)] = learner.upper.lower(ids)
        return kept[tuple(ids)]

    learner.lower_of = lower_of
    with learner.ready():
        for _ in range(2):  # the second time from what was kept
            if together:
                found = [learner.meta_gradient(theta, steps, episodes)]
            else:
                found = [learner.meta_gradient(theta, steps, [episode]) for episode in episodes]
    assert torch.cat([part.losses for part in found]) == pytest.approx(losses, rel=CLOSE)
    for name, expected in tensors.items():
        ours = torch.stack([part.tensors[name] for part in found]).sum(dim=0)
        assert float((ours - expected).norm()) <= CLOSE * float(expected.norm()) + 1e-10, name
        assert sum(part.log_steps[name] for part in found) == pytest.approx(logs[name], rel=100 * CLOSE, abs=1e-7)
    with learner.ready():
        plain = [sum(each) / len(each) for each in learner.losses(theta, steps, episodes)]
    assert plain == pytest.approx(losses.tolist(), rel=CLOSE)
