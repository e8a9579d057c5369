"""The codec: a passage's gradient as one row of bytes, and back. Knows arrays of numbers; knows no bank and no model.

A row is `codes` (code_bytes,) uint8 and `scales` (scale_count,) float16, laid out by the settings and the tensors'
shapes alone, so that any row can be decoded by itself.

lowrank   Each tensor G (rows × cols, small side s, long side l) is kept as its best rank-k approximation Σ uⱼ vⱼᵀ, with
          unit vectors uⱼ and vⱼ = Gᵀuⱼ. With one bit a value its k strongest directions are kept, all equally strong.
full      Each tensor is kept whole.

How these become bytes is `factors.py`'s. What has a scale is first multiplied by a power of two, so that fp16 scales
neither overflow nor lose digits, however small a gradient is. A tensor of zeros stays zeros: no norm is divided by.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import torch
import torch.nn.functional as F

from regrad_cli.errors import UsageProblem
from regrad_cli.learn.adapt import Tensors
from regrad_cli.learn.factors import Factors, Group, Integers, Signs, widths
from regrad_cli.learn.norms import held
from regrad_cli.records import CodecSettings, TensorShape

NAMES = "rN-int1, rN-int2, rN-int4, rN-int8 (low rank N), int2, int4, int8 (full rank)"


def parse_codec(name: str) -> CodecSettings:
    """`r4-int1` and the like as settings; the inverse of `str(settings)`.

    raises  UsageProblem for a name that is no codec
    """
    match = re.fullmatch(r"(?:r([1-9]\d?)-)?int([1248])", name)
    if not match or name == "int1":
        raise UsageProblem(f"'{name}' is no codec", f"use one of: {NAMES}")
    rank = int(match[1] or 0)
    return CodecSettings(kind="lowrank" if rank else "full", rank=rank, bits=int(match[2]))


def is_known(settings: CodecSettings) -> bool:
    """Whether this version decodes it; a crafted bank's settings can be anything."""
    if settings.kind not in ("lowrank", "full") or (settings.rank > 0) != (settings.kind == "lowrank"):
        return False
    bits = (1, 2, 4, 8) if settings.rank > 0 else (2, 4, 8)
    return settings.bits in bits and settings.group > 0 and settings.group % (8 if settings.bits == 1 else 4) == 0


def row_widths(settings: CodecSettings, shapes: Sequence[TensorShape]) -> tuple[int, int]:
    """code_bytes and scale_count of a row: arithmetic alone, whatever the shapes."""
    return widths(settings, _groups(settings, shapes))


def _groups(settings: CodecSettings, shapes: Sequence[TensorShape]) -> list[Group]:
    """Tensors of one shape together, in the order in which their shapes come first."""
    alike: dict[tuple[int, int], list[int]] = {}
    for place, shape in enumerate(shapes):
        small, long = sorted((shape.rows, shape.cols))
        alike.setdefault((small, long), []).append(place)
    if settings.kind == "full":
        return [Group(tuple(places), 1, 0, small * long) for (small, long), places in alike.items()]
    return [Group(tuple(at), min(settings.rank, small), small, long) for (small, long), at in alike.items()]


