"""Promises 1, 11, 12 and 22 for ingest (and rm), on tiny models; kills hit real processes.

(The bank's own half of promises 1 and 11 is in tests/bank/, where every system call is hit.)
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import tiny
import use_cases
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from test_answer import write_prior
from use_cases import counted, events_of, files, ingest, rows, skipped, sources, story, write

from regrad_cli.bank import open_bank, verify
from regrad_cli.records import DocumentDone, Progress, document_id

MODES = ("regrad", "both", "rag", "direct")
NAMES = ("Brannoch", "Skerry", "Velmora", "Gale")


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("empty") / ".gbank"
    prior = write_prior(path.parent / "prior.safetensors", tiny_model_folder)
    return use_cases.make_bank(path, tiny_model_folder, tiny_embedder_folder, prior=prior)


@pytest.fixture(scope="module")
def made(empty: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bank of four documents and their folder; not to be changed."""
    bank = Path(shutil.copytree(empty, tmp_path_factory.mktemp("made") / ".gbank"))
    ingest(bank, write(bank.parent / "docs", {f"{name}.md": story(name) for name in NAMES}))
    return bank


@pytest.fixture
def bank(empty: Path, tmp_path: Path) -> Path:
    """An empty bank, with four documents of three passages beside it."""
    write(tmp_path / "own" / "docs", {f"{name}.md": story(name) for name in NAMES})
    return Path(shutil.copytree(empty, tmp_path / "own" / ".gbank"))


def sound(bank: Path) -> bool:
    return [finding for finding in verify(bank) if not finding.note] == []


# ── promise 11: interrupted and resumed, the same rows ──────────────────────────────────────────────────────────────


def test_promise_11_interrupted_at_any_progress_event_and_resumed_ends_in_the_same_rows(made: Path, bank: Path) -> None:
    wanted, docs, start = rows(made), bank.parent / "docs", files(bank)
    events = list(events_of(bank, docs, commit_rows=3))
    assert rows(bank) == wanted
    steps = len(use_cases.progress(events))
    assert steps > 12
    for stop in range(1, steps, 2):
        shutil.rmtree(bank)
        write(bank, start)
        under_way = events_of(bank, docs, commit_rows=3)
        for _ in range(stop):
            while not isinstance(next(under_way), Progress):
                pass
        with pytest.raises(KeyboardInterrupt):
            under_way.throw(KeyboardInterrupt())
        held = rows(bank)
        assert held.items() <= wanted.items(), "what is there is what an uninterrupted ingest makes"
        with counted() as calls:
            summary = ingest(bank, docs, commit_rows=5)
        assert (sum(calls), summary.unchanged) == (len(wanted) - len(held), len(held))
        assert rows(bank) == wanted
        assert sound(bank)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_promise_11_rows_do_not_depend_on_when_it_commits(empty: Path, tmp_path: Path, dtype: str) -> None:
    found = []
    for commit_rows in (1, 2, 5, 256):
        bank = Path(shutil.copytree(empty, tmp_path / str(commit_rows) / ".gbank"))
        # parts of many lengths, so that passes are shared by other neighbours each time
        texts = {
            f"{name}.md": story(name) + "\n\n## End\n\n" + "Gulls cry. " * (3 * place)
            for place, name in enumerate(NAMES)
        }
        ingest(bank, write(bank.parent / "docs", texts), commit_rows=commit_rows, dtype=dtype)
        found.append(rows(bank))
    assert len(found[0]) > 12
    assert all(one == found[0] for one in found)


@pytest.mark.slow
@pytest.mark.starter
def test_promise_11_rows_of_the_real_model_do_not_depend_on_when_it_commits(
    starter_folder: Path, embedder_folder: Path, tmp_path: Path
) -> None:
    """Where a matrix product's shape changes its bits (bfloat16 in hardware), tiny models are too small to tell."""
    empty = use_cases.make_bank(tmp_path / "empty" / ".gbank", starter_folder, embedder_folder, chunk_tokens=64)
    found = []
    for commit_rows in (1, 3, 256):
        bank = Path(shutil.copytree(empty, tmp_path / str(commit_rows) / ".gbank"))
        docs = write(bank.parent / "docs", {f"{name}.md": story(name) for name in NAMES[:2]})
        ingest(bank, docs, commit_rows=commit_rows, dtype="auto")
        found.append(rows(bank))
    assert len(found[0]) > 3
    assert all(one == found[0] for one in found)


