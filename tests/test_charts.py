"""Charts draw what they are given: to scale, with a name, and nothing that a text could slip in."""

from __future__ import annotations

import math
import re
import xml.etree.ElementTree as ElementTree
from typing import Any

import pytest

from regrad_cli.charts import MARKED, MOST_POINTS, WIDTH, bar_chart, line_chart


def parsed(svg: str) -> Any:
    return ElementTree.fromstring(svg)


def points(svg: str, name: str) -> list[tuple[float, float]]:
    """Where a series' dots stand."""
    found = [circle for circle in parsed(svg).iter("circle") if (circle.findtext("title") or "").startswith(f"{name}:")]
    return [(float(circle.get("cx")), float(circle.get("cy"))) for circle in found]


def texts(svg: str) -> list[str]:
    return [text.text or "" for text in parsed(svg).iter("text")]


def test_points_lie_to_scale_and_up_is_more() -> None:
    dots = points(line_chart("t", {"a": [(0, 0), (10, 5), (20, 10)], "b": [(0, 10)]}, "x", "y"), "a")
    (x0, y0), (x1, y1), (x2, y2) = dots
    assert x1 - x0 == pytest.approx(x2 - x1, abs=0.2) and x1 > x0
    assert y0 - y1 == pytest.approx(y1 - y2, abs=0.2) and y0 > y1


@pytest.mark.parametrize(
    "values", [(0.0, 1.0), (-3.7, 12.1), (1e-7, 3e-7), (99.5, 100.5), (1e6, 9e9), (5.0, 5.0), (0.0, 0.0), (-2.0, -2.0)]
)
def test_every_point_lies_inside_whatever_the_range(values: tuple[float, float]) -> None:
    for svg in (
        line_chart("t", {"a": [(0, values[0]), (1, values[1])]}, "x", "y"),
        line_chart("t", {"a": [(values[0], 0), (values[1], 1)]}, "x", "y"),
    ):
        root = parsed(svg)
        _, _, width, height = map(float, root.get("viewBox").split())
        dots = points(svg, "a")
        assert len(dots) == 2 and all(0 <= x <= width and 0 <= y <= height for x, y in dots)


def test_ticks_are_round_numbers_around_the_data() -> None:
    shown = texts(line_chart("t", {"a": [(0, 2.1), (1800, 3.9)]}, "step", "loss"))
    assert {"2", "2.5", "3", "3.5", "4", "500", "1,000", "1,500", "2,000", "step", "loss"} <= set(shown)


def test_bars_are_as_long_as_their_values_and_intervals_lie_about_them() -> None:
    svg = bar_chart("t", [("a", 10, 8, 13), ("b", 20, None, None), ("c", -10, -12, -8)], "F1")
    root = parsed(svg)
    a, b, c = [(float(bar.get("x")), float(bar.get("width"))) for bar in root.iter("rect")]
    assert b[1] == pytest.approx(2 * a[1], abs=0.2) and c[1] == pytest.approx(a[1], abs=0.2)
    assert a[0] == b[0] == pytest.approx(c[0] + c[1], abs=0.2), "negative bars go the other way from zero"
    whiskers = [path.get("d") for path in root.iter("path") if path.get("class") == "whisker"]
    assert len(whiskers) == 2
    low, high = (float(re.search(pattern, whiskers[0])[1]) for pattern in (r"^M([\d.]+) ", r"H([\d.]+)"))  # type: ignore[index]
    assert low < a[0] + a[1] < high
    assert any("a: 10.0 (8.0 to 13.0)" in (bar.findtext("title") or "") for bar in root.iter("rect"))


def test_a_chart_has_a_name_and_a_description_for_those_who_hear_it() -> None:
    for svg in (line_chart("Loss", {"dev": [(0, 1)]}, "step", "loss"), bar_chart("Loss", [("dev", 1, 0, 2)], "loss")):
        root = parsed(svg)
        assert (root.get("role"), root.get("aria-label"), root.findtext("title")) == ("img", "Loss", "Loss")
        assert "dev" in root.findtext("desc")
        assert "prefers-color-scheme:dark" in root.findtext("style")


def test_numbers_that_are_none_are_left_out() -> None:
    svg = line_chart("t", {"a": [(0, 1), (1, math.nan), (2, math.inf), (3, 2)]}, "x", "y")
    assert len(points(svg, "a")) == 2
    svg += bar_chart("t", [("a", math.nan, 0, 1), ("b", 1, math.nan, 2)], "y")
    assert "nan" not in svg and "inf" not in svg


def test_nothing_to_show_is_said() -> None:
    assert "no data" in texts(line_chart("t", {}, "x", "y"))
    assert "no data" in bar_chart("t", [], "y")
    parsed(line_chart("t", {"a": []}, "x", "y"))


def test_a_long_series_is_thinned_and_keeps_its_ends() -> None:
    svg = line_chart("t", {"a": [(x, math.sin(x)) for x in range(20_000)]}, "x", "y")
    (line,) = [path.get("d") for path in parsed(svg).iter("path") if path.get("class") == "s0"]
    assert line.count("L") <= MOST_POINTS + 1 and line.count("L") > MARKED
    assert float(line.rpartition("L")[2].split()[0]) == pytest.approx(WIDTH - 20, abs=1)
    assert points(svg, "a") == []
    assert len(svg) < 60_000


def test_series_are_told_apart_by_more_than_colour() -> None:
    svg = line_chart("t", {f"series {n}": [(0, n), (1, n)] for n in range(12)}, "x", "y")
    lines = [path for path in parsed(svg).iter("path") if (path.get("class") or "").startswith("s")]
    assert len({(line.get("class"), line.get("stroke-dasharray")) for line in lines}) == 12
    assert {f"series {n}" for n in range(12)} <= set(texts(svg))


@pytest.mark.parametrize("text", ["<script>x</script>", "</title></svg>", "\"'&", "\x1b[31m\u202e\x00"])
def test_texts_are_escaped(text: str) -> None:
    for svg in (line_chart(text, {text: [(0, 1)], "b": []}, text, text), bar_chart(text, [(text, 1, 0, 2)], text)):
        root = parsed(svg)
        assert "script" not in {element.tag for element in root.iter()}
        assert not any(character in svg for character in "\x1b\u202e\x00")
