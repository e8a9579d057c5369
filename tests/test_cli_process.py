"""The command line as a process: pipes, Ctrl-C, a real terminal, closed and full outputs. Fakes stand behind it."""

from __future__ import annotations

import json
import os
import pty
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

HERE = Path(__file__).parent
DRIVER = """
import sys, time
sys.path[:0] = [{here!r}, {root!r}]
from faketerminal import *
class Patch:
    setitem = staticmethod(dict.__setitem__)
    setattr = staticmethod(lambda target, name, value, raising: setattr(target, name, value))
fakes = Fakes().install(Patch)
{setup}
from regrad_cli.cli import main
sys.exit(main(sys.argv[1:]))
"""
SLOW = """
def ask(question, options):
    yield Piece("first ")
    time.sleep(60)
    yield Piece("never")
fakes._ask = ask
"""
SLOW_INGEST = """
def ingest(bank, options):
    yield done()
    time.sleep(60)
sys.modules["regrad_cli.ingest"].ingest = ingest
"""
PACKING = """
def pack(path, out, *_, **__):
    out.write(b"FORMAT")
    out.flush()
sys.modules["regrad_cli.bank"].pack_bank = pack
"""
MANY = "fakes.snapshot = FakeSnapshot([passage(f'{number}.md') for number in range(20_000)])"


def words(*arguments: str, setup: str = "") -> list[str]:
    code = DRIVER.format(here=str(HERE), root=str(HERE.parent), setup=setup)
    return [sys.executable, "-c", code, *arguments]


def start(*arguments: str, setup: str = "", **options) -> subprocess.Popen[bytes]:
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE} | options
    return subprocess.Popen(words(*arguments, setup=setup), **pipes)


def read_until(stream, wanted: bytes, within_s: float = 20) -> bytes:
    """What comes, until `wanted` is in it."""
    found, end = b"", time.monotonic() + within_s
    while wanted not in found:
        ready, _, _ = select.select([stream], [], [], max(0, end - time.monotonic()))
        assert ready, f"{wanted!r} did not come; got {found!r}"
        piece = os.read(stream.fileno() if hasattr(stream, "fileno") else stream, 65536)
        assert piece, f"ended without {wanted!r}; got {found!r}"
        found += piece
    return found


def test_a_program_can_hold_a_conversation_through_a_pipe():
    process = start("ask", "-", "--json")
    for question in ("first", "second", "third"):
        process.stdin.write(question.encode() + b"\n")
        process.stdin.flush()
        line = read_until(process.stdout, b"\n")
        assert json.loads(line)["question"] == question
    process.stdin.close()
    assert process.wait(20) == 0
    process.stdout.close()
    process.stderr.close()


def test_pieces_reach_a_pipe_as_they_are_generated_and_ctrl_c_is_130():
    process = start("ask", "q", setup=SLOW, stdin=subprocess.DEVNULL)
    assert read_until(process.stdout, b"first") == b"first"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=20)
    assert (process.returncode, out, err) == (130, b"\n", b"interrupted\n")


def test_ctrl_c_in_ingest_says_how_to_resume_in_one_line():
    process = start("ingest", "docs", "--json", setup=SLOW_INGEST, stdin=subprocess.DEVNULL)
    read_until(process.stdout, b"document")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=20)
    assert process.returncode == 130
    assert err.count(b"\n") == 1
    assert "run the same command again" in json.loads(err)["error"]["hint"]


@pytest.mark.parametrize("extra", [[], ["--json"]])
def test_a_reader_that_goes_away_ends_it_quietly(extra):
    process = start("bank", "ls", *extra, setup=MANY, stdin=subprocess.DEVNULL)
    read_until(process.stdout, b"\n")
    process.stdout.close()
    assert process.stderr.read() == b""
    process.stderr.close()
    assert process.wait(20) == 141


def with_closed(streams: str, *arguments: str, setup: str = "") -> subprocess.CompletedProcess[bytes]:
    """A run by a shell that closes `streams` first, as in `regrad … >&-`."""
    command = words(*arguments, setup=setup)
    run = ["sh", "-c", f'"$@" {streams}', "sh", *command]
    return subprocess.run(run, stdin=subprocess.DEVNULL, capture_output=True, timeout=30)


@pytest.mark.parametrize("arguments", [["bank", "ls"], ["ask", "q"], ["ask", "q", "--json"], ["bank", "pack", "-"]])
def test_a_closed_standard_output_is_an_error_where_something_was_to_be_printed(arguments):
    ran = with_closed(">&-", *arguments, "-q", setup=PACKING)
    assert ran.returncode == 70
    assert ran.stderr.count(b"standard output is closed") == 1
    assert b"Traceback" not in ran.stderr


@pytest.mark.parametrize("streams", [">&-", ">&- 2>&-", "<&- >&- 2>&-"])
def test_closed_streams_are_no_crash(streams):
    assert with_closed(streams, "bank", "stats").returncode == 70
    assert with_closed(streams, "bank", "stats", "--nosuch").returncode == 2


