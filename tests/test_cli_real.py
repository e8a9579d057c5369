"""The main job through the command line on a tiny random model: init, ingest, query, ask, resume, refuse."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from faketerminal import HOSTILE_TEXT, OBEYED, call
from test_cli_ask import ASK_KEYS, SECONDS

DOCUMENTS = {
    "harbour.md": "# The harbour\n\nThe harbour of Velmora opens at seven. Its lamps are lit by Oda Brenk.\n",
    "ferry.txt": "The ferry that crosses the sound is called the Grey Heron. It leaves at noon.\n",
    "hostile.md": f"# Bell\x1b[31m [red]\n\n{HOSTILE_TEXT.encode('utf-8', 'replace').decode()}\n",
}


@pytest.fixture(scope="module")
def made(tmp_path_factory, tiny_model_folder, tiny_embedder_folder) -> Path:
    """A folder with documents and a bank of them; tests that change it take a copy."""
    root = tmp_path_factory.mktemp("cli")
    (root / "docs").mkdir()
    for name, text in DOCUMENTS.items():
        (root / "docs" / name).write_text(text, encoding="utf-8")
    words = ["--model", tiny_model_folder, "--embedder", tiny_embedder_folder, "--chunk-tokens", "64"]
    result = call("init", root / ".gbank", *words)
    assert result.code == 0, result.err
    assert "untrained" in result.out
    result = call("ingest", root / "docs", "--bank", root / ".gbank", "--json", "--device", "cpu")
    assert result.code == 0, result.err
    assert result.lines[-1]["documents"] == 3
    return root


@pytest.fixture
def bank(made, monkeypatch) -> Path:
    monkeypatch.setenv("REGRAD_BANK", str(made / ".gbank"))
    monkeypatch.setenv("REGRAD_MAX_TOKENS", "6")
    return made / ".gbank"


@pytest.fixture
def own_bank(made, tmp_path, monkeypatch) -> Path:
    """A copy that may be changed, with its documents beside it."""
    shutil.copytree(made, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    return tmp_path / "own" / ".gbank"


def test_ingest_again_changes_nothing(own_bank):
    result = call("ingest", "docs", "--json")
    last = result.lines[-1]
    assert (last["added"], last["unchanged"]) == (0, last["passages"])
    assert result.code == 0


def test_ingest_of_a_changed_file_replaces_its_own_passages_and_prune_drops_what_is_gone(own_bank):
    Path("docs/ferry.txt").write_text("The ferry is called the Black Swan now.\n")
    Path("docs/harbour.md").unlink()
    last = call("ingest", "docs", "--prune", "--json").lines[-1]
    assert (last["replaced"], last["removed"], last["documents"]) == (1, 1, 2)
    assert "Black Swan" in call("bank", "show", "docs/ferry.txt").out


def test_ingest_of_standard_input_and_of_a_list(own_bank):
    lines = json.dumps({"title": "Mill", "text": "The mill of Velmora grinds at night."}) + "\n"
    result = call("ingest", "-", "--format", "jsonl", "--name", "feed", "--json", stdin=lines.encode())
    assert result.lines[-1]["added"] == 1
    assert "Mill" in call("bank", "ls").out
    assert call("ingest", "--files-from", "-", stdin=b"docs/ferry.txt\n").code == 0


def test_unreadable_inputs_are_named_and_exit_3(own_bank):
    Path("docs/binary.md").write_bytes(bytes(range(256)) * 8)
    result = call("ingest", "docs", "none.md", "-q")
    assert result.code == 3
    assert "docs/binary.md" in result.err
    assert "none.md" in result.err
    assert "2 skipped" in result.out


def test_dry_run_adds_nothing(own_bank):
    Path("docs/new.md").write_text("A new page about the lighthouse of Velmora.\n")
    result = call("ingest", "docs", "--dry-run")
    assert "would add 1 " in result.out
    assert call("bank", "stats", "--json").document["documents"] == 3


def test_query_finds_passages(bank):
    found = call("query", "Who lights the lamps?", "-k", "2", "--json").lines
    assert [each["rank"] for each in found] == [1, 2]
    assert found[0]["score"] >= found[1]["score"]
    many = call("query", "-", "-k", "1", stdin=b"lamps\nferry\n").out.splitlines()
    assert [line.split("\t")[0] for line in many] == ["1", "2"]
    assert call("query", "lamps", "--min-score", "2").out == ""


@pytest.mark.parametrize("mode", ["regrad", "both", "rag", "direct"])
def test_ask_in_every_mode(bank, mode):
    result = call("ask", "Who lights the lamps?", "--mode", mode, "--json", "--device", "cpu", "--dtype", "fp32")
    assert result.code == 0, result.err
    (answer,) = result.lines
    assert answer.keys() >= ASK_KEYS
    assert answer["seconds"].keys() >= SECONDS
    assert answer["mode"] == mode
    assert answer["grounded"] == (mode != "direct")
    assert len(answer["passages"]) == (0 if mode == "direct" else 3)


def test_the_streamed_answer_is_the_answer(bank):
    words = ["ask", "Who lights the lamps?", "--dtype", "fp32"]
    whole = call(*words, "--json").lines[0]["answer"]
    streamed = call(*words)
    if whole.isprintable():
        assert streamed.out == whole + "\n"
    assert "untrained" in streamed.err
    assert "cpu" in streamed.err  # the device that was chosen
    assert call(*words, "-q").err == ""


def test_many_questions_in_order(bank):
    questions = ["Who lights the lamps?", "What is the ferry called?"]
    stdin = f"{questions[0]}\n{json.dumps({'question': questions[1]})}\n"
    result = call("ask", "-", "--json", "--dtype", "fp32", stdin=stdin.encode())
    assert [line["question"] for line in result.lines] == questions
    alone = call("ask", questions[1], "--json", "--dtype", "fp32").lines[0]
    assert alone["answer"] == result.lines[1]["answer"]


def test_promise_21_a_hostile_document_through_query_and_ask(bank):
    for tty in (True, False):
        for words in (["query", "bell", "-q"], ["ask", "bell", "-q", "--sources", "--mode", "rag", "--dtype", "fp32"]):
            result = call(*words, tty=tty, NO_COLOR="1")
            assert result.code == 0
            assert not any(character in result.out + result.err for character in OBEYED)
            assert "[red]" in result.out
            for line in call(*words, "--json", tty=tty).lines:
                assert line


def test_asking_for_cuda_where_there_is_none_is_an_error(bank):
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is CUDA here")
    assert call("ask", "q", "--device", "cuda").code == 13
    assert call("ask", "q", "--device", "cuda", "--json").error["kind"] == "model_unavailable"


def test_another_model_is_12(bank, tmp_path):
    import tiny

    other = tiny.write_model(tmp_path / "other", seed=5)
    result = call("ask", "q", "--model", other)
    assert result.code == 12, result.err


def test_a_damaged_hit_is_14_and_can_be_skipped(own_bank):
    for file in (own_bank / "shards").iterdir():
        data = bytearray(file.read_bytes())
        at = int.from_bytes(data[:8], "little") + 8  # the first byte after the header
        data[at] ^= 1
        file.chmod(0o644)
        file.write_bytes(data)
    words = ["ask", "Who lights the lamps?", "--dtype", "fp32", "--max-tokens", "4"]
    result = call(*words, "--json")
    if result.code == 0:  # what was flipped is in no row that this needed
        pytest.fail("a flipped byte of a shard's first tensor was not noticed")
    assert (result.code, result.error["kind"]) == (14, "damaged")
    skipping = call(*words, "--skip-damaged", "--json")
    assert skipping.code == 0
    assert skipping.lines[0]["partial"] is True
    assert "partial" in skipping.err


def test_doctor_tells_what_is_there(bank):
    report = call("doctor", "--json", "--device", "cpu").document
    assert report["device"]["device"] == "cpu"
    assert report["bank"]["documents"] == 3
    assert report["packages"]["torch"] != "missing"
    assert any("untrained" in problem for problem in report["problems"])
    result = call("doctor", tty=True, NO_COLOR="1")
    assert result.code == 0
    assert "gflops" in result.out


def test_doctor_without_a_bank_or_with_a_broken_one_still_reports(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "regrad init" in call("doctor", "--json", "--device", "cpu").document["bank"]["path"]
    report = call("doctor", "--json", "--device", "cuda:99", "--bank", tmp_path / "none").document
    assert report["problems"]


def test_ctrl_c_in_ingest_and_again_to_resume_as_a_process(own_bank, tmp_path):
    many = tmp_path / "own" / "many"
    many.mkdir()
    for number in range(400):
        (many / f"{number}.md").write_text(
            f"# Page {number}\n\n" + f"The lamp {number} of Velmora is lit at dusk. " * 6
        )
    words = [sys.executable, "-m", "regrad_cli", "ingest", "many", "--json", "--commit-rows", "8"]
    environ = os.environ | {"PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.PIPE, env=environ)
    for _ in range(3):
        assert json.loads(process.stdout.readline())["type"] == "document"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert json.loads(err.splitlines()[-1])["error"]["kind"] == "interrupted"
    assert b"Traceback" not in err
    kept = call("bank", "stats", "--json").document["documents"]
    assert 3 < kept < 403
    last = call("ingest", "many", "--json").lines[-1]
    assert last["unchanged"] > 0
    assert call("bank", "stats", "--json").document["documents"] == 403
    assert call("bank", "verify").code == 0
