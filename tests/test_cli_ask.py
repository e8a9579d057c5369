"""`ask` and `query`: streaming, many questions, JSON, exit codes, and documents that try to forge output."""

from __future__ import annotations

import json

import pytest
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, Fakes, call, passage, terminal

from regrad_cli.cli.app import run
from regrad_cli.errors import Damaged, NoBank, UsageProblem
from regrad_cli.records import Hit, Piece, RowRef, Used

ASK_KEYS = {"question", "answer", "mode", "grounded", "passages", "tokens", "seconds", "model", "prior", "bank"}
SECONDS = {"load", "retrieve", "adapt", "generate", "restore", "total"}


@pytest.fixture
def fakes(monkeypatch):
    return Fakes().install(monkeypatch)


def test_piped_the_answer_alone_is_on_stdout_and_notices_on_stderr(fakes):
    result = call("ask", "How much?")
    assert (result.code, result.out) == (0, "Forty-two\n")
    assert result.err == "prior: untrained\n"


def test_on_a_terminal_the_sources_stand_below_the_answer(fakes):
    result = call("ask", "How much?", tty=True, NO_COLOR="1")
    assert result.out.startswith("Forty-two\n\nSources\n")
    assert "Title" in result.out
    assert "a.md" in result.out
    assert "Sources" not in call("ask", "How much?", "--no-sources", tty=True).out
    assert "Sources" in call("ask", "How much?", "--sources").out


def test_an_answer_without_passages_says_so_on_a_terminal(fakes):
    fakes.used = ()
    assert "answered by itself" in call("ask", "How much?", tty=True).out


def test_what_is_said_of_a_streamed_answer_stands_on_a_line_of_its_own(fakes):
    fakes.used = ()
    streams = terminal(b"", tty=True, environ={"NO_COLOR": "1"})
    streams.stderr = streams.stdout
    assert run(["ask", "How much?"], streams) == 0
    assert "Forty-two\nnothing in the bank fits" in streams.stdout.getvalue()


@pytest.mark.parametrize("question", ["", " ", "\udcff"])
@pytest.mark.parametrize("command", ["ask", "query"])
def test_what_is_no_question_is_a_wrong_command_line(fakes, command, question):
    assert call(command, question).code == 2
    assert not fakes.asked


def test_json_has_the_names_that_others_rely_on(fakes):
    result = call("ask", "How much?", "--json")
    (answer,) = result.lines
    assert set(answer) >= ASK_KEYS
    assert set(answer["seconds"]) >= SECONDS
    assert set(answer["passages"][0]) == {"id", "source", "title", "score", "weight", "text"}
    assert answer["answer"] == "Forty-two"
    assert json.loads(result.err) == {"notice": {"message": "prior: untrained"}}


def test_global_options_work_before_and_after_the_command(fakes):
    for words in (["--json", "ask", "q"], ["ask", "q", "--json"], ["ask", "--json", "q"]):
        assert call(*words).lines[0]["answer"] == "Forty-two"
    for words in (["--bank", "/x", "ask", "q"], ["ask", "q", "--bank", "/x"]):
        call(*words)
        assert [asked for asked in fakes.asked if asked[0] == "bank"][-1] == ("bank", "/x")


def test_quiet_says_nothing_beside_the_answer(fakes):
    assert call("ask", "q", "-q").err == ""


def test_many_questions_use_one_model_and_give_a_line_each_in_order(fakes):
    fakes.pieces = ["Forty\n", "two"]
    result = call("ask", "-", stdin=b'first\n\n{"question": "second"}\nthird')
    assert result.out == "Forty two\n" * 3
    assert fakes.loads == 1
    assert [asked for asked, _ in fakes.asked if asked != "bank"] == ["first", "second", "third"]


def test_a_missing_question_is_read_from_a_pipe(fakes):
    assert call("ask", stdin=b"first\n").out == "Forty-two\n"
    assert call("query", stdin=b"first\n").out.startswith("1\t1\t0.75")


def test_a_missing_question_on_a_terminal_shows_help_and_does_not_hang(fakes):
    for command in ("ask", "query"):
        result = call(command, piped_in=False, tty=True)
        assert result.code == 2
        assert result.out == ""
        assert f"regrad {command}" in result.err
    assert call("ask", "--json", piped_in=False).error["kind"] == "usage"


