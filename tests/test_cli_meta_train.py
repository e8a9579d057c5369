"""meta-train on the command line: what is printed where, exit codes, progress, Ctrl-C, a prior that `init` takes."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny
import train_runs
from faketerminal import Result, call
from train_runs import LONG, NAN, left_behind, model_with_a_nan_token, resume_file, task

from regrad_cli.metatrain import MetaTrainOptions

HERE = Path(__file__).parent


@pytest.fixture
def plain(tmp_path: Path, tiny_model_folder: Path) -> MetaTrainOptions:
    """Four steps of two tasks."""
    return train_runs.options(tmp_path / "run", tiny_model_folder, steps=4, batch=2)


def words(given: MetaTrainOptions, *more: str | Path) -> list[str | Path]:
    found: list[str | Path] = ["meta-train", *given.tasks, "--out", given.out, "--model", given.model]
    for file in given.dev:
        found += ["--dev", file]
    for name in ("steps", "batch", "rank", "validate_every"):
        found += [f"--{name.replace('_', '-')}", str(getattr(given, name))]
    return [*found, "-k", str(given.k), "--strangers", "0", "--device", "cpu", "--dtype", "fp32", *more]


def learn(given: MetaTrainOptions, *more: str | Path, tty: bool = False) -> Result:
    return call(*words(given, *more), tty=tty)


def test_json_is_a_line_an_event_and_the_same_run_as_without(plain: MetaTrainOptions) -> None:
    found = learn(plain, "--json")
    assert found.code == 0
    kinds = [line["type"] for line in found.lines]
    assert kinds == ["validated", "step", "step", "validated", "step", "step", "validated", "trained"]
    steps = [line for line in found.lines if line["type"] == "step"]
    assert {"step", "steps", "loss", "learning_rate", "elapsed_s", "left_s", "skipped"} <= steps[0].keys()
    validated = found.lines[0]
    assert set(validated["losses"]) == {"prior", "own", "other", "shown"} and validated["best"] is True
    last = found.lines[-1]
    assert last["file"] == str(plain.out) and last["steps"] == 4 and last["tasks"] == 8 and last["skipped"] == []
    assert all("notice" in json.loads(line) for line in found.err.splitlines())
    before = left_behind(plain.out)
    assert learn(plain).code == 0 and left_behind(plain.out) == before


def test_without_json_the_result_is_a_sentence_and_the_rest_is_on_stderr(plain: MetaTrainOptions) -> None:
    found = learn(plain)
    assert found.code == 0
    first, second = found.out.splitlines()
    assert first.startswith(f"{plain.out}: learned from 8 tasks in 4 steps")
    assert re.fullmatch(r"answer loss on dev tasks: prior [\d.]+, own [\d.]+, other [\d.]+, shown [\d.]+", second)
    assert "computing on cpu, float32" in found.err and "after step 2, answer loss on dev tasks" in found.err
    quiet = learn(plain, "--quiet")
    assert quiet.err == "" and quiet.out.startswith(str(plain.out))


def test_a_terminal_shows_loss_steps_and_the_time_left(plain: MetaTrainOptions) -> None:
    found = learn(plain, tty=True)
    shown = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", found.err)
    assert re.search(r"learning  loss \d\.\d{3} .*[1-3]/4 \d+:\d\d:\d\d", shown), shown[-2000:]
    piped = learn(plain)
    assert "learning" not in piped.err


def test_bad_lines_are_named_and_the_exit_code_is_3(plain: MetaTrainOptions) -> None:
    file = train_runs.write(plain.tasks[0], [task(0), "{", task(1), {"id": "x"}, task(2)])
    found = learn(plain, "--json")
    assert found.code == 3
    told = [json.loads(line)["skipped"] for line in found.err.splitlines() if "skipped" in line]
    assert [each["source"] for each in told] == [f"{file}:2", f"{file}:4"]
    assert "'passages' must hold text" in told[1]["reason"]
    assert [text.split(": ")[0] for text in found.lines[-1]["skipped"]] == [f"{file}:2", f"{file}:4"]


def test_a_task_that_cannot_be_learned_from_is_named_once_and_the_exit_code_is_3(
    plain: MetaTrainOptions, tmp_path: Path
) -> None:
    model = model_with_a_nan_token(tmp_path / "nan")
    long = task(2) | {"questions": [{"question": LONG, "answers": ["dusk"]}]}
    train_runs.write(plain.tasks[0], [task(0), task(1, mark=NAN), long, task(3)])
    found = call(*words(plain, "--model", model, "--steps", "8"))
    assert found.code == 3
    told = [line for line in found.err.splitlines() if line.startswith("skipped: ")]
    assert sorted(line.split(": ")[1] for line in told) == ["t1", "t2"]
    assert any(line.endswith("its loss or gradient is not finite") for line in told)


def test_nothing_but_bad_tasks_is_an_error_with_its_own_kind(plain: MetaTrainOptions, tmp_path: Path) -> None:
    model = model_with_a_nan_token(tmp_path / "nan")
    train_runs.write(plain.tasks[0], [task(number, mark=NAN) for number in range(4)])
    found = call(*words(plain, "--model", model, "--steps", "8", "--json"))
    assert found.code == 70
    assert found.error["kind"] == "non_finite" and "no task of the last 3 steps" in found.error["message"]
    assert found.error["hint"] and resume_file(plain.out).exists() and not plain.out.exists()


@pytest.mark.parametrize(
    ("more", "said"),
    [
        (["--steps", "0"], "--steps"),
        (["--objective", "none"], "--objective"),
        (["--codec", "zip"], "'zip' is no codec"),
        (["--mix-context", "2"], "--mix-context is a share"),
        (["--lr", "nan"], "--lr"),
        (["--lr", "0"], "--lr must be above 0"),
        (["--device", "abacus"], "'abacus' is no device"),
        (["--init", "none.safetensors"], "the prior none.safetensors cannot be read"),
        (["--init", "shipped"], "no prior of"),
    ],
)
def test_what_cannot_be_is_a_usage_error_that_says_so(plain: MetaTrainOptions, more: list[str], said: str) -> None:
    found = learn(plain, *more, "--json")
    assert found.code == 2
    assert said in found.error["message"]
    assert found.out == "" and not plain.out.exists()


def test_tasks_that_are_not_there_and_a_folder_as_out_are_usage_errors(plain: MetaTrainOptions) -> None:
    found = call("meta-train", plain.out.parent / "none.jsonl")
    assert found.code == 2 and "none.jsonl cannot be read: No such file" in found.err
    found = call("meta-train", *plain.tasks, "--out", plain.out.parent)
    assert found.code == 2 and "is a folder" in found.err and "prior.safetensors" in found.err
    assert call("meta-train").code == 2


def test_a_missing_model_is_13(plain: MetaTrainOptions) -> None:
    assert call(*words(plain, "--model", plain.out.parent / "none")).code == 13


def test_other_settings_are_refused_with_exit_code_2(plain: MetaTrainOptions) -> None:
    from regrad_cli.metatrain import meta_train
    from regrad_cli.trainevents import TrainStep

    events = meta_train(plain)
    next(event for event in events if isinstance(event, TrainStep))
    assert learn(plain).code == 11  # and while it runs, nobody else trains into that file
    events.close()  # type: ignore[attr-defined]
    found = learn(plain, "--seed", "5")
    assert found.code == 2 and "other settings: seed (0 there, 5 here)" in found.err


def test_a_full_disk_is_a_sentence_and_70(plain: MetaTrainOptions, monkeypatch: Any) -> None:
    import errno

    from regrad_cli import trainfiles

    def full(fd: int) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(trainfiles.os, "fsync", full)
    found = learn(plain, "--json")
    assert found.code == 70 and found.error["kind"] == "storage_failed"
    assert "prior.safetensors: No space left on device" in found.error["message"]
    assert "run the same command again" in found.error["hint"]


# ── Ctrl-C, in a process of its own ─────────────────────────────────────────────────────────────────────────────────

WAITS = """
import sys, time
sys.path[:0] = [{here!r}, {root!r}]
from regrad_cli.models import quiet_libraries
quiet_libraries()
from regrad_cli.learn.workers import Workers
real, calls = Workers.gradients, []
def waiting(self, *given):
    calls.append(1)
    if len(calls) == 4:
        time.sleep(600)
    return real(self, *given)
