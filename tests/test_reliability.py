"""The list of mutations fits the source and covers every promise, a few of them are made for real, and a history with
faults is run; the whole of both is `python -m reliability`."""

from __future__ import annotations

import ast
import re
import runpy
import sys
import time
from pathlib import Path
from random import Random

import pytest

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "tests" / "bank")]  # not installed with the package

from faults import NoSmallDisk, on_small_disk  # noqa: E402

from reliability import report  # noqa: E402
from reliability.history import history  # noqa: E402
from reliability.mutate import Mutation, Verdict, listed, try_all, without_guard  # noqa: E402
from reliability.trial import LOST, NEW, OLD, Trial  # noqa: E402

MUTATIONS = listed()
LONG = re.compile(r"every_step|any_|history|random|cut_anywhere|retrieval")  # tests that take more than a second
CHEAP = [each for each in MUTATIONS if all(t.startswith("bank/") and not LONG.search(t) for t in each.tests)]
SAMPLE = 6
PAGE = (ROOT / "docs" / "reliability.md").read_text(encoding="utf-8")


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """A history sets these for the processes that it starts."""
    monkeypatch.setenv("REGRAD_STATE", "")
    monkeypatch.setenv("REGRAD_INDEX_FROM", "")
    monkeypatch.setattr("regrad_cli.bank.writer.SHARD_ROWS", 4096)


@pytest.mark.parametrize("path", sorted((ROOT / "reliability").glob("*.py")), ids=lambda path: path.name)
def test_a_module_says_first_what_it_does_and_is_short(path: Path) -> None:
    source = path.read_text(encoding="utf-8")
    assert ast.get_docstring(ast.parse(source)) and len(source.splitlines()) < 300


# ── guards taken out ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_listed_guard_stands_in_the_source_once_and_what_is_left_without_it_is_a_program() -> None:
    for mutation in MUTATIONS:
        source = (ROOT / "regrad_cli" / mutation.file).read_text(encoding="utf-8")
        mutated = mutation.applied(source)
        assert mutated != source, mutation.guard
        compile(mutated, mutation.file, "exec")
    assert len({(each.file, each.old, each.new) for each in MUTATIONS}) == len(MUTATIONS)


def test_every_promise_has_a_guard_in_the_list() -> None:
    promises = {promise.number for promise in runpy.run_path(str(ROOT / "docs" / "make_promises.py"))["PROMISES"]}
    assert {number for each in MUTATIONS for number in each.promises} == promises


def test_every_module_of_the_bank_that_changes_or_proves_anything_has_a_guard_in_the_list() -> None:
    """The others hold arithmetic, names or records; what they do wrong is not damage."""
    others = {"__init__", "damage", "diff", "history", "layout", "makeup", "matching", "nearest", "search", "sides"}
    modules = {path.stem for path in (ROOT / "regrad_cli" / "bank").glob("*.py")} - others
    assert modules <= {Path(each.file).stem for each in MUTATIONS}


def test_every_test_that_must_notice_exists() -> None:
    tests = runpy.run_path(str(ROOT / "docs" / "make_promises.py"))["tests"]()
    for name in (test for each in MUTATIONS for test in each.tests):
        file, test = name.split("::")
        assert file in tests.get(test, ()), name


def test_some_guards_taken_out_are_noticed() -> None:
    seed = int(time.time())
    chosen = Random(seed).sample(CHEAP, SAMPLE)
    verdicts = list(try_all(chosen))
    assert all(isinstance(verdict, Verdict) and verdict.noticed for verdict in verdicts), f"seed {seed}: {verdicts}"
    assert len(verdicts) == SAMPLE


def test_a_mutation_that_is_no_program_counts_as_missed_and_leaves_the_tree_as_it_was(tmp_path: Path) -> None:
    (tmp_path / "regrad_cli").mkdir()
    (tmp_path / "regrad_cli" / "it.py").write_text("x = 1\n")
    what = without_guard(tmp_path, Mutation("a guard", "it.py", (1,), ("none.py::test",), "x = 1", "x = ("))
    assert what is not None and "SyntaxError" in what
    assert (tmp_path / "regrad_cli" / "it.py").read_text() == "x = 1\n"
    with pytest.raises(ValueError, match="2 times"):
        Mutation("a guard", "it.py", (1,), (), "x", "y").applied("x x")


# ── faults ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def lost(trials: list[Trial]) -> list[Trial]:
    return [trial for trial in (Trial(*each) for each in trials) if trial.outcome == LOST]


def test_histories_with_faults_lose_nothing(tmp_path: Path) -> None:
    """One on the disk there is, one on a small one that fills up, where such a one can be had."""
    seed = int(time.time())
    trials = history(seed, tmp_path, False)["trials"]
    try:
        trials += on_small_disk(6 << 20, lambda place: history(seed + 1, place, True))["trials"]
    except NoSmallDisk:
        (tmp_path / "again").mkdir()
        trials += history(seed + 1, tmp_path / "again", False)["trials"]
    assert lost(trials) == [] and len(trials) > 60
    assert {trial[0] for trial in trials} == {seed, seed + 1}


def test_a_history_notices_what_is_left_behind(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrad_cli.bank.cleanup.remove_unnamed", lambda bank, names: None)
    (found,) = lost(history(5, tmp_path, False)["trials"])
    assert "left behind" in found.detail and found.seed == 5


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_figures_count_what_came_about_and_go_into_their_place(tmp_path: Path) -> None:
    counted = report.Counted()
    for trial in (
        Trial(1, "ingest", "killed at a call", "rename", OLD, None),
        Trial(1, "ingest", "killed at a call", "link", NEW, None),
        Trial(1, "ingest", "killed at a call", "", NEW, 0),
        Trial(2, "compact", "disk full at a call", "write", "refused", 70),
        Trial(2, "reading", "a flipped bit", "docs", "noticed", None),
        Trial(2, "bank repair", "a flipped bit", "docs", "named", None),
        Trial(2, "compact", "disk full at a call", "write", LOST, None, "what went wrong"),
    ):
        counted.add(trial)
    assert counted.faults == 5 and [trial.detail for trial in counted.lost] == ["what went wrong"]
    tables = counted.tables()
    assert "| killed at a call | 2 | 1 | 1 |  | 0 |" in tables
    assert "| disk full at a call | 2 | 1 | 0 | exit 70: 1 | 1 |" in tables
    assert "| docs | a flipped bit | 1 | 1 | 0 | 0 | 0 | 1 | 0 |" in tables
    page = tmp_path / "page.md"
    page.write_text(f"before\n{report.BEGIN}old{report.END}after\n", encoding="utf-8")
    report.write(page, tables)
    report.write(page, "new")
    assert page.read_text(encoding="utf-8") == f"before\n{report.BEGIN}new\n{report.END}after\n"


def test_the_page_has_a_place_for_the_figures_and_they_say_that_nothing_was_lost() -> None:
    figures = PAGE.split(report.BEGIN)[1].split(report.END)[0]
    assert re.search(r"[\d,]+ faults in [\d,]+ histories \(seeds \d+ to \d+\): \*\*0 lost\*\*", figures)