class Codec:
    """Encoder and decoder for gradients of these tensors.

    code_bytes, scale_count     the width of a row
    """

    def __init__(self, settings: CodecSettings, shapes: Sequence[TensorShape]) -> None:
        self.settings = settings
        self.shapes = tuple(shapes)
        self._groups = _groups(settings, shapes)
        self._form = (Signs if settings.bits == 1 else Integers)(settings, self._groups)
        self.code_bytes, self.scale_count = widths(settings, self._groups)

    # ── encoding ────────────────────────────────────────────────────────────────────────────────────────────────────

    def encode(self, gradients: Mapping[str, torch.Tensor]) -> tuple[np.ndarray, np.ndarray]:
        """{name: (n, rows, cols) float32} → codes (n, code_bytes) uint8, scales (n, scale_count) float16."""
        factors = []
        for group in self._groups:  # tensors of one shape together
            parts = [gradients[self.shapes[place].name] for place in group.places]
            if group.small:
                factors.append(self._factors(group, parts))
            else:
                factors.append(Factors(None, torch.stack([part.flatten(1) for part in parts], dim=1)[:, :, None]))
        codes, scales = self._form.write(factors)
        return codes.cpu().numpy(), scales.cpu().numpy()

    def _factors(self, group: Group, parts: Sequence[torch.Tensor]) -> Factors:
        """Those of the group's T tensors, by the small side's Gram matrix.

        One tensor at a time, so that what is made on the way stays in a CPU's caches.
        """
        both = zip(group.places, parts, strict=True)
        wide = [part.transpose(1, 2) if self._turned(place) else part for place, part in both]  # (n, small, long)
        sizes = torch.stack([torch.linalg.vector_norm(part, dim=(1, 2)) for part in parts], dim=1)  # (n, T)
        scale, even = torch.ones_like(sizes), wide
        if not bool(held(sizes).all()):  # then by its largest value, so that no square leaves float32's range
            peaks = torch.stack([part.flatten(1).abs().amax(dim=1) for part in parts], dim=1)
            scale = torch.where(held(sizes) | (peaks == 0), 1.0, peaks)
            even = [part / scale[:, place, None, None] for place, part in enumerate(wide)]
        gram = torch.stack([part @ part.transpose(-1, -2) for part in even], dim=1).double()  # (n, T, small, small)
        # On the CPU everywhere: a batch of tiny problems, and the same routine for every device.
        u = (
            torch.linalg.eigh(gram.cpu())[1][..., -group.pairs :].flip(-1).to(gram.device)
        )  # (n, T, small, k), best first
        sign = u.gather(-2, u.abs().argmax(dim=-2, keepdim=True)).sign()  # one spelling of ±u
        u = (u * torch.where(sign == 0, 1.0, sign)).float().transpose(-1, -2)  # (n, T, k, small)
        if self.settings.bits > 1:
            u = (u * 127).round() / 127  # what will be read back; v then makes up for the rounding
        v = torch.stack([u[:, place] @ part for place, part in enumerate(wide)], dim=1)
        norms = gram.diagonal(dim1=-2, dim2=-1).sum(dim=-1).sqrt() * scale  # (n, T)
        return Factors(u, v / u.square().sum(dim=-1, keepdim=True), norms)

    # ── decoding ────────────────────────────────────────────────────────────────────────────────────────────────────

    def decode(self, codes: np.ndarray, scales: np.ndarray, device: torch.device | str = "cpu") -> Tensors:
        """codes (n, code_bytes) uint8, scales (n, scale_count) float16 → {name: (n, rows, cols) float32}."""
        tensors: Tensors = {}
        for group, u, v in self._stored(codes, scales, device):
            stack = v[:, :, 0] if u is None else u.transpose(-1, -2) @ v  # (n, T, small, long), or (n, T, small · long)
            tensors.update(self._named(group, stack.unbind(1)))
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
            tensors.update(self._named(group, stack.unbind(0)))
        return {s.name: tensors[s.name].reshape(s.rows, s.cols) for s in self.shapes}

    def recoded(
        self, codes: np.ndarray, scales: np.ndarray, other: Codec, device: torch.device | str = "cpu"
    ) -> tuple[np.ndarray, np.ndarray]:
        """Gradients of this codec, (n, ·) each, as the other's of the same tensors. Directions that are all equally
        strong are handed on, the first of them, which were the strongest: found anew, they could be any mixture."""
        if not (self.settings.bits == 1 and other.settings.rank):
            return other.encode(self.decode(codes, scales, device))
        factors = []
        for (_, u, v), kept in zip(self._stored(codes, scales, device), other._groups, strict=True):
            assert u is not None
            there = u.square().sum(dim=-1)  # (n, T, k), 1 or 0
            norms = (there * v.double().square().sum(dim=-1)).sum(dim=-1).sqrt()  # of a decoded tensor
            more = max(0, kept.pairs - u.shape[2])
            u, v = (F.pad(part, (0, 0, 0, more))[:, :, : kept.pairs] for part in (u, v * there[..., None]))
            factors.append(Factors(u, v, norms))
        found, found_scales = other._form.write(factors)
        return found.cpu().numpy(), found_scales.cpu().numpy()

    def _named(self, group: Group, tensors: Sequence[torch.Tensor]) -> Iterator[tuple[str, torch.Tensor]]:
        """Small side first, or whole → as they are in the model."""
        for place, tensor in zip(group.places, tensors, strict=True):
            turned = group.small and self._turned(place)
            yield self.shapes[place].name, tensor.transpose(-1, -2) if turned else tensor

    def _turned(self, place: int) -> bool:
        """Whether a tensor's long side is its rows."""
        return self.shapes[place].rows > self.shapes[place].cols

    def _stored(
        self, codes: np.ndarray, scales: np.ndarray, device: torch.device | str
    ) -> Iterator[tuple[Group, torch.Tensor | None, torch.Tensor]]:
        """For each group of T tensors its u (n, T, k, small) and v (n, T, k, long); of whole tensors no u, and they
        themselves as v, (n, T, 1, small · long)."""
        raw = torch.from_numpy(np.array(codes, copy=True)).to(device)
        scale = torch.from_numpy(np.asarray(scales).astype(np.float32)).to(device)
        for group, found in zip(self._groups, self._form.read(raw, scale), strict=True):
            yield group, found.u, found.v
