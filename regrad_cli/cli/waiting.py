"""Questions on standard input, those that wait answered together: reads, calls, renders."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from itertools import groupby
from typing import Any

from regrad_cli.cli import answers, views
from regrad_cli.cli.call import Call
from regrad_cli.cli.work import problem
from regrad_cli.errors import UsageProblem
from regrad_cli.questions import Line, Questions
from regrad_cli.records import Refused

TOGETHER = 16  # more in one batch are hardly faster on a CPU, and the first of them waits for the last


def answer_lines(call: Call, make: Callable[[], Any], options: Any, sources: bool) -> int:
    """Every question of standard input, in order, as they come; returns how many had no answer.

    make    gives an Answerer, when the first question is there; `options` are its AskOptions
    """
    questions = Questions(call.terminal.input)
    answerer: Any = None
    problems = 0
    with ExitStack() as stack:
        while lines := questions.take(1):
            if answerer is None and not lines[0].problem:
                answerer = stack.enter_context(make())
                with call.follow(answerer.load()) as rest:  # more questions come meanwhile
                    list(rest)
            lines += questions.take(TOGETHER - 1, wait=False)
            for wrong, group in groupby(lines, key=lambda line: bool(line.problem)):
                if wrong:
                    problems += sum(problem(call, line, keep_place=True) for line in group)
                    continue
                if answerer is None:
                    answerer = stack.enter_context(make())
                problems += _answered(call, answerer, list(group), options, sources)
    return problems


def _answered(call: Call, answerer: Any, lines: Sequence[Line], options: Any, sources: bool) -> int:
    if len(lines) == 1:
        (line,) = lines
        try:
            answers.show_answer(call, answerer.ask(line.question, options), stream=False, sources=sources)
        except UsageProblem as refusal:  # this question cannot be answered; the next may be
            return problem(call, Line(line.number, line.question, refusal.message), keep_place=True)
        return 0
    problems = 0
    place = iter(lines)
    with call.follow(answerer.ask_many([line.question for line in lines], options)) as results:
        for event in results:
            line = next(place)
            if isinstance(event, Refused):
                problems += problem(call, Line(line.number, line.question, event.reason), keep_place=True)
            else:
                answers.warn(call, event)
                views.answer(call.terminal, event, streamed=False, one_line=True, sources=sources)
    return problems
