"""The codec: a passage's gradient as one row of bytes, and back. Knows arrays of numbers; knows no bank and no model.

A row is `codes` (code_bytes,) uint8 and `scales` (scale_count,) float16, laid out by the settings and the tensors'
shapes alone, so that any row can be decoded by itself.

lowrank   Each tensor G (rows × cols, small side s, long side l) is kept as its best rank-k approximation Σ uⱼ vⱼᵀ. The
          uⱼ are unit vectors, int8 in steps of 1/127. The vⱼ = Gᵀuⱼ are integers of `bits` with a scale a group.
full      Each tensor is kept whole, integers of `bits` with a scale a group.

Every stored vector is first multiplied by a power of two (one int8 a vector), so that fp16 scales neither overflow nor
lose digits, however small a gradient is. A tensor of zeros stays zeros: no norm is divided by.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from regrad_cli.errors import UsageProblem
from regrad_cli.learn.adapt import Tensors
from regrad_cli.records import CodecSettings, TensorShape

NAMES = "rN-int4, rN-int8 (low rank N), int4, int8 (full rank)"


def parse_codec(name: str) -> CodecSettings:
    """`r1-int4` and the like as settings; the inverse of `str(settings)`.

    raises  UsageProblem for a name that is no codec
    """
    match = re.fullmatch(r"(?:r([1-9]\d?)-)?int([48])", name)
    if not match:
        raise UsageProblem(f"'{name}' is no codec", f"use one of: {NAMES}")
    rank = int(match[1] or 0)
    return CodecSettings(kind="lowrank" if rank else "full", rank=rank, bits=int(match[2]))


class Codec:
    """Encoder and decoder for gradients of these tensors.

    code_bytes, scale_count     the width of a row
    """

    def __init__(self, settings: CodecSettings, shapes: Sequence[TensorShape]) -> None:
        self.settings = settings
        self.shapes = tuple(shapes)
        self._small = [min(s.rows, s.cols) for s in self.shapes]
        self._long = [max(s.rows, s.cols) for s in self.shapes]
        if settings.kind == "lowrank":
            self._ranks = [min(settings.rank, small) for small in self._small]
            lengths = [long for long, rank in zip(self._long, self._ranks, strict=True) for _ in range(rank)]
            self._unit_count = sum(small * rank for small, rank in zip(self._small, self._ranks, strict=True))
        else:
            lengths = [s.rows * s.cols for s in self.shapes]
            self._unit_count = 0
        group = settings.group
        self._lengths = lengths
        self._padded = [-(-length // group) * group for length in lengths]
        self._value_count = sum(self._padded)
        self.scale_count = self._value_count // group
        self.code_bytes = len(lengths) + self._unit_count + self._value_count * settings.bits // 8

    # ── encoding ────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, gradients: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """{name: (n, rows, cols) float32} → codes (n, code_bytes) uint8, scales (n, scale_count) float16."""
        vectors: list[torch.Tensor] = []  # (n, length) each, in the order of self._lengths
        units: list[torch.Tensor] = []  # (n, small) each
        if self.settings.kind == "full":
            vectors = [gradients[shape.name].flatten(1) for shape in self.shapes]
        else:
            factors = self._factors(gradients)
            for shape in self.shapes:
                u, v = factors[shape.name]
                units += u.unbind(1)
                vectors += v.unbind(1)
        exponents, values = self._normalised(vectors)
        integers, scales = self._quantised(values)
        parts = [exponents.view(torch.uint8)]
        if units:
            parts.append(torch.cat(units, dim=1).mul(127).round().to(torch.int8).view(torch.uint8))
        parts.append(integers)
        return torch.cat(parts, dim=1).cpu().numpy(), scales.cpu().numpy()

    def _factors(self, gradients: Mapping[str, torch.Tensor]) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
        """{name: (u (n, k, small), v (n, k, long))}, by the small side's Gram matrix, tensors of one shape together."""
        alike: dict[tuple[int, int], list[TensorShape]] = {}
        for shape in self.shapes:
            alike.setdefault((min(shape.rows, shape.cols), max(shape.rows, shape.cols)), []).append(shape)
        found = {}
        for (small, _long), shapes in alike.items():
            rank = min(self.settings.rank, small)
            flat = [gradients[s.name] if s.rows == small else gradients[s.name].transpose(1, 2) for s in shapes]
            stack = torch.stack(flat, dim=1)  # (n, T, small, long)
            peak = stack.abs().amax(dim=(-1, -2), keepdim=True)
            even = stack / torch.where(peak > 0, peak, 1.0)  # so that no square leaves float32's range
            gram = (even @ even.transpose(-1, -2)).double()  # (n, T, small, small)
            # On the CPU everywhere: a batch of tiny problems, and the same routine for every device.
            u = torch.linalg.eigh(gram.cpu())[1][..., -rank:].flip(-1).to(stack.device)  # (n, T, small, k), best first
            sign = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True)).sign()  # one spelling of ±u
            u = (u * torch.where(sign == 0, 1.0, sign)).float().transpose(-1, -2)  # (n, T, k, small)
            u = (u * 127).round() / 127  # what will be read back; v then makes up for the rounding
            v = u @ stack / u.square().sum(dim=-1, keepdim=True)  # (n, T, k, long)
            for index, shape in enumerate(shapes):
                found[shape.name] = (u[:, index], v[:, index])
        return found

    def _normalised(self, vectors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """Each vector over a power of two: exponents (n, vectors) int8, values (n, value_count) of magnitude ≤ 1."""
        n = vectors[0].shape[0]
        values = vectors[0].new_zeros((n, self._value_count))
        exponents = torch.zeros((n, len(vectors)), dtype=torch.int8, device=values.device)
        start = 0
        for index, (vector, length, padded) in enumerate(zip(vectors, self._lengths, self._padded, strict=True)):
            exponent = torch.frexp(vector.abs().amax(dim=1))[1].clamp(-126, 126)  # (n,)
            exponents[:, index] = exponent.to(torch.int8)
            torch.ldexp(vector, -exponent[:, None], out=values[:, start : start + length])
            start += padded
        return exponents, values

    def _quantised(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, value_count) float32 → packed integers (n, bytes) uint8 and scales (n, scale_count) float16."""
        n = values.shape[0]
        top = 2 ** (self.settings.bits - 1) - 1  # 7 or 127; symmetric, zero stays zero
        groups = values.view(n, -1, self.settings.group)
        scales = (groups.abs().amax(dim=2) / top).half()
        divisor = scales.float()[:, :, None]
        integers = (groups / torch.where(divisor > 0, divisor, 1.0)).round().clamp(-top, top).view(n, -1)
        if self.settings.bits == 8:
            return integers.to(torch.int8).view(torch.uint8), scales
        nibbles = (integers + 8).to(torch.uint8)
        return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scales

    # ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────────

    def decode(self, codes: np.ndarray, scales: np.ndarray, device: torch.device | str = "cpu") -> Tensors:
        """codes (n, code_bytes) uint8, scales (n, scale_count) float16 → {name: (n, rows, cols) float32}."""
        raw = torch.from_numpy(np.array(codes, copy=True)).to(device)
        scale = torch.from_numpy(np.asarray(scales).astype(np.float32)).to(device)
        n, heads = raw.shape[0], len(self._lengths)
        exponents = raw[:, :heads].contiguous().view(torch.int8).int()
        units = raw[:, heads : heads + self._unit_count].contiguous().view(torch.int8).float() / 127
        packed = raw[:, heads + self._unit_count :].contiguous()
        if self.settings.bits == 8:
            integers = packed.view(torch.int8).float()
        else:
            integers = torch.stack((packed & 15, packed >> 4), dim=2).view(n, -1).float() - 8
        values = (integers.view(n, -1, self.settings.group) * scale[:, :, None]).view(n, -1)

        vectors, start = [], 0
        for index, (length, padded) in enumerate(zip(self._lengths, self._padded, strict=True)):
            vectors.append(torch.ldexp(values[:, start : start + length], exponents[:, index, None]))
            start += padded
        if self.settings.kind == "full":
            return {s.name: v.view(n, s.rows, s.cols) for s, v in zip(self.shapes, vectors, strict=True)}
        tensors, at, unit_at = {}, 0, 0
        for shape, small, rank in zip(self.shapes, self._small, self._ranks, strict=True):
            u = units[:, unit_at : unit_at + small * rank].view(n, rank, small)
            v = torch.stack(vectors[at : at + rank], dim=1)  # (n, k, long)
            left, right = (u, v) if shape.rows == small else (v, u)
            tensors[shape.name] = left.transpose(1, 2) @ right  # (n, rows, cols)
            at, unit_at = at + rank, unit_at + small * rank
        return tensors
