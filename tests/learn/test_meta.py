"""The meta-gradient of production against plain backpropagation through both levels, in float64."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F

from regrad_cli.learn import meta
from regrad_cli.learn.forked import Row, layout
from regrad_cli.learn.meta import Episode, MetaLearner, Prompted
from regrad_cli.learn.model import Model, find_projections
from regrad_cli.learn.prior import seeded_prior

PASSAGES = ((5, 9, 30, 41, 7, 12, 100, 18), (60, 61, 62, 7, 9), (44, 13, 80, 81, 82, 83, 84, 90, 91, 92, 15))
CLOSE = 1e-6  # transformers computes norms and softmax in fp32 even in a float64 model
QUESTIONS = (Prompted((3, 8, 22, 50, 51, 2), 4), Prompted((3, 8, 23, 24, 25, 26, 70, 2), 6))


@pytest.fixture(params=["llama", "gemma2", "gpt2"])
def model(request: pytest.FixtureRequest, family: Callable[[str], Model]) -> Model:
    return double(family(request.param))


def double(ours: Model) -> Model:
    """A copy in float64, so that equal means equal."""
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
    model: Model,
    theta: dict[str, torch.Tensor],
    steps: dict[str, float],
    episodes: list[Episode],
    *,
    seen: Callable[[torch.Tensor], torch.Tensor] = lambda gradient: gradient,
) -> tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]:
    """Losses, ∇θ and ∂/∂log α by autograd through the whole model: one graph, nothing kept, nothing shared.

    seen    what the inner step makes of a passage's gradient
    """
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
        each = []
        for q in episode.questions:
            adapted = dict(leaves)
            for ids, weight in zip(episode.passages, q.weights, strict=True):
                loss = F.cross_entropy(logits(ids, leaves)[:-1], torch.tensor(ids[1:]))
                gradients = torch.autograd.grad(loss, [leaves[name] for name in steps], create_graph=True)
                for name, gradient in zip(steps, gradients, strict=True):
                    adapted[name] = adapted[name] - logs[name].exp() * weight * seen(gradient)
            answer = torch.tensor(q.ids[q.start :])
            each.append(F.cross_entropy(logits(q.ids, adapted)[q.start - 1 : len(q.ids) - 1], answer))
        losses.append(torch.stack(each).mean())
    total = torch.stack(losses).sum()
    found = torch.autograd.grad(total, [*leaves.values(), *logs.values()], materialize_grads=True)
    tensors = dict(zip(leaves, found[: len(leaves)], strict=True))
    return torch.stack(losses).detach(), tensors, dict(zip(logs, map(float, found[len(leaves) :]), strict=True))


def weighed(weights: Sequence[float], questions: Sequence[Prompted] = QUESTIONS) -> tuple[Prompted, ...]:
    """The questions, all with these weights."""
    return tuple(replace(question, weights=tuple(weights)) for question in questions)


def episodes_of(k: int) -> list[Episode]:
    """Two tasks: questions of the first weigh alike, those of the second do not."""
    weights = {0: (), 1: (1.0,), 3: (0.6, 0.3, 0.1)}[k]
    last = len(PASSAGES)
    unlike = weighed(weights, QUESTIONS[1:]) + weighed([weight**2 / 2 for weight in weights], QUESTIONS)
    return [Episode("one", PASSAGES[:k], weighed(weights)), Episode("two", PASSAGES[last - k :], unlike)]


@pytest.mark.parametrize("held", [10_000, 1], ids=["graph held", "graph made again"])
@pytest.mark.parametrize("together", [True, False], ids=["one group", "one by one"])
@pytest.mark.parametrize("k", [0, 1, 3])
@pytest.mark.parametrize("shared", [meta.SHARED, 2], ids=["a row a question", "questions in one row"])
@pytest.mark.parametrize("changed", ["", "lora_B"], ids=["all tensors", "B alone"])
@pytest.mark.parametrize("unit", [False, True], ids=["as they are", "normalized"])
def test_meta_gradient_equals_backpropagation_through_both_levels(
    model: Model, k: int, together: bool, held: int, shared: int, changed: str, unit: bool, monkeypatch: Any
) -> None:
    monkeypatch.setattr(meta, "SHARED", shared)
    theta, steps = start(model)
    steps = {name: step for name, step in steps.items() if name.endswith(changed)}
    episodes = episodes_of(k)
    inner = {"seen": lambda gradient: gradient / gradient.norm()} if unit else {}
    losses, tensors, logs = by_both_levels(model, theta, steps, episodes, **inner)

    learner = MetaLearner(model, 2.0, held_tokens=held, normalized=unit)
    kept: dict[tuple[int, ...], torch.Tensor] = {}
    rows: list[Row] = []

    def lower_of(ids: Any) -> torch.Tensor:
        if tuple(ids) not in kept:
            kept[tuple(ids)] = learner.upper.lower(ids)
        return kept[tuple(ids)]

    def seen(found: Sequence[Row], *given: Any) -> Any:
        rows.extend(found)
        return layout(found, *given)

    monkeypatch.setattr(meta, "layout", seen)

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
    for name, log in logs.items():
        assert sum(part.log_steps[name] for part in found) == pytest.approx(log, rel=100 * CLOSE, abs=1e-7)
    assert any(row.shared for row in rows) == (shared == 2 and model.reads_forked_rows)
    with learner.ready():
        plain = [sum(each) / len(each) for each in learner.losses(theta, steps, episodes)]
    assert plain == pytest.approx(losses.tolist(), rel=CLOSE)


def learned(model: Model, episodes: list[Episode], **options: Any) -> Any:
    theta, steps = start(model)
    learner = MetaLearner(model, 2.0, **options)
    with learner.ready():
        return learner.meta_gradient(theta, steps, episodes)


def close(found: Any, expected: tuple[torch.Tensor, dict[str, torch.Tensor], dict[str, float]]) -> None:
    losses, tensors, logs = expected
    assert found.losses == pytest.approx(losses, rel=CLOSE)
    for name, tensor in tensors.items():
        assert float((found.tensors[name] - tensor).norm()) <= CLOSE * float(tensor.norm()) + 1e-10, name
        assert found.log_steps[name] == pytest.approx(logs[name], rel=100 * CLOSE, abs=1e-7)


@pytest.mark.parametrize("held", [10_000, 1], ids=["at once", "one by one"])
def test_first_order_is_the_exact_gradient_without_its_second_term(model: Model, held: int) -> None:
    episodes = episodes_of(3)
    found = learned(model, episodes, first_order=True, held_tokens=held)
    theta, steps = start(model)
    close(found, by_both_levels(model, theta, steps, episodes, seen=lambda gradient: gradient.detach()))
    exact = learned(model, episodes)
    assert any(float((exact.tensors[name] - found.tensors[name]).norm()) > 1e-4 for name in theta)
    assert exact.log_steps == pytest.approx(found.log_steps)


def coarse(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A codec of steps of 1/4."""
    return {name: (tensor * 4).round() / 4 for name, tensor in tensors.items()}