def test_what_prints_nothing_needs_no_standard_output():
    assert with_closed(">&-", "bank", "ls", "-q", setup="fakes.snapshot = FakeSnapshot([])").returncode == 0


def test_no_file_gets_the_number_of_a_closed_stream():
    setup = "import atexit, os; atexit.register(lambda: os._exit(os.open(os.devnull, os.O_RDONLY)))"
    assert with_closed("<&- >&- 2>&-", "bank", "stats", setup=setup).returncode > 2


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("arguments", [["bank", "stats"], ["ask", "q"], ["bank", "stats", "--json"]])
def test_a_full_disk_behind_standard_output_is_an_error(arguments):
    with Path("/dev/full").open("wb") as full:
        process = start(*arguments, "-q", stdout=full, stdin=subprocess.DEVNULL)
        _, err = process.communicate(timeout=20)
    assert process.returncode == 70
    assert err.count(b"No space left") == 1
    assert b"Traceback" not in err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("extra", [[], ["--json"], ["--debug"]])
@pytest.mark.parametrize(("arguments", "code"), [(["ask", "q"], 14), (["bank", "nosuch"], 2), (["bank"], 2)])
def test_an_error_that_cannot_be_said_ends_with_its_own_code(arguments, code, extra):
    setup = "from regrad_cli.errors import Damaged; fakes.raises = Damaged('row 3')"
    with Path("/dev/full").open("wb") as full:
        process = start(*arguments, "-q", *extra, setup=setup, stderr=full, stdin=subprocess.DEVNULL)
        process.communicate(timeout=20)
    assert process.returncode == code


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_ctrl_c_that_cannot_be_said_is_130():
    with Path("/dev/full").open("wb") as full:
        process = start("ask", "q", setup=SLOW, stderr=full, stdin=subprocess.DEVNULL)
        read_until(process.stdout, b"first")
        process.send_signal(signal.SIGINT)
        process.communicate(timeout=20)
    assert process.returncode == 130


def test_an_output_that_is_not_utf8_gets_escapes_not_a_crash():
    setup = "fakes.pieces = ['na\\u00efve \\u65e5\\u672c']"
    for extra, wanted in (([], b"na\\xefve \\u65e5\\u672c\n"), (["--json"], b"na\\u00efve \\u65e5\\u672c")):
        process = start(
            "ask", "q", *extra, setup=setup, stdin=subprocess.DEVNULL, env=os.environ | {"PYTHONIOENCODING": "ascii"}
        )
        out, _ = process.communicate(timeout=20)
        assert process.returncode == 0
        assert wanted in out


def in_terminal(*arguments: str, setup: str = "", typed: bytes = b"", wait_for: bytes = b"") -> tuple[int, bytes]:
    """Run on a real pseudo-terminal; `typed` is sent once `wait_for` has come."""
    primary, secondary = pty.openpty()
    environ = os.environ | {"TERM": "xterm", "COLUMNS": "90"}
    process = subprocess.Popen(
        words(*arguments, setup=setup), stdin=secondary, stdout=secondary, stderr=secondary, env=environ,
        start_new_session=True, preexec_fn=_own_terminal,
    )  # fmt: skip
    os.close(secondary)
    shown = b""
    if typed:
        shown += read_until(primary, wait_for)
        os.write(primary, typed)
    while True:
        try:
            piece = os.read(primary, 65536)
        except OSError:  # Linux says EIO where the other side has closed
            break
        if not piece:
            break
        shown += piece
    os.close(primary)
    return process.wait(20), shown


def _own_terminal() -> None:
    import fcntl
    import termios

    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


def test_a_missing_question_on_a_terminal_shows_help_and_does_not_hang():
    code, shown = in_terminal("ask")
    assert code == 2
    assert b"regrad ask" in shown
    assert b"Traceback" not in shown


def test_on_a_terminal_the_answer_and_its_sources_are_shown():
    code, shown = in_terminal("ask", "q")
    assert code == 0
    assert shown.index(b"Forty-two") < shown.index(b"Sources")


def test_ctrl_c_typed_on_a_terminal_ends_ingest_and_takes_the_bar_away():
    setup = SLOW_INGEST.replace("yield done()", "yield Progress('gradients', 1, 9); time.sleep(0.5)")
    code, shown = in_terminal("ingest", "docs", setup=setup, typed=b"\x03", wait_for=b"gradients")
    assert code == 130
    assert b"interrupted: what was committed stays" in shown
    assert shown.rindex(b"\x1b[?25h") > shown.rindex(b"\x1b[?25l")  # the cursor is back
    assert b"Traceback" not in shown


def test_removal_asks_on_a_terminal():
    code, shown = in_terminal("bank", "rm", "a.md", typed=b"y\n", wait_for=b"[y/N]")
    assert code == 0
    assert b"removed a.md" in shown
