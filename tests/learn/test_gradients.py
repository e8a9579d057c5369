"""Per-passage gradients: equal to autograd's one by one, the same bits in any company, finite or refused."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from learn.conftest import FAMILIES, filled_prior, random_passages

from regrad_cli.errors import Mismatch, PriorMismatch, UsageProblem
from regrad_cli.learn import gradients as subject
from regrad_cli.learn.adapt import adapted, hooked
from regrad_cli.learn.gradients import bucket_rows, passage_gradients
from regrad_cli.learn.model import Model, find_projections, load_model
from regrad_cli.learn.norms import norms_of
from regrad_cli.learn.prior import Prior, seeded_prior


def all_gradients(model: Model, prior: Prior, passages: list[list[int]]) -> dict[int, dict[str, torch.Tensor]]:
    found = {}
    for part in passage_gradients(model, prior, passages):
        for row, position in enumerate(part.positions):
            assert position not in found
            found[position] = {name: tensor[row] for name, tensor in part.tensors.items()}
            found[position]["loss"] = part.losses[row]
    return found


def reference(model: Model, prior: Prior, ids: list[int]) -> dict[str, torch.Tensor]:
    """By plain autograd on one unpadded passage, with the LoRA branch as plain differentiable tensors."""
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in prior.tensors.items()}

    def hook(projection):
        a, b = leaves[projection.name_a], leaves[projection.name_b]
        return lambda module, inputs, output: output + prior.scale * (inputs[0] @ a.T) @ b.T

    batch = torch.tensor([ids])
    with hooked(model, hook):
        loss = model.network(input_ids=batch, labels=batch, use_cache=False).loss
    found = dict(zip(leaves, torch.autograd.grad(loss, list(leaves.values())), strict=True))
    return found | {"loss": loss.detach()}


@pytest.mark.parametrize("name", FAMILIES)
def test_batched_gradients_equal_one_by_one(family: Callable[[str], Model], name: str) -> None:
    model = family(name)
    prior = filled_prior(model)
    passages = random_passages(model, (5, 31, 32, 33, 64, 2, 17, 40))
    batched = all_gradients(model, prior, passages)
    assert sorted(batched) == list(range(len(passages)))
    for position, ids in enumerate(passages):
        for key, expected in reference(model, prior, ids).items():
            scale = expected.abs().max().clamp(min=1e-8)
            assert torch.allclose(batched[position][key] / scale, expected / scale, atol=2e-4), (name, position, key)


def test_the_projections_found_are_the_mlps_of_the_upper_half(family: Callable[[str], Model]) -> None:
    for name in FAMILIES:
        paths = [projection.path for projection in family(name).projections]
        layers = {path.split(".mlp")[0].rsplit(".", 1)[1] for path in paths}
        assert layers == {"2", "3"}
        kinds = {path.rsplit(".", 1)[1] for path in paths}
        assert kinds == ({"c_fc", "c_proj"} if name == "gpt2" else {"gate_proj", "up_proj", "down_proj"})
        assert all(".mlp." in path for path in paths)


def test_a_model_without_decoder_layers_is_refused() -> None:
    with pytest.raises(Mismatch):
        find_projections(torch.nn.Linear(3, 3))


@pytest.mark.parametrize("card", [{}, {"normalized": True}], ids=["as they are", "normalized"])
def test_a_gradient_is_the_same_bits_in_any_company_and_place(model: Model, prior: Prior, card: dict) -> None:
    prior = replace(prior, card=prior.card | card)
    length = subject.bucket_length(50)
    rows = bucket_rows(length, "cpu")
    mine, *others = random_passages(model, (50, *[length - n % 7 for n in range(rows - 1)]))
    alone = all_gradients(model, prior, [mine])[0]
    for place in range(rows):
        company = [*others[:place], mine, *others[place:]]
        together = all_gradients(model, prior, company)[place]
        assert all(torch.equal(alone[name], together[name]) for name in alone), place


def test_nothing_below_the_first_adapted_projection_is_in_the_graph(model: Model, prior: Prior) -> None:
    tracked = []
    first = model.projections[0].path.rsplit(".mlp", 1)[0]
    handles = [
        module.register_forward_hook(
            lambda m, i, output, path=path: tracked.append((path, (output[0] if isinstance(output, tuple) else output)))
        )
        for path, module in model.network.named_modules()
        if path.startswith("model.layers.") and path.count(".") == 2
    ]
    try:
        all_gradients(model, prior, random_passages(model, (9,)))
    finally:
        for handle in handles:
            handle.remove()
    tracked = tracked[-4:]  # the pass itself; a probe of the logits comes before it
    below = [output.requires_grad for path, output in tracked if path < first]
    above = [output.requires_grad for path, output in tracked if path >= first]
    assert len(below) == 2 and not any(below)
    assert len(above) == 2 and all(above)


def test_model_and_prior_are_left_as_they_were(model: Model, prior: Prior) -> None:
    before = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    all_gradients(model, prior, random_passages(model, (9, 30)))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.network.state_dict().items())
    assert all(parameter.grad is None for parameter in model.network.parameters())
    assert not any(projection.module._forward_hooks for projection in model.projections)


def test_an_untrained_prior_has_zero_gradients_of_a_and_others_of_b(model: Model) -> None:
    found = all_gradients(model, seeded_prior(model, "f" * 64), random_passages(model, (30,)))[0]
    found.pop("loss")
    for name, gradient in found.items():
        assert bool((gradient == 0).all()) == name.endswith("lora_A"), name


@pytest.mark.parametrize("length", [0, 1])
def test_promise_22_a_passage_of_no_next_token_is_refused(model: Model, prior: Prior, length: int) -> None:
    with pytest.raises(UsageProblem):
        list(passage_gradients(model, prior, [[3] * length]))


def test_a_passage_longer_than_the_model_is_refused(model: Model, prior: Prior) -> None:
    with pytest.raises(UsageProblem, match="longer"):
        list(passage_gradients(model, prior, [[3] * 1025]))


def test_promise_22_a_passage_that_is_not_finite_is_marked_and_spoils_no_other(
    model: Model, prior: Prior, monkeypatch: pytest.MonkeyPatch
) -> None:
    passages = random_passages(model, (20, 20))
    passages[0] = [token if token != 5 else 6 for token in passages[0]]
    passages[1][3] = 5
    embedding = model.network.get_input_embeddings()
    clean = all_gradients(model, prior, passages)[0]
    handle = embedding.register_forward_hook(
        lambda module, inputs, output: output.masked_fill((inputs[0] == 5)[..., None], float("inf"))
    )
    try:
        parts = list(passage_gradients(model, prior, passages))
    finally:
        handle.remove()
    finite = {position: bool(part.finite[row]) for part in parts for row, position in enumerate(part.positions)}
    assert finite == {0: True, 1: False}
    part = next(part for part in parts if 0 in part.positions)
    row = part.positions.index(0)
    assert all(torch.equal(tensor[row], clean[name]) for name, tensor in part.tensors.items())


def test_promise_22_a_gradient_that_is_not_finite_is_marked_also_where_the_loss_is(
    model: Model, prior: Prior, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = subject._Tap.backward

    def overflows(ctx: Any, *deltas: torch.Tensor) -> Any:
        result = real(ctx, *deltas)
        ctx.found[ctx.names[1]][1, 0, 0] = float("inf")
        return result

    monkeypatch.setattr(subject._Tap, "backward", staticmethod(overflows))
    (part,) = passage_gradients(model, prior, random_passages(model, (20, 20)))
    assert bool(torch.isfinite(part.losses).all()) and part.finite.tolist() == [True, False]
    assert all(bool((tensor[1] == 0).all()) for tensor in part.tensors.values())


def test_a_prior_of_another_model_is_refused(family: Callable[[str], Model], prior: Prior) -> None:
    with pytest.raises(PriorMismatch):
        list(passage_gradients(family("gpt2"), prior, [[3, 4, 5]]))
    with pytest.raises(PriorMismatch), adapted(family("gpt2"), prior):
        pass


def test_a_norm_is_added_up_over_all_rows_of_a_pass_also_over_empty_ones(
    model: Model, prior: Prior, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A GPU adds up in an order that depends on how many norms there are."""
    seen: set[int] = set()

    def noted(tensors: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        seen.update(len(tensor) for tensor in tensors.values())
        return norms_of(tensors)

    monkeypatch.setattr(subject, "norms_of", noted)
    all_gradients(model, prior, random_passages(model, (50,)))
    assert seen == {bucket_rows(subject.bucket_length(50), "cpu")}


@pytest.mark.starter
@pytest.mark.parametrize("card", [{}, {"normalized": True}], ids=["as they are", "normalized"])
def test_on_the_starter_a_gradient_is_the_same_bits_in_any_company_and_place(starter_folder: Path, card: dict) -> None:
    model = load_model(starter_folder, device="cpu", dtype="auto")
    prior = seeded_prior(model, "f" * 64)
    filled = Prior({n: torch.full_like(t, 0.01) if n.endswith("B") else t for n, t in prior.tensors.items()},
                   prior.log_step_sizes, prior.card | card)  # fmt: skip
    for length in (40, 64, 190):
        rows = bucket_rows(subject.bucket_length(length), "cpu")
        assert rows > 1
        mine, *others = random_passages(model, (length, *[length - 3] * rows))
        alone = all_gradients(model, filled, [mine])[0]
        for place in sorted({1, rows - 1}):
            company = [*others[:place], mine, *others[place : rows - 1]]
            together = all_gradients(model, filled, company)[place]
            assert all(torch.equal(alone[name], together[name]) for name in alone), (length, place)


def test_a_gradient_is_the_same_bits_however_many_workers_there_are(model: Model, prior: Prior) -> None:
    passages = random_passages(model, (50, 64, 33, 60, 20, 20, 47, 64, 64, 64, 64, 64, 64, 64))
    found = []
    for workers in (1, 2, 5):
        parts = passage_gradients(model, prior, passages, workers=workers)
        found.append({place: (part, row) for part in parts for row, place in enumerate(part.positions)})
    for place in range(len(passages)):
        first, row = found[0][place]
        for other in found[1:]:
            part, other_row = other[place]
            assert all(torch.equal(first.tensors[n][row], part.tensors[n][other_row]) for n in prior.tensors), place


def test_gradients_left_in_the_middle_leave_nothing_behind(model: Model, prior: Prior) -> None:
    threads = torch.get_num_threads()
    parts = passage_gradients(model, prior, random_passages(model, (20, 60, 100, 200, 300)))
    next(parts)
    parts.close()
    assert not any(projection.module._forward_hooks for projection in model.projections)
    assert model.network.config._attn_implementation == "sdpa"
    assert torch.get_num_threads() == threads


def test_only_logits_that_are_a_plain_product_take_the_lean_path(family: Callable[[str], Model]) -> None:
    assert {name: family(name).has_plain_head for name in FAMILIES} == {
        "llama": True, "qwen2": True, "gemma": True, "gemma2": False, "gpt2": True
    }  # fmt: skip
