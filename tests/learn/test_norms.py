"""Norms and gradients of norm 1, also where float32 holds no square of a value."""

from __future__ import annotations

import pytest
import torch

from regrad_cli.learn.norms import all_held, normalize_, normalized, norms_of

SIZES = (1.0, 1e-25, 1e25, 0.0, 3e-4)


def matrices(sizes: tuple[float, ...]) -> torch.Tensor:
    generator = torch.Generator().manual_seed(4)
    return torch.stack([torch.randn(6, 9, generator=generator) * size for size in sizes])


@pytest.mark.parametrize("sizes", [SIZES, (1.0, 3e-4)], ids=["out of range", "in range"])
def test_every_matrix_comes_to_norm_one_whatever_its_size_and_zeros_stay_zeros(sizes: tuple[float, ...]) -> None:
    tensors = {"t": matrices(sizes)}
    expected = normalized(tensors["t"])
    normalize_(tensors, norms_of(tensors), careful=not all_held(norms_of(tensors)))
    torch.testing.assert_close(tensors["t"], expected, rtol=2e-6, atol=0)
    lengths = torch.linalg.vector_norm(tensors["t"].double(), dim=(1, 2))
    torch.testing.assert_close(lengths, torch.tensor([1.0 if size else 0.0 for size in sizes]).double())


def test_a_matrix_comes_to_the_same_bits_beside_one_that_is_out_of_range() -> None:
    both, alone = {"t": matrices((1.0, 1e25))}, {"t": matrices((1.0,))}
    for tensors in (both, alone):
        normalize_(tensors, norms_of(tensors), careful=tensors is both)
    assert torch.equal(both["t"][:1], alone["t"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_norms_that_are_held_are_of_finite_values(value: float) -> None:
    tensors = {"fine": matrices((1.0, 2.0)), "odd": matrices((1.0, 2.0))}
    assert all_held(norms_of(tensors))
    tensors["odd"][1, 2, 3] = value
    assert not all_held(norms_of(tensors))
