"""What the lower half gives for a text, computed once and kept: in memory up to a limit, beyond it in a file."""

from __future__ import annotations

import math
import tempfile
import threading
from collections.abc import Callable, Sequence
from typing import Any

import torch

MEMORY_BYTES = 1 << 30


class LowerCache:
    """tokens → (L, H), as `compute` gives it; from several threads. The file has no name and goes with the process.

    memory_bytes    of tensors that stay in memory
    """

    def __init__(self, compute: Callable[[Sequence[int]], torch.Tensor], *, memory_bytes: int = MEMORY_BYTES) -> None:
        self._compute = compute
        self._left = memory_bytes
        self._memory: dict[tuple[int, ...], torch.Tensor] = {}
        self._places: dict[tuple[int, ...], tuple[int, tuple[int, ...], torch.dtype]] = {}
        self._file: Any = None
        self._end = 0
        self._full = False
        self._lock = threading.Lock()

    def __call__(self, ids: Sequence[int]) -> torch.Tensor:
        key = tuple(ids)
        if key in self._memory:
            return self._memory[key]
        with self._lock:
            place = self._places.get(key)
            if place is not None:
                start, shape, dtype = place
                data = bytearray(math.prod(shape) * dtype.itemsize)
                self._file.seek(start)
                if self._file.readinto(data) == len(data):
                    return torch.frombuffer(data, dtype=dtype).view(shape)
        tensor = self._compute(key).cpu().contiguous()
        with self._lock:
            size = tensor.numel() * tensor.element_size()
            if key in self._memory or key in self._places:
                pass  # another thread was faster
            elif size <= self._left:
                self._memory[key] = tensor
                self._left -= size
            elif not self._full:
                self._write(key, tensor, size)
        return tensor

    def _write(self, key: tuple[int, ...], tensor: torch.Tensor, size: int) -> None:
        """Into the file; where that is full, nothing more is kept and everything still computed."""
        try:
            self._file = self._file or tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
            self._file.seek(self._end)
            self._full = self._file.write(tensor.view(torch.uint8).numpy().tobytes()) != size
        except OSError:
            self._full = True
        if not self._full:
            self._places[key] = (self._end, tuple(tensor.shape), tensor.dtype)
            self._end += size
