"""The walls of the architecture, held by reading imports; and what may be loaded before anything computes."""

from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import regrad_cli

PACKAGE = Path(regrad_cli.__file__).parent
MODULES = sorted(PACKAGE.rglob("*.py"))
HEAVY = {"torch", "transformers", "sentence_transformers", "peft"}
GROUND = (
    "records.py",
    "results.py",
    "trainevents.py",
    "settings.py",
    "errors.py",
    "shown.py",
    "places.py",
    "questions.py",
)
USE_CASES = ("ingest.py", "answer.py", "metatrain.py", "evaluate.py", "maintain.py")


def name_of(path: Path) -> str:
    return path.relative_to(PACKAGE).as_posix()


def imports(path: Path, *, top_only: bool = False) -> Iterator[str]:
    """Dotted names that a module imports, absolute; with `top_only`, those that run when it is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    package = ["regrad_cli", *path.relative_to(PACKAGE).parent.parts]
    for node in _at_import(tree) if top_only else ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            yield from (f"{module}.{alias.name}" for alias in node.names)


def _at_import(node: ast.AST) -> Iterator[ast.AST]:
    """Nodes outside of functions and of `if TYPE_CHECKING`."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            continue
        yield child
        yield from _at_import(child)


def belongs(name: str, *roots: str) -> bool:
    return any(name == root or name.startswith(root + ".") for root in roots)


def of(*folders: str) -> list[Path]:
    return [path for path in MODULES if name_of(path).split("/")[0] in folders]


@pytest.mark.parametrize("path", of("bank"), ids=name_of)
def test_the_bank_knows_arrays_not_models(path):
    forbidden = HEAVY | {
        f"regrad_cli.{name}" for name in ("learn", "ingest", "answer", "cli", "render", "models", "embed")
    }
    assert [name for name in imports(path) if belongs(name, *forbidden)] == []


@pytest.mark.parametrize("path", of("learn"), ids=name_of)
def test_the_mathematics_knows_models_not_files_of_a_bank(path):
    forbidden = [f"regrad_cli.{name}" for name in ("bank", "ingest", "answer", "cli", "render", "documents")]
    assert [name for name in imports(path) if belongs(name, *forbidden)] == []


@pytest.mark.parametrize("path", of(*GROUND, "render.py"), ids=name_of)
def test_the_ground_imports_the_standard_library_only(path):
    allowed = sys.stdlib_module_names | {"regrad_cli"}
    late = {"places.py": {"platformdirs"}, "render.py": {"rich"}}.get(name_of(path), set())
    assert {name.split(".")[0] for name in imports(path, top_only=True)} <= allowed
    assert {name.split(".")[0] for name in imports(path)} <= allowed | late
    ours = [name for name in imports(path) if belongs(name, "regrad_cli")]
    assert all(belongs(name, *(f"regrad_cli.{each[:-3]}" for each in GROUND)) for name in ours)


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path).split("/")[0] not in ("cli",)], ids=name_of)
def test_nothing_below_the_command_line_knows_it(path):
    own_main = {"__main__.py": "regrad_cli.cli.main"}.get(name_of(path))
    above = ["regrad_cli.cli", "typer", "click"] + (
        [] if name_of(path) == "render.py" else ["regrad_cli.render", "rich"]
    )
    assert [name for name in imports(path) if belongs(name, *above) and name != own_main] == []


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path) != "render.py"], ids=name_of)
def test_only_render_prints(path):
    tree = ast.parse(path.read_text(encoding="utf-8"))
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & {"print", "input", "typer.echo", "typer.secho", "typer.confirm", "typer.prompt"}
    assert not any(call.startswith(("sys.stdout", "sys.stderr", "sys.stdin")) for call in calls)


@pytest.mark.parametrize("path", [path for path in MODULES if name_of(path).split("/")[0] != "learn"], ids=name_of)
def test_what_is_heavy_is_imported_late(path):
    assert [name for name in imports(path, top_only=True) if belongs(name, *HEAVY)] == []


@pytest.mark.parametrize("path", of("documents.py", "embed.py", "lexical.py", "models.py", "readers.py"), ids=name_of)
def test_subjects_are_unaware_of_the_halves(path):
    forbidden = [f"regrad_cli.{name}" for name in ("bank", "learn", "ingest", "answer")]
    assert [name for name in imports(path) if belongs(name, *forbidden)] == []


@pytest.mark.parametrize(
    "path", of("metatrain.py", "trainfiles.py", "trainoptions.py", "episodes.py", "tasks.py"), ids=name_of
)
def test_training_knows_no_bank(path):
    assert [name for name in imports(path) if belongs(name, "regrad_cli.bank", "regrad_cli.ingest")] == []


@pytest.mark.parametrize("path", MODULES, ids=name_of)
def test_a_module_says_first_what_it_does(path):
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


def test_no_pickle_is_named_anywhere():
    for path in MODULES:
        assert not [
            name for name in imports(path) if belongs(name, "pickle", "dill", "joblib", "cloudpickle", "shelve")
        ]


def loaded_by(code: str) -> set[str]:
    """Top-level modules that are loaded in a fresh process after `code`."""
    code += "\nimport sys, json; sys.__stdout__.write(json.dumps(sorted({m.split('.')[0] for m in sys.modules})))"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(ast.literal_eval(ran.stdout.splitlines()[-1]))


def test_help_imports_no_torch():
    loaded = loaded_by("from regrad_cli.cli import main; main(['--help'])")
    assert not loaded & (HEAVY | {"hnswlib", "numpy", "rich", "safetensors", "tokenizers"})
    assert "typer" in loaded


def test_bank_stats_imports_no_torch(tmp_path):
    loaded = loaded_by(
        f"from regrad_cli.cli import main; main(['bank', 'stats', '--bank', {str(tmp_path / 'none')!r}])"
    )
    assert not loaded & HEAVY
