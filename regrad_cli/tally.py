"""How often each 64-bit number came, in 12 bytes a number: for ids of documents by the million. Knows numbers only."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping

import numpy as np

RECENT = 1024  # numbers that lie in a dictionary, at a hundred bytes each, before they are sorted in among the others


class Tally:
    """{number: how often}: numbers from 0 on and below 2⁶⁴, counts that fit into 32 bits and may be negative."""

    def __init__(self) -> None:
        self._numbers = np.zeros(0, np.uint64)  # (n,) ascending
        self._counts = np.zeros(0, np.int32)
        self._recent: Counter[int] = Counter()

    def __getitem__(self, number: int) -> int:
        """How often it came; 0 where it never did."""
        place = int(np.searchsorted(self._numbers, np.uint64(number)))
        there = place < len(self._numbers) and int(self._numbers[place]) == number
        return self._recent[number] + (int(self._counts[place]) if there else 0)

    def add(self, number: int) -> bool:
        """Counts it once more; whether it came for the first time."""
        new = not self[number]
        self.update({number: 1})
        return new

    def update(self, counts: Mapping[int, int]) -> None:
        """Adds these."""
        for number, count in counts.items():
            self._recent[number] += count
        if len(self._recent) >= RECENT:
            self._sort_in()

    def _sort_in(self) -> None:
        size = len(self._recent)
        numbers = np.concatenate([self._numbers, np.fromiter(self._recent, np.uint64, size)])
        counts = np.concatenate([self._counts, np.fromiter(self._recent.values(), np.int32, size)])
        order = np.argsort(numbers, kind="stable")
        numbers, counts = numbers[order], counts[order]
        first = np.flatnonzero(np.concatenate([[True], numbers[1:] != numbers[:-1]]))
        self._numbers, self._counts = numbers[first], np.add.reduceat(counts, first, dtype=np.int32)
        self._recent.clear()
