"""Counts of numbers, as a Counter has them and in a tenth of its bytes."""

from __future__ import annotations

import random
from collections import Counter

import pytest

from regrad_cli import tally
from regrad_cli.tally import Tally


@pytest.mark.parametrize("recent", [1, 7, 1024])
def test_counts_are_those_of_a_counter(monkeypatch: pytest.MonkeyPatch, recent: int) -> None:
    monkeypatch.setattr(tally, "RECENT", recent)
    drawn = random.Random(5)
    mine, theirs = Tally(), Counter[int]()
    some = [0, 1, 2**63, 2**64 - 1, *(drawn.getrandbits(64) for _ in range(60))]
    for _ in range(300):
        counts = {drawn.choice(some): drawn.choice([-2, -1, 1, 3]) for _ in range(5)}
        mine.update(counts)
        theirs.update(counts)
    assert {number: mine[number] for number in some} == {number: theirs[number] for number in some}
    assert mine[12345] == 0


def test_a_number_is_new_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tally, "RECENT", 10)
    drawn = random.Random(9)
    numbers = [drawn.getrandbits(64) for _ in range(100)]
    mine = Tally()
    assert all(mine.add(number) for number in numbers)
    assert not any(mine.add(number) for number in numbers)
