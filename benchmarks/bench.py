"""Where benchmarks work: a temporary folder, the commands as a user runs them, a bank of the examples, their questions.

Everything is made when it is first asked for, and by the real commands. Measures nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from benchmarks.machine import ROOT
from benchmarks.measure import Figure, Ran, run_process

EXAMPLES = ROOT / "examples" / "docs"
QUESTIONS = ROOT / "examples" / "questions.jsonl"


@dataclass(frozen=True)
class Options:
    """How much is measured. None takes each benchmark's own default.

    sizes      passages of ingest's smaller and larger run
    rounds     repetitions of each process
    questions  questions of `answer`, `many` and `drift`
    tasks      tasks that `metatrain` learns from
    rows       of each of the banks of `rows`
    real_rows  of one more with gradients as large as the starter's; None for none
    graph_rows most rows of a bank for which `rows` builds a search graph
    """

    device: str = "cpu"
    model: str = "starter"
    embedder: str = "minilm"
    sizes: tuple[int, int] | None = None
    rounds: int | None = None
    questions: int | None = None
    tasks: int | None = None
    rows: tuple[int, ...] | None = None
    real_rows: int | None = None
    graph_rows: int = 1 << 30


@dataclass(frozen=True)
class Result:
    """What a benchmark found: its table, notes that say how it was measured, and what else it shows, in Markdown."""

    figures: list[Figure]
    notes: list[str]
    more: str = ""


def environment(folder: Path) -> dict[str, str]:
    """The user's environment without regrad settings; models from the user's cache, index and config of our own."""
    from regrad_cli.models import cache_folder

    kept = {name: value for name, value in os.environ.items() if not name.startswith(("REGRAD_", "PYTHONDONTWRITE"))}
    return kept | {
        "REGRAD_CACHE": str(cache_folder()),
        "REGRAD_STATE": str(folder / "state"),
        "XDG_CONFIG_HOME": str(folder / "config"),
        "PYTHONPATH": os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH")))),
    }


class Bench:
    """One run of benchmarks: `folder` is empty at first and not shared with anybody."""

    def __init__(self, folder: Path, options: Options) -> None:
        self.folder = folder
        self.options = options

    @cached_property
    def regrad_command(self) -> list[str | Path]:
        """The installed `regrad` beside this Python, else the package run as a module."""
        script = Path(sys.executable).parent / "regrad"
        return [script] if script.is_file() else [sys.executable, "-m", "regrad_cli"]

    def run(self, *command: str | Path, given: str = "") -> Ran:
        return run_process(command, cwd=self.folder, env=os.environ, given=given)

    def regrad(self, *arguments: str | Path, given: str = "") -> Ran:
        return self.run(*self.regrad_command, *arguments, given=given)

    def python(self, module: str, *arguments: str | Path) -> Ran:
        """A module of this folder in a process of its own."""
        return self.run(sys.executable, "-m", f"benchmarks.{module}", *arguments)

    @cached_property
    def model_folder(self) -> Path:
        from regrad_cli.models import resolve_model

        return resolve_model(self.options.model, report=told).path

    @cached_property
    def embedder_folder(self) -> Path:
        from regrad_cli.models import resolve_embedder

        return resolve_embedder(self.options.embedder, report=told).path

    @cached_property
    def empty_bank(self) -> Path:
        """A bank with nothing in it, of the defaults; copied, never written to."""
        bank = self.folder / "empty.gbank"
        self.model_folder, self.embedder_folder  # noqa: B018  (fetched here, so that it is told)
        self.regrad("init", bank, "--model", self.options.model, "--embedder", self.options.embedder)
        return bank

    def new_bank(self, name: str) -> Path:
        """A fresh copy of the empty bank, in a folder of its own."""
        bank = self.folder / name / ".gbank"
        shutil.rmtree(bank, ignore_errors=True)
        shutil.copytree(self.empty_bank, bank)
        return bank

    @cached_property
    def example_bank(self) -> Path:
        """A bank of examples/docs."""
        bank = self.new_bank("examples")
        self.regrad("ingest", EXAMPLES, "--bank", bank, "--device", self.options.device, "--json")
        return bank

    @cached_property
    def questions(self) -> list[str]:
        """The questions of the examples, spread over the documents: the first of each task, then each second."""
        tasks = [json.loads(line)["questions"] for line in QUESTIONS.read_text(encoding="utf-8").splitlines()]
        longest = max(map(len, tasks))
        return [task[turn]["question"] for turn in range(longest) for task in tasks if turn < len(task)]


def told(message: str) -> None:
    """What goes on, for whoever waits."""
    print(message, file=sys.stderr, flush=True)
