"""The report is one page that needs nothing beside it and obeys nothing that stands in tasks and answers."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from typing import Any

import pytest
from faketerminal import HOSTILE_TEXT

from regrad_cli.records import Skipped
from regrad_cli.report import page
from regrad_cli.results import Difference, DriftPoint, Evaluated, ModeScore, Scored, Scores

HOSTILE = "<script>alert(1)</script><img src=http://evil.example/x onerror=alert(2)>\"'&{{ 7919 * 7919 }}"
MODES = ("direct", "rag-tuned", "regrad", "random")


def scores(**changes: Any) -> Scores:
    modes = {mode: ModeScore(10.0, 20.0 + n, 15.0, 27.5, 0.25, 40.0, 3.5) for n, mode in enumerate(MODES)}
    values = {
        "tasks": 2, "questions": 3, "modes": modes, "differences": {"regrad - direct": Difference(2.0, -1.0, 5.0)},
        "retrieval": {"recall@1": 0.5, "recall@3": 0.75, "recall@10": 1.0},
    }  # fmt: skip
    return Scores(**(values | changes))


def result(**changes: Any) -> Evaluated:
    points = [DriftPoint("direct", 0, 0.0, 21.5, 1, 2, 1, 3, 0.0)]
    points += [DriftPoint("cpt", size, size / 1e4, 22.5, 1, 2, 1, 3, 9.0) for size in (200, 2000)]
    points += [DriftPoint("regrad", size, 0.0, 21.5, 30, 40, 35, 45, 9.0, {"recall@3": 0.98}) for size in (200, 2000)]
    values = {
        "pooled": scores(), "datasets": {"nq": scores(), "xquad": scores(retrieval=None)}, "drift": tuple(points),
        "drift_questions": 3, "settings": {"model": "starter", "prior": {"name": "p", "trained": True}, "bank": None},
        "skipped": (Skipped("tasks.jsonl:3", "'questions' must be a list"),), "elapsed_s": 75.0,
    }  # fmt: skip
    return Evaluated(**(values | changes))


def answer(number: int, mode: str, text: str = "x", f1: float = 0.0, **changes: Any) -> Scored:
    values = {"dataset": "nq", "task": "t", "question": f"question {number}", "answers": ("right", "also right")}
    values |= {"seconds": 0.1, "prompt_tokens": 5, "answer_tokens": 2} | changes
    return Scored(number=number, mode=mode, answer=text, em=100.0 * (f1 == 100), f1=f1, **values)


class Page(HTMLParser):
    """What a browser would see: elements with their attributes, and whether they are closed as they were opened."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.cells: list[str] = []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))
        if tag not in ("meta", "br"):
            self.open.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and {"td", "th"} & set(self.open):
            self.cells[-1] += data


def assert_self_contained(text: str) -> Page:
    seen = Page(text)
    assert seen.open == []
    tags = {tag for tag, _ in seen.elements}
    assert tags <= {
        "html", "head", "meta", "title", "style", "body", "h1", "h2", "p", "em", "table", "caption", "tr", "th", "td",
        "div", "span", "br", "svg", "desc", "path", "rect", "circle", "text",
    }  # fmt: skip
    for tag, attributes in seen.elements:
        assert not any(name.startswith("on") or name in ("src", "href", "xlink:href") for name in attributes), tag
    styles = re.findall(r"<style>(.*?)</style>", text, re.S)
    assert styles and not any("url(" in style or "@import" in style for style in styles)
    return seen


def test_the_page_shows_every_figure_and_plot() -> None:
    text = page(result(), [answer(n, mode) for mode in MODES for n in range(3)])
    seen = assert_self_contained(text)
    cells = {cell.strip() for cell in seen.cells}
    assert {"20.0", "15.0 to 27.5", "0.250", "40", "3.5", "regrad - direct", "+2.0", "-1.0 to 5.0", "0.750"} <= cells
    assert {"starter", "prior name", "tasks.jsonl:3", "'questions' must be a list", "0.02", "0.2", "21.5"} <= cells
    drawn = [attributes.get("aria-label") for tag, attributes in seen.elements if tag == "svg"]
    assert len(drawn) == 3 * 2 + 3 and all(drawn)
    assert all(name in text for name in ("All files", "nq", "xquad", "1 min 15 s"))


def test_answers_stand_side_by_side_in_the_order_of_questions_and_modes() -> None:
    answers = [answer(n, mode, f"{mode} says {n}") for mode in reversed(MODES) for n in (2, 0, 1)]
    seen = Page(page(result(drift=()), answers))
    said = [cell for cell in seen.cells if " says " in cell]
    assert said == [f"{mode} says {n}" for n in range(3) for mode in MODES]
    assert "right / also right" in seen.cells


def test_right_and_partly_right_answers_are_marked_in_words_and_not_by_colour_alone() -> None:
    answers = [answer(0, "direct", "no"), answer(0, "rag-tuned", "some", 66.7), answer(0, "regrad", "right", 100)]
    cells = Page(page(result(), answers)).cells
    assert {"no", "≈67 some", "✓ right"} <= set(cells)


def test_drifts_answers_and_later_seeds_of_random_are_not_among_them() -> None:
    answers = [answer(0, "random", "heron", run=0), answer(0, "random", "owl", run=1), answer(0, "cpt@200", "egret")]
    text = page(result(), answers)
    assert "heron" in text and "owl" not in text and "egret" not in text


def test_a_mode_without_an_answer_leaves_its_cell_empty() -> None:
    assert_self_contained(page(result(), [answer(0, "regrad")]))
    assert_self_contained(page(result(drift=(), skipped=(), datasets={}), []))


@pytest.mark.parametrize("text", [HOSTILE, HOSTILE_TEXT, "</style></svg></td>-->", "]]>", "\x00\x1b[31m\u202e"])
def test_nothing_from_elsewhere_is_obeyed(text: str) -> None:
    """Wherever a text can stand: every field of records that users' files fill."""
    hostile = answer(0, "regrad", text, dataset=text, task=text, question=text, answers=(text, text), passages=(text,))
    mode = ModeScore(10.0, 20.0, 15.0, 27.5, 0.25, 40.0, 3.5)
    whole = result(
        datasets={text: scores(modes={text: mode}), "other": scores()},
        settings={"tasks": [text], "prior": {"name": text}},
        skipped=(Skipped(text, text),),
    )
    shown = page(whole, [hostile])
    assert_self_contained(shown)
    assert "<script" not in shown and "<img" not in shown and "62710561" not in shown
    assert not any(character in shown for character in "\x00\x1b\u202e\u2066\ud800")
    shown.encode("utf-8")
    if text == HOSTILE:
        assert sum("<script>alert(1)</script>" in cell for cell in Page(shown).cells) >= 5, "it is shown, not dropped"


def test_the_same_result_is_the_same_page() -> None:
    answers = [answer(n, mode) for mode in MODES for n in range(3)]
    assert page(result(), answers) == page(replace(result()), answers[::-1])
