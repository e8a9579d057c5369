"""Measures how long `--help`, `bank stats` and a cold `query` take as whole processes, beside `python -c pass`."""

from __future__ import annotations

import statistics
import sys

from benchmarks.bench import Bench, Options, Result
from benchmarks.measure import Figure, Target, interleaved, paired_ratio, shown

TITLE = "Start-up"
DEVICES = ("cpu",)


def run(place: Bench, options: Options) -> Result:
    bank = place.example_bank
    question = place.questions[0]
    rounds = options.rounds or 9
    results = interleaved(
        {
            "pass": lambda: place.run(sys.executable, "-c", "pass"),
            "regrad --help": lambda: place.regrad("--help"),
            "regrad bank stats": lambda: place.regrad("bank", "stats", "--bank", bank),
            "regrad query, cold": lambda: place.regrad("query", question, "--bank", bank),
        },
        rounds,
        warm_up=True,
    )
    seconds = {name: [ran.seconds for ran in runs] for name, runs in results.items()}
    baseline = seconds.pop("pass")
    bounds = {"regrad --help": 0.25, "regrad bank stats": 0.4}
    figures = [
        Figure(
            name,
            statistics.median(found),
            "s",
            statistics.median(baseline),
            paired_ratio(found, baseline),
            Target("≤", bounds[name], "value") if name in bounds else None,
        )
        for name, found in seconds.items()
    ]
    slowest = ", ".join(f"{name} {shown(max(found), 's')}" for name, found in seconds.items())
    return Result(
        figures,
        [
            f"Whole processes, median of {rounds} rounds after one for warm-up; baseline `python -c pass`. "
            f"Slowest: {slowest}."
        ],
    )
