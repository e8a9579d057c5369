"""`ask --compare`: each mode answers as it does alone, from one loaded model and one retrieval; and what is shown."""

from __future__ import annotations

from pathlib import Path

import pytest
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, answer_of, call, terminal
from story_bank import story_bank
from test_answer import QUESTION
from use_cases import ask

from regrad_cli import answer as answers
from regrad_cli.answer import AskOptions
from regrad_cli.bank import Snapshot
from regrad_cli.cli.answers import comparison
from regrad_cli.compare import MODES_COMPARED, Comparer
from regrad_cli.learn import model as models
from regrad_cli.records import Comparison, Notice, Progress, Used


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    return story_bank(tmp_path_factory.mktemp("compared"), tiny_model_folder, tiny_embedder_folder)


@pytest.fixture(scope="module")
def textless(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    root = tmp_path_factory.mktemp("textless")
    return story_bank(root, tiny_model_folder, tiny_embedder_folder, keep_text=False)


@pytest.fixture
def words(made: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.setenv("REGRAD_BANK", str(made))
    return ["--compare", "--device", "cpu", "--dtype", "fp32", "--max-tokens", "8"]


def compared(bank: Path, *questions: str, **options: object) -> list[Comparison]:
    chosen = AskOptions(**({"max_tokens": 8} | options))  # type: ignore[arg-type]
    with Comparer(bank, device="cpu", dtype="fp32") as comparer:
        events = [event for question in questions for event in comparer.compare(question, chosen)]
    return [event for event in events if isinstance(event, Comparison)]


# ── what is compared ────────────────────────────────────────────────────────────────────────────────────────────────


def test_each_mode_answers_as_it_does_alone(made: Path) -> None:
    (result,) = compared(made, QUESTION, k=2, gamma=0.5)
    assert [each.mode for each in result.answers] == ["direct", "rag", "regrad", "both"]
    for each in result.answers:
        alone = ask(made, QUESTION, each.mode, k=2, gamma=0.5)
        assert (each.answer, each.passages, each.tokens) == (alone.answer, alone.passages, alone.tokens), each.mode
    assert len({each.answer for each in result.answers}) == 4
    assert result.question == QUESTION


def test_the_model_is_loaded_once_and_each_question_looks_for_passages_once(
    made: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads, searches = [], []
    load, search = models.load_model, Snapshot.nearest
    monkeypatch.setattr(models, "load_model", lambda *given, **named: loads.append(1) or load(*given, **named))
    monkeypatch.setattr(Snapshot, "nearest", lambda *given, **named: searches.append(1) or search(*given, **named))
    results = compared(made, QUESTION, "What is rung in Brannoch?", max_tokens=1)
    assert (len(results), len(loads), len(searches)) == (2, 1, 2)


def test_loading_counts_in_no_mode_and_the_retrieval_in_each_that_used_it(made: Path) -> None:
    (result,) = compared(made, QUESTION, max_tokens=2)
    retrieve = result.seconds["retrieve"]
    assert retrieve > 0 and result.seconds["load"] > 0
    seconds = {each.mode: each.seconds for each in result.answers}
    assert [seconds[mode]["retrieve"] for mode in MODES_COMPARED] == [0.0, retrieve, retrieve, retrieve]
    for each in seconds.values():
        assert each["load"] < result.seconds["load"] / 10
        assert sum(value for stage, value in each.items() if stage != "total") == pytest.approx(each["total"])


def test_notices_come_once_a_session_and_progress_counts_the_modes(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    import use_cases

    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder)
    with Comparer(bank, device="cpu", dtype="fp32") as comparer:
        first, second = (list(comparer.compare(QUESTION, AskOptions(max_tokens=1))) for _ in range(2))
    told = [event.message for event in first if isinstance(event, Notice)]
    assert len(told) == 2 and "untrained" in told[1]
    assert not any(isinstance(event, Notice) for event in second)
    assert [event.done for event in first if isinstance(event, Progress)] == [0, 1, 2, 3, 4]


def test_a_bank_without_text_shows_the_modes_that_work_there_and_says_so(textless: Path) -> None:
    with Comparer(textless, device="cpu", dtype="fp32") as comparer:
        assert comparer.modes == ("direct", "regrad")
        events = list(comparer.compare(QUESTION, AskOptions(max_tokens=2)))
        again = list(comparer.compare(QUESTION, AskOptions(max_tokens=2)))
    assert "without modes rag and both" in next(event.message for event in events if isinstance(event, Notice))
    assert not any(isinstance(event, Notice) for event in again)
    assert [each.mode for each in events[-1].answers] == ["direct", "regrad"]  # type: ignore[union-attr]


def test_where_nothing_fits_every_mode_is_the_untouched_model(made: Path) -> None:
    (result,) = compared(made, QUESTION, min_score=1.1)
    assert {(each.grounded, each.answer) for each in result.answers} == {(False, ask(made, QUESTION, "direct").answer)}


# ── the command ─────────────────────────────────────────────────────────────────────────────────────────────────────


def test_json_is_one_document_of_the_four_answers(words: list[str]) -> None:
    document = call("ask", QUESTION, *words, "--json").document
    assert set(document) == {"question", "answers", "seconds"}
    assert [each["mode"] for each in document["answers"]] == list(MODES_COMPARED)
    alone = call("ask", QUESTION, "--mode", "both", *words[1:], "--json").lines[0]
    assert set(document["answers"][3]) == set(alone)
    assert document["answers"][3]["passages"] == alone["passages"]


def test_many_questions_are_a_line_each_in_order(words: list[str]) -> None:
    result = call("ask", "-", *words, "--json", stdin=b"first\n{broken\nthird\n")
    assert result.code == 3
    assert [line["question"] for line in result.lines] == ["first", None, "third"]
    assert [len(line["answers"]) for line in result.lines if "answers" in line] == [4, 4]


def test_piped_a_line_a_mode_numbered_where_there_are_several_questions(words: list[str]) -> None:
    rows = [line.split("\t") for line in call("ask", QUESTION, *words).out.splitlines()]
    assert [row[0] for row in rows] == list(MODES_COMPARED)
    assert all(len(row) == 4 and float(row[2]) > 0 and int(row[3]) > 0 for row in rows)
    rows = [line.split("\t") for line in call("ask", "-", *words, stdin=b"one\n\ntwo\n").out.splitlines()]
    assert [row[:2] for row in rows] == [[number, mode] for number in "13" for mode in MODES_COMPARED]


def test_on_a_terminal_a_table_and_the_passages(words: list[str]) -> None:
    shown = call("ask", QUESTION, *words, tty=True, NO_COLOR="1").out
    assert all(heading in shown for heading in ("mode", "answer", "seconds", "prompt tokens"))
    first_words = [line.split()[0] for line in shown.splitlines() if line.strip()]
    assert [word for word in first_words if word in MODES_COMPARED] == list(MODES_COMPARED)
    assert "Sources" in shown and "Velmora.md" in shown
    assert "Sources" not in call("ask", QUESTION, *words, "--no-sources", tty=True).out


def test_nothing_fits_is_said_once(words: list[str]) -> None:
    result = call("ask", QUESTION, *words, "--min-score", "1.1")
    assert result.err.count("nothing in the bank fits") == 1


@pytest.mark.parametrize("more", [["--explain"], ["--mode", "rag"]])
def test_what_does_not_go_together_is_usage_before_anything_is_loaded(
    words: list[str], monkeypatch: pytest.MonkeyPatch, more: list[str]
) -> None:
    monkeypatch.setattr(answers.Answerer, "__init__", lambda *given, **named: pytest.fail("something was opened"))
    result = call("ask", "q", *words, *more, "--json")
    assert (result.code, result.out, result.error["kind"]) == (2, "", "usage")
    assert result.error["hint"]


def test_a_mode_set_elsewhere_does_not_stand_in_the_way(words: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAD_MODE", "rag")
    assert call("ask", QUESTION, *words).code == 0


def test_without_a_bank_there_is_nothing_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("REGRAD_MODE", "direct")
    assert call("ask", "q", "--compare").code == 10


@pytest.mark.parametrize("tty", [True, False])
def test_promise_21_a_hostile_answer_cannot_forge_a_row(tty: bool) -> None:
    used = (Used("i:0", HOSTILE_NAME, HOSTILE_TEXT, 0.9, 1.0, HOSTILE_TEXT),)
    four = tuple(answer_of(HOSTILE_TEXT, HOSTILE_TEXT, mode, used) for mode in MODES_COMPARED)
    for number in (None, 3):
        streams = terminal(tty=tty, environ={"NO_COLOR": "1"})
        comparison(streams, Comparison(HOSTILE_TEXT, four, {}), number=number, sources=True)
        out = streams.stdout.getvalue()  # type: ignore[attr-defined]
        assert not any(character in out for character in OBEYED)
        assert "\nerror: forged" not in out
        if not tty:
            assert len(out.splitlines()[:4]) == 4 and all("\t" in line for line in out.splitlines()[:4])
