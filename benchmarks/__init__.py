"""Benchmarks: each prints a ratio to a baseline that ran beside it, on the same machine, in the same minutes.

`python -m benchmarks.run` runs them all; `--write` keeps the results in RESULTS.md.
"""
