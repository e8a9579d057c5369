"""What an evaluation looks like: JSON under cli.md's names, or tables for people. Knows records and the terminal."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

from regrad_cli.render import Column, Terminal
from regrad_cli.results import DriftPoint, Evaluated, Scores
from regrad_cli.shown import count, duration

DIGITS = 4  # of figures in JSON


def evaluated(terminal: Terminal, result: Evaluated) -> None:
    """The end of an evaluation. Piped, each row begins with its file's name, with "all" or with "drift"."""
    if terminal.json:
        terminal.document(as_document(result))
        return
    scopes = {"all": result.pooled} | (result.datasets if len(result.datasets) > 1 else {})
    for name, scores in scopes.items():
        _scores(terminal, name, scores)
    if result.drift:
        _drift(terminal, result)
    if terminal.out_is_terminal:
        terminal.text(f"F1 and EM from 0 to 100, intervals of 95 %; {duration(result.elapsed_s)} in all", "dim")
    terminal.stdout.flush()


def as_document(result: Evaluated) -> dict[str, Any]:
    """The result under the names that `eval --json` has."""
    drift: dict[str, Any] | None = None
    if result.drift:
        drift = {"questions": result.drift_questions}
        for method in dict.fromkeys(point.method for point in result.drift):
            points = [point for point in result.drift if point.method == method]
            drift[method] = [_rounded({k: v for k, v in asdict(p).items() if k != "method"}) for p in points]
    return {
        **_document(result.pooled),
        "drift": drift,
        "datasets": {name: _document(scores) for name, scores in result.datasets.items()},
        "settings": result.settings,
        "skipped": [asdict(one) for one in result.skipped],
        "seconds": round(result.elapsed_s, 3),
    }


def _document(scores: Scores) -> dict[str, Any]:
    found = asdict(scores)
    return {name: _rounded(found[name]) for name in ("tasks", "questions", "modes", "differences", "retrieval")}


def _rounded(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {name: _rounded(item) for name, item in value.items()}
    if isinstance(value, float) and value != 0:  # small ones (a distance, a time) keep digits that say something
        return round(value, DIGITS) if abs(value) >= 1 else float(f"{value:.{DIGITS}g}")
    return value


def _scores(terminal: Terminal, name: str, scores: Scores) -> None:
    if terminal.out_is_terminal:
        asked = f"{count(scores.questions, 'question')} of {count(scores.tasks, 'task')}"
        terminal.parts((name, "bold"), (f"  {asked}", "dim"))
    columns = [Column("mode"), *(Column(heading, number=True) for heading in (
        "EM", "F1", "interval", "seconds", "prompt tokens", "answer tokens"))]  # fmt: skip
    rows = [
        [mode, f"{s.em:.1f}", f"{s.f1:.1f}", _span(s.f1_low, s.f1_high), f"{s.seconds:.3f}", f"{s.prompt_tokens:.0f}",
         f"{s.answer_tokens:.1f}"] for mode, s in scores.modes.items()
    ]  # fmt: skip
    _table(terminal, name, columns, rows)
    columns = [Column("difference"), Column("F1", number=True), Column("interval", number=True)]
    rows = [[pair, f"{gap.f1:+.1f}", _span(gap.low, gap.high)] for pair, gap in scores.differences.items()]
    _table(terminal, name, columns, rows)
    if scores.retrieval is not None:
        columns = [Column("retrieval"), Column("share", number=True)]
        _table(terminal, name, columns, [[k, f"{share:.3f}"] for k, share in scores.retrieval.items()])


def _drift(terminal: Terminal, result: Evaluated) -> None:
    if terminal.out_is_terminal:
        terminal.parts(("drift", "bold"), (f"  {count(result.drift_questions, 'question')}", "dim"))
    headings = ("passages", "distance", "perplexity", "EM", "F1", "interval", "seconds")
    columns = [Column("method"), *(Column(heading, number=True) for heading in headings)]
    _table(terminal, "drift", columns, map(_point, result.drift))


def _point(point: DriftPoint) -> list[str]:
    cells = [point.method, str(point.passages), f"{point.distance:.6g}", f"{point.perplexity:.4g}", f"{point.em:.1f}"]
    return [*cells, f"{point.f1:.1f}", _span(point.f1_low, point.f1_high), f"{point.seconds:.1f}"]


def _span(low: float, high: float) -> str:
    return f"{low:.1f} to {high:.1f}"


def _table(terminal: Terminal, name: str, columns: list[Column], rows: Any) -> None:
    terminal.table(columns, (row if terminal.out_is_terminal else [name, *row] for row in rows))
