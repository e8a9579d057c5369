"""How right an answer is, and how sure a mean over questions: EM, F1 and paired bootstrap intervals. Knows no model.

Exact match and F1 go from 0 to 100. Normalisation and token F1 as in HotpotQA's own evaluation (Yang et al. 2018,
which takes SQuAD's): lower case, no punctuation, no articles, single spaces.
"""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)
CLOSED = {"yes", "no", "noanswer"}  # a longer answer that holds one of these words is not half right
RESAMPLES = 10_000
LEVEL = 0.95
BLOCK = 500  # resamples drawn at a time: 500 × questions numbers


def normalised(text: str) -> str:
    """Lower case, without punctuation (ASCII), articles and superfluous space."""
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split())


def exact_match(answer: str, aliases: Sequence[str]) -> float:
    """100 where the answer is one of the aliases after normalisation, else 0.

    Where nothing is left of an alias (the blood group "A"), lower case and outer space are all that is forgiven: an
    empty answer is never right.
    """
    return 100.0 * any(_equal(answer, alias) for alias in aliases)


def f1(answer: str, aliases: Sequence[str]) -> float:
    """The harmonic mean of precision and recall over words, against the alias that fits best, 0 to 100."""
    return max(_f1(answer, alias) for alias in aliases)


def _equal(answer: str, alias: str) -> bool:
    wanted = normalised(alias)
    if not wanted:
        return answer.strip().lower() == alias.strip().lower()
    return normalised(answer) == wanted


def _f1(answer: str, alias: str) -> float:
    if _equal(answer, alias):
        return 100.0
    given, wanted = normalised(answer), normalised(alias)
    if given in CLOSED or wanted in CLOSED:
        return 0.0
    words, right = given.split(), wanted.split()
    shared = sum((Counter(words) & Counter(right)).values())
    return 200.0 * shared / (len(words) + len(right)) if shared else 0.0


def resampled_means(
    values: Mapping[str, Sequence[float]], *, seed: int, resamples: int = RESAMPLES
) -> dict[str, npt.NDArray[np.float64]]:
    """Means over bootstrap resamples of the questions, {name: (resamples,)}.

    values   {name: one value a question}, in the same order of questions everywhere: each resample draws the same
             questions for all, so differences of two means are paired
    """
    table = np.array(list(values.values()), dtype=np.float64)  # (names, n)
    n = table.shape[1]
    generator = np.random.default_rng(seed)
    means = np.empty((resamples, len(table)))
    for start in range(0, resamples, BLOCK):
        block = slice(start, min(start + BLOCK, resamples))
        counts = generator.multinomial(n, np.full(n, 1.0 / n), size=block.stop - block.start).astype(np.float64)
        for place, row in enumerate(table):  # one by one: the last bits of a mean do not depend on its neighbours
            means[block, place] = counts @ row / n
    return dict(zip(values, means.T, strict=True))


def interval(means: npt.NDArray[np.float64], level: float = LEVEL) -> tuple[float, float]:
    """The percentile interval of resampled means (or of their differences), (low, high)."""
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)
