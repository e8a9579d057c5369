"""An evaluation as one page of HTML that needs nothing beside it: tables, plots, answers side by side.

Knows records and charts; knows no model, no file and no terminal. Everything that comes from elsewhere (tasks, answers,
names) is escaped, and what a reader could not see is made visible; the page loads nothing and runs no script.
"""

from __future__ import annotations

from collections.abc import Sequence
from importlib.resources import files
from typing import Any

from jinja2 import Environment, StrictUndefined

from regrad_cli import __version__
from regrad_cli.charts import bar_chart, line_chart
from regrad_cli.results import DriftPoint, Evaluated, Scored, Scores
from regrad_cli.shown import duration, visible


def page(result: Evaluated, answers: Sequence[Scored]) -> str:
    """The whole page.

    answers     as they came; those that measured drift, and all but the first seed of mode random, are not shown
    """
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_seen
    )
    template = environment.from_string((files("regrad_cli") / "data" / "report.html").read_text(encoding="utf-8"))
    scopes = {"All files": result.pooled} | (result.datasets if len(result.datasets) > 1 else {})
    return template.render(
        version=__version__,
        scopes=[(name, scores, _charts(name, scores)) for name, scores in scopes.items()],
        settings=_flat(result.settings),
        skipped=result.skipped,
        drift=result.drift,
        drift_questions=result.drift_questions,
        drift_charts=_drift_charts(result.drift) if result.drift else [],
        modes=list(result.pooled.modes),
        questions=_side_by_side(answers, list(result.pooled.modes)),
        elapsed=duration(result.elapsed_s),
    )


def _seen(value: Any) -> Any:
    return visible(value) if type(value) is str else value


def _charts(name: str, scores: Scores) -> list[str]:
    bars = [(mode, one.f1, one.f1_low, one.f1_high) for mode, one in scores.modes.items()]
    gaps = [(pair, gap.f1, gap.low, gap.high) for pair, gap in scores.differences.items()]
    drawn = [bar_chart(f"{name}: F1 by mode", bars, "F1, 0 to 100, with 95 % intervals")]
    if gaps:
        drawn.append(bar_chart(f"{name}: differences in F1", gaps, "F1 points, paired, with 95 % intervals"))
    return drawn


def _drift_charts(points: Sequence[DriftPoint]) -> list[str]:
    methods = [method for method in dict.fromkeys(point.method for point in points) if method != "direct"]
    start = [point for point in points if point.method == "direct"]

    def series(field: str) -> dict[str, list[tuple[float, float]]]:
        return {
            method: [(p.passages, getattr(p, field)) for p in [*start, *points] if p in start or p.method == method]
            for method in methods
        }

    names = (("f1", "F1 on the same questions"), ("distance", "distance of the base weights, relative"),
             ("perplexity", "perplexity of a fixed text"))  # fmt: skip
    return [
        line_chart(f"Passages added: {name}", series(field), "passages", name.partition(",")[0])
        for field, name in names
    ]


def _side_by_side(answers: Sequence[Scored], modes: Sequence[str]) -> list[tuple[Scored, list[Scored | None]]]:
    """For every question, in order: any of its answers (what they share), and the answer of each mode."""
    found: dict[int, dict[str, Scored]] = {}
    for one in answers:
        if one.mode in modes and not one.run:
            found.setdefault(one.number, {})[one.mode] = one
    return [
        (next(iter(by_mode.values())), [by_mode.get(mode) for mode in modes]) for _, by_mode in sorted(found.items())
    ]


def _flat(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, str]]:
    rows: list[tuple[str, str]] = []
    for name, value in settings.items():
        if isinstance(value, dict):
            rows += _flat(value, f"{prefix}{name} ")
        elif value is not None and value != []:
            shown = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
            rows.append((prefix + name.replace("_", " "), shown))
    return rows