Workers.gradients = waiting
from regrad_cli.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_ctrl_c_keeps_what_was_learned_says_how_to_go_on_and_changes_no_byte(plain: MetaTrainOptions) -> None:
    assert learn(plain).code == 0
    whole = left_behind(plain.out)
    plain.out.unlink()
    code = WAITS.format(here=str(HERE), root=str(HERE.parent))
    command = [sys.executable, "-c", code, *map(str, words(plain, "--json"))]
    process = subprocess.Popen(
        command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    steps = 0
    while steps < 3:
        line = process.stdout.readline()
        assert line, process.communicate()
        steps += json.loads(line)["type"] == "step"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=120)
    assert process.returncode == 130
    last = json.loads(err.splitlines()[-1])["error"]
    assert last == {
        "code": 130, "kind": "interrupted", "message": "interrupted", "hint": "run the same command again to go on",
    }  # fmt: skip
    assert resume_file(plain.out).exists() and not plain.out.exists()
    again = learn(plain)
    assert again.code == 0 and "going on after step 3 of 4" in again.err
    assert left_behind(plain.out) == whole


# ── the prior in use ────────────────────────────────────────────────────────────────────────────────────────────────


def test_init_takes_the_prior_and_refuses_it_for_another_model(
    plain: MetaTrainOptions, tmp_path: Path, tiny_embedder_folder: Path
) -> None:
    assert learn(plain).code == 0
    usual = ["--embedder", tiny_embedder_folder, "--prior", plain.out, "--json"]
    made = call("init", tmp_path / "bank", "--model", plain.model, *usual)
    assert made.code == 0, made.err
    stats = call("bank", "stats", "--bank", tmp_path / "bank", "--json").document
    assert stats["prior"] == "prior"
    other = tiny.write_model(tmp_path / "other", seed=1)
    refused = call("init", tmp_path / "refused", "--model", other, *usual)
    assert refused.code == 12 and refused.error["kind"] == "mismatch"
    assert str(plain.out) in refused.error["message"]
    assert not (tmp_path / "refused").exists()


