"""Which number format a CPU is fast at, told from what PyTorch knows of it."""

from __future__ import annotations

import pytest
import torch

from regrad_cli.processor import multiplies_bf16


@pytest.mark.parametrize(
    ("name", "amx", "avx512", "expected"),
    [
        pytest.param("Intel Xeon", True, True, True, id="amx"),
        pytest.param("Intel Xeon", False, True, False, id="a virtual machine that hides amx"),
        pytest.param("AMD EPYC 9R14", False, True, True, id="amd"),
        pytest.param("Intel Core i7-8550U", False, False, False, id="neither"),
        pytest.param(None, False, True, True, id="a pytorch that names no cpu"),
    ],
)
def test_bf16_where_it_is_faster(
    monkeypatch: pytest.MonkeyPatch, name: str | None, amx: bool, avx512: bool, expected: bool
) -> None:
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: avx512)
    if name is None:
        monkeypatch.delattr(torch.cpu, "get_capabilities", raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"cpu_name": name}, raising=False)
    assert multiplies_bf16() is expected
