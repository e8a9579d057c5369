"""Segments of a passage: nothing is lost, none is larger than it must be, and the one that is asked about fits best."""

from __future__ import annotations

import re
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrad_cli.lexical import Lexicon, sharing
from regrad_cli.passages import TokenSpans
from regrad_cli.segments import (
    LEAST_TOKENS,
    SEGMENT_TOKENS,
    SHARED_WORDS,
    Segment,
    cosines,
    cut,
    fits,
    heavy,
    pieces,
    shared,
)

SENTENCES = (
    "The harbour lies behind two islands.",
    "Its lamp is lit at dusk by the keeper.",
    "A ferry crosses twice a day in summer.",
    "The old bell was cast in another town.",
    "Fish is sold on the eastern quay every morning.",
    "Nobody remembers who built the long wall.",
)


def by_letters(text: str) -> list[tuple[int, int]]:
    """Every letter is a token."""
    return [match.span() for match in re.finditer(r"\S", text)]


def segments(text: str, token_spans: TokenSpans, most: int) -> tuple[str, ...]:
    return tuple(part.text for part in cut("", text, token_spans, most))


def letters(text: str) -> int:
    return len(by_letters(text))


def test_a_short_passage_and_a_single_sentence_stay_whole() -> None:
    short = " ".join(SENTENCES)[: SEGMENT_TOKENS + 10]
    assert segments(short, by_letters, 3) == (short,)
    single = "the lamp and the bell and the ferry and " * 20
    assert len(segments(single, by_letters, 3)) == 1
    text = " ".join(SENTENCES)
    assert segments(text, by_letters, 1) == (text,)


@given(st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=9), st.integers(2, 5))
def test_together_they_are_the_passage_and_the_largest_is_as_small_as_sentences_allow(
    sentences: list[str], most: int
) -> None:
    text = " ".join(sentences)
    found = segments(text, by_letters, most)
    assert " ".join(found) == text
    wanted = max(1, min(most, round(letters(text) / SEGMENT_TOKENS)))
    assert len(found) <= wanted
    sizes = [letters(sentence) for sentence in sentences]
    cuts = combinations(range(1, len(sizes)), min(wanted, len(sizes)) - 1)
    best = min(max(sum(sizes[a:b]) for a, b in zip((0, *cut), (*cut, len(sizes)), strict=True)) for cut in cuts)
    assert max(map(letters, found)) == best


def test_paragraphs_items_and_headings_are_borders_too() -> None:
    text = "# The lamp\n" + "lit at dusk " * 5 + "\n\n# The bell\n" + "rung at dawn " * 5 + "\n\n- " + "red ferry " * 5
    found = segments(text, by_letters, 3)
    assert [part.split()[0] for part in found] == ["#", "#", "-"]


@given(st.lists(st.sampled_from(SENTENCES), min_size=1, max_size=9), st.integers(1, 5))
def test_their_beginnings_alone_give_them_again(sentences: list[str], most: int) -> None:
    text = "\n\n".join(sentences)
    found = cut("Tarn", text, by_letters, most)
    assert found[0].begin == 0 and all(text.startswith(part.text, part.begin) for part in found)
    assert pieces("Tarn", text, [part.begin for part in found]) == found


def test_a_stretch_of_a_token_or_two_has_no_gradient_of_its_own() -> None:
    long = "the lamp and the bell and the ferry and " * 20
    assert len(segments(f"{long}.\n\nNo.", by_letters, 3)) == 1
    enough = "x" * LEAST_TOKENS
    assert segments(f"{long}.\n\n{enough}", by_letters, 3)[-1] == enough


def test_gradients_that_hardly_weigh_are_left_out_and_one_always_stays() -> None:
    assert heavy([0.9, 0.02, 0.03, 0.05]) == [0, 2, 3]
    assert heavy([0.01] * 100) == list(range(100))


def test_a_passages_weight_is_shared_among_its_segments_alone() -> None:
    found = shared([0.75, 0.25], [np.array([0.5, 0.4, 0.1]), np.array([0.9])], 0.1)
    assert sum(found[:3]) == pytest.approx(0.75) and found[3] == pytest.approx(0.25)
    assert found[0] / found[1] == pytest.approx(np.e) and found[1] / found[2] == pytest.approx(np.exp(3))
    assert shared([1.0], [np.array([1000.0, -1000.0])], 0.001) == [1.0, 0.0]


def test_cosines_are_those_of_vectors_of_any_length() -> None:
    vectors = np.array([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0], [0.0, 0.0]], np.float32)
    assert cosines(np.array([1.0, 0.0], np.float32), vectors) == pytest.approx([1, 0, np.sqrt(0.5), 0])


def test_words_that_one_segment_shares_count_for_more_than_words_that_all_share() -> None:
    lexicon = Lexicon()
    texts = [lexicon.terms(text) for text in ("the lamp of Tarn", "the bell of Tarn", "the ferry of Tarn")]
    found = sharing(lexicon.terms("Who lit the lamp lamps of Tarn?"), texts)
    assert found == pytest.approx([np.log(4) + np.log(4 / 3), np.log(4 / 3), np.log(4 / 3)])
    assert sharing(lexicon.terms("Why?"), texts).tolist() == [0.0, 0.0, 0.0]


def test_meaning_and_words_are_added_and_words_of_the_title_count_for_nothing() -> None:
    parts = [Segment("Tarn", "The lamp of Tarn."), Segment("Tarn", "The bell is old."), Segment("Bell", "A bell, red.")]
    cosines = np.array([0.5, 0.4, 0.3])
    found = fits("Where is the bell of Tarn?", parts, cosines, Lexicon())
    assert found == pytest.approx([0.5, 0.4 + SHARED_WORDS * np.log(4), 0.3])
    assert parts[1].training_text == "Tarn\nThe bell is old." and parts[1].embedding_text == "Tarn. The bell is old."
