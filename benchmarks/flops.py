"""Counts the arithmetic of one passage, and measures how much of it this machine does a second in matrix products.

The count, for a passage of T tokens (one multiplication and one addition are two operations):
  lower forward    2 · T · parameters of the linear maps of the layers below the first adapted one
  upper forward    2 · T · parameters of those from it on
  upper backward   2 · T · the same, without the first adapted layer's maps that come before its last (nothing asks for
                   a gradient there); once, not twice: frozen weights get no gradient
  output matrix    2 · T · vocabulary · width, forward, and once more backward
  attention        2 · T² · width a layer forward (scores and mixing, the causal half), twice that backward
  adapters         6 · T · rank · (inputs + outputs) a projection: branch, its backward, the two gradients
  embedder         2 · T · parameters of its linear maps (regrad alone)
The rate is that of the largest parts' own shapes, weights in cache, nothing between the products: no program that does
this arithmetic is faster than count / rate. Run as a process it prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.plain_loop import RANK

ROWS = (192, 384, 768)  # tokens in one product; the fastest counts
SECONDS = 0.15  # each shape is repeated for at least this long


class Product(NamedTuple):
    """A matrix product's weight (inputs × outputs), and how often a token passes through it."""

    inputs: int
    outputs: int
    times: int = 1

    @property
    def per_token(self) -> int:
        return 2 * self.inputs * self.outputs * self.times


class Count(NamedTuple):
    """Operations of a passage: the plain loop's, what regrad's has beside it, and the products they consist of."""

    gradient: float
    embedder: float
    products: list[Product]

    @property
    def total(self) -> float:
        return self.gradient + self.embedder


def skeleton(folder: Path) -> Any:
    """The causal language model of a folder, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def count_gradient(network: Any, tokens: float) -> tuple[float, list[Product]]:
    """(operations of one passage's gradient, its products) for a causal language model."""
    from regrad_cli.learn.model import find_projections, first_adapted_layer

    config = network.config.get_text_config()
    layers = _layers(network, config.num_hidden_layers)
    first = first_adapted_layer(network)
    projections = find_projections(network)
    products: list[Product] = []
    for index, layer in enumerate(layers):
        linear = _products(layer)
        products += linear
        if index > first:
            products += [Product(p.outputs, p.inputs) for p in linear]
        elif index == first:
            last = [p for p in projections if any(p.module is module for module in layer.modules())][-1]
            products.append(Product(last.outputs, last.inputs))
    width, vocabulary = config.hidden_size, config.vocab_size
    products += [Product(width, vocabulary), Product(vocabulary, width)]
    upper = len(layers) - first - 1
    attention = 2 * tokens**2 * width * (len(layers) + 2 * upper)
    adapters = sum(6 * tokens * RANK * (p.inputs + p.outputs) for p in projections)
    return sum(p.per_token for p in products) * tokens + attention + adapters, _merged(products)


def count_embedder(folder: Path, tokens: float) -> tuple[float, list[Product]]:
    """(operations of one passage's vector, its products) for a BERT-like encoder."""
    import torch
    from transformers import AutoConfig, AutoModel

    with torch.device("meta"):
        config = AutoConfig.from_pretrained(folder)
        encoder = AutoModel.from_config(config)
    products = _products(encoder.encoder)
    attention = 4 * tokens**2 * config.hidden_size * config.num_hidden_layers  # both ways: not causal
    return sum(p.per_token for p in products) * tokens + attention, _merged(products)


def count(model: Path, embedder: Path, tokens: float) -> Count:
    """Operations of one passage of `tokens` tokens."""
    gradient, products = count_gradient(skeleton(model), tokens)
    vector, more = count_embedder(embedder, tokens)
    return Count(gradient, vector, products + more)


def _layers(network: Any, count: int) -> list[Any]:
    from torch import nn

    return list(next(m for m in network.modules() if isinstance(m, nn.ModuleList) and len(m) == count))


def _products(module: Any) -> list[Product]:
    """The linear maps of a module, GPT-2's Conv1D included."""
    found = []
    for each in module.modules():
        if type(each).__name__ == "Linear":
            found.append(Product(each.in_features, each.out_features))
        elif type(each).__name__ == "Conv1D":
            found.append(Product(*each.weight.shape))
    return found


def _merged(products: Sequence[Product]) -> list[Product]:
    times: dict[tuple[int, int], int] = {}
    for p in products:
        times[p.inputs, p.outputs] = times.get((p.inputs, p.outputs), 0) + p.times
    return [Product(*shape, number) for shape, number in times.items()]


def rate(products: Sequence[Product], dtype: str, device: str) -> dict[int, float]:
    """{tokens in a product: operations a second} over these products, each by its share of the work."""
    import torch

    kind = {"fp32": torch.float32, "bf16": torch.bfloat16}[dtype]
    rates = {}
    for rows in ROWS:
        seconds = 0.0
        for p in products:
            weight = torch.randn((p.outputs, p.inputs), dtype=torch.float32, device=device).to(kind)
            x = torch.randn((rows, p.inputs), dtype=torch.float32, device=device).to(kind)
            seconds += p.times * _seconds(lambda x=x, weight=weight: torch.nn.functional.linear(x, weight), device)
        rates[rows] = rows * sum(p.per_token for p in products) / seconds
    return rates


def _seconds(work: Any, device: str) -> float:
    """Seconds of one call, over at least SECONDS of calls after one for warm-up."""
    import torch

    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    with torch.inference_mode():
        work()
        wait()
        calls, batch, start = 0, 1, time.perf_counter()
        while (elapsed := time.perf_counter() - start) < SECONDS:
            for _ in range(batch):
                work()
            wait()
            calls += batch
            batch = min(batch * 2, 64)
    return elapsed / calls


def main(arguments: Sequence[str]) -> None:
    model, embedder, tokens, device = arguments
    found = count(Path(model), Path(embedder), float(tokens))
    rates = {dtype: rate(found.products, dtype, device) for dtype in ("fp32", "bf16")}
    print(json.dumps({"gradient": found.gradient, "embedder": found.embedder, "rates": rates}))


if __name__ == "__main__":
    main(sys.argv[1:])