def test_no_question_on_a_pipe_loads_nothing(fakes):
    result = call("ask", stdin=b"\n\n")
    assert (result.code, result.out, fakes.loads) == (0, "", 0)


def test_a_line_that_is_no_question_keeps_its_place_and_exits_3(fakes):
    result = call("ask", "-", stdin=b"first\n{broken\nthird\n")
    assert result.code == 3
    assert result.out == "Forty-two\n\nForty-two\n"
    assert "standard input, line 2" in result.err
    result = call("ask", "-", "--json", stdin=b"first\n{broken\nthird\n")
    assert [line["answer"] for line in result.lines] == ["Forty-two", None, "Forty-two"]
    assert [json.loads(line) for line in result.err.splitlines() if "skipped" in line] == [
        {"skipped": {"source": "standard input, line 2", "reason": "starts with { but is not JSON"}}
    ]


def test_a_question_that_cannot_be_answered_does_not_end_the_conversation(fakes):
    fakes.raises = UsageProblem("too long")
    result = call("ask", "-", "--json", stdin=b"first\nsecond\n")
    assert result.code == 3
    assert [line["question"] for line in result.lines] == ["first", "second"]
    assert call("ask", "first").code == 2


def test_damage_in_the_middle_of_an_answer_ends_its_line_and_exits_14(fakes):
    fakes.raises = Damaged("row 3 is damaged", "use --skip-damaged")
    result = call("ask", "q")
    assert result.code == 14
    assert result.out == "Forty-two\n"
    assert "row 3 is damaged" in result.err
    assert "--skip-damaged" in result.err
    assert call("ask", "q", "--json").error == {
        "code": 14,
        "kind": "damaged",
        "message": "row 3 is damaged",
        "hint": "use --skip-damaged",
    }


def test_ctrl_c_in_an_answer_is_one_line_and_130(fakes):
    fakes.raises = KeyboardInterrupt()
    result = call("ask", "q", "-q")
    assert result.code == 130
    assert result.out == "Forty-two\n"
    assert result.err == "interrupted\n"
    assert call("ask", "q", "--json").error["code"] == 130


def test_the_use_case_is_closed_before_anything_is_said_of_its_end(fakes, monkeypatch):
    order = []

    def ask(question, options):
        try:
            yield Piece("first")
            yield Piece("second")
        finally:
            order.append("restored")

    def write(self, text):
        if text == "first":
            raise KeyboardInterrupt
        order.append(text)

    fakes._ask = ask
    monkeypatch.setattr("faketerminal.Out.write", write)
    assert call("ask", "q").code == 130
    assert order[0] == "restored"
    assert order[-1] == "interrupted\n"


def test_a_fault_of_ours_is_70_with_a_traceback_only_with_debug(fakes):
    fakes.raises = ZeroDivisionError("oh")
    result = call("ask", "q")
    assert result.code == 70
    assert "Traceback" not in result.err
    assert "ZeroDivisionError" in call("ask", "q", "--debug").err
    assert "Traceback" in call("ask", "q", "--debug", "--json").error["traceback"]


def test_no_bank_is_10_with_the_way_out(fakes):
    fakes.bank_path = NoBank("no bank here", "`regrad init` makes one")
    for words in (["ask", "q"], ["query", "q"], ["bank", "stats"], ["ingest", "x"], ["bank", "rm", "x", "--yes"]):
        result = call(*words)
        assert result.code == 10
        assert "regrad init" in result.err


def test_direct_without_a_bank_asks_the_model_alone(fakes):
    fakes.bank_path = NoBank("no bank here", "")
    assert call("ask", "q", "--mode", "direct").code == 0
    assert fakes.loaded_with["bank"] is None
    assert fakes.loaded_with["model"] == "starter"
    assert call("ask", "q", "--mode", "direct", "--bank", "/x").code == 10


