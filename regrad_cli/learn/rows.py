"""A passage's row of a bank, which holds the gradients of its segments: put together, and taken apart again. Knows the
codec and arrays of numbers; knows no text and no bank.

Where passages are not cut (`segments` is 1), a row is the codec's. Otherwise `codes` is `segments` parts of one size,
one after another, and each is

begin   uint32, little-endian: the character of the passage's text with which the segment begins; EMPTY for none
vector  int8 (embedding_dim,): the unit vector of its text, in steps of 1/127
codes   the codec's, of its gradient

and `scales` is the codec's of each part in the same order. A part that is EMPTY holds zeros besides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from regrad_cli.errors import Damaged
from regrad_cli.learn.adapt import Tensors
from regrad_cli.learn.codec import Codec, is_known, row_widths
from regrad_cli.learn.prior import MOST_SEGMENTS
from regrad_cli.records import BankSettings, CodecSettings, TensorShape

EMPTY = 0xFFFFFFFF
MOST_VALUES = 1 << 29  # of one gradient, decoded: 2 GiB in fp32; rank 64 on a model of 70 billion weights has half


@dataclass(frozen=True, eq=False)
class Parts:
    """Segments of n rows, m in all, row by row and in the order of their text.

    owners   (m,) int64: the place of the row that each is of
    begins   (m,) int64: the character of the passage's text with which each begins
    vectors  (m, d) float32 of nearly unit norm; None where passages are not cut
    codes    (m, C) uint8 and scales (m, S) float16: the codec's
    """

    owners: npt.NDArray[np.int64]
    begins: npt.NDArray[np.int64]
    vectors: npt.NDArray[np.float32] | None
    codes: npt.NDArray[np.uint8]
    scales: npt.NDArray[np.float16]


class RowLayout:
    """How rows of one bank are put together.

    codec                    of every segment's gradient
    code_bytes, scale_count  the width of a row
    """

    def __init__(self, codec: CodecSettings, shapes: Sequence[TensorShape], segments: int, dimension: int) -> None:
        self.codec = Codec(codec, shapes)
        self.segments = segments
        self._dimension = dimension
        self.code_bytes, self.scale_count = widths(codec, shapes, segments, dimension)

    def join(self, parts: Parts, rows: int) -> tuple[np.ndarray, np.ndarray]:
        """The segments of so many rows as codes (rows, code_bytes) uint8, scales (rows, scale_count) float16.

        A row without any segment is zeros.
        """
        if self.segments == 1:
            codes, scales = (np.zeros((rows, part.shape[1]), part.dtype) for part in (parts.codes, parts.scales))
            codes[parts.owners], scales[parts.owners] = parts.codes, parts.scales
            return codes, scales
        assert parts.vectors is not None
        heads = np.zeros((rows, self.segments, 4), np.uint8)
        vectors = np.zeros((rows, self.segments, self._dimension), np.int8)
        codes = np.zeros((rows, self.segments, self.codec.code_bytes), np.uint8)
        scales = np.zeros((rows, self.segments, self.codec.scale_count), np.float16)
        heads[np.unique(parts.owners)] = 0xFF  # EMPTY, until a segment is there
        at = parts.owners, _places(parts.owners)
        heads[at] = parts.begins.astype("<u4").view(np.uint8).reshape(-1, 4)
        vectors[at] = np.rint(parts.vectors * 127).clip(-127, 127).astype(np.int8)
        codes[at], scales[at] = parts.codes, parts.scales
        whole = np.concatenate([heads, vectors.view(np.uint8), codes], axis=2)
        return whole.reshape(rows, self.code_bytes), scales.reshape(rows, self.scale_count)

    def split(self, codes: np.ndarray, scales: np.ndarray) -> Parts:
        """The segments of codes (n, code_bytes) uint8, scales (n, scale_count) float16.

        raises  Damaged where there is none, or one begins before the one it follows
        """
        n = len(codes)
        if self.segments == 1:
            return Parts(np.arange(n), np.zeros(n, np.int64), None, codes, scales)
        parts = np.ascontiguousarray(codes).reshape(n, self.segments, self.code_bytes // self.segments)
        begins = np.ascontiguousarray(parts[..., :4]).view("<u4")[..., 0].astype(np.int64)
        there = begins != EMPTY
        if not there[:, 0].all() or (np.diff(begins, axis=1)[there[:, 1:]] <= 0).any():
            raise Damaged("a row's segments are not in order", "take the bank from its source again")
        head = 4 + self._dimension
        vectors = np.ascontiguousarray(parts[..., 4:head][there]).view(np.int8).astype(np.float32)
        return Parts(
            owners=np.nonzero(there)[0],
            begins=begins[there],
            vectors=vectors / np.float32(127),
            codes=parts[..., head:][there],
            scales=np.asarray(scales).reshape(n, self.segments, self.codec.scale_count)[there],
        )

    def sums(self, codes: np.ndarray, scales: np.ndarray, device: torch.device | str = "cpu") -> Tensors:
        """Each row's segments' gradients added up: {name: (n, rows, cols) float32}."""
        parts = self.split(codes, scales)
        decoded = self.codec.decode(parts.codes, parts.scales, device)
        if self.segments == 1:
            return decoded
        owners = torch.from_numpy(parts.owners).to(device)
        return {
            name: tensor.new_zeros((len(codes), *tensor.shape[1:])).index_add_(0, owners, tensor)
            for name, tensor in decoded.items()
        }


def _places(owners: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
    """The place of each among those of the same owner, which stand together."""
    firsts = np.searchsorted(owners, owners)
    return np.arange(len(owners)) - firsts


def widths(codec: CodecSettings, shapes: Sequence[TensorShape], segments: int, dimension: int) -> tuple[int, int]:
    """code_bytes and scale_count of a row: arithmetic alone, whatever the shapes."""
    code_bytes, scale_count = row_widths(codec, shapes)
    if segments == 1:
        return code_bytes, scale_count
    return segments * (4 + dimension + code_bytes), segments * scale_count


def layout_of(settings: BankSettings) -> RowLayout:
    """The layout of a bank's rows.

    raises  Damaged where the settings are of no codec, or do not agree with one another: a crafted bank's could ask for
            any amount of memory
    """
    codec, shapes, segments = settings.codec, settings.tensors, settings.segments
    known = is_known(codec) and bool(shapes) and 1 <= segments <= MOST_SEGMENTS
    named = len({shape.name for shape in shapes}) == len(shapes)
    sizes = [shape.rows * shape.cols for shape in shapes]
    fits = known and named and min(sizes) > 0 and sum(sizes) <= MOST_VALUES
    stated = settings.code_bytes, settings.scale_count
    if not fits or widths(codec, shapes, segments, settings.embedding_dim) != stated:
        raise Damaged(
            f"the bank's settings do not agree with one another: {codec} of {len(shapes)} tensors, rows of "
            f"{settings.code_bytes} bytes",
            "take the bank from its source again",
        )
    return RowLayout(codec, shapes, segments, settings.embedding_dim)
