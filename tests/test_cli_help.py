"""Help, version, completion, mistyped words: what holds for every command alike."""

from __future__ import annotations

import os
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import typer
from faketerminal import Fakes, call

from regrad_cli import __version__
from regrad_cli.cli.app import app
from regrad_cli.errors import RegradError

ROOT = Path(__file__).parent.parent
MAKER = runpy.run_path(str(ROOT / "docs" / "make_commands.py"))
COMMANDS = dict(MAKER["walk"](typer.main.get_command(app), "regrad"))
DUE = ["init", "ingest", "query", "ask", "doctor", "model", "model ls", "model fetch", "config", "config show", "bank"]
DUE += ["export", "meta-train", "eval", "compact", "diff"]
DUE += ["bank " + name for name in ("stats", "ls", "show", "rm", "log", "verify", "repair", "pack", "unpack")]


def test_every_command_that_is_due_is_there():
    assert {f"regrad {name}" for name in DUE} | {"regrad"} == set(COMMANDS)


@pytest.mark.parametrize("path", COMMANDS)
def test_every_command_argument_and_option_has_help(path):
    command = COMMANDS[path]
    assert command.help
    for parameter in command.params:
        assert parameter.help, f"{path} {parameter.name}"
        assert parameter.help.endswith((".", "…")), f"{path} {parameter.name}: {parameter.help}"


@pytest.mark.parametrize("path", COMMANDS)
@pytest.mark.parametrize("option", ["-h", "--help"])
def test_help_is_everywhere_on_stdout(path, option, capsys):
    assert call(*path.split()[1:], option).code == 0
    printed = capsys.readouterr()
    assert printed.out.startswith(f"Usage: {path}")
    assert "\x1b" not in printed.out
    assert printed.err == ""
    assert all(len(line) <= 100 for line in printed.out.splitlines())


@pytest.mark.parametrize("path", [path for path in COMMANDS if not hasattr(COMMANDS[path], "commands")])
def test_json_quiet_and_debug_are_on_every_command(path):
    options = {option for parameter in COMMANDS[path].params for option in parameter.opts}
    assert {"--json", "--quiet", "--debug"} <= options


def test_what_computes_takes_a_device():
    for name, wanted in {"ingest": 2, "ask": 2, "query": 1, "doctor": 2, "export": 2, "eval": 2, "diff": 1}.items():
        options = {option for parameter in COMMANDS[f"regrad {name}"].params for option in parameter.opts}
        assert len(options & {"--device", "--dtype"}) == wanted, name


def test_the_commands_page_is_current():
    assert MAKER["TARGET"].read_text(encoding="utf-8") == MAKER["page"](), "run: python docs/make_commands.py"


def test_every_exit_code_is_on_the_commands_page():
    page = MAKER["HEAD"]
    kinds = [RegradError]
    for kind in kinds:
        kinds += kind.__subclasses__()
    assert all(f" {kind.exit_code} " in page for kind in kinds)


@pytest.mark.parametrize("words", [[], ["bank"], ["model"], ["config"]])
def test_a_group_without_a_command_shows_help_on_stderr_and_is_usage(words):
    result = call(*words)
    assert (result.code, result.out) == (2, "")
    assert "Usage: regrad" in result.err
    assert call(*words, "--json").error["kind"] == "usage"


@pytest.mark.parametrize(
    ("words", "meant"),
    [(["aks", "q"], "'ask'"), (["bank", "lst"], "'ls'"), (["ask", "q", "--jsn"], "--json"), (["igest"], "'ingest'")],
)
def test_mistyped_words_get_a_suggestion(words, meant):
    result = call(*words)
    assert result.code == 2
    assert meant in result.err
    error = call(*words, "--json").error
    assert (error["code"], error["kind"]) == (2, "usage")
    assert meant in error["message"]


def test_a_usage_error_names_the_command_whose_help_tells_more():
    assert "regrad bank rm --help" in call("bank", "rm").err


def test_promise_21_a_hostile_word_on_the_command_line_is_shown():
    assert "\x1b" not in call("\x1b[31mask").err
    assert "\x1b" not in call("ask", "q", "--\x1b[31m").err


def test_version():
    assert call("--version").out == f"regrad {__version__}\n"
    assert call("--version", "--json").document == {"version": __version__}


def test_a_word_after_two_dashes_is_no_option(monkeypatch):
    fakes = Fakes().install(monkeypatch)
    assert call("ask", "--", "--json").out == "Forty-two\n"
    assert fakes.asked[-1][0] == "--json"


def test_completion_is_offered(capsys):
    assert call("--help").code == 0
    assert "--install-completion" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("typed", "offered"), [("regrad ba", "bank"), ("regrad bank st", "stats"), ("regrad ask --mode b", "both")]
)
def test_completion_completes(typed, offered):
    environ = os.environ | {"_REGRAD_COMPLETE": "complete_bash", "COMP_WORDS": typed}
    environ["COMP_CWORD"] = str(typed.count(" "))
    ran = subprocess.run(
        [sys.executable, "-m", "regrad_cli"], capture_output=True, text=True, env=environ, cwd=ROOT, check=False
    )
    assert ran.stdout.split() == [offered], ran.stderr