def test_options_reach_the_use_case_and_variables_count(fakes):
    words = "--mode both -k 5 --gamma 0.5 --min-score 0.1 --max-tokens 9 --combine sum"
    words += " --device cpu --dtype fp32 --skip-damaged"
    call("ask", "q", *words.split(), "--snapshot", "2")
    options = fakes.asked[-1][1]
    given = {"mode": "both", "k": 5, "gamma": 0.5, "min_score": 0.1, "max_tokens": 9, "explain": False}
    assert vars(options) == given | {"combine": "sum"}
    expected = {"modes": {"both"}, "device": "cpu", "dtype": "fp32", "snapshot": 2, "skip_damaged": True, "model": None}
    assert expected.items() <= fakes.loaded_with.items()


def test_environment_decides_where_no_flag_does(fakes, monkeypatch):
    monkeypatch.setenv("REGRAD_MODE", "rag")
    monkeypatch.setenv("REGRAD_K", "7")
    call("ask", "q", "-k", "2")
    assert (fakes.asked[-1][1].mode, fakes.asked[-1][1].k) == ("rag", 2)
    monkeypatch.setenv("REGRAD_K", "none")
    result = call("ask", "q")
    assert result.code == 2
    assert "REGRAD_K" in result.err


@pytest.mark.parametrize("words", [["--mode", "rga"], ["-k", "0"], ["--device", "gpu"], ["--gamma", "nan"], ["--wat"]])
def test_wrong_options_are_2_before_anything_is_loaded(fakes, words):
    for extra in ([], ["--json"]):
        result = call("ask", "q", *words, *extra)
        assert result.code == 2
        assert fakes.loads == 0
        assert not extra or result.error["kind"] == "usage"


def test_an_empty_question_is_usage(fakes):
    assert call("ask", "  ").code == 2
    assert call("query", "").code == 2


def test_query_json_has_the_names_that_others_rely_on(fakes):
    (line,) = call("query", "q", "--json").lines
    assert {"rank", "score", "id", "source", "title", "text"} <= set(line)
    assert (line["rank"], line["score"]) == (1, 0.75)


def test_query_piped_is_a_line_a_passage_and_many_questions_are_numbered(fakes):
    fakes.hits = [Hit(RowRef(0, 0), 0.75, passage(text="two\nlines")), Hit(RowRef(0, 1), 0.5, passage(ordinal=1))]
    id = passage().document
    assert call("query", "q").out.splitlines() == [
        f"1\t0.7500\t{id}:0\ta.md\tTitle\ttwo\\nlines",
        f"2\t0.5000\t{id}:1\ta.md\tTitle\tSome text.",
    ]
    numbers = [line.split("\t")[:2] for line in call("query", "-", stdin=b"a\nb\n").out.splitlines()]
    assert numbers == [["1", "1"], ["1", "2"], ["2", "1"], ["2", "2"]]


def test_query_that_finds_nothing_prints_no_data(fakes):
    fakes.hits = []
    assert call("query", "q").out == ""
    assert call("query", "q", "--json").out == ""


@pytest.mark.parametrize("tty", [True, False])
@pytest.mark.parametrize("command", [["ask", "q", "--sources"], ["query", "q"], ["ask", "-"]])
def test_promise_21_documents_and_answers_cannot_forge_output(fakes, tty, command):
    fakes.pieces = [HOSTILE_TEXT[:3], HOSTILE_TEXT[3:]]
    fakes.used = (Used("i:0", HOSTILE_NAME, HOSTILE_TEXT, 0.9, 1.0, HOSTILE_TEXT),)
    fakes.hits = [Hit(RowRef(0, 0), 0.75, passage(HOSTILE_NAME, HOSTILE_TEXT, HOSTILE_TEXT))]
    result = call(*command, stdin=b"q\n", tty=tty, NO_COLOR="1")
    assert result.code == 0
    assert not any(character in result.out + result.err for character in OBEYED)
    assert "\nerror: forged" not in result.out
    if command != ["ask", "-"]:
        assert "[red]" in result.out
    assert "[bold]" in result.out
    result = call(*command, "--json", stdin=b"q\n", tty=tty)
    (line,) = result.lines
    assert not any(character in result.out for character in OBEYED)
    assert "\x1b[31mred" in json.dumps(line, ensure_ascii=False).replace("\\u001b", "\x1b")
