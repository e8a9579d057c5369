"""What is shown about answers: themselves, modes side by side, what each passage did, an adapter that was written."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path
from typing import Any

from regrad_cli.cli import views
from regrad_cli.cli.call import Call
from regrad_cli.records import Answer, Comparison, Exported, Piece
from regrad_cli.render import Column, Terminal
from regrad_cli.shown import count, size


def show_answer(call: Call, events: Iterator[Any], *, stream: bool, sources: bool) -> None:
    """The events of one question: its answer, streamed or whole."""
    terminal = call.terminal
    streamed = False
    try:
        with call.follow(events) as results:
            for event in results:
                if isinstance(event, Piece) and stream and not terminal.json:
                    streamed = True  # said first: Ctrl-C may come inside the writing
                    terminal.piece(event.text)
                elif isinstance(event, Answer):
                    if streamed:
                        terminal.end_pieces()
                    warn(call, event)
                    views.answer(terminal, event, streamed=streamed, one_line=not stream, sources=sources)
                    streamed = False
                    if not terminal.json:
                        explanation(terminal, event)
    finally:
        if streamed:  # left by an exception or Ctrl-C: what follows starts on a line of its own
            terminal.end_pieces()


def warn(call: Call, answer: Answer) -> None:
    """What is to be said of an answer before it is shown."""
    if not answer.grounded and answer.mode != "direct":
        call.terminal.notice("nothing in the bank fits: the untouched model answered by itself")
    warn_of_damage(call, answer)


def warn_of_damage(call: Call, answer: Answer) -> None:
    if answer.partial:
        left_out = "; ".join(answer.notices)
        call.terminal.warning(f"damaged passages were left out: this answer is partial ({left_out})")


def comparison(terminal: Terminal, result: Comparison, *, number: int | None, sources: bool) -> None:
    """One question's answers by mode; `number` is the question's line where there are several questions.

    Seconds leave loading out. Piped, a line a mode: (number,) mode, answer, seconds, prompt tokens.
    """
    if terminal.json:
        if number is None:
            terminal.document(asdict(result))
        else:
            terminal.record(asdict(result))
        return
    names = (Column("mode"), Column("answer", share=1))
    columns = (*names, Column("seconds", number=True), Column("prompt tokens", number=True))
    rows = []
    for answer in result.answers:
        seconds = answer.seconds["total"] - answer.seconds["load"]
        cells = [answer.mode, " ".join(answer.answer.split()), f"{seconds:.2f}", str(answer.tokens["prompt"])]
        rows.append(cells if number is None or terminal.out_is_terminal else [str(number), *cells])
    if number is not None and terminal.out_is_terminal:
        terminal.parts((f"{number}. {result.question}", "bold"))
    terminal.table(columns, rows)
    if sources:
        views.passages_used(terminal, result.answers[-1])
    terminal.stdout.flush()


def explanation(terminal: Terminal, answer: Answer) -> None:
    """What each passage's gradient did to the answer. Piped, a line a passage: change, weight, id, title."""
    result = answer.explain
    if result is None:
        return
    terminal.text("")
    titles = {used.id: used.title or used.source for used in answer.passages}
    rows = [[f"{each.change:+.3f}", f"{each.weight:.3f}", each.id, titles[each.id]] for each in result.passages]
    if not terminal.out_is_terminal:
        terminal.table((), rows)
        terminal.stdout.flush()
        return
    terminal.text("What each passage's gradient did", "bold")
    columns = (Column("change", number=True), Column("weight", number=True), Column("id"), Column("passage", share=1))
    terminal.table(columns, rows)
    terminal.text(
        "change: by how many nats the answer is likelier with the passage's gradient; below 0 it stands in the way",
        "dim",
    )
    terminal.text(
        f"log-probability of the answer: {result.log_probability:.3f} as given, {result.without_gradients:.3f} by the "
        f"prior alone, {result.base_model:.3f} by the untouched model",
        "dim",
    )
    terminal.stdout.flush()


def exported(terminal: Terminal, result: Exported) -> None:
    """An adapter that was written, what it is made of, and the prompt that it answers."""
    if result.partial:
        terminal.warning(f"damaged passages were left out of the adapter ({'; '.join(result.notices)})")
    if terminal.json:
        terminal.document(asdict(result))
        return
    made_of = f"{count(len(result.passages), 'passage')}, {count(result.modules, 'module')} of rank {result.rank}"
    terminal.parts((f"Wrote the adapter to {Path(result.path)}",), (f"  {made_of}, {size(result.size_bytes)}", "dim"))
    terminal.parts(("model ", "dim"), (result.base_model,))
    for used in result.passages:
        weight = f"  (score {used.score:.2f}, weight {used.weight:.2f})"
        terminal.parts(("  ",), (used.title or used.source, "cyan"), (f"  {used.id}{weight}", "dim"))
    terminal.notice("it was made for this prompt, in the model's chat template:")
    for line in result.prompt.split("\n"):
        terminal.notice(f"  {line}")
