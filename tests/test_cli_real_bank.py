"""The bank's commands on real files: hostile documents, damage, a locked bank, and what is imported and how fast."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, call, settings_of_bank

from regrad_cli.bank import create_bank, open_bank, write_bank
from regrad_cli.records import Passage, document_id, row_key, sha256_hex

PRIOR = b"a prior, as far as the bank can tell"
DIMENSION = 16


def add(path: Path, source: str, title: str, *texts: str) -> str:
    """A document of random rows; returns its id."""
    rng = np.random.default_rng(len(source))
    count = len(texts)
    with write_bank(path) as writer:
        made_for = writer.snapshot.settings
        passages = [Passage(document_id(source), source, title, i, 9 * i, 5, text) for i, text in enumerate(texts)]
        keys = [row_key(each, made_for.model, made_for.tokenizer, made_for.prior) for each in passages]
        codes = rng.integers(0, 256, (count, made_for.code_bytes), dtype=np.uint8)
        scales = rng.normal(size=(count, made_for.scale_count)).astype(np.float16)
        embeddings = rng.normal(size=(count, DIMENSION))
        embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
        writer.add(passages, keys, codes, scales, embeddings.astype(np.float16))
        writer.commit("ingest")
        writer.finish()
    return document_id(source)


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    path = tmp_path / "a bank" / ".gbank"
    path.parent.mkdir()
    create_bank(path, settings_of_bank(prior=sha256_hex(PRIOR), embedding_dim=DIMENSION), PRIOR)
    add(path, "a.md", "Alpha", "The first.", "The second.")
    add(path, "notes/b.md", "Beta", "The third.")
    return path


def test_the_bank_is_found_from_a_folder_below_it(bank, monkeypatch):
    below = bank.parent / "deep" / "er"
    below.mkdir(parents=True)
    monkeypatch.chdir(below)
    assert call("bank", "stats", "--json").document["passages"] == 3
    shown = {each["name"]: each for each in call("config", "show", "--json").document["settings"]}
    assert (shown["bank"]["value"], shown["bank"]["origin"]) == (str(bank), "found")


def test_stats_ls_show_log(bank):
    stats = call("bank", "stats", "--bank", bank, "--json").document
    assert (stats["documents"], stats["passages"], stats["codec"]) == (2, 3, "r1-int4")
    assert "2 documents, 3 passages" in call("bank", "stats", "--bank", bank).out
    assert [line.split("\t")[1:] for line in call("bank", "ls", "--bank", bank).out.splitlines()] == [
        ["a.md", "Alpha", "2", "10"],
        ["notes/b.md", "Beta", "1", "5"],
    ]
    assert "The second." in call("bank", "show", "a.md", "--bank", bank).out
    assert (
        call("bank", "show", f"{document_id('a.md')[:5]}:1", "--bank", bank, "--json").document["text"] == "The second."
    )
    assert {"ingest"} <= {line["operation"] for line in call("bank", "log", "--bank", bank, "--json").lines}
    assert call("bank", "stats", "--snapshot", "99", "--bank", bank).code == 2


def test_rm_removes_for_good_and_says_what(bank):
    assert call("bank", "rm", "notes/b.md", "--yes", "--bank", bank).out == "removed notes/b.md (1 passage)\n"
    assert len(call("bank", "ls", "--bank", bank).out.splitlines()) == 1
    assert call("bank", "rm", "notes/b.md", "--yes", "--bank", bank).code == 2


def test_a_bank_that_is_written_to_is_11(bank):
    with write_bank(bank):
        ran = subprocess.run(
            [sys.executable, "-m", "regrad_cli", "bank", "rm", "a.md", "--yes", "--bank", bank, "--json"],
            capture_output=True, text=True, cwd=Path(__file__).parent.parent, check=False,
        )  # fmt: skip
    assert ran.returncode == 11
    assert json.loads(ran.stderr)["error"]["kind"] == "locked"


def test_config_show_says_what_the_bank_decided(bank, monkeypatch):
    monkeypatch.setenv("REGRAD_BANK", str(bank))
    monkeypatch.setenv("REGRAD_CHUNK_OVERLAP", "3")
    shown = {each["name"]: each for each in call("config", "show", "--json").document["settings"]}
    assert (shown["bank"]["value"], shown["bank"]["origin"]) == (str(bank), "REGRAD_BANK")
    assert (shown["codec"]["value"], shown["codec"]["origin"]) == ("r1-int4", "bank")
    assert (shown["chunk_overlap"]["value"], shown["chunk_overlap"]["origin"]) == (3, "REGRAD_CHUNK_OVERLAP")
    assert shown["device"]["origin"] == "default"


def test_config_show_without_a_bank_or_with_a_broken_one(bank, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert call("config", "show").code == 0
    (bank / "FORMAT").write_text("gbank 9\n")
    result = call("config", "show", "--bank", bank)
    assert result.code == 0
    assert "cannot be read" in result.err
    assert call("config", "show", "--bank", tmp_path / "none").err.startswith("warning")


def test_verify_names_a_flipped_bit_and_reading_it_is_14(bank):
    assert call("bank", "verify", "--bank", bank).code == 0
    for file in (bank / "docs").iterdir():
        data = bytearray(file.read_bytes())
        data[len(data) // 2] ^= 1
        file.chmod(0o644)
        file.write_bytes(data)
    result = call("bank", "verify", "--bank", bank)
    assert result.code == 14
    assert "docs/" in result.out
    assert call("bank", "verify", "--bank", bank, "--json").document["ok"] is False
    assert call("bank", "ls", "--bank", bank).code == 14
    result = call("bank", "ls", "--skip-damaged", "--bank", bank)
    assert result.code == 0
    assert "warning: left out" in result.err


@pytest.mark.parametrize("tty", [True, False])
def test_promise_21_a_hostile_document_in_a_real_bank(bank, tty):
    source = HOSTILE_NAME
    id = add(bank, source, HOSTILE_TEXT, HOSTILE_TEXT)
    commands = (["stats"], ["ls"], ["show", id], ["show", f"{id}:0"], ["log"], ["verify"], ["rm", id, "--yes"])
    for words in commands:
        result = call("bank", *words, "-q", "--bank", bank, tty=tty, NO_COLOR="1")
        assert result.code == 0, words
        assert not any(character in result.out + result.err for character in OBEYED), words
        assert "\nerror: forged" not in result.out, words
        if words[0] == "rm":
            add(bank, source, HOSTILE_TEXT, HOSTILE_TEXT)
        result = call("bank", *words, "--json", "--bank", bank)
        _ = result.lines if words[0] in ("ls", "log") else result.document
    with open_bank(bank) as opened:
        assert opened.stats()["documents"] == 2


def test_bank_stats_and_ls_import_no_torch(bank):
    code = (
        "import sys; from regrad_cli.cli import main; code = main(sys.argv[1:]);"
        "loaded = {'torch', 'transformers', 'sentence_transformers', 'hnswlib', 'rich', 'pydantic'} & set(sys.modules);"
        "sys.exit(code or bool(loaded))"
    )
    for command in ("stats", "ls", "log", "verify"):
        ran = subprocess.run(
            [sys.executable, "-c", code, "bank", command, "--bank", bank],
            capture_output=True, text=True, cwd=Path(__file__).parent.parent, env=os.environ, check=False,
        )  # fmt: skip
        assert ran.returncode == 0, ran.stderr
