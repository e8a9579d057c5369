"""Norms of gradients, and whether they are right: float32 holds no square of 1e20. Knows arrays alone."""

from __future__ import annotations

from collections.abc import Mapping

import torch

HELD = 1e-15, 1e15  # the norms of tensors whose squares, added up, float32 holds


def norms_of(tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """{name: (n,) float32} of n matrices each, (n, rows, cols) float32; right where `held`."""
    return {name: torch.linalg.vector_norm(tensor, dim=(1, 2)) for name, tensor in tensors.items()}


def held(norms: torch.Tensor) -> torch.Tensor:
    """Whether each norm is of values whose squares float32 holds: finite ones, and not all zero."""
    return (norms > HELD[0]) & (norms < HELD[1])


def all_held(norms: Mapping[str, torch.Tensor]) -> bool:
    """Of all tensors' norms, (n,) each, in one look at the device."""
    return bool(held(torch.stack(list(norms.values()))).all())


def normalized(tensor: torch.Tensor) -> torch.Tensor:
    """Each of n matrices (n, rows, cols) over its norm, differentiable; zeros stay zeros."""
    peaks = tensor.detach().abs().amax(dim=(1, 2), keepdim=True)  # so that no square leaves the type's range
    even = tensor / torch.where(peaks > 0, peaks, 1.0)
    norms = even.square().sum(dim=(1, 2), keepdim=True).sqrt()
    return even / torch.where(norms > 0, norms, 1.0)


def normalize_(tensors: Mapping[str, torch.Tensor], norms: Mapping[str, torch.Tensor], *, careful: bool) -> None:
    """`normalized` of every tensor (n, rows, cols), in its place, from its norms (n,): a third of the time.

    careful  some norms may not be `held`; those rows are normalized the long way. Otherwise they come to NaN
    """
    for name, tensor in tensors.items():
        long_way = normalized(tensor) if careful else None
        tensor /= norms[name][:, None, None]
        if long_way is not None:
            torch.where(held(norms[name])[:, None, None], tensor, long_way, out=tensor)
