"""The main job's last command: ask, in one mode, explained, or in all modes side by side. Parse, call, render."""

from collections.abc import Iterator
from contextlib import ExitStack
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from regrad_cli.cli import answers, waiting
from regrad_cli.cli.call import Call, SkipDamaged, Snapshot, command
from regrad_cli.cli.work import SECTION, Combine, Gamma, K, MinScore, Search, problem, stated
from regrad_cli.errors import EXIT_DONE, EXIT_PARTIAL, UsageProblem
from regrad_cli.questions import Line, read_questions
from regrad_cli.records import Comparison
from regrad_cli.settings import MODES


def ask(
    call: Call,
    text: Annotated[
        str | None, typer.Argument(metavar="TEXT", help="The question; - reads one a line from standard input.")
    ] = None,
    mode: Annotated[
        str | None,
        typer.Option(
            "--mode",
            metavar="|".join(MODES),
            help="By gradients, by gradients and passages in the prompt, by passages alone, or by neither.",
            autocompletion=lambda: list(MODES),
        ),
    ] = None,
    k: K = None,
    gamma: Gamma = None,
    search: Search = None,
    min_score: MinScore = None,
    combine: Combine = None,
    max_tokens: Annotated[
        int | None, typer.Option("--max-tokens", metavar="N", help="Longest answer, in tokens; 128 if not set.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option("--model", metavar="NAME", help="Where the bank's model lies; or a model to ask without a bank."),
    ] = None,
    snapshot: Snapshot = None,
    skip_damaged: SkipDamaged = False,
    sources: Annotated[
        bool | None,
        typer.Option("--sources/--no-sources", help="List passages below the answer; on a terminal if not set."),
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Answer in all modes, side by side: answers, seconds, prompt tokens.")
    ] = False,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Show how much likelier each passage's gradient made the answer, in nats."),
    ] = False,
) -> int:
    """Answer a question from the bank.

    The answer is streamed. With - or piped input, many questions are answered by one loaded model, in order, one line
    each: a question a line, or JSON lines with "question". Those that already wait are answered together, which
    is faster.
    """
    if text is None and call.terminal.in_is_terminal:
        return call.usage_help("no question was given")
    many = text is None or text == "-"
    question = "" if many else stated(text or "")
    _refuse_together(mode, compare, explain, one_line=many and not call.terminal.json)
    chosen = call.value("mode", mode)
    flags = {"k": k, "gamma": gamma, "min_score": min_score, "combine": combine, "max_tokens": max_tokens}
    settings = {name: call.value(name, flag) for name, flag in flags.items()}
    device, dtype = call.value("device", call.device), call.value("dtype", call.dtype)
    bank = call.bank_path() if compare else _bank_for(call, chosen)
    from regrad_cli import answer  # here, so that a wrong option or a missing bank is told without waiting for torch

    options = answer.AskOptions(mode="regrad" if compare else chosen, explain=explain, **settings)
    if bank is None:
        model = call.value("model", model)
    show_sources = sources if sources is not None else call.terminal.out_is_terminal and not many
    kept: dict[str, Any] = {"snapshot": snapshot, "skip_damaged": skip_damaged, "model": model}
    kept["search"] = call.value("search", search)
    make: Any = _comparer() if compare else partial(answer.Answerer, modes={chosen})
    make = partial(make, bank, device=device, dtype=dtype, **kept)
    if many and not compare and not explain:
        return EXIT_PARTIAL if waiting.answer_lines(call, make, options, show_sources) else EXIT_DONE
    problems = 0
    with ExitStack() as stack:
        answerer: Any = None
        lines: Iterator[Line] = read_questions(call.terminal.input) if many else iter([Line(1, question)])
        for line in lines:
            if line.problem:
                problems += problem(call, line, keep_place=True)
                continue
            if answerer is None:
                answerer = stack.enter_context(make())
            try:
                if compare:
                    number = line.number if many else None
                    _show_comparison(call, answerer.compare(line.question, options), number, show_sources)
                else:
                    events = answerer.ask(line.question, options)
                    answers.show_answer(call, events, stream=not many, sources=show_sources)
            except UsageProblem as refusal:  # this question cannot be answered; the next may be
                if not many:
                    raise
                problems += problem(call, Line(line.number, line.question, refusal.message), keep_place=True)
    return EXIT_PARTIAL if problems else EXIT_DONE


def _refuse_together(mode: str | None, compare: bool, explain: bool, *, one_line: bool) -> None:
    """raises UsageProblem for options of `ask` that do not go together"""
    if compare and explain:
        raise UsageProblem(
            "--compare shows modes and --explain the passages of one mode", "use one of them, or one after the other"
        )
    if compare and mode is not None:
        raise UsageProblem("--compare answers in all modes, so --mode says nothing", "leave --mode out")
    if explain and one_line:
        raise UsageProblem("--explain takes more than a line an answer", "use --json, or ask one question")


def _bank_for(call: Call, mode: str) -> Path | None:
    """The bank; None where a model alone is to answer and there is none."""
    from regrad_cli.errors import NoBank

    try:
        return call.bank_path()
    except NoBank:
        if mode == "direct" and call.value("bank", call.bank_flag) is None:
            return None
        raise


def _comparer() -> Any:
    from regrad_cli.compare import Comparer

    return Comparer


def _show_comparison(call: Call, events: Iterator[Any], number: int | None, sources: bool) -> None:
    with call.follow(events) as results:
        for event in results:
            if isinstance(event, Comparison):
                last = event.answers[-1]
                if not last.grounded:
                    call.terminal.notice(
                        "nothing in the bank fits: in every mode the untouched model answered by itself"
                    )
                answers.warn_of_damage(call, last)
                answers.comparison(call.terminal, event, number=number, sources=sources)


def register(app: typer.Typer) -> None:
    """Put the command into the application."""
    command(app, "ask", bank=True, device=True, dtype=True, section=SECTION)(ask)
