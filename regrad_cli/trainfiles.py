"""The files of a training run: the prior, and beside it what happened and what to go on from. Knows bytes and lines;
knows neither tensors nor tasks.

Beside FILE stand FILE.metrics.jsonl (a line a step and a validation), FILE.curve.html and, until the run is done,
FILE.resume. Whatever is replaced is whole at every moment: written as FILE.….part, synced, renamed.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from html import escape
from pathlib import Path
from typing import Any

from regrad_cli.errors import Damaged, Locked, StorageFailed, UsageProblem
from regrad_cli.shown import json_text, visible_line

POINTS = 60  # of the curve of training: each is the mean of the steps up to it


class TrainFiles:
    """The files of one run, which nobody else may be writing; used in a `with` block.

    entries     what metrics.jsonl holds of this run, as it was written
    raises      UsageProblem where `out` cannot be written, before anything was computed; Locked
    """

    def __init__(self, out: Path) -> None:
        self.out = out
        self.resume, self.metrics, self.curve = (
            out.with_name(out.name + ending) for ending in (".resume", ".metrics.jsonl", ".curve.html")
        )
        self.entries: list[dict[str, Any]] = []

    def __enter__(self) -> TrainFiles:
        out = self.out
        if out.exists() and not out.is_file():
            kind = "a folder" if out.is_dir() else "no plain file"
            raise UsageProblem(f"{out} is {kind}", "give --out the name of a file, such as prior.safetensors")
        try:
            out.parent.mkdir(parents=True, exist_ok=True)
            part = _part(self.resume)
            part.write_bytes(b"")
            part.unlink()
            self._lines = self.metrics.open("ab", buffering=0)
        except OSError as error:
            raise UsageProblem(
                f"{out} cannot be written: {error.strerror}", "give --out a file in a folder that is yours"
            ) from error
        try:
            fcntl.flock(self._lines, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self._lines.close()
            raise Locked(f"another process is training {out}", "wait for it, or give another --out") from None
        except OSError:
            pass  # a file system without locks
        return self

    def __exit__(self, *_: object) -> None:
        with suppress(OSError):
            if not os.fstat(self._lines.fileno()).st_size:
                self.metrics.unlink()
        self._lines.close()

    # ── going on ──────────────────────────────────────────────────────────────────────────────────────────────────

    def kept(self, settings: Mapping[str, Any], earlier: Mapping[str, Any]) -> bytes | None:
        """What an earlier process has kept of this run; None where there is nothing, or only what a run with other
        settings left at its end.

        earlier  the settings of a run whose version did not write them down
        raises  UsageProblem in the middle of a run with other settings, naming them; Damaged where it cannot be read
        """
        try:
            data = self.resume.read_bytes()
        except FileNotFoundError:
            return None
        except OSError as error:
            raise UsageProblem(f"{self.resume} cannot be read: {error.strerror}") from None
        theirs, step = self._told_in(data)
        theirs, ours = {**earlier, **theirs}, json.loads(json.dumps(settings))
        other = sorted(name for name in ours.keys() | theirs.keys() if ours.get(name) != theirs.get(name))
        if other and step == theirs.get("steps") and self.out.exists():
            return None
        if other:
            told = (_difference(name, theirs.get(name), ours.get(name)) for name in other)
            raise UsageProblem(
                f"{self.resume} is of a run with other settings: {', '.join(told)}",
                "remove it to begin anew, or give another --out",
            )
        return data

    def _told_in(self, data: bytes) -> tuple[dict[str, Any], Any]:
        """The settings of its run, and how many steps that had done."""
        length = int.from_bytes(data[:8], "little")
        try:
            told = json.loads(data[8 : 8 + length])["__metadata__"]
            settings, step = json.loads(told["settings"]), json.loads(told["card"])["step"]
            if isinstance(settings, dict):
                return settings, step
        except (ValueError, KeyError, TypeError, RecursionError):
            pass
        raise self.damaged()

    def damaged(self) -> Damaged:
        return Damaged(f"{self.resume} is no training run that can be gone on with", "remove it to begin anew")

    def take_up(self, step: int, validated: int) -> None:
        """Keeps what metrics.jsonl says up to this step, and of validations up to that; the rest will come again."""
        found = []
        with suppress(OSError):
            for line in self.metrics.read_bytes().splitlines(keepends=True):
                with suppress(ValueError, RecursionError):  # a line that a kill or a full disk cut off
                    entry = json.loads(line)
                    if not _is_entry(entry) or not line.endswith(b"\n"):
                        continue
                    if entry["step"] <= (validated if "losses" in entry else step):
                        found.append((entry, line))
        self.entries = [entry for entry, _ in found]
        with self._storage("write", self.metrics):
            self._lines.truncate(0)
            self._write(b"".join(line for _, line in found))

    # ── on the way ────────────────────────────────────────────────────────────────────────────────────────────────

    def note(self, entry: dict[str, Any]) -> None:
        """One line for metrics.jsonl. raises StorageFailed"""
        self.entries.append(entry)
        with self._storage("write", self.metrics):
            self._write((json_text(entry) + "\n").encode())

    def _write(self, data: bytes) -> None:
        while data:
            data = data[self._lines.write(data) :]

    def keep(self, data: bytes) -> None:
        """What the next process goes on from. raises StorageFailed; what was kept before stays"""
        self._replace(self.resume, data)

    # ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────

    def finish(self, prior: bytes, *, over: bool = True) -> None:
        """The result and its curve; once the run is over, nothing to go on from is left. raises StorageFailed"""
        self._replace(self.out, prior)
        title = escape(visible_line(self.out.name))
        page = f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{title}</title>{self._chart()}</html>\n'
        self._replace(self.curve, page.encode())
        if over:
            self.resume.unlink(missing_ok=True)

    def _chart(self) -> str:
        from regrad_cli.charts import line_chart

        steps = [(entry["step"], entry["loss"]) for entry in self.entries if entry.get("loss") is not None]
        size = max(1, len(steps) // POINTS)
        groups = [steps[place : place + size] for place in range(0, len(steps), size)]
        lines = {"training": [(group[-1][0], sum(loss for _, loss in group) / len(group)) for group in groups]}
        for entry in self.entries:
            for name, loss in entry.get("losses", {}).items():
                if loss is not None:
                    lines.setdefault(f"dev: {name}", []).append((entry["step"], loss))
        return line_chart("Answer loss", lines, "step", "mean cross-entropy, nats a token")

    def _replace(self, path: Path, data: bytes) -> None:
        part = _part(path)
        with self._storage("write", path):
            try:
                with part.open("wb") as file:
                    file.write(data)
                    file.flush()
                    os.fsync(file.fileno())
                part.replace(path)
            except BaseException:
                part.unlink(missing_ok=True)
                raise
            folder = os.open(path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)

    @contextmanager
    def _storage(self, verb: str, path: Path) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            raise StorageFailed(
                f"could not {verb} {path}: {error.strerror or error}",
                "make room and run the same command again: it goes on from what was kept before",
            ) from error


def _is_entry(value: Any) -> bool:
    """Whether it is what `note` writes, as far as it is read again."""
    if not isinstance(value, dict) or type(value.get("step")) is not int or abs(value["step"]) > 1 << 40:
        return False
    losses, skipped = value.get("losses", {}), value.get("skipped", [])
    if not isinstance(losses, dict) or not isinstance(skipped, list):
        return False
    numbers = [*losses.values(), value.get("loss"), value.get("elapsed_s", 0.0)]
    told = all(isinstance(each, str) for each in skipped)
    return told and value.get("elapsed_s", 0.0) is not None and all(map(_is_number_or_none, numbers))


def _is_number_or_none(value: Any) -> bool:
    return value is None or (isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300)


def _part(path: Path) -> Path:
    """One name for what is being written, so that a killed process's is overwritten by the next."""
    return path.with_name(path.name + ".part")


def _difference(name: str, theirs: Any, ours: Any) -> str:
    if any(isinstance(value, list | dict) or value is None for value in (theirs, ours)) or name == "model":
        return name
    return f"{name} ({theirs} there, {ours} here)"


def last_losses(entries: Sequence[Mapping[str, Any]], step: int) -> dict[str, float]:
    """The dev losses that were noted after this step."""
    found = [entry["losses"] for entry in entries if "losses" in entry and entry["step"] == step]
    return dict(found[-1]) if found else {}
