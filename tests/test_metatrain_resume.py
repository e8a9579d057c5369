"""A training run killed, interrupted or refused a disk: it goes on to the same bytes, and loses nothing of others."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import train_runs
from train_runs import (
    interrupted_at,
    left_behind,
    metrics,
    metrics_lines,
    options,
    resume_file,
    run,
    started,
    task,
    trained,
)

from regrad_cli import metatrain, trainfiles
from regrad_cli.errors import Damaged, Locked, StorageFailed, UsageProblem
from regrad_cli.learn.optimise import Training
from regrad_cli.learn.workers import Workers
from regrad_cli.metatrain import MetaTrainOptions, meta_train
from regrad_cli.records import Notice
from regrad_cli.trainevents import TrainStep
from regrad_cli.trainfiles import TrainFiles

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def whole(
    tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> tuple[bytes, list[dict[str, Any]]]:
    """What an uninterrupted run of the usual options leaves behind."""
    given = options(tmp_path_factory.mktemp("whole"), tiny_model_folder, tiny_embedder_folder)
    run(given)
    return left_behind(given.out)


@pytest.fixture
def usual(tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path) -> MetaTrainOptions:
    return options(tmp_path / "run", tiny_model_folder, tiny_embedder_folder)


@pytest.fixture
def plain(tmp_path: Path, tiny_model_folder: Path) -> MetaTrainOptions:
    """Without strangers, so without an embedder."""
    return options(tmp_path / "run", tiny_model_folder)


# ── killed, interrupted, gone on with ─────────────────────────────────────────────────────────────────────────────────

KILL = """
import os, signal, sys
from pathlib import Path
sys.path[:0] = [{here!r}, {root!r}]
from regrad_cli.models import quiet_libraries
quiet_libraries()
import train_runs
from regrad_cli import metatrain, trainfiles
from regrad_cli.learn.workers import Workers
Run, Files = metatrain._Run, trainfiles.TrainFiles

def die(*_, **__):
    os.kill(os.getpid(), signal.SIGKILL)

def kept_at(*steps):
    def keep(self, training):
        if training.step in steps and not getattr(self, "seen", None) == training.step:
            self.seen = training.step
            self._keep(training)
    Run._keep_if_due = keep

def dying(holder, name, when, after=False):
    real, calls = getattr(holder, name), [0]
    def patched(*given, **named):
        calls[0] += 1
        if when(calls[0], *given) and not after:
            die()
        found = real(*given, **named)
        if when(calls[0], *given) and after:
            die()
        return found
    setattr(holder, name, patched)

