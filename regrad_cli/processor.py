"""What this machine's processor is good at, for the choice of a number format. Knows no model."""

from __future__ import annotations

from typing import Any


def multiplies_bf16() -> bool:
    """Whether products in bf16 are faster than in fp32 on this CPU: with AMX, or with AVX512-BF16 unless it is Intel's.

    AMD's AVX512-BF16 has twice the rate of fp32 or more. Intel's has no higher rate than fp32's two units, and is meant
    to be met beside AMX; where a virtual machine hides AMX, fp32 is what is fast (measured 2026-11, a Xeon of that kind
    with two cores: 265 GFLOP/s in fp32, 157 in bf16).
    """
    import torch

    has = {name: getattr(torch.cpu, f"_is_{name}_supported", lambda: False)() for name in ("amx_tile", "avx512_bf16")}
    return has["amx_tile"] or (has["avx512_bf16"] and not _by_intel())


def _by_intel() -> bool:
    """Whether PyTorch names this CPU as one of Intel's; versions that name none know of no CPU that it would be."""
    import torch

    known: dict[str, Any] = getattr(torch.cpu, "get_capabilities", dict)()
    return str(known.get("cpu_name", "")).startswith("Intel")