@pytest.mark.parametrize("held", [10_000, 1], ids=["at once", "one by one"])
def test_through_a_codec_values_are_what_it_gives_back_and_its_own_gradient_is_one(model: Model, held: int) -> None:
    episodes = episodes_of(3)
    theta, steps = start(model)

    def straight_through(gradient: torch.Tensor) -> torch.Tensor:
        return gradient + (coarse({"": gradient})[""] - gradient).detach()

    close(
        learned(model, episodes, codec=coarse, held_tokens=held),
        by_both_levels(model, theta, steps, episodes, seen=straight_through),
    )
    learner = MetaLearner(model, 2.0, codec=coarse, held_tokens=held)
    with learner.ready():
        plain = learner.losses(theta, steps, episodes)
    means = [sum(each) / len(each) for each in plain]
    assert means == pytest.approx(by_both_levels(model, theta, steps, episodes, seen=straight_through)[0].tolist())
    assert means != pytest.approx(by_both_levels(model, theta, steps, episodes)[0].tolist(), rel=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_fused_attention_is_put_off_in_the_inner_graph_where_it_is_on(
    family: Callable[[str], Model], name: str, monkeypatch: Any
) -> None:
    """On a GPU the model keeps its fused attention, which cannot be differentiated twice. Here the CPU stands in."""
    from contextlib import nullcontext

    from regrad_cli.learn import upper

    model = double(family(name))
    monkeypatch.setattr(upper, "attention_for_gradients", lambda _: nullcontext())
    model.network.set_attn_implementation("sdpa")
    theta, steps = start(model)
    found = learned(model, episodes_of(3))
    close(found, by_both_levels(model, theta, steps, episodes_of(3)))


# ── memory ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def peak_bytes(work: Callable[[], Any]) -> int:
    """The most bytes that graphs held for their backward at one time."""
    live, peak = 0, 0

    class Held:
        def __init__(self, tensor: torch.Tensor) -> None:
            nonlocal live, peak
            self.tensor, self.size = tensor, tensor.untyped_storage().nbytes()
            live += self.size
            peak = max(peak, live)

        def __del__(self) -> None:
            nonlocal live
            live -= self.size

    with torch.autograd.graph.saved_tensors_hooks(Held, lambda held: held.tensor):
        work()
    return peak


@pytest.mark.parametrize("first_order", [False, True])
def test_memory_does_not_grow_with_the_number_of_passages(family: Callable[[str], Model], first_order: bool) -> None:
    model = family("llama")
    theta, steps = start(model)
    theta = {name: tensor.float() for name, tensor in theta.items()}

    def peak(k: int, held: int) -> int:
        passages = tuple(tuple(3 + (7 * i + j) % 90 for j in range(40)) for i in range(k))
        episode = Episode("one", passages, weighed([1.0 / k] * k, QUESTIONS[:1]))
        learner = MetaLearner(model, 2.0, first_order=first_order, held_tokens=held)
        with learner.ready():
            return peak_bytes(lambda: learner.meta_gradient(theta, steps, [episode]))

    assert peak(8, held=80) <= 1.02 * peak(2, held=80)
    assert peak(8, held=10_000) > 2 * peak(2, held=10_000)  # what is measured does grow where nothing limits it


def test_gradients_of_many_passages_are_summed_group_by_group(family: Callable[[str], Model], monkeypatch: Any) -> None:
    model = family("llama")
    theta, steps = start(model)
    theta = {name: tensor.float() for name, tensor in theta.items()}
    seen: list[int] = []

    def codec(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.append(len(next(iter(tensors.values()))))
        return tensors

    episode = Episode("one", PASSAGES * 3, weighed([1.0 / 9] * 9))
    learner = MetaLearner(model, 2.0, codec=codec, held_tokens=24)
    with learner.ready():
        learner.meta_gradient(theta, steps, [episode])
        learner.losses(theta, steps, [episode])
    assert max(seen) <= 4 and sum(seen) == 18
