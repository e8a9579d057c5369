"""Questions that wait are answered together: the same answers in the same order, whatever the batch holds."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from faketerminal import call
from story_bank import story_bank
from use_cases import answered

from regrad_cli.answer import Answerer, AskOptions
from regrad_cli.bank import open_bank
from regrad_cli.errors import Damaged, UsageProblem
from regrad_cli.questions import Lines, Questions
from regrad_cli.records import Answer, Notice, Refused

QUESTIONS = (
    "Who lights the lamp in Velmora?",
    "Who rings the bell?",
    "How many keys has keeper 2 of Skerry?",
    "Where is the lamp lit at dusk?",
    "Who is the keeper of part 1 in Brannoch, and how many keys has he?",
)


@pytest.fixture(scope="module")
def bank(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    return story_bank(tmp_path_factory.mktemp("together"), tiny_model_folder, tiny_embedder_folder)


def opened(bank: Path, mode: str, **options: Any) -> Answerer:
    return Answerer(bank, modes={mode}, device="cpu", dtype="fp32", **options)


def together(answerer: Answerer, questions: tuple[str, ...], mode: str, **options: Any) -> list[Any]:
    events = answerer.ask_many(questions, AskOptions(mode=mode, max_tokens=8, **options))
    return [event for event in events if not isinstance(event, Notice)]


def but_for_seconds(answer: Answer) -> Answer:
    return replace(answer, seconds={})


@pytest.mark.parametrize("mode", ["regrad", "both", "rag", "direct"])
def test_each_answer_is_that_of_its_question_alone(bank: Path, mode: str) -> None:
    with opened(bank, mode) as answerer:
        alone = [answered(answerer, question, mode) for question in QUESTIONS]
        found = together(answerer, QUESTIONS, mode)
        backwards = together(answerer, QUESTIONS[::-1], mode)
    assert [but_for_seconds(one) for one in found] == [but_for_seconds(one) for one in alone]
    assert [but_for_seconds(one) for one in backwards[::-1]] == [but_for_seconds(one) for one in alone]
    assert len({one.answer for one in found}) > 1 or mode != "regrad", "answers that are all alike would show nothing"
    for one in found:
        assert one.seconds.keys() == alone[0].seconds.keys()
        assert one.seconds["total"] == pytest.approx(sum(v for name, v in one.seconds.items() if name != "total"))


def test_questions_that_nothing_fits_are_answered_by_the_untouched_model_beside_others(bank: Path) -> None:
    with opened(bank, "regrad", search="lexical") as answerer:
        wanted = [answered(answerer, question, min_score=0.2) for question in (*QUESTIONS, "Quxify zzz?")]
        found = together(answerer, (*QUESTIONS, "Quxify zzz?"), "regrad", min_score=0.2)
    assert {one.grounded for one in found} == {True, False}
    assert [but_for_seconds(one) for one in found] == [but_for_seconds(one) for one in wanted]


def test_a_question_that_cannot_be_answered_keeps_its_place(bank: Path) -> None:
    long = "lamp " * 2000
    with opened(bank, "regrad") as answerer:
        first, refused, empty, last = together(answerer, (QUESTIONS[0], long, "  ", QUESTIONS[1]), "regrad")
        with pytest.raises(UsageProblem) as alone:
            answered(answerer, long)
    assert isinstance(refused, Refused) and refused.question == long and refused.reason == alone.value.message
    assert empty == Refused("  ", "the question is empty")
    assert (first.question, last.question) == (QUESTIONS[0], QUESTIONS[1])


def test_what_stands_before_damage_is_answered_before_it_is_told(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with opened(bank, "regrad") as answerer:
        retrieve = answerer.retrieve

        def broken(question: str, options: AskOptions) -> Any:
            if question == QUESTIONS[2]:
                raise Damaged("row 3 is damaged")
            return (yield from retrieve(question, options))

        monkeypatch.setattr(answerer, "retrieve", broken)
        seen = []
        with pytest.raises(Damaged):
            for event in answerer.ask_many(QUESTIONS, AskOptions(max_tokens=8)):
                seen.append(event)
    assert [event.question for event in seen if isinstance(event, Answer)] == list(QUESTIONS[:2])


def test_the_weights_are_whole_between_answers_and_after_one_left_in_the_middle(bank: Path) -> None:
    from regrad_cli.learn.controls import weights_hash

    with opened(bank, "regrad") as answerer:
        answered(answerer, QUESTIONS[0])
        alone = answered(answerer, QUESTIONS[1])
        assert answerer._opened is not None and answerer._opened.engine is not None
        model = answerer._opened.engine.model
        before = weights_hash(model)
        begun = answerer.ask(QUESTIONS[0], AskOptions(max_tokens=8))
        while isinstance(next(begun), Notice):
            pass
        found = answerer.ask_many(QUESTIONS[1:3], AskOptions(max_tokens=8))
        first = next(event for event in found if isinstance(event, Answer))
        assert not any(projection.module._forward_hooks for projection in model.projections)
        assert first.answer == alone.answer and weights_hash(model) == before


# ── which questions wait ─────────────────────────────────────────────────────────────────────────────────────────────


class Pipe:
    """Both ends; what is written is there at once."""

    def __init__(self) -> None:
        out, self._into = os.pipe()
        self.stream = os.fdopen(out, "rb")

    def write(self, data: bytes) -> None:
        os.write(self._into, data)

    def end(self) -> None:
        os.close(self._into)


def test_lines_that_wait_are_taken_and_nobody_is_waited_for() -> None:
    pipe = Pipe()
    questions = Questions(pipe.stream)
    assert questions.take(5, wait=False) == []
    pipe.write(b"one\ntwo\n\nthree")
    assert [line.question for line in questions.take(5)] == ["one", "two"], "the third is not whole yet"
    assert questions.take(5, wait=False) == []
    pipe.write(b" and more\nfour\nfive\n")
    assert [line.question for line in questions.take(2)] == ["three and more", "four"]
    pipe.write(b"last")
    pipe.end()
    assert [(line.number, line.question) for line in questions.take(9)] == [(6, "five"), (7, "last")]
    assert questions.take(9) == []
    pipe.stream.close()


def test_the_first_line_is_waited_for_however_late_it_comes() -> None:
    pipe = Pipe()
    threading.Timer(0.2, lambda: pipe.write(b"\n\nlate\n")).start()
    assert [line.question for line in Questions(pipe.stream).take(3)] == ["late"]
    pipe.end()
    pipe.stream.close()


def test_a_line_is_cut_where_it_is_asked_to_be() -> None:
    lines = Lines(io.BytesIO(b"abcdef\ngh\n\nij"))
    assert [lines.read(4) for _ in range(7)] == [b"abcd", b"ef\n", b"gh\n", b"\n", b"ij", b"", b""]
    assert not lines.waits()


def test_on_the_command_line_they_are_answered_as_one_by_one(bank: Path) -> None:
    lines = [*QUESTIONS, "{broken", "lamp " * 2000, "Who rings the bell?"]
    usual = ["--bank", bank, "--device", "cpu", "--dtype", "fp32", "--max-tokens", "8"]
    found = call("ask", "-", "--json", *usual, stdin="\n".join(lines).encode())
    assert found.code == 3
    records = found.lines
    assert [record["question"] for record in records] == [*QUESTIONS, None, lines[-2].strip(), "Who rings the bell?"]
    for record, question in zip(records, lines, strict=True):
        if record["answer"] is not None:
            assert record["answer"] == call("ask", question, "--json", *usual).lines[0]["answer"]
    assert [bool(record.get("error")) for record in records] == [False] * 5 + [True, True, False]
    plain = call("ask", "-", *usual, stdin="\n".join(lines).encode())
    assert len(plain.out.split("\n")[:-1]) == len(lines) and plain.code == 3


def test_an_answer_is_given_while_the_next_question_is_still_thought_of(bank: Path) -> None:
    with open_bank(bank):
        pass
    words = [sys.executable, "-m", "regrad_cli", "ask", "-", "--json", "--bank", str(bank), "--device", "cpu"]
    with subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdin is not None and process.stdout is not None
        for question in QUESTIONS[:2]:
            process.stdin.write(f"{question}\n".encode())
            process.stdin.flush()
            assert json.loads(process.stdout.readline())["question"] == question
        process.stdin.close()
        assert process.wait() == 0
