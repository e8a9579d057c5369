"""Measures a cold `regrad ask` against the shortest script that loads the same model and generates as many tokens.

Whole processes in turns, one question of the examples a round. The script is shortest_script.py.
"""

from __future__ import annotations

import json
import statistics

from benchmarks.bench import Bench, Options, Result
from benchmarks.measure import Figure, Ran, Target, paired_ratio, spread

TITLE = "A cold ask"
DEVICES = ("cpu", "cuda")
MAX_TOKENS = 20  # a short answer: the longer, the more both sides are alike


def run(place: Bench, options: Options) -> Result:
    from regrad_cli.learn.model import choose_device, choose_dtype

    dtype = str(choose_dtype("auto", choose_device(options.device))).removeprefix("torch.")
    bank = place.example_bank
    rounds = options.rounds or 5

    def ask(question: str) -> Ran:
        limit = str(MAX_TOKENS)
        return place.regrad(
            "ask", question, "--bank", bank, "--device", options.device, "--max-tokens", limit, "--json"
        )

    ours: list[Ran] = []
    scripts: list[Ran] = []
    counts: list[int] = []
    left_out = True  # the first pair is for warm-up
    for question in place.questions:
        asked = ask(question)
        tokens = json.loads(asked.stdout.splitlines()[-1])["tokens"]["answer"]
        if tokens == 0:
            continue  # nothing to compare: generate() cannot be made to generate nothing
        script = place.python("shortest_script", place.model_folder, dtype, options.device, str(tokens), question)
        if int(script.stdout) != tokens:
            raise RuntimeError(f"the script generated {script.stdout.strip()} tokens, regrad {tokens}")
        if left_out:
            left_out = False
            continue
        ours.append(asked)
        scripts.append(script)
        counts.append(tokens)
        if len(ours) == rounds:
            break
    ratios = [a.seconds / b.seconds for a, b in zip(ours, scripts, strict=True)]
    figures = [
        Figure(
            "cold regrad ask, whole process",
            statistics.median(ran.seconds for ran in ours),
            "s",
            statistics.median(ran.seconds for ran in scripts),
            paired_ratio([ran.seconds for ran in ours], [ran.seconds for ran in scripts]),
            Target("≤", 1.25),
        ),
        Figure(
            "peak memory",
            max(ran.peak_bytes for ran in ours) / 1e6,
            "MB",
            max(ran.peak_bytes for ran in scripts) / 1e6,
            paired_ratio([ran.peak_bytes for ran in ours], [ran.peak_bytes for ran in scripts]),
        ),
    ]
    notes = [
        f"Mode regrad, {len(ours)} questions of the examples after one for warm-up, answers of {min(counts)} to "
        f"{max(counts)} tokens (at most {MAX_TOKENS}), {dtype}; ratios of the pairs {spread(ratios)}. Files are in the "
        "page cache on both sides.",
    ]
    return Result(figures, notes)
