"""The terminal: what is data, what is escaped, what is shown where, and how it ends."""

from __future__ import annotations

import io
import json

import pytest
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, terminal
from hypothesis import example, given
from hypothesis import strategies as st

from regrad_cli.errors import NoBank, UsageProblem
from regrad_cli.questions import read_questions
from regrad_cli.records import Progress
from regrad_cli.render import Column
from regrad_cli.shown import apportioned, count, duration, json_text, percent, size, visible, visible_line


@pytest.mark.parametrize("character", OBEYED)
def test_promise_21_what_a_terminal_obeys_is_shown(character):
    for show in (visible, visible_line):
        shown = show(f"a{character}b")
        assert character not in shown
        assert shown.startswith("a\\")
        assert shown.endswith("b")
        shown.encode("utf-8")


def test_newlines_and_tabs_stay_in_text_and_are_shown_in_a_line():
    assert visible("a\tb\nc\r\nd") == "a\tb\nc\nd"
    assert visible_line("a\tb\nc") == r"a\tb\nc"


def test_languages_and_emoji_are_left_alone():
    text = "Grüße, 日本語, नमस्ते, می‌خواهم, 👩‍👩‍👧, עברית"
    assert visible(text) == text
    assert json_text(text) == f'"{text}"'


def test_bytes_of_a_file_name_that_are_not_utf8_are_named():
    assert visible_line("\udcff.md") == r"\xff.md"


@example([float("nan"), float("-inf")])
@example("\udcff.md")  # as Python carries a file's name that is not UTF-8
@given(
    st.recursive(
        st.text(st.characters()) | st.floats() | st.integers() | st.none(), lambda inner: st.lists(inner, max_size=3)
    )
)
def test_promise_21_json_is_valid_and_safe_on_a_terminal(value):
    text = json_text(value)
    text.encode("utf-8")
    json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is no JSON"))
    assert visible(text) == text


@given(st.text(st.characters(exclude_categories=["Cs"])))
def test_json_reads_back_as_the_same_text(text):
    assert json.loads(json_text({"text": text})) == {"text": text}
    assert json.loads(json_text(text, ascii_only=True)) == text


@given(st.lists(st.text(), max_size=6))
def test_an_answer_in_pieces_is_shown_like_the_whole(pieces):
    streams = terminal()
    for piece in pieces:
        streams.piece(piece)
    streams.end_pieces()
    assert streams.stdout.getvalue() == visible("".join(pieces).strip()) + "\n"


def test_pieces_are_flushed_as_they_come():
    streams = terminal()
    flushed = []
    streams.stdout.flush = lambda: flushed.append(streams.stdout.getvalue())
    streams.piece("one")
    streams.piece("two")
    assert flushed == ["one", "onetwo"]


@pytest.mark.parametrize("tty", [True, False])
def test_promise_21_tables_cannot_be_forged(tty):
    streams = terminal(tty=tty, environ={"NO_COLOR": "1"})
    streams.table((Column("name"), Column("text")), [[HOSTILE_NAME, HOSTILE_TEXT]])
    out = streams.stdout.getvalue()
    assert not any(character in out for character in OBEYED)
    assert "[red]" in out
    if not tty:
        assert out.count("\n") == 1
        assert out.count("\t") == 1


def test_tables_are_tabs_without_headings_when_piped_and_drawn_on_a_terminal():
    piped, drawn = terminal(), terminal(tty=True)
    for streams in (piped, drawn):
        streams.table((Column("name"), Column("size", number=True)), [["a", "1"], ["b", "2"]])
    assert piped.stdout.getvalue() == "a\t1\nb\t2\n"
    assert "name" in drawn.stdout.getvalue()


def test_colours_only_on_a_terminal_that_wants_them():
    assert "\x1b[" in terminal(tty=True).style("x", "red")
    for streams in (
        terminal(),
        terminal(tty=True, environ={"NO_COLOR": "1"}),
        terminal(tty=True, environ={"TERM": "dumb"}),
    ):
        assert streams.style("x", "red") == "x"
        assert streams.style("x", "red", err=True) == "x"


def test_progress_is_on_stderr_of_a_terminal_only():
    for streams, shown in (
        (terminal(tty=True), True),
        (terminal(), False),
        (terminal(tty=True, environ={"TERM": "dumb"}), False),
    ):
        streams.progress(Progress("gradients", 1, 4))
        streams.progress(Progress("gradients", 2, 4))
        streams.close()
        assert ("gradients" in streams.stderr.getvalue()) == shown
        assert streams.stdout.getvalue() == ""


def test_quiet_leaves_errors_and_skipped_inputs():
    streams = terminal(tty=True)
    streams.quiet = True
    streams.progress(Progress("gradients", 1, 4))
    streams.notice("by the way")
    assert streams.stderr.getvalue() == ""
    streams.skipped("a.md", "empty")
    streams.error(NoBank("none here", "make one"))
    assert "a.md: empty" in streams.stderr.getvalue()
    assert "none here" in streams.stderr.getvalue()


