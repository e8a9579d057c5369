"""A row of a bank: what its segments are is what comes back, and what a crafted one says is refused."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from faketerminal import settings_of_bank
from hypothesis import given
from hypothesis import strategies as st

from regrad_cli.errors import Damaged
from regrad_cli.learn.codec import row_widths
from regrad_cli.learn.rows import EMPTY, Parts, RowLayout, layout_of, widths
from regrad_cli.records import CodecSettings, TensorShape

SHAPES = (TensorShape("a", 4, 66), TensorShape("b", 50, 4))
DIMENSION = 6


def layout(segments: int) -> RowLayout:
    return RowLayout(CodecSettings(), SHAPES, segments, DIMENSION)


def some(made_for: RowLayout, counts: list[int], seed: int = 0) -> Parts:
    """So many segments in each row."""
    drawn = np.random.default_rng(seed)
    m = sum(counts)
    vectors = drawn.normal(size=(m, DIMENSION))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    gradients = {s.name: torch.from_numpy(drawn.normal(size=(m, s.rows, s.cols)).astype(np.float32)) for s in SHAPES}
    return Parts(
        np.repeat(np.arange(len(counts)), counts),
        np.concatenate([[0, *np.sort(drawn.choice(np.arange(1, 10**6), count - 1, False))] for count in counts]).astype(
            int
        ),
        vectors.astype(np.float32),
        *made_for.codec.encode(gradients),
    )


@given(st.integers(2, 5), st.lists(st.integers(1, 5), min_size=1, max_size=5))
def test_what_was_put_together_comes_apart_again(segments: int, counts: list[int]) -> None:
    made = layout(segments)
    parts = some(made, [min(count, segments) for count in counts])
    codes, scales = made.join(parts, len(counts))
    assert codes.shape == (len(counts), made.code_bytes) and codes.dtype == np.uint8
    assert scales.shape == (len(counts), made.scale_count) and scales.dtype == np.float16
    back = made.split(codes, scales)
    for name in ("owners", "begins", "codes", "scales"):
        assert np.array_equal(getattr(back, name), getattr(parts, name)), name
    assert back.vectors is not None and parts.vectors is not None
    assert np.abs(back.vectors - parts.vectors).max() <= 0.5 / 127 + 1e-6
    again = made.join(back, len(counts))
    assert np.array_equal(again[0], codes) and np.array_equal(again[1], scales), "recoding moves no vector"


def test_rows_of_whole_passages_are_the_codecs_own() -> None:
    made = layout(1)
    parts = replace(some(made, [1, 1]), vectors=None)
    codes, scales = made.join(parts, 2)
    assert np.array_equal(codes, parts.codes) and np.array_equal(scales, parts.scales)
    assert (made.code_bytes, made.scale_count) == row_widths(CodecSettings(), SHAPES)
    back = made.split(codes, scales)
    assert back.vectors is None and back.owners.tolist() == [0, 1] and back.begins.tolist() == [0, 0]


def test_a_row_is_the_same_bytes_in_any_company() -> None:
    made = layout(3)
    parts = some(made, [3, 1, 2])
    codes, scales = made.join(parts, 3)
    assert parts.vectors is not None
    for row in range(3):
        own = parts.owners == row
        alone = Parts(
            np.zeros(own.sum(), int), parts.begins[own], parts.vectors[own], parts.codes[own], parts.scales[own]
        )
        assert np.array_equal(made.join(alone, 1)[0][0], codes[row])
        assert np.array_equal(made.join(alone, 1)[1][0], scales[row])


def test_a_part_that_is_not_there_is_zeros_but_for_its_beginning() -> None:
    made = layout(3)
    codes, scales = made.join(some(made, [1]), 1)
    size = made.code_bytes // 3
    for part in (1, 2):
        own = codes[0, part * size : (part + 1) * size]
        assert own[:4].tobytes() == EMPTY.to_bytes(4, "little") and not own[4:].any()
    assert not scales[0, made.scale_count // 3 :].any()


def test_a_row_that_has_no_segment_is_zeros() -> None:
    made = layout(2)
    parts = some(made, [2, 1])
    later = replace(parts, owners=parts.owners + 1)
    codes, scales = made.join(later, 3)
    assert not codes[0].any() and not scales[0].any() and codes[1].any() and codes[2].any()


def test_of_no_rows_there_are_no_segments() -> None:
    for segments in (1, 3):
        made = layout(segments)
        one = some(made, [1])
        none = Parts(*(part[:0] for part in (one.owners, one.begins, one.vectors, one.codes, one.scales)))  # type: ignore[index]
        codes, scales = made.join(none, 0)
        assert codes.shape == (0, made.code_bytes) and scales.shape == (0, made.scale_count)
        assert len(made.split(codes, scales).owners) == 0


def test_a_rows_sum_is_that_of_its_segments() -> None:
    made = layout(3)
    parts = some(made, [3, 1])
    summed = made.sums(*made.join(parts, 2))
    decoded = made.codec.decode(parts.codes, parts.scales)
    for name, tensor in summed.items():
        assert torch.allclose(tensor[0], decoded[name][:3].sum(0)) and torch.equal(tensor[1], decoded[name][3])
    whole = layout(1)
    for name, tensor in whole.sums(parts.codes, parts.scales).items():
        assert torch.equal(tensor, decoded[name])


@pytest.mark.parametrize("begins", [(EMPTY, 0), (5, 5), (9, 3), (EMPTY, EMPTY)], ids=str)
def test_promise_16_segments_out_of_order_are_refused(begins: tuple[int, int]) -> None:
    made = layout(2)
    codes, scales = made.join(some(made, [2]), 1)
    for place, begin in enumerate(begins):
        start = place * made.code_bytes // 2
        codes[0, start : start + 4] = np.frombuffer(begin.to_bytes(4, "little"), np.uint8)
    with pytest.raises(Damaged, match="not in order"):
        made.split(codes, scales)


@pytest.mark.parametrize(
    "changes",
    [
        {"tensors": ()},
        {"tensors": (TensorShape("x", 1 << 20, 1 << 20),)},
        {"tensors": (TensorShape("x", 0, 32),)},
        {"tensors": (TensorShape("x", 8, 32), TensorShape("x", 8, 32))},
        {"codec": CodecSettings(kind="evil")},
        {"codec": CodecSettings(bits=3)},
        {"codec": CodecSettings(group=0)},
        {"codec": CodecSettings(group=63)},
        {"codec": CodecSettings(rank=0)},
        {"codec": CodecSettings(rank=1 << 40)},
        {"code_bytes": 1 << 31},
        {"scale_count": 5},
        {"segments": 0},
        {"segments": 3},
        {"segments": 1 << 40},
        {"embedding_dim": 4, "segments": 2},
    ],
    ids=str,
)
def test_promise_16_settings_that_do_not_agree_are_refused_before_memory_is_taken(changes: dict) -> None:
    shapes = (TensorShape("x", 8, 32),)
    for segments in (1, 2):
        code_bytes, scale_count = widths(CodecSettings(), shapes, segments, 8)
        right = settings_of_bank(
            tensors=shapes, code_bytes=code_bytes, scale_count=scale_count, segments=segments, embedding_dim=8
        )
        assert layout_of(right).code_bytes == code_bytes
        with pytest.raises(Damaged, match="do not agree"):
            layout_of(replace(right, **changes))
