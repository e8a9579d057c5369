"""Adaptation: what k gradients change in the prior, and the one context manager in which a model answers with it.

Base weights are never written: the adapted tensors run beside them and are taken away again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from regrad_cli.errors import PriorMismatch
from regrad_cli.learn.model import Model, Projection
from regrad_cli.learn.prior import Prior

Tensors = dict[str, torch.Tensor]


def combine(
    gradients: Mapping[str, torch.Tensor], weights: Sequence[float], step_sizes: Mapping[str, float], gamma: float = 1.0
) -> Tensors:
    """Change of the prior for one question: −γ · αₜ · Σᵢ wᵢ gᵢₜ, for every tensor t.

    gradients   {tensor name: (k, rows, cols) float32}, k ≥ 1
    weights     k floats, non-negative
    step_sizes  {tensor name: α}
    returns     {tensor name: (rows, cols) float32}
    raises      PriorMismatch if names differ or a tensor has another number of gradients
    source      ReGrad, arXiv 2606.15734, section on adaptation at inference
    """
    if set(gradients) != set(step_sizes):
        raise PriorMismatch("gradients and step sizes are of other tensors", "use the prior the bank was made with")
    change = {}
    for name, stack in gradients.items():
        if stack.shape[0] != len(weights):
            raise PriorMismatch(f"{name}: {stack.shape[0]} gradients for {len(weights)} weights")
        step = -gamma * step_sizes[name]
        total = stack[0] * (step * weights[0])
        for gradient, weight in zip(stack[1:], weights[1:], strict=True):
            total.add_(gradient, alpha=step * weight)
        change[name] = total
    return change


Change = Mapping[str, torch.Tensor] | None  # {tensor name: (rows, cols)} of what gradients change; None: nothing


def check_change(prior: Prior, change: Change) -> None:
    """raises PriorMismatch where the change is not of the tensors that this prior's gradients change"""
    wanted = {shape.name: (shape.rows, shape.cols) for shape in prior.shapes}
    if change is not None and {name: tuple(tensor.shape) for name, tensor in change.items()} != wanted:
        raise PriorMismatch("the change is of other tensors than the prior's", "use the prior the bank was made with")


def changed(prior: Prior, change: Change, name: str) -> torch.Tensor:
    """A tensor of θ + change, (rows, cols), in θ's type."""
    own = prior.tensors[name]
    return own if change is None or name not in change else own + change[name].to(own)


@contextmanager
def adapted(model: Model, prior: Prior, change: Change = None) -> Iterator[None]:
    """The model answers with θ + change inside, and is what it was outside: on success, any exception and Ctrl-C.

    raises  PriorMismatch where prior or change are not of this model
    """
    prior.check(model.projections)
    check_change(prior, change)

    def hook(projection: Projection) -> Any:
        a = changed(prior, change, projection.name_a).to(model.device, model.dtype).T  # (inputs, r)
        b = (prior.scale * changed(prior, change, projection.name_b)).to(model.device, model.dtype).T  # (r, outputs)
        return partial(branch, a, b)

    def branch(a: torch.Tensor, b: torch.Tensor, _module: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
        return output + (inputs[0] @ a) @ b

    with hooked(model, hook):
        yield


@contextmanager
def hooked(model: Model, hook_for: Callable[[Any], Callable[..., Any]]) -> Iterator[None]:
    """Forward hooks on every adapted projection, without effect from the moment the block is left, however it is.

    Ctrl-C may come while hooks are put on or taken off: one that stays on by that does nothing any more.
    """
    handles: list[Any] = []
    live = [True]

    def while_live(hook: Callable[..., Any]) -> Callable[..., Any]:
        return lambda module, inputs, output: hook(module, inputs, output) if live else None

    try:
        for projection in model.projections:
            handles.append(projection.module.register_forward_hook(while_live(hook_for(projection))))
        yield
    finally:
        live.clear()
        for handle in handles:
            handle.remove()