def test_promise_21_messages_about_hostile_files_stay_on_their_line():
    for show in ("notice", "warning"):
        streams = terminal()
        getattr(streams, show)(f"reading {HOSTILE_NAME}")
        assert streams.stderr.getvalue().count("\n") == 1
    streams = terminal()
    streams.skipped(HOSTILE_NAME, HOSTILE_TEXT)
    streams.error(UsageProblem(HOSTILE_NAME, HOSTILE_TEXT))
    err = streams.stderr.getvalue()
    assert err.count("\n") == 3
    assert not any(character in err for character in OBEYED)


def test_errors_in_json_have_stable_names():
    streams = terminal()
    streams.json = True
    assert streams.error(NoBank("none here", "make one")) == 10
    expected = {"error": {"code": 10, "kind": "no_bank", "message": "none here", "hint": "make one"}}
    assert json.loads(streams.stderr.getvalue()) == expected


def test_what_nobody_expected_is_70_and_its_traceback_only_with_debug():
    for debug in (False, True):
        streams = terminal()
        streams.debug = debug
        try:
            raise ValueError("odd")
        except ValueError as error:
            assert streams.error(error) == 70
        assert ("Traceback" in streams.stderr.getvalue()) == debug


def test_a_bar_of_parts_says_what_each_is_without_colours_and_without_utf8():
    streams = terminal(tty=True, environ={"COLUMNS": "24", "NO_COLOR": "1"})
    parts = [("big", 990.0, "990 B", "cyan"), ("none", 0.0, "0 B", "red"), ("small", 1.0, "1 B", "dim")]
    streams.stack(parts)
    assert streams.stdout.getvalue().splitlines() == [
        "  " + 19 * "█" + "▓",
        "  █ big    990 B  >99 %",
        "  ▓ small    1 B   <1 %",
    ]
    streams = terminal(tty=True)
    streams.stdout.encoding = "ascii"
    streams.stack(parts)
    assert streams.stdout.getvalue().isascii()
    streams.stack([])


@given(amounts=st.lists(st.floats(0, 1e15), max_size=9), cells=st.integers(9, 80))
def test_cells_of_a_bar_are_all_given_and_none_to_nothing(amounts, cells):
    given_ = apportioned(amounts, cells)
    assert sum(given_) == (cells if any(amounts) else 0)
    assert [number > 0 for number in given_] == [amount > 0 for amount in amounts]
    for one, amount in zip(given_, amounts, strict=True):
        assert all(one <= other + 1 for other, larger in zip(given_, amounts, strict=True) if larger > amount)


def test_shares_are_never_rounded_to_nothing_or_to_all():
    assert [percent(share) for share in (0, 0.001, 0.005, 0.5, 0.994, 0.999, 1)] == [
        "0 %", "<1 %", "<1 %", "50 %", "99 %", ">99 %", "100 %",
    ]  # fmt: skip


def test_questions_come_as_lines_or_json_and_wrong_ones_are_named():
    lines = [
        b"\xef\xbb\xbffirst\r\n",
        b"\n",
        b'{"question": " second "}\n',
        b"{broken\n",
        b'{"other": 1}\n',
        b"\xff\n",
        b"x" * (1 << 20) + b"yy\n",
        b'{"question": "' + b"[" * 9 + b'"}\n',
        b"[" * 50 + b"\n",
        b"last",
    ]
    found = [(line.number, line.question, line.problem) for line in read_questions(io.BytesIO(b"".join(lines)))]
    assert found == [
        (1, "first", ""),
        (3, "second", ""),
        (4, "", "starts with { but is not JSON"),
        (5, "", 'has no text under "question"'),
        (6, "", "not UTF-8"),
        (7, "", "longer than 1 MiB"),
        (8, "[" * 9, ""),
        (9, "[" * 50, ""),
        (10, "last", ""),
    ]


def test_a_json_question_nested_without_end_is_named_not_a_crash():
    (line,) = read_questions(io.BytesIO(b'{"question": ' + b"[" * 100_000 + b"\n"))
    assert line.problem


def test_confirming_needs_someone_to_answer():
    with pytest.raises(UsageProblem) as caught:
        terminal(b"y\n").confirm("Remove?")
    assert "--yes" in caught.value.hint
    for said, meant in ((b"y\n", True), (b"YES\n", True), (b"\n", False), (b"n\n", False), (b"", False)):
        assert terminal(said, tty=True, piped_in=False).confirm("Remove?") is meant


def test_figures_for_people():
    assert [size(n) for n in (0, 999, 1000, 12_345_678, 5e12)] == ["0 B", "999 B", "1.0 kB", "12.3 MB", "5.0 TB"]
    assert [duration(s) for s in (0.04, 9.96, 61, 3660)] == ["0.0 s", "10 s", "1 min 1 s", "1 h 1 min"]
    assert count(1, "passage") == "1 passage"
    assert count(1200, "passage") == "1,200 passages"


def test_bars_fit_the_width_and_an_empty_bank_has_none():
    streams = terminal(tty=True, environ={"NO_COLOR": "1", "COLUMNS": "40"})
    streams.bars([("gradients", 900, "900 B"), ("text", 1, "1 B"), ("index", 0, "0 B")])
    lines = streams.stdout.getvalue().splitlines()
    assert [line.count("█") for line in lines] == [20, 1, 0]
    streams.bars([("gradients", 0, "0 B")])
    assert all(len(line) <= 40 for line in streams.stdout.getvalue().splitlines())
