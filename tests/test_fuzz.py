"""Promise 16 for every reader of foreign bytes: what is thrown at them comes to a value or to an error of ours, within
bounds. The targets are in fuzz/; for minutes or hours `python -m tests.fuzz TARGET` runs them with atheris.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from fuzz.targets import Target, all_targets, within, within_memory
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

ROOT = Path(__file__).resolve().parents[1]
SCRATCH = Path(tempfile.gettempdir()) / f"regrad-fuzz-{os.getpid()}"
TARGETS = all_targets(SCRATCH)
EXAMPLES = 8  # of each target here; the time is in what the slowest read
ATHERIS_SECONDS = 10.0  # of the processor, for all of them together, once everything is loaded


@pytest.fixture(scope="module", autouse=True)
def scratch() -> object:
    """Where the targets write, made when the first of them runs and gone with the last."""
    import shutil

    from regrad_cli.bank import files

    SCRATCH.mkdir(parents=True)
    names = ("REGRAD_STATE", "REGRAD_CACHE", "REGRAD_INDEX_FROM")
    before, fsync = {name: os.environ.get(name) for name in names}, files.System.fsync
    yield
    files.System.fsync = staticmethod(fsync)  # type: ignore[method-assign]
    for name, value in before.items():
        os.environ.pop(name, None)
        if value is not None:
            os.environ[name] = value
    shutil.rmtree(SCRATCH, ignore_errors=True)


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_promise_16_what_is_thrown_at_a_reader_is_a_value_or_an_error_within_bounds(target: Target) -> None:
    seeds = target.seeds()
    for seed in seeds:
        target.run(seed)

    @settings(
        max_examples=EXAMPLES, derandomize=True, deadline=None, database=None, suppress_health_check=list(HealthCheck)
    )
    @given(st.data())
    def thrown(data: st.DataObject) -> None:
        def choose(n: int) -> int:
            return data.draw(st.integers(0, max(0, n - 1)))

        given_bytes = seeds[choose(len(seeds))]
        for _ in range(1 + choose(3)):
            given_bytes = target.mutate(given_bytes, choose)
        with within(), within_memory():
            target.run(given_bytes)

    thrown()


@pytest.mark.parametrize("target", TARGETS.values(), ids=TARGETS)
def test_promise_16_bytes_without_any_sense_are_a_value_or_an_error(target: Target) -> None:
    target.seeds()
    for data in (b"", b"\0" * 64, b"\xff" * 3000, b"[" * 3000, b'{"a":' * 3000, b"1" * 6000, bytes(range(256)) * 8):
        with within():
            target.run(data)


def test_promise_16_atheris_finds_nothing_in_any_target(tmp_path: Path) -> None:
    """All targets in one process for a bounded time; each has to have had its turn."""
    words = [sys.executable, "-m", "tests.fuzz", "all", "--seconds", str(ATHERIS_SECONDS), "--findings", str(tmp_path)]
    ran = subprocess.run(words, capture_output=True, text=True, cwd=ROOT, check=False, timeout=900)
    assert ran.returncode == 0, ran.stderr[-6000:]
    told = json.loads(ran.stdout.splitlines()[-1])
    assert told["findings"] == [] and list(tmp_path.iterdir()) == []
    assert told["executions"].keys() == TARGETS.keys()
    assert min(told["executions"].values()) >= 1 and sum(told["executions"].values()) > 2 * len(TARGETS)


def test_a_target_that_breaks_is_found(tmp_path: Path) -> None:
    """The driver itself: a reader that lets an error out ends it with 1 and keeps the bytes."""
    code = (
        "import sys; sys.path.insert(0, '.')\n"
        "import tests.fuzz.__main__ as fuzz, tests.fuzz.targets as t\n"
        "broken = t.Target('broken', 'nobody', lambda data: [][len(data)], lambda: [b'x'])\n"
        "fuzz.all_targets = lambda scratch: {'broken': broken}\n"
        f"sys.argv = ['fuzz', 'broken', '--seconds', '1', '--findings', {str(tmp_path)!r}]\n"
        "fuzz.main()\n"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=False, timeout=300
    )
    assert ran.returncode == 1, ran.stderr[-2000:]
    assert "IndexError" in json.loads(ran.stdout.splitlines()[-1])["findings"][0]
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"x"]
