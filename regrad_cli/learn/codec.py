"""The codec: a passage's gradient as one row of bytes, and back. Knows arrays of numbers; knows no bank and no model.

A row is `codes` (code_bytes,) uint8 and `scales` (scale_count,) float16, laid out by the settings and the tensors'
shapes alone, so that any row can be decoded by itself.

lowrank   Each tensor G (rows × cols, small side s, long side l) is kept as its best rank-k approximation Σ uⱼ vⱼᵀ. The
          uⱼ are unit vectors, int8 in steps of 1/127. The vⱼ = Gᵀuⱼ are integers of `bits` with a scale a group.
full      Each tensor is kept whole, integers of `bits` with a scale a group.

With 8 and 4 bits the integers are from −127 to 127 and from −7 to 7. With 2 there are four: −3/2, −1/2, 1/2 and 3/2.

Every stored vector is first multiplied by a power of two (one int8 a vector), so that fp16 scales neither overflow nor
lose digits, however small a gradient is. A tensor of zeros stays zeros: no norm is divided by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch

from regrad_cli.errors import UsageProblem
from regrad_cli.learn.adapt import Tensors
from regrad_cli.records import CodecSettings, TensorShape

NAMES = "rN-int2, rN-int4, rN-int8 (low rank N), int2, int4, int8 (full rank)"
BEST_STEP = 0.9957  # of four equal steps over a normal distribution, in standard deviations (Max, IRE IT-6, 1960)


def parse_codec(name: str) -> CodecSettings:
    """`r1-int4` and the like as settings; the inverse of `str(settings)`.

    raises  UsageProblem for a name that is no codec
    """
    match = re.fullmatch(r"(?:r([1-9]\d?)-)?int([248])", name)
    if not match:
        raise UsageProblem(f"'{name}' is no codec", f"use one of: {NAMES}")
    rank = int(match[1] or 0)
    return CodecSettings(kind="lowrank" if rank else "full", rank=rank, bits=int(match[2]))


def row_widths(settings: CodecSettings, shapes: Sequence[TensorShape]) -> tuple[int, int]:
    """code_bytes and scale_count of a row: arithmetic alone, whatever the shapes."""
    vectors = units = values = 0
    for shape in shapes:
        small, long = sorted((shape.rows, shape.cols))
        rank = min(settings.rank, small) if settings.kind == "lowrank" else 0
        length = long if rank else small * long
        vectors += rank or 1
        units += small * rank
        values += (rank or 1) * -(-length // settings.group) * settings.group
    return vectors + units + values * settings.bits // 8, values // settings.group


@dataclass(frozen=True)
class _Group:
    """Tensors of one shape, and where their parts lie in a row.

    turned      whether a tensor's long side is its rows
    vectors     places of their V stored vectors among the exponents; values, units: columns of what they store
    """

    rank: int
    names: tuple[str, ...]
    turned: tuple[bool, ...]
    vectors: torch.Tensor
    values: torch.Tensor
    units: torch.Tensor


@dataclass
class _Builder:
    rank: int
    names: list[str] = field(default_factory=list)
    turned: list[bool] = field(default_factory=list)
    vectors: list[int] = field(default_factory=list)
    values: list[torch.Tensor] = field(default_factory=list)
    units: list[torch.Tensor] = field(default_factory=list)

    def group(self) -> _Group:
        columns = (torch.tensor(self.vectors), torch.cat(self.values), torch.cat(self.units))
        return _Group(self.rank, tuple(self.names), tuple(self.turned), *columns)


class Codec:
    """Encoder and decoder for gradients of these tensors.

    code_bytes, scale_count     the width of a row
    """

    def __init__(self, settings: CodecSettings, shapes: Sequence[TensorShape]) -> None:
        self.settings = settings
        self.shapes = tuple(shapes)
        self._lengths: list[int] = []  # of each stored vector, in the order of the tensors
        self._padded: list[int] = []
        self._unit_count = 0
        alike: dict[tuple[int, int], _Builder] = {}
        start = 0
        for shape in self.shapes:
            small, long = sorted((shape.rows, shape.cols))
            rank = min(settings.rank, small) if settings.kind == "lowrank" else 0
            place = alike.setdefault((small, long), _Builder(rank))
            place.names.append(shape.name)
            place.turned.append(shape.rows != small)
            length = long if rank else small * long
            for _ in range(rank or 1):
                place.vectors.append(len(self._lengths))
                place.values.append(torch.arange(start, start + length))
                self._lengths.append(length)
                self._padded.append(-(-length // settings.group) * settings.group)
                start += self._padded[-1]
            place.units.append(torch.arange(self._unit_count, self._unit_count + small * rank))
            self._unit_count += small * rank
        self._groups = [place.group() for place in alike.values()]
        self._value_count = start
        self.code_bytes, self.scale_count = row_widths(settings, self.shapes)

    # ── encoding ────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, gradients: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """{name: (n, rows, cols) float32} → codes (n, code_bytes) uint8, scales (n, scale_count) float16."""
        first = gradients[self.shapes[0].name]
        n, device = first.shape[0], first.device
        exponents = torch.empty((n, len(self._lengths)), dtype=torch.int8, device=device)
        units = torch.empty((n, self._unit_count), dtype=torch.int8, device=device)
        values = torch.zeros((n, self._value_count), device=device)
        for group in self._groups:  # tensors of one shape together
            if self.settings.kind == "full":
                vectors = torch.stack([gradients[name].flatten(1) for name in group.names], dim=1)  # (n, V, length)
            else:
                u, v = self._factors(group, gradients)  # (n, T, k, small), (n, T, k, long)
                units[:, group.units.to(device)] = u.mul(127).round().to(torch.int8).flatten(1)
                vectors = v.flatten(1, 2)
            exponent = torch.frexp(vectors.abs().amax(dim=2))[1].clamp(-126, 126)  # (n, V)
            exponents[:, group.vectors.to(device)] = exponent.to(torch.int8)
            values[:, group.values.to(device)] = torch.ldexp(vectors, -exponent[..., None]).flatten(1)
        integers, scales = self._quantised(values)
        codes = torch.cat([exponents.view(torch.uint8), units.view(torch.uint8), integers], dim=1)
        return codes.cpu().numpy(), scales.cpu().numpy()

    def _factors(self, group: _Group, gradients: Mapping[str, torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        """u (n, T, k, small) and v (n, T, k, long) of the group's T tensors, by the small side's Gram matrix.

        One tensor at a time, so that what is made on the way stays in a CPU's caches.
        """
        parts = [gradients[name] for name in group.names]
        wide = [p.transpose(1, 2) if t else p for p, t in zip(parts, group.turned, strict=True)]  # (n, small, long)
        grams = []
        for plain, part in zip(parts, wide, strict=True):
            least, most = plain.flatten(1).amin(dim=1), plain.flatten(1).amax(dim=1)
            peak = torch.maximum(-least, most)[:, None, None]
            even = part / torch.where(peak > 0, peak, 1.0)  # so that no square leaves float32's range
            grams.append(even @ even.transpose(-1, -2))
        gram = torch.stack(grams, dim=1).double()  # (n, T, small, small)
        # On the CPU everywhere: a batch of tiny problems, and the same routine for every device.
        u = (
            torch.linalg.eigh(gram.cpu())[1][..., -group.rank :].flip(-1).to(gram.device)
        )  # (n, T, small, k), best first
        sign = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True)).sign()  # one spelling of ±u
        u = (u * torch.where(sign == 0, 1.0, sign)).float().transpose(-1, -2)  # (n, T, k, small)
        u = (u * 127).round() / 127  # what will be read back; v then makes up for the rounding
        v = torch.stack([u[:, place] @ part for place, part in enumerate(wide)], dim=1)
        return u, v / u.square().sum(dim=-1, keepdim=True)

    def _quantised(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, value_count) float32 → packed integers (n, bytes) uint8 and scales (n, scale_count) float16."""
        n = values.shape[0]
        if self.settings.bits == 2:
            return self._in_fours(values.view(n, -1, self.settings.group))
        top = 2 ** (self.settings.bits - 1) - 1  # 7 or 127; symmetric, zero stays zero
        groups = values.view(n, -1, self.settings.group)
        scales = (groups.abs().amax(dim=2) / top).half()
        divisor = scales.float()[:, :, None]
        integers = (groups / torch.where(divisor > 0, divisor, 1.0)).round().clamp(-top, top).view(n, -1)
        if self.settings.bits == 8:
            return integers.to(torch.int8).view(torch.uint8), scales
        nibbles = (integers + 8).to(torch.uint8)
        return nibbles[:, 0::2] | (nibbles[:, 1::2] << 4), scales

    @staticmethod
    def _in_fours(groups: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, groups, group) → packed integers and scales, the least squared error that two looks find."""
        there = (groups != 0).float()  # what fills up a group takes no part
        scale = BEST_STEP * (groups.square().sum(2) / there.sum(2).clamp(min=1)).sqrt()

        def nearest() -> torch.Tensor:
            step = torch.where(scale > 0, scale, 1.0)[:, :, None]
            return (groups / step).floor().clamp(-2, 1)

        for _ in range(2):
            level = (nearest() + 0.5) * there
            scale = (groups * level).sum(2) / level.square().sum(2).clamp(min=1e-12)
        scales = scale.half()
        scale = scales.float()
        fours = (nearest() + 2).to(torch.uint8).flatten(1)
        packed = fours[:, 0::4] | (fours[:, 1::4] << 2) | (fours[:, 2::4] << 4) | (fours[:, 3::4] << 6)
        return packed, scales

    # ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────────

    def decode(self, codes: np.ndarray, scales: np.ndarray, device: torch.device | str = "cpu") -> Tensors:
        """codes (n, code_bytes) uint8, scales (n, scale_count) float16 → {name: (n, rows, cols) float32}."""
        tensors: Tensors = {}
        for group, u, v in self._stored(codes, scales, device):
            stack = v[:, :, 0] if u is None else u.transpose(-1, -2) @ v  # (n, T, small, long), or (n, T, small · long)
            tensors.update(zip(group.names, self._turned(group, stack.unbind(1)), strict=True))
        return {s.name: tensors[s.name].reshape(-1, s.rows, s.cols) for s in self.shapes}

    def weighted(
        self, codes: np.ndarray, scales: np.ndarray, weights: Sequence[float], device: torch.device | str = "cpu"
    ) -> Tensors:
        """Σ wᵢ gᵢ of these rows' gradients, without any of them by itself: {name: (rows, cols) float32}.

        weights  n floats
        """
        w = torch.tensor(weights, dtype=torch.float32, device=device)[:, None, None, None]
        tensors: Tensors = {}
        for group, u, v in self._stored(codes, scales, device):
            v = (v * w).transpose(0, 1)  # (T, n, k, long)
            if u is None:
                stack = v.sum(dim=(1, 2))
            else:  # the rows' pairs one after another, as one gradient of n · k pairs
                stack = u.transpose(0, 1).flatten(1, 2).transpose(1, 2) @ v.flatten(1, 2)  # (T, small, long)
            tensors.update(zip(group.names, self._turned(group, stack.unbind(0)), strict=True))
        return {s.name: tensors[s.name].reshape(s.rows, s.cols) for s in self.shapes}

    def _turned(self, group: _Group, tensors: Sequence[torch.Tensor]) -> Iterator[torch.Tensor]:
        """Small side first, or whole → as they are in the model."""
        for tensor, turned in zip(tensors, group.turned, strict=True):
            yield tensor.transpose(-1, -2) if turned and group.rank else tensor

    def _stored(
        self, codes: np.ndarray, scales: np.ndarray, device: torch.device | str
    ) -> Iterator[tuple[_Group, torch.Tensor | None, torch.Tensor]]:
        """For each group of T tensors its u (n, T, k, small) and v (n, T, k, long); of whole tensors no u, and they
        themselves as v, (n, T, 1, small · long)."""
        raw = torch.from_numpy(np.array(codes, copy=True)).to(device)
        scale = torch.from_numpy(np.asarray(scales).astype(np.float32)).to(device)
        n, heads = raw.shape[0], len(self._lengths)
        exponents = raw[:, :heads].contiguous().view(torch.int8).int()
        units = raw[:, heads : heads + self._unit_count].contiguous().view(torch.int8).float() / 127
        packed = raw[:, heads + self._unit_count :].contiguous()
        if self.settings.bits == 8:
            integers = packed.view(torch.int8).float()
        elif self.settings.bits == 2:
            fours = torch.stack([packed >> shift & 3 for shift in (0, 2, 4, 6)], dim=2)
            integers = fours.view(n, -1).float() - 1.5
        else:
            integers = torch.stack((packed & 15, packed >> 4), dim=2).view(n, -1).float() - 8
        values = (integers.view(n, -1, self.settings.group) * scale[:, :, None]).view(n, -1)
        for group in self._groups:
            exponent = exponents[:, group.vectors.to(device)]  # (n, V)
            vectors = torch.ldexp(
                values[:, group.values.to(device)].unflatten(1, (len(group.vectors), -1)), exponent[..., None]
            ).unflatten(1, (len(group.names), group.rank or 1))
            u = None
            if group.rank:
                u = units[:, group.units.to(device)].unflatten(1, (len(group.names), group.rank, -1))
            yield group, u, vectors