def test_a_start_of_another_model_is_12(plain: MetaTrainOptions, tmp_path: Path) -> None:
    assert learn(plain).code == 0
    other = tiny.write_model(tmp_path / "other", seed=1)
    new = ["--out", tmp_path / "new.safetensors", "--init", plain.out]
    assert call(*words(plain, "--model", other, *new)).code == 12
    assert learn(plain, *new).code == 0


def test_what_goes_on_from_a_prior_cuts_and_weighs_as_that_was_learned_with(
    plain: MetaTrainOptions, tmp_path: Path, tiny_embedder_folder: Path
) -> None:
    def card(file: Path) -> tuple[Any, ...]:
        from regrad_cli.learn.prior import Prior

        found = Prior.from_bytes(file.read_bytes()).card
        return tuple(found[name] for name in ("segments", "temperature", "segment_temperature"))

    shares = ["--temperature", "0.08", "--segment-temperature", "0.2"]
    cut = ["--segments", "3", *shares, "--embedder", tiny_embedder_folder]
    assert learn(plain, *cut).code == 0
    assert card(plain.out) == (3, 0.08, 0.2)
    kept, changed, fresh = (tmp_path / f"{name}.safetensors" for name in ("kept", "changed", "fresh"))
    embedder = ["--embedder", tiny_embedder_folder]
    assert learn(plain, "--out", kept, "--init", plain.out, *embedder).code == 0
    assert card(kept) == card(plain.out)
    assert learn(plain, "--out", changed, "--init", plain.out, *embedder, "--segments", "2").code == 0
    assert card(changed) == (2, 0.08, 0.2)
    assert learn(plain, "--out", fresh).code == 0
    assert card(fresh) == (1, 0.05, 0.3)


def test_the_help_names_every_option_and_what_lies_beside_the_result(capsys: pytest.CaptureFixture[str]) -> None:
    assert call("meta-train", "--help").code == 0
    shown = " ".join(capsys.readouterr().out.split())
    for option in ("--out", "--dev", "--init", "--objective", "--steps", "--first-order", "--codec", "--mix-context"):
        assert option in shown
    assert "FILE.metrics.jsonl" in shown and "FILE.resume" in shown