@pytest.mark.slow
def test_promise_01_and_11_ingest_killed_at_random_moments_and_resumed_ends_in_the_same_rows(
    made: Path, bank: Path
) -> None:
    """Between the kills the bank is sound, and holds only rows that an uninterrupted ingest makes."""
    wanted, chance = rows(made), random.Random(11)
    kills = 0
    for _ in range(40):
        process = regrad(bank, "ingest", "docs", "--commit-rows", "2", "--json", "--dtype", "fp32", "--device", "cpu")
        # Half the kills come after a document was reported, where commits are made; half before, in the planning.
        if process.stdout is not None and kills % 2 == 0:
            process.stdout.readline()
        else:
            time.sleep(chance.uniform(0.5, 4))
        time.sleep(chance.uniform(0, 0.03))
        process.kill()
        process.communicate()
        kills += process.returncode == -signal.SIGKILL
        assert sound(bank)
        held = rows(bank)
        assert held.items() <= wanted.items()
        if kills >= 4 or held == wanted:
            break
    assert kills
    done = regrad(bank, "ingest", "docs", "--json", "--dtype", "fp32", "--device", "cpu")
    out, err = done.communicate(timeout=120)
    assert done.returncode == 0, err
    assert json.loads(out.splitlines()[-1])["unchanged"] == len(held)
    assert rows(bank) == wanted


# ── promise 1: kills of the real command ────────────────────────────────────────────────────────────────────────────


def regrad(bank: Path, *words: str | Path, **options: Any) -> subprocess.Popen[bytes]:
    pipes: dict[str, Any] = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    root = str(Path(use_cases.__file__).parents[1])
    environ = os.environ | {"PYTHONPATH": root, "OMP_NUM_THREADS": "1", "REGRAD_BANK": str(bank)}
    return subprocess.Popen(
        [sys.executable, "-m", "regrad_cli", *map(str, words)], cwd=bank.parent, env=environ, **(pipes | options)
    )


@pytest.mark.slow
def test_promise_01_rm_killed_at_random_moments_leaves_the_old_or_the_new_snapshot(made: Path, tmp_path: Path) -> None:
    old = rows(made)
    document = document_id("docs/Skerry.md")
    new = {place: row for place, row in old.items() if place[0] != document}
    chance, seen, killed = random.Random(1), [], 0
    started = time.monotonic()
    bank = Path(shutil.copytree(made, tmp_path / "whole" / ".gbank"))
    assert regrad(bank, "bank", "rm", document, "--yes").wait(60) == 0
    whole_s = time.monotonic() - started
    assert rows(bank) == new
    for turn in range(10):
        bank = Path(shutil.copytree(made, tmp_path / str(turn) / ".gbank"))
        process = regrad(bank, "bank", "rm", document, "--yes")
        time.sleep(chance.uniform(0.5, 1.0) * whole_s)
        process.kill()
        process.communicate()
        killed += process.returncode == -signal.SIGKILL
        after = rows(bank)
        assert after in (old, new)
        seen.append(after == new)
        assert sound(bank)
        if process.returncode == 0:
            assert after == new
        assert regrad(bank, "bank", "rm", "docs/Gale.md", "--yes").wait(60) == 0, "a dead writer's lock does not block"
        assert rows(bank).keys() == {place for place in after if place[0] != document_id("docs/Gale.md")}
    assert killed


# ── promise 12: again changes nothing ───────────────────────────────────────────────────────────────────────────────

WORDS = st.sampled_from(
    ["lamp", "Velmora", "the bell.", "keeper", "1902", "is lit.", "\n\n", "\n## Part\n\n", "gale", "ä"]
)
TEXTS = st.lists(WORDS, max_size=60).map(" ".join)
SETS = st.dictionaries(st.sampled_from(["a.md", "b.txt", "c/d.md", "c/e.txt"]), TEXTS, min_size=1, max_size=4)


@given(SETS, SETS, st.randoms(use_true_random=False))
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_promise_12_ingesting_again_changes_nothing_and_order_is_nothing(
    empty: Path, tmp_path_factory: pytest.TempPathFactory, first: dict, second: dict, chance: random.Random
) -> None:
    root = tmp_path_factory.mktemp("again")
    bank, other = (Path(shutil.copytree(empty, root / name / ".gbank")) for name in ("one", "two"))
    for texts in (first, second):  # a second set over the first: changed, removed and new documents
        shutil.rmtree(bank.parent / "docs", ignore_errors=True)
        docs = write(bank.parent / "docs", texts)
        ingest(bank, docs, prune=True)
        held, all_files = rows(bank), files(bank)
        with counted() as calls:
            again = ingest(bank, docs, prune=True)
        assert (calls, again.added, again.removed) == ([], 0, 0)
        assert files(bank) == all_files
        # one by one, in any order, into another bank, and over what it held: the same rows
        paths = [write(other.parent / "docs", texts) / name for name in texts]
        chance.shuffle(paths)
        gone = [path for path in (other.parent / "docs").rglob("*") if path.is_file() and path not in paths]
        for path in gone:
            path.unlink()
        ingest(other, *paths, commit_rows=3)
        ingest(other, other.parent / "docs", prune=True)
        empty_now = {document_id(f"docs/{name}") for name, text in texts.items() if not text.strip()}
        assert {p: r for p, r in rows(other).items() if p[0] not in empty_now} == {
            p: r for p, r in held.items() if p[0] not in empty_now
        }
        assert sound(bank) and sound(other)


