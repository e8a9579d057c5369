"""An answer that only repeats itself ends before its second copy; one that repeats a few words does not."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from regrad_cli.learn import generate
from regrad_cli.learn import prompt as prompt_module
from regrad_cli.learn.generate import greedy_batch
from regrad_cli.learn.model import Model
from regrad_cli.learn.prompt import COPIES, REPEATED, Kept, greedy, said_once

END = 0


class Scripted:
    """Stands in for a model whose most likely tokens are given; `asked` counts them."""

    end_ids = (END,)

    def __init__(self, *scripts: Sequence[int]) -> None:
        self.scripts = scripts
        self.asked = 0

    def next_tokens(
        self, _model: Model, _prompts: object, max_tokens: int, _beginnings: object = None
    ) -> Iterator[list[int]]:
        for place in range(min(max_tokens, max(map(len, self.scripts)))):
            self.asked += 1
            yield [script[place] if place < len(script) else END for script in self.scripts]


def answers(monkeypatch: pytest.MonkeyPatch, *scripts: Sequence[int], limit: int = 64) -> list[list[int]]:
    """What greedy_batch makes of the scripts; greedy, one by one, makes the same."""
    with monkeypatch.context() as patch:
        batch = Scripted(*scripts)
        patch.setattr(generate, "next_tokens", batch.next_tokens)
        together = greedy_batch(batch, [[1]] * len(scripts), limit)  # type: ignore[arg-type]
        for script, answer in zip(scripts, together, strict=True):
            alone = Scripted(script)
            patch.setattr(prompt_module, "next_tokens", alone.next_tokens)
            assert list(greedy(alone, [1], limit)) == answer  # type: ignore[arg-type]
    return together


@pytest.mark.parametrize(
    ("said", "kept"),
    [
        ([7] * 64, 1),
        ([1, 2, 3] + [7] * 61, 4),
        ([5, 6, 7, 8] * 16, 4),  # as the starter once said "Petrel 3 Petrel 3 …"
        ([9, 5, 6, 7, 8] + [5, 6, 7, 8] * 15, 5),
        ([1, 7, 7, 2] * 16, 4),
        (list(range(1, 22)) * 3, 21),
    ],
)
def test_a_repetition_is_said_once(monkeypatch: pytest.MonkeyPatch, said: list[int], kept: int) -> None:
    assert answers(monkeypatch, said) == [said[:kept]]


@pytest.mark.parametrize(
    "said",
    [
        [5, 6, 5, 6],  # Walla Walla
        [5, 6] * (REPEATED // 2 - 1) + [5],
        list(range(1, 22)) * 2,
        [*([7] * (REPEATED - 1)), 8],
        [4, 5, 6, *([7, 8] * 5), 4, 5, 6, *([7, 8] * 5)],
    ],
)
def test_a_few_words_said_again_stay(monkeypatch: pytest.MonkeyPatch, said: list[int]) -> None:
    assert answers(monkeypatch, said) == [said]
    assert answers(monkeypatch, [*said, END, 3, 3]) == [said]
    assert answers(monkeypatch, said, limit=len(said)) == [said]


def test_rows_of_a_batch_end_each_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    scripts = [[7] * 64, [*range(1, 40), END], [5, END], [1, 2] * 32]
    assert answers(monkeypatch, *scripts) == [[7], [*range(1, 40)], [5], [1, 2]]


def test_nothing_more_is_computed_once_all_only_repeat_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    batch = Scripted([7] * 64, [5, 6, 7, 8] * 16)
    monkeypatch.setattr(generate, "next_tokens", batch.next_tokens)
    greedy_batch(batch, [[1], [1]], 64)  # type: ignore[arg-type]
    assert batch.asked == REPEATED


def test_tokens_that_repeat_nothing_come_at_once_and_the_end_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    script = Scripted([1, 2, 3, 1, 4, 4, END])
    monkeypatch.setattr(prompt_module, "next_tokens", script.next_tokens)
    tokens = Kept(greedy(script, [1], 64))  # type: ignore[arg-type]
    when = [(token, script.asked) for token in tokens]
    assert when == [(1, 1), (2, 2), (3, 3), (1, 5), (4, 5), (4, 7)]
    assert tokens.end == [END]


@given(st.lists(st.integers(1, 3), max_size=60), st.integers(1, 8), st.integers(0, 40))
@example([], 1, 40)
def test_whatever_is_said_is_cut_at_the_first_repetition(start: list[int], period: int, more: int) -> None:
    """Against the rule written out: blocks compared copy by copy, at every length that the answer had."""
    said = start + [100 + place % period for place in range(more)]

    def ends_in(ids: list[int]) -> int | None:
        for block in range(1, len(ids) // COPIES + 1):
            length = max(REPEATED, COPIES * block)
            tail = ids[-length:]
            if len(tail) == length and all(tail[place] == tail[place % block] for place in range(length)):
                first = len(ids) - length
                while first and ids[first - 1] == ids[first - 1 + block]:
                    first -= 1
                return first + block
        return None

    expected = said
    for length in range(1, len(said) + 1):
        if (once := ends_in(said[:length])) is not None:
            expected = said[:once]
            break
        assert said_once(said[:length]) is None
    with pytest.MonkeyPatch.context() as patch:
        assert answers(patch, said) == [expected]