{setup}
train_runs.run(train_runs.options(Path({folder!r}), Path({model!r}), Path({embedder!r})))
"""
KILLS = {
    "before anything was kept": "kept_at(); dying(Workers, 'gradients', lambda call, *_: call == 3)",
    "right after a checkpoint": "kept_at(3); dying(Files, 'keep', lambda call, *_: call == 1, after=True)",
    "steps after a checkpoint": "kept_at(1); dying(Workers, 'gradients', lambda call, *_: call == 5)",
    "between a step and its line": "kept_at(3); dying(Files, 'note', lambda call, *_: call == 7)",
    "in a validation": "kept_at(4); dying(Workers, 'losses', lambda call, *_: call == 10)",
    "while a checkpoint is written": (
        "kept_at(1, 4); dying(trainfiles.os, 'fsync', lambda call, *_: os.path.exists(@part) and call > 2)"
    ),
    "between the result and its end": (
        "kept_at(4); dying(Files, '_replace', lambda call, self, path, *_: path == self.curve)"
    ),
}


@pytest.mark.parametrize("place", KILLS)
def test_promise_01_a_killed_run_goes_on_to_the_same_bytes_and_the_same_metrics(
    usual: MetaTrainOptions, whole: Any, place: str
) -> None:
    part = str(resume_file(usual.out)) + ".part"
    code = KILL.format(
        here=str(HERE), root=str(HERE.parent), setup=KILLS[place].replace("@part", repr(part)),
        folder=str(usual.out.parent), model=usual.model, embedder=usual.embedder,
    )  # fmt: skip
    killed = subprocess.run([sys.executable, "-c", code], stdin=subprocess.DEVNULL, capture_output=True)
    assert killed.returncode == -signal.SIGKILL, killed.stderr.decode()
    assert resume_file(usual.out).exists() == (place != "before anything was kept")
    assert Path(part).exists() == (place == "while a checkpoint is written")
    events = run(usual)
    assert left_behind(usual.out) == whole
    told = [event.message for event in events if isinstance(event, Notice) and "going on" in event.message]
    assert bool(told) == (place != "before anything was kept")
    assert {path.name for path in usual.out.parent.iterdir()} == {
        "train.jsonl", "dev.jsonl", "prior.safetensors", "prior.safetensors.metrics.jsonl",
        "prior.safetensors.curve.html",
    }  # fmt: skip


@pytest.mark.parametrize(
    ("holder", "name", "call", "after", "kept"),
    [
        (Workers, "gradients", 1, False, 0),
        (Workers, "gradients", 4, False, 3),
        (Workers, "losses", 2, False, 0),
        (Workers, "losses", 6, False, 2),  # step 2 is not validated yet: going on begins with that
        (TrainFiles, "note", 4, False, None),  # neither of step 2 nor of step 3: nothing is kept of such a moment
        (TrainFiles, "note", 5, True, None),
        (Training, "update", 3, True, None),
        (Training, "keep_if_best", 2, True, None),
        (torch.optim.AdamW, "step", 4, False, None),
    ],
)
def test_what_ctrl_c_keeps_is_of_one_moment_and_goes_on_to_the_same_bytes(
    usual: MetaTrainOptions, whole: Any, holder: Any, name: str, call: int, after: bool, kept: int | None
) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, holder, name, call, after=after)
        with pytest.raises(KeyboardInterrupt):
            run(usual)
    assert resume_file(usual.out).exists() == (kept is not None)
    events = run(usual)
    told = [event.message for event in events if isinstance(event, Notice) and "going on after step" in event.message]
    assert [message.split()[4] for message in told] == ([] if kept is None else [str(kept)])
    assert left_behind(usual.out) == whole


def test_a_run_left_in_the_middle_by_its_consumer_goes_on_to_the_same_bytes(
    usual: MetaTrainOptions, whole: Any
) -> None:
    for _ in range(3):
        events = meta_train(usual)
        for event in events:
            if isinstance(event, TrainStep):
                break
        events.close()  # type: ignore[attr-defined]
    last = trained(usual)
    assert left_behind(usual.out) == whole
    assert last.steps == 6


def test_a_checkpoint_every_step_changes_nothing(usual: MetaTrainOptions, whole: Any) -> None:
    run(replace(usual, checkpoint_s=0))
    assert left_behind(usual.out) == whole


def test_the_time_spent_before_a_kill_is_counted(usual: MetaTrainOptions) -> None:
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, Workers, "gradients", 4)
        with pytest.raises(KeyboardInterrupt):
            run(usual)
    lines = [json.loads(line) for line in metrics_lines(usual.out)]
    lines[3]["elapsed_s"] = 1000.0
    usual.out.with_name(usual.out.name + ".metrics.jsonl").write_text(
        "".join(json.dumps(each) + "\n" for each in lines)
    )
    assert trained(usual).elapsed_s > 1000


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 1}, "seed (0 there, 1 here)"),
        ({"steps": 7, "learning_rate": 0.5}, "learning_rate (0.001 there, 0.5 here), steps (6 there, 7 here)"),
        ({"codec": "r1-int4"}, "codec"),
        ({"objective": "rag"}, "objective (regrad there, rag here)"),
        ({"dev": ()}, "dev"),
    ],
)
def test_going_on_with_other_settings_is_refused_by_naming_them(
    plain: MetaTrainOptions, changes: dict[str, Any], named: str
) -> None:
    started(plain)
    before = resume_file(plain.out).read_bytes(), metrics(plain.out)
    with pytest.raises(UsageProblem, match="of a run with other settings") as refused:
        run(replace(plain, **changes))
    assert refused.value.message.endswith(f"other settings: {named}")
    assert "remove it" in refused.value.hint
    assert (resume_file(plain.out).read_bytes(), metrics(plain.out)) == before


def test_going_on_with_other_tasks_or_another_model_or_start_is_refused(
    plain: MetaTrainOptions, tmp_path: Path
) -> None:
    started(plain)
    other = tiny.write_model(tmp_path / "other", seed=1)
    with pytest.raises(UsageProblem, match=r"other settings: model$"):
        run(replace(plain, model=str(other)))
    train_runs.write(plain.tasks[0], map(task, range(9)))
    with pytest.raises(UsageProblem, match=r"other settings: data$"):
        run(plain)


def test_what_is_free_to_change_in_going_on_is_where_things_lie_and_how_often_they_are_kept(
    usual: MetaTrainOptions, whole: Any, tmp_path: Path
) -> None:
    started(usual)
    folder = tmp_path / "elsewhere"
    usual.out.parent.rename(folder)
    moved = replace(
        usual, out=folder / usual.out.name, tasks=(folder / "train.jsonl",), dev=(folder / "dev.jsonl",), checkpoint_s=0
    )
    run(moved)
    assert left_behind(moved.out) == whole


@pytest.mark.parametrize("damage", [b"", b"not a file of tensors", b"\x02\0\0\0\0\0\0\0[]", None])
def test_a_damaged_resume_file_is_named_and_left_alone(plain: MetaTrainOptions, damage: bytes | None) -> None:
    started(plain)
    file = resume_file(plain.out)
    data = file.read_bytes()[:-5] if damage is None else damage
    file.write_bytes(data)
    with pytest.raises(Damaged) as refused:
        run(plain)
    assert str(file) in refused.value.message and "remove it" in refused.value.hint
    assert file.read_bytes() == data and not plain.out.exists()


def test_a_resume_file_with_a_value_that_is_not_finite_is_not_gone_on_with(plain: MetaTrainOptions) -> None:
    from safetensors.torch import load, save

    started(plain)
    file = resume_file(plain.out)
    tensors, length = load(file.read_bytes()), int.from_bytes(file.read_bytes()[:8], "little")
    metadata = json.loads(file.read_bytes()[8 : 8 + length])["__metadata__"]
    tensors["logs"][1] = torch.nan
    file.write_bytes(save(tensors, metadata=metadata))
    with pytest.raises(Damaged):
        run(plain)


def test_lines_of_metrics_that_a_crash_cut_off_or_left_over_are_not_kept(usual: MetaTrainOptions, whole: Any) -> None:
    started(usual, 3)
    file = usual.out.with_name(usual.out.name + ".metrics.jsonl")
    file.write_bytes(file.read_bytes() + b'{"step": 4, "loss": 1.0}\n{"step": 4, "losses": {}}\n\xff\n{"step": 1, "lo')
    run(usual)
    assert left_behind(usual.out) == whole


def test_a_run_whose_metrics_were_removed_still_ends_in_the_same_prior(usual: MetaTrainOptions, whole: Any) -> None:
    started(usual, 3)
    usual.out.with_name(usual.out.name + ".metrics.jsonl").unlink()
    run(usual)
    assert usual.out.read_bytes() == whole[0]
    assert [line["step"] for line in metrics(usual.out)] == [4, 4, 5, 6, 6]


def test_two_processes_do_not_train_into_one_file(plain: MetaTrainOptions) -> None:
    events = meta_train(plain)
    next(event for event in events if isinstance(event, TrainStep))
    with pytest.raises(Locked, match="another process is training"):
        run(plain)
    events.close()  # type: ignore[attr-defined]
    assert trained(plain).steps == 6


# ── the same seed ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("threads", [1, 2])
def test_the_number_of_threads_changes_no_bit(usual: MetaTrainOptions, whole: Any, threads: int) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        run(usual)
        assert torch.get_num_threads() == threads
    finally:
        torch.set_num_threads(before)
    assert left_behind(usual.out) == whole


def test_another_seed_is_another_prior(usual: MetaTrainOptions, whole: Any) -> None:
    run(replace(usual, seed=1))
    assert usual.out.read_bytes() != whole[0]


# ── where it is written ───────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture
def nothing_computed(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    def loaded(*_: Any, **__: Any) -> Any:
        raise AssertionError("a model was asked for")

    monkeypatch.setattr(metatrain, "resolve_model", loaded)
    return


def test_a_missing_folder_is_made(plain: MetaTrainOptions) -> None:
    given = replace(plain, out=plain.out.parent / "a" / "b" / "p.safetensors", steps=1)
    assert trained(given).file == str(given.out)
    assert given.out.exists()


def where(folder: Path, kind: str) -> Path:
    (folder / "file").write_bytes(b"")
    (folder / "folder").mkdir()
    os.mkfifo(folder / "pipe")
    (folder / "folder with").mkdir()
    (folder / "folder with" / "p.resume.part").mkdir(parents=True)
    return {
        "a folder": folder / "folder",
        "below a file": folder / "file" / "p",
        "a pipe": folder / "pipe",
        "a device": Path("/dev/null"),
        "no place for its files": folder / "folder with" / "p",
        "the tasks": folder / "train.jsonl",
        "the dev tasks": folder / "x" / ".." / "dev.jsonl",
    }[kind]


@pytest.mark.parametrize(
    "kind",
    ["a folder", "below a file", "a pipe", "a device", "no place for its files", "the tasks", "the dev tasks"],
)
def test_a_place_that_cannot_be_written_is_found_out_before_anything_is_computed(
    plain: MetaTrainOptions, nothing_computed: None, kind: str
) -> None:
    before = {path.name: path.stat().st_size for path in plain.out.parent.iterdir()}
    out = where(plain.out.parent, kind)
    with pytest.raises(UsageProblem) as refused:
        run(replace(plain, out=out))
    assert refused.value.hint
    for name, size in before.items():
        assert (plain.out.parent / name).stat().st_size == size


def test_a_folder_of_somebody_else_is_found_out_before_anything_is_computed(
    plain: MetaTrainOptions, nothing_computed: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    def denied(path: Path, data: bytes) -> None:  # what a folder without w answers, but to root
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES), str(path))

    monkeypatch.setattr(Path, "write_bytes", denied)
    with pytest.raises(UsageProblem, match=r"cannot be written: Permission denied"):
        run(plain)


def test_a_start_that_would_be_overwritten_is_refused(plain: MetaTrainOptions, nothing_computed: None) -> None:
    plain.out.write_bytes(b"a prior")
    with pytest.raises(UsageProblem, match="which is to be read"):
        run(replace(plain, init=plain.out))
    assert plain.out.read_bytes() == b"a prior"


def test_a_run_that_never_began_leaves_nothing_behind(plain: MetaTrainOptions) -> None:
    from regrad_cli.errors import ModelUnavailable

    with pytest.raises(ModelUnavailable):
        run(replace(plain, model=str(plain.out.parent / "none")))
    assert {path.name for path in plain.out.parent.iterdir()} == {"train.jsonl", "dev.jsonl"}


def fails(patch: pytest.MonkeyPatch, ending: str, after: int) -> None:
    """The disk is full from the so-manieth write of a file with this ending on."""
    real, calls = os.fsync, [0]

    def fsync(fd: int) -> None:
        name = str(Path(f"/proc/self/fd/{fd}").readlink())
        if name.endswith(ending):
            calls[0] += 1
            if calls[0] > after:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), name)
        real(fd)

    patch.setattr(trainfiles.os, "fsync", fsync)


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs /proc")
@pytest.mark.parametrize(("ending", "after"), [(".resume.part", 2), ("prior.safetensors.part", 0), (".html.part", 0)])
def test_a_full_disk_is_told_and_the_run_goes_on_from_what_was_kept_before(
    usual: MetaTrainOptions, whole: Any, ending: str, after: int
) -> None:
    given = replace(usual, checkpoint_s=0)
    with pytest.MonkeyPatch.context() as patch:
        fails(patch, ending, after)
        with pytest.raises(StorageFailed) as failed:
            run(given)
    assert failed.value.exit_code == 70
    assert "No space left on device" in failed.value.message and "make room" in failed.value.hint
    assert not list(usual.out.parent.glob("*.part"))
    told = [event.message for event in run(given) if isinstance(event, Notice) and "going on" in event.message]
    assert told
    assert left_behind(usual.out) == whole


def test_a_full_disk_behind_the_metrics_is_told_and_keeps_no_half_step(usual: MetaTrainOptions, whole: Any) -> None:
    given = replace(usual, checkpoint_s=0)
    real, calls = TrainFiles._write, [0]

    def full(self: TrainFiles, data: bytes) -> None:
        calls[0] += 1
        if calls[0] == 5:
            self._lines.write(data[:7])
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainFiles, "_write", full)
        with pytest.raises(StorageFailed, match="metrics"):
            run(given)
    run(given)
    assert left_behind(usual.out) == whole


def test_a_curve_can_be_drawn_of_any_number_of_steps(tmp_path: Path) -> None:
    for count in (0, 1, 61, 500):
        with TrainFiles(tmp_path / "p") as files:
            files.entries = [{"step": step + 1, "loss": 1.0 / (step + 1)} for step in range(count)]
            files.finish(b"prior")
        assert "<svg" in files.curve.read_text(encoding="utf-8")


def test_options_that_cannot_be_are_refused(plain: MetaTrainOptions, nothing_computed: None) -> None:
    wrong: dict[str, Any] = {
        "objective": "none", "steps": 0, "batch": 0, "k": 0, "questions": 0, "rank": 0, "validate_every": 0,
        "dev_tasks": 0, "mix_context": 1.5, "strangers": math.nan, "learning_rate": 0.0, "temperature": math.nan,
        "step_rate": math.nan, "codec": "zip", "reading": -1, "keep": "first",
    }  # fmt: skip
    for name, value in wrong.items():
        with pytest.raises(UsageProblem):
            run(replace(plain, **{name: value}))
    with pytest.raises(UsageProblem):
        run(replace(plain, learning_rate=math.inf))
    with pytest.raises(UsageProblem, match="for --reading to stand beside"):
        run(replace(plain, objective="rag", reading=1))