# ── promise 22: nothing that is not finite gets in ──────────────────────────────────────────────────────────────────

BAD = "~"  # the character whose token is broken in the models below


def write_broken_model(folder: Path) -> Path:
    """A tiny model in which one token's embedding is infinite, as a damaged or overflowing one would be."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tiny.write_model(folder, tiny.llama_config(tie_word_embeddings=False))
    network = AutoModelForCausalLM.from_pretrained(folder)
    (token,) = AutoTokenizer.from_pretrained(folder)(BAD, add_special_tokens=False)["input_ids"]
    with torch.no_grad():
        network.get_input_embeddings().weight[token] = float("inf")
    network.save_pretrained(folder)
    return folder


def write_broken_embedder(folder: Path) -> Path:
    import torch
    from safetensors.torch import load_file, save_file

    tiny.write_embedder(folder)
    from tokenizers import Tokenizer

    token = Tokenizer.from_file(str(folder / "tokenizer.json")).token_to_id(BAD)
    tensors = load_file(folder / "model.safetensors")
    (name,) = [name for name in tensors if name.endswith("word_embeddings.weight")]
    tensors[name][token] = torch.inf
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


@pytest.mark.parametrize("broken", ["model", "embedder"])
def test_promise_22_what_is_not_finite_is_skipped_and_named_and_the_rest_is_the_same_bits(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path, broken: str
) -> None:
    import numpy as np

    model = write_broken_model(tmp_path / "model") if broken == "model" else tiny_model_folder
    embedder = write_broken_embedder(tmp_path / "embedder") if broken == "embedder" else tiny_embedder_folder
    bank = use_cases.make_bank(tmp_path / "one" / ".gbank", model, embedder)
    docs = write(bank.parent / "docs", {f"{name}.md": story(name) for name in NAMES})
    ingest(bank, docs)
    good = rows(bank)

    bank = use_cases.make_bank(tmp_path / "two" / ".gbank", model, embedder)
    texts = {f"{name}.md": story(name) for name in NAMES}
    texts["Skerry.md"] = texts["Skerry.md"].replace("keeper 1", f"keeper {BAD}")
    texts["all-bad.md"] = f"# Gulf\n\nNothing {BAD} but this.\n"
    events = list(events_of(bank, write(bank.parent / "docs", texts)))
    summary = events[-1]
    assert set(skipped(summary)) == {"docs/Skerry.md", "docs/all-bad.md"}
    assert "passage 1" in skipped(summary)["docs/Skerry.md"]
    assert all("not finite" in reason for reason in skipped(summary).values())
    assert (summary.added, summary.passages) == (len(good) - 1, len(good) - 1)
    done = {event.source: event.added for event in events if isinstance(event, DocumentDone)}
    assert (done["docs/Skerry.md"], done["docs/Velmora.md"]) == (2, 3)
    missing = (document_id("docs/Skerry.md"), 1)
    assert rows(bank) == {place: row for place, row in good.items() if place != missing}
    with open_bank(bank) as opened:
        for ref, _, _ in opened.passages():
            held = opened.read_rows([ref])
            assert np.isfinite(held.scales).all() and np.isfinite(held.embeddings).all()
    before = files(bank)
    assert set(skipped(ingest(bank, bank.parent / "docs"))) == set(skipped(summary)), "and named again the next time"
    assert files(bank) == before


def test_promise_22_through_the_command_it_is_exit_3(tmp_path: Path, tiny_embedder_folder: Path) -> None:
    from faketerminal import call

    bank = use_cases.make_bank(tmp_path / ".gbank", write_broken_model(tmp_path / "model"), tiny_embedder_folder)
    write(tmp_path / "docs", {"good.md": story("good"), "bad.md": f"It is {BAD} there.\n"})
    result = call("ingest", tmp_path / "docs", "--bank", bank, "--device", "cpu")
    assert result.code == 3
    assert "docs/bad.md" in result.err and "finite" in result.err
    assert sources(bank) == {"docs/good.md"}
