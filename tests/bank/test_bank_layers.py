"""The bank knows arrays, not models: what it may import, held by reading its source and by loading all of it."""

from __future__ import annotations

import ast
import pkgutil
import subprocess
import sys
from pathlib import Path

import pytest

import regrad_cli.bank

MODULES = sorted(Path(regrad_cli.bank.__path__[0]).glob("*.py"))
OUTSIDE = {"numpy", "safetensors", "hnswlib"}
OURS = ("regrad_cli.bank", "regrad_cli.errors", "regrad_cli.places", "regrad_cli.records", "regrad_cli.tally")


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_a_module_of_the_bank_imports_only_what_its_layer_may(module: Path) -> None:
    for node in ast.walk(ast.parse(module.read_text(encoding="utf-8"))):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0
            names = [node.module or ""]
        for name in names:
            top = name.split(".")[0]
            known = top in sys.stdlib_module_names or top in OUTSIDE or name == "regrad_cli" or name.startswith(OURS)
            assert known, f"{module.name} imports {name}"
            assert top != "pickle"


@pytest.mark.parametrize("module", MODULES, ids=lambda path: path.stem)
def test_a_module_of_the_bank_opens_with_what_it_does_and_is_no_longer_than_400_lines(module: Path) -> None:
    text = module.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(text))
    assert len(text.splitlines()) <= 400


def test_loading_all_of_the_bank_loads_no_torch() -> None:
    names = [f"regrad_cli.bank.{info.name}" for info in pkgutil.iter_modules(regrad_cli.bank.__path__)]
    code = f"import sys, importlib\nfor name in {names!r}: importlib.import_module(name)\n"
    code += "print([name for name in ('torch', 'transformers', 'sentence_transformers') if name in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_every_name_the_bank_offers_is_there() -> None:
    for name in regrad_cli.bank.__all__:
        assert getattr(regrad_cli.bank, name) is not None
    with pytest.raises(AttributeError):
        _ = regrad_cli.bank.nothing
