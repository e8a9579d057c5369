"""Writes invented documents with questions: the worlds a prior is trained on. Knows no model.

`python -m benchmarks.prior.worlds --seed 0 --tasks 3000 --out worlds.jsonl`; the kinds of documents are in `kinds/`.
"""

from benchmarks.prior.worlds.write import write_worlds

__all__ = ["write_worlds"]
