"""Continued pretraining: it learns its corpus, moves the weights by as much as dense matrices say, and repeats."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from learn.conftest import filled_prior, random_passages

from regrad_cli.errors import UsageProblem
from regrad_cli.learn.adapt import adapted, hooked
from regrad_cli.learn.cpt import continue_training, perplexity, weight_distance
from regrad_cli.learn.model import Model
from regrad_cli.learn.prior import Prior, seeded_prior
from regrad_cli.learn.steps import fixed_texts

TEXT = "The harbour of Velmora opens at seven in the morning, and its lamps are lit by Oda Brenk."


@pytest.fixture
def start(model: Model) -> Prior:
    return seeded_prior(model, "f" * 64, rank=4)


def trained(model: Model, start: Prior, passages: list[list[int]], **options) -> Prior:
    options = {"learning_rate": 1e-2, "at": (len(passages),)} | options
    return list(continue_training(model, start, passages, **options))[-1][1]


def test_the_loss_falls_on_a_corpus_that_repeats_itself(model: Model, start: Prior) -> None:
    passages = [model.token_ids(TEXT)] * 96
    seen = [perplexity(model, TEXT)]
    for _, prior in continue_training(model, start, passages, learning_rate=1e-2, at=(32, 96)):
        with adapted(model, prior):
            seen.append(perplexity(model, TEXT))
    assert seen[0] > seen[1] > seen[2]
    assert seen[2] < seen[0] / 4
    assert perplexity(model, TEXT) == seen[0], "the model itself was changed"


def test_the_distance_is_zero_at_the_start_and_grows(model: Model, start: Prior) -> None:
    passages = random_passages(model, (20, 40, 33, 12) * 8)
    steps = list(continue_training(model, start, passages, learning_rate=1e-3, at=(0, 8, 16, 32)))
    assert [n for n, _ in steps] == [0, 8, 16, 32]
    distances = [weight_distance(model, start, prior) for _, prior in steps]
    assert distances[0] == 0
    assert distances == sorted(set(distances))


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("from_base", [True, False])
def test_the_distance_equals_that_of_dense_matrices(family: Callable[[str], Model], name: str, from_base: bool) -> None:
    model = family(name)
    start = seeded_prior(model, "f" * 64, rank=4) if from_base else filled_prior(model, seed=1)
    prior = filled_prior(model, seed=2)
    moved = base = 0.0
    for projection in model.projections:
        a, b = projection.name_a, projection.name_b
        before = start.scale * start.tensors[b].double() @ start.tensors[a].double()
        after = prior.scale * prior.tensors[b].double() @ prior.tensors[a].double()
        moved += float((after - before).square().sum())
        base += float(projection.module.weight.double().square().sum())
    assert weight_distance(model, start, prior) == pytest.approx((moved / base) ** 0.5, rel=1e-6)
    assert weight_distance(model, prior, prior) == 0


def test_a_step_is_adamws_on_the_mean_loss_of_its_batch(model: Model) -> None:
    start = filled_prior(model)
    passages = random_passages(model, (20, 40, 33, 12))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(5)).tolist()
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in start.tensors.items()}
    optimizer = torch.optim.AdamW(leaves.values(), lr=1e-3)

    def hook(projection):
        a, b = leaves[projection.name_a], leaves[projection.name_b]
        return lambda module, inputs, output: output + start.scale * (inputs[0] @ a.T) @ b.T

    for chosen in (order[:3], order[3:]):  # batches of three and one: a sum instead of a mean would be seen
        optimizer.zero_grad()
        with hooked(model, hook):
            batches = [torch.tensor([passages[place]]) for place in chosen]
            losses = [model.network(input_ids=ids, labels=ids, use_cache=False).loss for ids in batches]
        torch.stack(losses).mean().backward()
        optimizer.step()
    (_, ours), *_ = continue_training(model, start, passages, learning_rate=1e-3, batch=3, seed=5, at=(4,))
    for name, leaf in leaves.items():
        moved, expected = ours.tensors[name] - start.tensors[name], leaf.detach() - start.tensors[name]
        assert (moved - expected).norm() < 1e-3 * expected.norm(), name


def test_the_same_seed_gives_the_same_bits_and_another_seed_another_order(model: Model, start: Prior) -> None:
    passages = random_passages(model, (20, 40, 33, 12) * 4)
    first, again, other = (trained(model, start, passages, seed=seed) for seed in (3, 3, 4))
    assert first.to_bytes() == again.to_bytes()
    assert any(not torch.equal(first.tensors[name], other.tensors[name]) for name in first.tensors)


def test_what_stands_after_n_passages_does_not_depend_on_what_follows(model: Model, start: Prior) -> None:
    passages = random_passages(model, (20, 40, 33, 12) * 4)
    early = next(continue_training(model, start, passages, learning_rate=1e-2, at=(8, 16)))[1]
    alone = trained(model, start, passages, at=(8,))
    assert early.to_bytes() == alone.to_bytes()


def test_n_passages_are_n_also_inside_a_batch_and_the_card_says_how_many(model: Model, start: Prior) -> None:
    passages = random_passages(model, (20, 40, 33, 12))
    (n, cut), *_ = continue_training(model, start, passages, learning_rate=1e-2, batch=4, at=(3, 4))
    order = torch.randperm(4, generator=torch.Generator().manual_seed(0)).tolist()
    only = [passages[place] if place in order[:3] else [3, 3] for place in range(4)]
    (_, alone), *_ = continue_training(model, start, only, learning_rate=1e-2, batch=4, at=(3,))
    assert cut.to_bytes() == alone.to_bytes()
    assert (n, cut.card["passages"], cut.card["model"]) == (3, 3, start.card["model"])


def test_a_prior_that_is_out_is_not_trained_on_and_the_start_stays_what_it_was(model: Model, start: Prior) -> None:
    passages = random_passages(model, (20, 40) * 8)
    kept = {name: tensor.clone() for name, tensor in start.tensors.items()}
    steps = continue_training(model, start, passages, learning_rate=1e-2, at=(8, 16))
    _, early = next(steps)
    bits = early.to_bytes()
    next(steps)
    assert early.to_bytes() == bits
    assert all(torch.equal(tensor, kept[name]) for name, tensor in start.tensors.items())


def test_a_learning_rate_that_leaves_the_finite_numbers_is_an_error(model: Model, start: Prior) -> None:
    passages = random_passages(model, (20, 40) * 8)
    broken = replace(start, tensors={name: tensor * float("inf") for name, tensor in start.tensors.items()})
    with pytest.raises(UsageProblem, match="finite"):
        trained(model, broken, passages)


@pytest.mark.parametrize("at", [(3,), (-1,)])
def test_more_passages_than_there_are_is_refused(model: Model, start: Prior, at: tuple[int, ...]) -> None:
    with pytest.raises(UsageProblem):
        trained(model, start, random_passages(model, (20, 40)), at=at)


def test_perplexity_is_that_of_the_models_own_loss(model: Model) -> None:
    ids = torch.tensor([model.token_ids(TEXT)])
    expected = torch.exp(model.network(input_ids=ids, labels=ids).loss).item()
    assert perplexity(model, TEXT) == pytest.approx(expected, rel=1e-5)
    assert perplexity(model, "\n\n".join(fixed_texts())) > 1
    with pytest.raises(UsageProblem):
        perplexity(model, "")


def test_a_text_longer_than_the_models_positions_is_read_in_windows(model: Model) -> None:
    assert model.positions == 1024
    ids = model.token_ids(" ".join([TEXT] * 60))
    assert len(ids) > 1100
    total = 0.0
    for part in (torch.tensor([ids[start : start + 1024]]) for start in range(0, len(ids), 1024)):
        total += float(model.network(input_ids=part, labels=part).loss) * (part.shape[1] - 1)
    windows = -(-len(ids) // 1024)
    expected = torch.tensor(total / (len(ids) - windows)).exp().item()
    assert perplexity(model, " ".join([TEXT] * 60)) == pytest.approx(expected, rel=1e-4)
