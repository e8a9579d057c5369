"""Takes guards out of a copy of regrad, one at a time, and asks whether the tests that must notice do. Knows the list
in mutations.toml and how to run pytest; not what a guard is for.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
LIST = Path(__file__).with_name("mutations.toml")
COPIED = ("regrad_cli", "tests", "reliability", "benchmarks", "docs", "examples", "pyproject.toml", "README.md")
LIMIT_S = 900  # of the tests of one mutation; one that hangs without its guard is noticed
# A test that fails for one of these has met a mutation that is no program, and says nothing about the guard.
NO_PROGRAM = re.compile(
    r"\b(SyntaxError|IndentationError|ImportError|ModuleNotFoundError|NameError|UnboundLocalError)\b"
)


@dataclass(frozen=True, slots=True)
class Mutation:
    """A guard and what takes it out.

    guard     what holds with it, in words
    file      below regrad_cli/; `old` stands there exactly once
    promises  the numbers of those it is for
    tests     those that must notice, one of them at least: names below tests/, as pytest takes them
    """

    guard: str
    file: str
    promises: tuple[int, ...]
    tests: tuple[str, ...]
    old: str
    new: str

    def applied(self, source: str) -> str:
        """The file's text without the guard. raises ValueError unless it is found exactly once"""
        if (count := source.count(self.old)) != 1:
            raise ValueError(f"{self.file} holds {self.guard!r} {count} times: bring mutations.toml up to date")
        return source.replace(self.old, self.new)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What came of a mutation: noticed by a test's failure, or why not."""

    mutation: Mutation
    noticed: bool
    what: str
    seconds: float


def listed() -> tuple[Mutation, ...]:
    """The whole list, in its order."""
    entries = tomllib.loads(LIST.read_text(encoding="utf-8"))["mutation"]
    return tuple(Mutation(**entry | {key: tuple(entry[key]) for key in ("promises", "tests")}) for entry in entries)


@contextmanager
def copied_tree() -> Iterator[Path]:
    """A copy of what the tests need, for the life of the block: nobody else ever sees a mutation."""
    with tempfile.TemporaryDirectory(prefix="regrad-mutations-") as folder:
        for name in COPIED:
            if (ROOT / name).is_dir():
                shutil.copytree(ROOT / name, Path(folder, name), ignore=shutil.ignore_patterns("__pycache__"))
            else:
                shutil.copy(ROOT / name, folder)
        yield Path(folder)


def try_all(mutations: Sequence[Mutation]) -> Iterator[Verdict | str]:
    """Runs the tests of all of them on the tree as it is, which must pass, then those of each without its guard.

    yields  a Verdict for each; first a sentence, and nothing else, where the tree as it is does not pass
    """
    with copied_tree() as tree:
        failed = run_tests(tree, {test for mutation in mutations for test in mutation.tests}, None)
        if failed is not None:
            yield f"without any mutation: {failed}"
            return
        for mutation in mutations:
            start = time.monotonic()
            what = without_guard(tree, mutation)
            noticed = what is not None and not NO_PROGRAM.search(what)
            yield Verdict(mutation, noticed, what or "no test noticed", time.monotonic() - start)


def without_guard(tree: Path, mutation: Mutation) -> str | None:
    """What its tests say without the guard; None if they pass. The tree is as it was afterwards."""
    file = tree / "regrad_cli" / mutation.file
    source = file.read_text(encoding="utf-8")
    mutated = mutation.applied(source)
    try:
        compile(mutated, mutation.file, "exec")
    except SyntaxError as error:
        return f"SyntaxError: {error}"
    file.write_text(mutated, encoding="utf-8")
    try:
        return run_tests(tree, mutation.tests)
    finally:
        file.write_text(source, encoding="utf-8")


def run_tests(tree: Path, tests: Iterable[str], limit_s: int | None = LIMIT_S) -> str | None:
    """The first failure of these tests in this tree, in a line; None if all pass."""
    names = sorted(tests)
    words = [sys.executable, "-m", "pytest", "-x", "-q", "--tb=line", "-rfE", "-p", "no:cacheprovider"]
    words += [f"--basetemp={tree / 'made'}", *(f"tests/{name}" for name in names)]
    if all(name.startswith("bank/") for name in names):
        words.append("--confcutdir=tests/bank")  # the bank's tests need no model, and no torch
    here = {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "REGRAD_CACHE": str(tree / "cache")}
    try:
        ran = subprocess.run(
            words, cwd=tree, env=os.environ | here, capture_output=True, text=True, check=False, timeout=limit_s
        )
    except subprocess.TimeoutExpired:
        return f"the tests did not end within {limit_s} s"
    finally:
        shutil.rmtree(tree / "made", ignore_errors=True)
    if ran.returncode == 0:
        return None
    if ran.returncode < 0:
        return f"the tests' process died of signal {-ran.returncode}"
    failures = re.findall(r"^FAILED (.*)$", ran.stdout, flags=re.M)
    if ran.returncode != 1 or not failures:  # nothing was collected, or a fixture failed before any test
        tail = (ran.stdout + ran.stderr).strip().splitlines()[-1:]
        return f"ImportError? pytest ended with {ran.returncode}: {''.join(tail)}"
    return str(failures[0])
