"""`init` and `ingest`: what reaches the use case, what is printed, and how it ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, Fakes, call, done, summary

from regrad_cli.errors import Locked
from regrad_cli.records import DocumentGone, Notice, Skipped

SUMMARY = {"type", "documents", "passages", "added", "unchanged", "replaced", "removed", "skipped", "seconds"}


@pytest.fixture
def fakes(monkeypatch):
    made = Fakes().install(monkeypatch)
    made.ingest_events = [Notice("cpu, bf16"), done(), summary()]
    return made


def test_init_makes_a_bank_here_unless_told_where(fakes, monkeypatch):
    assert call("init").code == 0
    assert fakes.initialised_with["path"] == Path(".gbank")
    monkeypatch.setenv("REGRAD_BANK", "/elsewhere")
    call("init")
    assert fakes.initialised_with["path"] == Path("/elsewhere")
    call("init", "named")
    assert fakes.initialised_with["path"] == Path("named")


def test_init_takes_what_a_bank_is_made_with_from_flags_variables_and_config(fakes, monkeypatch, tmp_path):
    (tmp_path / "config.toml").write_text('codec = "int8"\nmodel = "of-config"\n')
    monkeypatch.setenv("REGRAD_CONFIG", str(tmp_path / "config.toml"))
    monkeypatch.setenv("REGRAD_MODEL", "of-variable")
    call("init", "--chunk-tokens", "64", "--no-text", "--prior", "p.safetensors")
    got = fakes.initialised_with
    assert (got["codec"], got["model"], got["chunk_tokens"], got["keep_text"]) == ("int8", "of-variable", 64, False)
    assert (got["prior"], got["embedder"]) == (Path("p.safetensors"), "minilm")


def test_init_says_what_it_made_and_names_an_untrained_prior(fakes):
    result = call("init", "here")
    assert "here" in result.out
    assert "untrained" in result.out
    assert "fetching the starter" in result.err
    assert call("init", "here", "--json").document["prior_trained"] is False


def test_ingest_ends_with_a_summary_and_notices_go_to_stderr(fakes):
    result = call("ingest", "docs")
    assert result.code == 0
    assert result.out == "2 documents, 5 passages: 5 added, 0 unchanged, in 1.5 s\n"
    assert "cpu, bf16" in result.err


def test_ingest_json_is_lines_with_the_names_that_others_rely_on(fakes):
    document, last = call("ingest", "docs", "--json").lines
    assert document["type"] == "document"
    assert {"id", "source", "title", "passages"} <= set(document)
    assert set(last) >= SUMMARY
    assert last["type"] == "summary"


def test_skipped_inputs_are_named_counted_and_exit_3(fakes):
    left_out = Skipped("bad.pdf", "is encrypted")
    fakes.ingest_events = [left_out, summary(left_out)]
    result = call("ingest", "docs", "-q")
    assert result.code == 3
    assert "bad.pdf: is encrypted" in result.err
    assert "1 skipped" in result.out
    result = call("ingest", "docs", "--json")
    assert result.lines[-1]["skipped"] == [{"source": "bad.pdf", "reason": "is encrypted"}]
    assert json.loads(result.err)["skipped"]["source"] == "bad.pdf"


def test_what_is_pruned_is_named(fakes):
    fakes.ingest_events = [DocumentGone("9" * 16, "old.md"), summary(removed=1)]
    result = call("ingest", "docs", "--prune")
    assert result.err == "removed: old.md, which is gone\n"
    assert "1 document removed" in result.out
    named, last = call("ingest", "docs", "--prune", "--json").lines
    assert named == {"type": "removed", "id": "9" * 16, "source": "old.md"}
    assert last["removed"] == 1
    fakes.ingest_events = [DocumentGone("9" * 16, "old.md"), summary(removed=1, dry_run=True)]
    result = call("ingest", "docs", "--prune", "--dry-run")
    assert result.err == "would remove: old.md, which is gone\n"
    assert ", would remove 1 document" in result.out


def test_ctrl_c_says_how_to_resume(fakes):
    fakes.ingest_events = [done(), KeyboardInterrupt()]
    result = call("ingest", "docs")
    assert result.code == 130
    assert result.err.count("\n") == 1
    assert "run the same command again to resume" in result.err
    error = call("ingest", "docs", "--json").error
    assert (error["code"], error["kind"]) == (130, "interrupted")


def test_a_locked_bank_is_11(fakes):
    fakes.ingest_events = [Locked("another process writes", "wait with --wait 60")]
    assert call("ingest", "docs").code == 11
    call("ingest", "docs", "--wait", "60")
    assert fakes.ingest_options.wait_s == 60


def test_dry_run_tells_passages_bytes_and_time(fakes):
    fakes.ingest_events = [summary(dry_run=True, estimated_bytes=12_000, estimated_seconds=90.0)]
    assert "would add 5 (about 12.0 kB and 1 min 30 s)" in call("ingest", "docs", "--dry-run").out
    assert fakes.ingest_options.dry_run is True
    assert call("ingest", "docs", "-n", "--json").lines[-1]["estimated_bytes"] == 12_000


def test_paths_and_standard_input(fakes):
    call("ingest", "a", "-", "b", "--format", "jsonl", "--name", "feed", stdin=b"{}")
    options = fakes.ingest_options
    assert options.paths == (Path("a"), Path("b"))
    assert options.stdin.read() == b"{}"
    assert (options.stdin_format, options.stdin_name) == ("jsonl", "feed")
    call("ingest", stdin=b"text")
    assert fakes.ingest_options.stdin is not None
    call("ingest", "a", stdin=b"text")
    assert fakes.ingest_options.stdin is None


def test_a_file_called_dash_is_not_standard_input(fakes):
    call("ingest", "./-", stdin=b"text")
    assert (fakes.ingest_options.paths, fakes.ingest_options.stdin) == ((Path("-"),), None)


@pytest.mark.parametrize(
    "words",
    [
        ("a", "--name", "feed"),
        ("a", "--format", "jsonl"),
        ("a", "--format", "text"),
        ("--files-from", "-", "--name", "feed"),
        ("-", "--name", ""),
    ],
)
def test_options_of_standard_input_that_have_no_effect_are_usage(fakes, words):
    result = call("ingest", *words, stdin=b"text")
    assert (result.code, result.out) == (2, "")
    assert "--name" in result.err and "hint: " in result.err


def test_nothing_to_ingest_on_a_terminal_shows_help(fakes):
    result = call("ingest", piped_in=False, tty=True)
    assert result.code == 2
    assert "regrad ingest" in result.err


def test_files_from_takes_lines_or_nuls_and_names_that_are_not_utf8(fakes, tmp_path):
    call("ingest", "--files-from", "-", stdin=b"one.md\ntwo words.md\r\n\n")
    assert fakes.ingest_options.paths == (Path("one.md"), Path("two words.md"))
    assert fakes.ingest_options.stdin is None
    listing = tmp_path / "list"
    listing.write_bytes(b"a\nb.md\0\xff.md\0")
    call("ingest", "c.md", "--files-from", listing)
    assert fakes.ingest_options.paths == (Path("c.md"), Path("a\nb.md"), Path("\udcff.md"))
    assert call("ingest", "--files-from", tmp_path / "none").code == 2
    assert call("ingest", "-", "--files-from", "-").code == 2


def test_options_reach_the_use_case(fakes):
    fields = ["--title-field", "t", "--text-field", "b"]
    call("ingest", "a", "--prune", *fields, "--commit-rows", "9", "--device", "cpu", "--dtype", "bf16")
    options = fakes.ingest_options
    assert (options.prune, options.title_field, options.text_field, options.commit_rows) == (True, "t", "b", 9)
    assert (options.device, options.dtype) == ("cpu", "bf16")


@pytest.mark.parametrize("tty", [True, False])
def test_promise_21_names_of_files_cannot_forge_output(fakes, tty):
    left_out = Skipped(HOSTILE_NAME, HOSTILE_TEXT)
    fakes.ingest_events = [done(HOSTILE_NAME, HOSTILE_TEXT), left_out, summary(left_out)]
    result = call("ingest", "docs", "-q", tty=tty, NO_COLOR="1")
    assert result.code == 3
    assert not any(character in result.out + result.err for character in OBEYED)
    assert "\nerror: forged" not in result.err
    result = call("ingest", "docs", "-q", "--json")
    assert result.lines[0]["title"].startswith("a\x1b[31mred")
    assert not any(character in result.out + result.err for character in OBEYED)
