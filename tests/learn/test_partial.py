"""Priors under which gradients change some of the tensors alone: the rest of θ is there, and stays as it is."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from conftest import filled_prior, random_passages
from test_adapt import logits
from test_gradients import all_gradients

from regrad_cli.errors import PriorMismatch, UsageProblem
from regrad_cli.learn.adapt import adapted
from regrad_cli.learn.codec import Codec, parse_codec
from regrad_cli.learn.generate import adapted_rows
from regrad_cli.learn.model import Model
from regrad_cli.learn.prior import Prior
from regrad_cli.learn.steps import of_uppermost, with_found_step_size


def kept(prior: Prior, ending: str) -> Prior:
    """The prior with step sizes for the tensors alone whose names end so."""
    logs = {name: log for name, log in prior.log_step_sizes.items() if name.endswith(ending)}
    return replace(prior, log_step_sizes=logs)


@pytest.mark.parametrize("ending", ["lora_B", "down_proj.lora_A", "layers.3.mlp.up_proj.lora_B"])
def test_what_is_sought_has_the_same_bits_and_nothing_else_is_there(model: Model, prior: Prior, ending: str) -> None:
    passages = random_passages(model, (9, 33, 20))
    whole, part = (all_gradients(model, each, passages) for each in (prior, kept(prior, ending)))
    for position, found in part.items():
        assert set(found) == {"loss", *(name for name in prior.tensors if name.endswith(ending))}
        for name, tensor in found.items():
            assert torch.equal(tensor, whole[position][name]), name


def test_nothing_below_the_lowest_tensor_that_is_sought_is_in_the_graph(model: Model, prior: Prior) -> None:
    tracked = []
    handles = [
        layer.register_forward_hook(
            lambda _m, _i, output, place=place: tracked.append(
                (place, (output[0] if isinstance(output, tuple) else output).requires_grad)
            )
        )
        for place, layer in enumerate(model.network.model.layers)
    ]
    try:
        all_gradients(model, of_uppermost(model, prior, 1), random_passages(model, (9,)))
    finally:
        for handle in handles:
            handle.remove()
    assert dict(tracked[-4:]) == {0: False, 1: False, 2: False, 3: True}


def test_a_change_of_some_tensors_is_one_of_all_with_zeros_in_the_others(model: Model, prior: Prior) -> None:
    (ids,) = random_passages(model, (12,))
    some = kept(prior, "lora_B")
    change = {name: torch.full_like(prior.tensors[name], 0.05) for name in some.log_step_sizes}
    zeros = {name: torch.zeros_like(tensor) for name, tensor in prior.tensors.items()}
    with adapted(model, prior, zeros | change):
        expected = logits(model, ids)
    with adapted(model, some, change):
        assert torch.equal(logits(model, ids), expected)
    with adapted(model, prior):
        assert not torch.allclose(logits(model, ids), expected)
    with adapted_rows(model, some, [change]):
        assert torch.allclose(logits(model, ids), expected, atol=1e-5)


@pytest.mark.parametrize("several", [False, True])
def test_a_change_of_other_tensors_is_refused(model: Model, prior: Prior, several: bool) -> None:
    some = kept(prior, "lora_B")
    whole = {name: torch.zeros_like(tensor) for name, tensor in prior.tensors.items()}
    less = dict(list(whole.items())[:1])
    for change in (whole, less):
        context = adapted_rows(model, some, [None, change]) if several else adapted(model, some, change)
        with pytest.raises(PriorMismatch, match="other tensors"), context:
            pass


def test_it_comes_back_from_its_bytes(prior: Prior) -> None:
    some = kept(prior, "lora_B")
    again = Prior.from_bytes(some.to_bytes())
    assert again.log_step_sizes == some.log_step_sizes and again.to_bytes() == some.to_bytes()
    assert list(again.tensors) == list(prior.tensors) and again.card == prior.card
    assert [shape.name for shape in again.shapes] == list(some.log_step_sizes)
    assert some.rounded().log_step_sizes == some.log_step_sizes


def test_a_row_shrinks_with_what_it_leaves_out(prior: Prior) -> None:
    whole, some = (Codec(parse_codec("r2-int2"), each.shapes) for each in (prior, kept(prior, "lora_B")))
    assert some.code_bytes + 2 * some.scale_count < 0.7 * (whole.code_bytes + 2 * whole.scale_count)


def test_of_the_uppermost_layers(model: Model, prior: Prior) -> None:
    one = of_uppermost(model, prior, 1)
    assert {name.split(".")[2] for name in one.log_step_sizes} == {"3"} and len(one.log_step_sizes) == 6
    assert all(torch.equal(one.tensors[name], tensor) for name, tensor in prior.tensors.items())
    assert of_uppermost(model, prior, 2).log_step_sizes == prior.log_step_sizes
    with pytest.raises(UsageProblem, match="3 layers are wanted, and there are some of 2"):
        of_uppermost(model, prior, 3)
    with pytest.raises(UsageProblem, match="some of 1"):
        of_uppermost(model, one, 2)


def test_a_step_size_is_found_for_those_alone(model: Model) -> None:
    seeded = filled_prior(model)
    some = kept(seeded, "lora_B")
    assert set(with_found_step_size(model, some).log_step_sizes) == set(some.log_step_sizes)
