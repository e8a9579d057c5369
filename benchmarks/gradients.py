"""Measures gradients of passages of 64, 192 and 512 tokens against a plain loop: a second, of the limit, memory.

Processes in turns, each of which times itself once it has loaded: regrad's passes with the codec, the loop of
plain_loop.py without saving, in fp32 and in bf16. Texts, embeddings and commits are `ingest`'s.
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.bench import Bench, Options, Result
from benchmarks.flops import count_gradient, rate, skeleton
from benchmarks.measure import Figure, Ran, interleaved, paired_ratio, shown, spread
from benchmarks.plain_loop import RANK, gradients, lora_network

TITLE = "Gradients by length"
DEVICES = ("cpu", "cuda")
LENGTHS = (64, 192, 512)
TOKENS = {"cpu": 6_144, "cuda": 196_608}  # of the passages of one process
PLAIN = ("fp32", "bf16")


def run(place: Bench, options: Options) -> Result:
    rounds = options.rounds or 3
    network = skeleton(place.model_folder)
    figures: list[Figure] = []
    ratios = []
    for length in LENGTHS:
        count = max(4, TOKENS[options.device] // length)
        results = interleaved({way: _process(place, way, length, count) for way in ("regrad", *PLAIN)}, rounds)
        seconds = {way: [float(ran.stdout.splitlines()[-1]) for ran in rans] for way, rans in results.items()}
        peak = {way: max(ran.peak_bytes for ran in rans) / 1e6 for way, rans in results.items()}
        faster = min(PLAIN, key=lambda way: statistics.median(seconds[way]))
        work, products = count_gradient(network, length)
        best = max(value for dtype in PLAIN for value in rate(products, dtype, options.device).values())
        ours, plain = (count / statistics.median(seconds[way]) for way in ("regrad", faster))
        ratio = paired_ratio(seconds[faster], seconds["regrad"])
        ratios.append(f"{length}: {spread([a / b for a, b in zip(seconds[faster], seconds['regrad'], strict=True)])}")
        figures += [
            Figure(f"passages of {length} tokens a second; baseline: plain loop, {faster}", ours, "/s", plain, ratio),
            Figure(
                f"{length} tokens: arithmetic done, as a share of this machine's best rate of matrix products",
                100 * ours * work / best,
                "%",
                100 * plain * work / best,
            ),
            Figure(f"{length} tokens: peak memory", peak["regrad"], "MB", peak[faster]),
        ]
    notes = [
        f"{shown(TOKENS[options.device])} tokens a process, random ones; {rounds} rounds in turns, their ratios "
        + ", ".join(ratios)
        + ". Loading is not in it; regrad's codec is."
    ]
    return Result(figures, notes)


def _process(place: Bench, way: str, length: int, count: int) -> Callable[[], Ran]:
    return lambda: place.python("gradients", way, place.model_folder, place.options.device, str(length), str(count))


def ours(folder: Path, device: str) -> Callable[[list[list[int]]], Iterator[object]]:
    """Passages → their gradients, encoded as the starter's prior has it, a pass at a time."""
    from regrad_cli.learn.codec import Codec, parse_codec
    from regrad_cli.learn.gradients import PassageGradients, map_gradients
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.prior import seeded_prior

    model = load_model(folder, device=device)
    prior = seeded_prior(model, "benchmark", rank=RANK)
    prior = replace(prior, card=prior.card | {"normalized": True})
    codec = Codec(parse_codec("r4-int1"), prior.shapes)

    def encoded(found: PassageGradients) -> object:
        return codec.encode(found.tensors)

    return lambda passages: map_gradients(model, prior, passages, encoded)


def plain(folder: Path, device: str, dtype: str) -> Callable[[list[list[int]]], Iterator[object]]:
    network, _ = lora_network(folder, dtype, device)
    return lambda passages: gradients(network, passages)


def main(arguments: Sequence[str]) -> None:
    way, folder, device, length, count = arguments
    of = ours(Path(folder), device) if way == "regrad" else plain(Path(folder), device, way)
    passages = [[(7 * place + 13 * number) % 4_096 + 5 for place in range(int(length))] for number in range(int(count))]
    for _ in of(passages[:2]):
        pass
    start = time.perf_counter()
    for _ in of(passages):
        pass
    print(json.dumps(time.perf_counter() - start))


if __name__ == "__main__":
    main(sys.argv[1:])
