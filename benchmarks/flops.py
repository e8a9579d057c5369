"""Counts the arithmetic of one passage, and measures how much of it this machine does a second in matrix products.

The count, for a passage of T tokens (one multiplication and one addition are two operations):
  forward          2 · T · parameters of the linear maps of all layers
  backward         2 · T · parameters of those from the first layer on whose gradient is sought, without that layer's
                   maps before its last (nothing asks for a gradient there); once: frozen weights get none
  output matrix    2 · T · vocabulary · width, forward, and once more backward
  attention        2 · T² · width a layer forward (scores and mixing, the causal half), twice that backward
  adapters         2 · T · rank · (inputs + outputs) an adapted projection, and twice that again for the backward
                   pass and the two gradients where they are sought
  embedder         2 · T · parameters of its linear maps (regrad alone)
The plain loop seeks the gradients of all adapted projections, regrad those that its prior's step sizes name.
The rate is that of the largest parts' own shapes, weights in cache, nothing between the products: no program that does
this arithmetic is faster than count / rate. Run as a process it prints JSON.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Collection, Sequence
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
    """Operations of a passage and the products that regrad's consist of.

    plain     the plain loop's
    gradient  regrad's; embedder: what it has beside it
    """

    plain: float
    gradient: float
    embedder: float
    products: list[Product]


def skeleton(folder: Path) -> Any:
    """The causal language model of a folder, without its weights."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))


def count_gradient(network: Any, tokens: float, changed: Collection[str] | None = None) -> tuple[float, list[Product]]:
    """(operations of one passage's gradient, its products) for a causal language model.

    changed  names of the LoRA tensors whose gradients are sought; None: of all adapted projections
    """
    from regrad_cli.learn.model import find_projections

    config = network.config.get_text_config()
    layers = _layers(network, config.num_hidden_layers)
    projections = find_projections(network)
    sought = [p for p in projections if changed is None or p.name_a in changed or p.name_b in changed]
    first = next(index for index, layer in enumerate(layers) if _in(layer, sought[0]))
    products: list[Product] = []
    for index, layer in enumerate(layers):
        linear = _products(layer)
        products += linear
        if index > first:
            products += [Product(p.outputs, p.inputs) for p in linear]
        elif index == first:
            last = [p for p in sought if _in(layer, p)][-1]
            products.append(Product(last.outputs, last.inputs))
    width, vocabulary = config.hidden_size, config.vocab_size
    products += [Product(width, vocabulary), Product(vocabulary, width)]
    upper = len(layers) - first - 1
    attention = 2 * tokens**2 * width * (len(layers) + 2 * upper)
    adapters = sum(2 * tokens * RANK * (p.inputs + p.outputs) * (3 if p in sought else 1) for p in projections)
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


def count(model: Path, embedder: Path, tokens: float, changed: Collection[str] | None = None) -> Count:
    """Operations of one passage of `tokens` tokens; `changed` as for `count_gradient`."""
    network = skeleton(model)
    gradient, products = count_gradient(network, tokens, changed)
    vector, more = count_embedder(embedder, tokens)
    return Count(count_gradient(network, tokens)[0], gradient, vector, products + more)


def _in(layer: Any, projection: Any) -> bool:
    return any(projection.module is module for module in layer.modules())


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
    """MODEL EMBEDDER TOKENS DEVICE PRIOR: what a passage costs with this prior, and the rates."""
    from regrad_cli.learn.prior import Prior

    model, embedder, tokens, device, prior = arguments
    changed = Prior.from_bytes(Path(prior).read_bytes()).log_step_sizes
    found = count(Path(model), Path(embedder), float(tokens), changed)
    rates = {dtype: rate(found.products, dtype, device) for dtype in ("fp32", "bf16")}
    operations = {"plain": found.plain, "gradient": found.gradient, "embedder": found.embedder}
    print(json.dumps(operations | {"rates": rates}))


if __name__ == "__main__":
    main(sys.argv[1:])
