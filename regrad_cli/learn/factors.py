"""How a gradient's factors become the bytes of a row, and come back: one class for each way. Knows arrays of numbers.

A tensor is kept as `pairs` pairs of vectors, u (small,) and v (long,), whose products add up to it; or whole, as one v
and no u. Shapes: n rows, T tensors of one shape, k pairs each, V = T · k vectors.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch

from regrad_cli.records import CodecSettings

BEST_STEP = 0.9957  # of four equal steps over a normal distribution, in standard deviations (Max, IRE IT-6, 1960)
FAINT = 2e-3  # a direction so much fainter than the strongest is rounding (bf16's), and left out where all are equal


@dataclass(frozen=True)
class Factors:
    """Of the T tensors of a group.

    u      (n, T, k, small), of norm 1, strongest first; None where tensors are kept whole
    v      (n, T, k, long)
    norms  (n, T), of the tensors themselves; None where these are not known
    """

    u: torch.Tensor | None
    v: torch.Tensor
    norms: torch.Tensor | None = None


@dataclass(frozen=True)
class Group:
    """Tensors of one shape: their places among all tensors, and what each is kept as; small is 0 where it is whole."""

    places: tuple[int, ...]
    pairs: int
    small: int
    long: int


def widths(settings: CodecSettings, groups: Sequence[Group]) -> tuple[int, int]:
    """code_bytes and scale_count of a row: arithmetic alone."""
    tensors = sum(len(group.places) for group in groups)
    vectors = sum(len(group.places) * group.pairs for group in groups)
    units = sum(len(group.places) * group.pairs * group.small for group in groups)
    values = sum(len(group.places) * group.pairs * _padded(group.long, settings) for group in groups)
    if settings.bits == 1:
        return tensors + -(-units // 4) + values // 8, tensors
    return vectors + units + values * settings.bits // 8, values // settings.group


def _padded(length: int, settings: CodecSettings) -> int:
    return -(-length // settings.group) * settings.group


class _Columns:
    """Where each group's vectors lie in a row, in the order of the tensors.

    vectors, units, values  of each group: places among the vectors, and columns of what these hold
    """

    def __init__(self, settings: CodecSettings, groups: Sequence[Group]) -> None:
        self.vectors: list[torch.Tensor] = []
        self.units: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        order = sorted((place, group) for group, found in enumerate(groups) for place in found.places)
        starts: list[list[tuple[int, int, int]]] = [[] for _ in groups]  # of each tensor
        vector = unit = value = 0
        for _, number in order:
            group = groups[number]
            starts[number].append((vector, unit, value))
            vector += group.pairs
            unit += group.pairs * group.small
            value += group.pairs * _padded(group.long, settings)
        self.vector_count, self.unit_count, self.value_count = vector, unit, value
        for group, found in zip(groups, starts, strict=True):
            first = torch.tensor(found)  # (T, 3)
            pair = torch.arange(group.pairs)
            self.vectors.append((first[:, :1] + pair).flatten())
            self.units.append((first[:, 1:2] + torch.arange(group.pairs * group.small)).flatten())
            begin = first[:, 2:] + pair * _padded(group.long, settings)  # (T, k)
            self.values.append((begin[..., None] + torch.arange(group.long)).flatten())


class Integers:
    """u as int8 in steps of 1/127; v as integers of 2, 4 or 8 bits with a scale a group and an exponent a vector.

    With 8 and 4 bits the integers are from −127 to 127 and from −7 to 7. With 2 there are four: −3/2, −1/2, 1/2, 3/2.
    """

    def __init__(self, settings: CodecSettings, groups: Sequence[Group]) -> None:
        self._settings, self._groups = settings, tuple(groups)
        self._at = _Columns(settings, groups)

    def write(self, factors: Sequence[Factors]) -> tuple[torch.Tensor, torch.Tensor]:
        """Each group's → codes (n, code_bytes) uint8, scales (n, scale_count) float16."""
        n, device = len(factors[0].v), factors[0].v.device
        exponents = torch.empty((n, self._at.vector_count), dtype=torch.int8, device=device)
        units = torch.empty((n, self._at.unit_count), dtype=torch.int8, device=device)
        values = torch.zeros((n, self._at.value_count), device=device)
        for number, found in enumerate(factors):
            vectors = found.v.flatten(1, 2)  # (n, V, long)
            exponent = torch.frexp(vectors.abs().amax(dim=2))[1].clamp(-126, 126)  # (n, V)
            exponents[:, self._at.vectors[number].to(device)] = exponent.to(torch.int8)
            values[:, self._at.values[number].to(device)] = torch.ldexp(vectors, -exponent[..., None]).flatten(1)
            if found.u is not None:
                units[:, self._at.units[number].to(device)] = found.u.mul(127).round().to(torch.int8).flatten(1)
        integers, scales = self._quantised(values)
        return torch.cat([exponents.view(torch.uint8), units.view(torch.uint8), integers], dim=1), scales

    def read(self, codes: torch.Tensor, scales: torch.Tensor) -> Iterator[Factors]:
        """codes (n, code_bytes) uint8, scales (n, scale_count) float32 → each group's."""
        n, heads, body = len(codes), self._at.vector_count, self._at.vector_count + self._at.unit_count
        exponents = codes[:, :heads].contiguous().view(torch.int8).int()
        units = codes[:, heads:body].contiguous().view(torch.int8).float() / 127
        packed = codes[:, body:].contiguous()
        if self._settings.bits == 8:
            integers = packed.view(torch.int8).float()
        elif self._settings.bits == 4:
            integers = _unpacked(packed, 4).float() - 8
        else:
            integers = _unpacked(packed, 2).float() - 1.5
        values = (integers.view(n, -1, self._settings.group) * scales[:, :, None]).view(n, -1)
        for number, group in enumerate(self._groups):
            shape = len(group.places), group.pairs
            exponent = exponents[:, self._at.vectors[number].to(codes.device)]  # (n, V)
            vectors = values[:, self._at.values[number].to(codes.device)].unflatten(1, (-1, group.long))
            v = torch.ldexp(vectors, exponent[..., None]).unflatten(1, shape)
            yield Factors(self._units(units, number, group) if group.small else None, v)

    def _units(self, units: torch.Tensor, number: int, group: Group) -> torch.Tensor:
        found = units[:, self._at.units[number].to(units.device)]
        return found.unflatten(1, (len(group.places), group.pairs, group.small))

    def _quantised(self, values: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(n, value_count) float32 → packed integers (n, bytes) uint8 and scales (n, scale_count) float16."""
        groups = values.view(len(values), -1, self._settings.group)
        if self._settings.bits == 2:
            return _in_fours(groups)
        top = 2 ** (self._settings.bits - 1) - 1  # 7 or 127; symmetric, zero stays zero
        scales = (groups.abs().amax(dim=2) / top).half()
        divisor = scales.float()[:, :, None]
        integers = (groups / torch.where(divisor > 0, divisor, 1.0)).round().clamp(-top, top).flatten(1)
        if self._settings.bits == 8:
            return integers.to(torch.int8).view(torch.uint8), scales
        return _packed((integers + 8).to(torch.uint8), 4), scales


class Signs:
    """The directions of a tensor alone, each as strong as any other: u of −1, 0 and 1 in two bits, v of −1 and 1 in
    one, both made of unit norm; and one exponent and one scale a tensor, by which it has about the norm that it had.

    Equal strengths are those of Muon's orthogonalised step (Jordan et al. 2024); docs/experiments.md, 17.
    """

    def __init__(self, settings: CodecSettings, groups: Sequence[Group]) -> None:
        self._groups = tuple(groups)
        self._tensors = [torch.tensor(group.places) for group in groups]
        self._tensor_count = sum(len(group.places) for group in groups)
        self._at = _Columns(settings, groups)

    def write(self, factors: Sequence[Factors]) -> tuple[torch.Tensor, torch.Tensor]:
        """Each group's → codes (n, code_bytes) uint8, scales (n, scale_count) float16."""
        n, device = len(factors[0].v), factors[0].v.device
        exponents = torch.empty((n, self._tensor_count), dtype=torch.int8, device=device)
        scales = torch.empty((n, self._tensor_count), dtype=torch.float16, device=device)
        units = torch.ones((n, -(-self._at.unit_count // 4) * 4), dtype=torch.uint8, device=device)
        signs = torch.zeros((n, self._at.value_count), dtype=torch.uint8, device=device)
        for number, found in enumerate(factors):
            assert found.u is not None and found.norms is not None
            norms = torch.linalg.vector_norm(found.v.double(), dim=-1)  # (n, T, k)
            there = norms > FAINT * norms.amax(dim=-1, keepdim=True)
            strength = found.norms / there.sum(dim=-1).clamp(min=1).sqrt()  # (n, T), of each pair
            exponent = torch.frexp(strength)[1].clamp(-126, 126)
            place = self._tensors[number].to(device)
            exponents[:, place] = exponent.to(torch.int8)
            scales[:, place] = torch.ldexp(strength, -exponent).half()
            thirds = _thirds(found.u) * there[..., None]
            units[:, self._at.units[number].to(device)] = (thirds + 1).to(torch.uint8).flatten(1)
            signs[:, self._at.values[number].to(device)] = (found.v >= 0).to(torch.uint8).flatten(1)
        return torch.cat([exponents.view(torch.uint8), _packed(units, 2), _packed(signs, 1)], dim=1), scales

    def read(self, codes: torch.Tensor, scales: torch.Tensor) -> Iterator[Factors]:
        """codes (n, code_bytes) uint8, scales (n, scale_count) float32 → each group's."""
        heads = self._tensor_count
        body = heads + -(-self._at.unit_count // 4)
        lengths = torch.ldexp(scales, codes[:, :heads].contiguous().view(torch.int8).int())  # (n, tensors)
        units = _unpacked(codes[:, heads:body], 2).float() - 1
        signs = _unpacked(codes[:, body:], 1).float() * 2 - 1
        for number, group in enumerate(self._groups):
            shape = len(group.places), group.pairs, -1
            u = units[:, self._at.units[number].to(codes.device)].unflatten(1, shape)
            v = signs[:, self._at.values[number].to(codes.device)].unflatten(1, shape)
            length = lengths[:, self._tensors[number].to(codes.device)][:, :, None, None]
            unit = u.square().sum(dim=-1, keepdim=True).clamp(min=1).sqrt()
            yield Factors(u / unit, v * (length / group.long**0.5))


def _thirds(u: torch.Tensor) -> torch.Tensor:
    """The vector of −1, 0 and 1 that is nearest in direction to each u (…, small)."""
    ordered = u.abs().sort(dim=-1, descending=True).values
    counts = torch.arange(1, u.shape[-1] + 1, device=u.device)
    least = ordered.gather(-1, (ordered.cumsum(-1) / counts.sqrt()).argmax(dim=-1, keepdim=True))
    return u.sign() * (u.abs() >= least)


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
    return _packed((nearest() + 2).to(torch.uint8).flatten(1), 2), scales


def _packed(values: torch.Tensor, bits: int) -> torch.Tensor:
    """(n, count) uint8 of so many bits each → (n, count · bits / 8), the earliest in the lowest bits."""
    packed = values[:, :: 8 // bits].clone()
    for place in range(1, 8 // bits):
        packed |= values[:, place :: 8 // bits] << (place * bits)
    return packed


def _unpacked(packed: torch.Tensor, bits: int) -> torch.Tensor:
    """The inverse of `_packed`."""
    parts = [packed >> shift & (1 << bits) - 1 for shift in range(0, 8, bits)]
    return torch.stack(parts, dim=2).flatten(1)
