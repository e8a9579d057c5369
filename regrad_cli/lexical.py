"""How much of a question's words a text holds. Knows text and English word endings; no bank, no model, no vectors.

Two measures, both from 0 to 1. `coverage` compares a question with a few hundred candidates and needs nothing but
them: what is rare is counted among the candidates themselves. `Bm25` ranks a whole corpus, indexed in memory by bm25s.
Nothing is written to disk, so nothing of a removed passage can stay behind here.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import numpy as np
import numpy.typing as npt

# Words that say how a question is asked, not what it is about. Longer lists (you, some, about, …) found fewer passages.
_ASKING = """
    a an and are as at be been by did do does for from had has have how in is it its many much of on or that the this
    to was were what when where which who whom whose why with
"""
STOPWORDS = frozenset(_ASKING.split())
# Chinese and Japanese are written without spaces: each of their characters is a word, and pairs of them are the terms.
_IDEOGRAPHS = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
_WORD = re.compile(rf"[{_IDEOGRAPHS}]|[^\W{_IDEOGRAPHS}]+(?:'[^\W{_IDEOGRAPHS}]+)*")
# For texts in ASCII the same in a third of the time: what is in no word becomes a blank.
_BLANKED = bytes(code if re.match(r"[\w']", chr(code), re.ASCII) else 32 for code in range(256))

# Texts without any of the question's words that are imagined beside the candidates: a word that two texts of three
# hold is not common for that. In banks of 4 to 20 passages it halves the questions that are wrongly turned away.
BACKGROUND_TEXTS = 100
RARITY = 1.5  # exponent: BM25 takes 1, the cosine of tf-idf vectors 2

Terms = npt.NDArray[np.int32]


class Lexicon:
    """Words as numbers: one number for all forms of a word, in the order that a session meets them."""

    def __init__(self) -> None:
        self._numbers: dict[str, int] = {}  # of stems
        self._words: dict[str, int] = {}  # each form that was met → its stem's number, -1 for a stopword

    @cached_property
    def _stemmer(self) -> Any:
        import Stemmer

        return Stemmer.Stemmer("english")

    def terms(self, text: str) -> Terms:
        """The text's words as numbers, in order, stopwords left out, (n,) int32."""
        known, words = self._words, words_of(plain(text))
        try:
            terms = np.array([*map(known.__getitem__, words)], np.int32)
        except KeyError:  # words that were not met before
            terms = np.array([known[word] if word in known else self._learn(word) for word in words], np.int32)
        return terms[terms >= 0]

    def _learn(self, word: str) -> int:
        number = -1
        if word not in STOPWORDS:
            number = self._numbers.setdefault(self._stemmer.stemWord(word), len(self._numbers))
        self._words[word] = number
        return number


def plain(text: str) -> str:
    """Lower case, without accents, one kind of apostrophe."""
    if text.isascii():
        return text.lower()
    letters = unicodedata.normalize("NFKD", text.casefold().replace("\u2019", "'"))
    return "".join(letter for letter in letters if not unicodedata.combining(letter))


def words_of(text: str) -> list[str]:
    """The words of a text that is `plain`, in order."""
    if not text.isascii():
        return _WORD.findall(text)
    blanked = text.encode().translate(_BLANKED).decode()
    if "'" in blanked:  # one that is not between two letters is in no word
        blanked = f" {blanked} ".replace("''", "  ").replace(" '", "  ").replace("' ", "  ")
    return blanked.split()


def sharing(question: Terms, texts: Sequence[Terms]) -> npt.NDArray[np.float64]:
    """How much each of a few texts shares with a question, (n,): Σ log((n + 1) / n_w) over the question's words w that
    it holds, n_w being how many of the n texts hold w. What all of them hold tells them apart by next to nothing."""
    held = np.array([np.isin(np.unique(question), text) for text in texts], np.float64)  # (n, words)
    return held @ np.log((len(texts) + 1) / np.maximum(held.sum(axis=0), 1))


def coverage(question: Terms, texts: Sequence[Terms]) -> npt.NDArray[np.float64]:
    """The share of the question that each text holds: the mean of that of its words and that of its pairs of
    neighbouring words, rare ones counting for more; (n,) from 0 to 1.

    A word weighs log(1 + (N − n + ½) / (n + ½)) to the power of 1.5, where n of the N texts hold it; one that no text
    holds weighs most, so a question about something else comes out low everywhere. How often a word occurs and how
    long the text is are left out: beside embeddings they find no more passages (docs/retrieval.md).
    """
    if not len(question) or not texts:
        return np.zeros(len(texts))
    lengths = np.array([len(text) + 1 for text in texts])
    flat = np.full(lengths.sum(), -1, np.int32)  # all texts, with a -1 after each: a pair never spans two
    starts = np.cumsum(lengths) - lengths
    for start, text in zip(starts.tolist(), texts, strict=True):
        flat[start : start + len(text)] = text
    words = list(dict.fromkeys(question.tolist()))
    at = {word: flat == word for word in words}
    shares = _share([np.logical_or.reduceat(at[word], starts) for word in words])
    pairs = list(dict.fromkeys(zip(question[:-1].tolist(), question[1:].tolist(), strict=True)))
    if not pairs:
        return shares
    follows = [at[first] & np.append(at[second][1:], False) for first, second in pairs]
    return (shares + _share([np.logical_or.reduceat(found, starts) for found in follows])) / 2


def _share(held: list[npt.NDArray[np.bool_]]) -> npt.NDArray[np.float64]:
    """held  for each term, which of the texts hold it, (n,)"""
    matrix = np.stack(held, axis=1)  # (texts, terms)
    weights = rarity(matrix.sum(axis=0), len(matrix) + BACKGROUND_TEXTS) ** RARITY
    shares: npt.NDArray[np.float64] = matrix @ weights / weights.sum()
    return shares


def rarity(holding: npt.NDArray[Any], texts: int) -> npt.NDArray[np.float64]:
    """What a term weighs that `holding` of `texts` texts hold: BM25's inverse document frequency."""
    weights: npt.NDArray[np.float64] = np.log1p((texts - holding + 0.5) / (holding + 0.5))
    return weights


class Bm25:
    """A corpus indexed in memory. Scores are BM25's, divided by the most that any text could reach."""

    def __init__(self, texts: Iterable[str], lexicon: Lexicon) -> None:
        self._lexicon = lexicon
        corpus = [lexicon.terms(text).tolist() for text in texts]
        self.texts = len(corpus)
        self._index: Any = None
        self._holding = np.zeros(0, np.int64)  # for each term, how many texts hold it
        if any(corpus):
            from bm25s import BM25

            self._index = BM25(method="lucene", k1=1.2, b=0.75)
            vocabulary = {number: number for number in range(1 + max(max(terms, default=0) for terms in corpus))}
            self._index.index((corpus, vocabulary), show_progress=False)
            self._holding = np.diff(self._index.scores["indptr"])

    def scores(self, question: str) -> npt.NDArray[np.float64]:
        """(n,) from 0 to 1; a word that no text holds counts among what could be reached."""
        terms = list(dict.fromkeys(self._lexicon.terms(question).tolist()))
        known = [term for term in terms if term < len(self._holding)]
        if not known or self._index is None:
            return np.zeros(self.texts)
        holding = np.append(self._holding[known], np.zeros(len(terms) - len(known)))
        found = self._index.get_scores_from_ids(known)
        scores: npt.NDArray[np.float64] = found.astype(np.float64) / rarity(holding, self.texts).sum()
        return scores
