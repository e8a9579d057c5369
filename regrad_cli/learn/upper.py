"""The upper half of a model by itself, from the lower half's output, which never changes. Knows no prior and no loss.

Shapes: N rows of L tokens, hidden size H. Rows are filled up at their end: in a causal model nothing before the
filling sees it, so no mask is needed but where texts share a row (`forked.py`).
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from types import MappingProxyType
from typing import Any

import torch
from torch import nn

from regrad_cli.learn.adapt import hooked
from regrad_cli.learn.model import Model, Projection, attention_for_gradients, decoder_layers, first_adapted_layer

NOTHING: Mapping[str, torch.Tensor] = MappingProxyType({})
Rows = dict[str, torch.Tensor]  # LoRA tensors by name, one for all rows (rows, cols) or one each (N, rows, cols)


class _Reached(Exception):
    """The lower half is done; what is above it is not wanted."""


class UpperHalf:
    """Runs the layers from the first adapted one on, with LoRA tensors that are given with each call.

    Usable inside `ready()` only, there from several threads at a time.
    scale   multiplies the LoRA branch
    """

    def __init__(self, model: Model, scale: float) -> None:
        self.model = model
        self.scale = scale
        self._layers = decoder_layers(model.network)[1]
        self._first = first_adapted_layer(model.network)
        self._local = threading.local()
        self._plain = model.has_plain_head  # asked here: it probes the model, which inside `ready` is not itself
        self._tuples = False  # whether this model's layers return tuples; `lower` sees it

    @contextmanager
    def ready(self) -> Iterator[None]:
        """Inside, the model's own forward is this class's: nobody else may use the model."""
        with ExitStack() as stack:
            stack.enter_context(attention_for_gradients(self.model))
            handle = self._layers[self._first].register_forward_pre_hook(self._exchange, with_kwargs=True)
            stack.callback(handle.remove)
            for layer in self._layers[: self._first]:
                stack.enter_context(self._bypassed(layer))
            stack.enter_context(hooked(self.model, self._branch_of))
            yield

    @torch.no_grad()
    def lower(self, ids: Sequence[int]) -> torch.Tensor:
        """What the first adapted layer reads for these tokens: (L, H), on the model's device."""
        self._local.given, self._local.through = None, True
        try:
            self._body(torch.tensor([list(ids)], device=self.model.device), NOTHING)
        except _Reached:
            return self._local.reached[0]
        finally:
            self._local.through = False
        raise AssertionError("the first adapted layer was not reached")

    def outputs(
        self, ids: torch.Tensor, lower: torch.Tensor, tensors: Rows, read_as: Mapping[str, torch.Tensor] = NOTHING
    ) -> torch.Tensor:
        """Of ids (N, L), whose lower half's output (N, L, H) is given: the last hidden states (N, L, H) where the
        model's head is plain, else the logits (N, L, V).

        read_as  `forked.layout` of the rows
        """
        self._local.given, self._local.through, self._local.tensors = lower, False, tensors
        return self._body(ids, read_as)

    def _body(self, ids: torch.Tensor, read_as: Mapping[str, torch.Tensor]) -> torch.Tensor:
        if self._plain:
            return self.model.network.base_model(input_ids=ids, use_cache=False, **read_as).last_hidden_state
        return self.model.network(input_ids=ids, use_cache=False, **read_as).logits

    def _exchange(self, _module: nn.Module, args: Any, kwargs: Any) -> Any:
        """Before the first adapted layer: takes what it would read, or gives it what is known already."""
        if self._local.through:
            self._local.reached = args[0] if args else kwargs["hidden_states"]
            raise _Reached
        if args:
            return (self._local.given, *args[1:]), kwargs
        return args, kwargs | {"hidden_states": self._local.given}

    @contextmanager
    def _bypassed(self, layer: nn.Module) -> Iterator[None]:
        """The layer hands on what it is given, unless the lower half itself is wanted."""
        usual = layer.forward

        def forward(*args: Any, **kwargs: Any) -> Any:
            if self._local.through:
                output = usual(*args, **kwargs)
                self._tuples = isinstance(output, tuple)
                return output
            hidden = args[0] if args else kwargs["hidden_states"]
            return (hidden,) if self._tuples else hidden

        layer.forward = forward  # type: ignore[method-assign]
        try:
            yield
        finally:
            del layer.forward

    def _branch_of(self, projection: Projection) -> Callable[..., torch.Tensor]:
        name_a, name_b = projection.name_a, projection.name_b

        def branch(_module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            a, b = self._local.tensors[name_a], self._local.tensors[name_b]
            return output + self.scale * ((inputs[0] @ a.mT) @ b.mT)

        return branch
