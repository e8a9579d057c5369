"""EM and F1 against examples worked by hand, and intervals that cover what they should."""

from __future__ import annotations

import numpy as np
import pytest

from regrad_cli.scores import exact_match, f1, interval, normalised, resampled_means


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("The  Grey Heron.", "grey heron"),
        ("a man, an ape & the sea", "man ape sea"),
        ("O'Brien's U.S. flag", "obriens us flag"),
        ("Theatre another banana", "theatre another banana"),  # articles go as words, not as letters
        ("  ", ""),
        ("Bạch Đằng (1288)", "bạch đằng 1288"),
        ("the-end", "theend"),  # punctuation first, then articles: as HotpotQA does
    ],
)
def test_normalisation_by_hand(text, plain):
    assert normalised(text) == plain


@pytest.mark.parametrize(
    ("answer", "aliases", "em", "expected"),
    [
        ("the Grey Heron", ["Grey Heron!"], 100, 100),
        ("Grey Heron ferry", ["the grey heron"], 0, 80),  # precision 2/3, recall 1
        ("Heron", ["Grey Heron"], 0, 200 / 3),
        ("sparrow", ["Grey Heron"], 0, 0),
        ("", ["Grey Heron"], 0, 0),
        ("heron heron", ["heron", "the owl"], 0, 200 / 3),  # a word counts as often as it stands there
        ("in 1902", ["1901", "1902"], 0, 200 / 3),  # the best of the aliases
        ("yes it is", ["yes"], 0, 0),  # no half points for yes and no
        ("yes", ["yes it is"], 0, 0),
        ("Yes.", ["yes"], 100, 100),
        ("", ["A"], 0, 0),  # nothing is left of "A", and an empty answer is not right for that
        ("the", ["A"], 0, 0),
        (" a ", ["A"], 100, 100),
    ],
)
def test_em_and_f1_by_hand(answer, aliases, em, expected):
    assert exact_match(answer, aliases) == em
    assert f1(answer, aliases) == pytest.approx(expected)


def test_an_exact_match_has_full_f1_and_no_f1_leaves_the_scale():
    words = ["the", "A", "grey", "heron", "yes", "1902", "", "heron."]
    texts = [f"{one} {other}".strip() for one in words for other in words]
    for answer in texts:
        for alias in texts:
            if alias:
                assert 0 <= f1(answer, [alias]) <= 100
                assert f1(answer, [alias]) == 100 or not exact_match(answer, [alias])


def test_intervals_come_from_the_seed_alone():
    values = {"a": [0.0, 100.0, 50.0, 20.0], "b": [10.0, 0.0, 0.0, 100.0]}
    first, again = (resampled_means(values, seed=3, resamples=800) for _ in range(2))
    other = resampled_means(values, seed=4, resamples=800)
    assert all((first[name] == again[name]).all() for name in values)
    assert not (first["a"] == other["a"]).all()


def test_a_means_interval_is_that_of_the_normal_approximation_where_questions_are_many():
    values = np.random.default_rng(0).uniform(0, 100, 2000)
    low, high = interval(resampled_means({"a": values.tolist()}, seed=1)["a"])
    half = 1.96 * values.std() / 2000**0.5
    assert low == pytest.approx(values.mean() - half, abs=0.1)
    assert high == pytest.approx(values.mean() + half, abs=0.1)


def test_differences_are_paired():
    """Two modes that differ by 5 on every question differ by 5 in every resample, however noisy the questions are."""
    noisy = np.random.default_rng(0).uniform(0, 90, 40)
    means = resampled_means({"a": (noisy + 5).tolist(), "b": noisy.tolist()}, seed=0, resamples=700)
    np.testing.assert_allclose(means["a"] - means["b"], 5.0)
    low, high = interval(means["a"])
    assert high - low > 10


def test_a_mode_has_the_same_interval_whatever_stands_beside_it():
    values = {"a": [0.0, 100.0, 50.0, 20.0], "b": [10.0, 0.0, 0.0, 100.0]}
    alone = resampled_means({"b": values["b"]}, seed=3, resamples=600)["b"]
    np.testing.assert_array_equal(alone, resampled_means(values, seed=3, resamples=600)["b"])


def test_one_question_has_an_interval_of_no_width():
    assert interval(resampled_means({"a": [37.5]}, seed=0)["a"]) == (37.5, 37.5)
