"""A question → the passages of a bank that fit it, each with one score, and whether anything fits at all.

Knows a snapshot's vectors and texts, and a question's words and vector; no model and no prior. Three ways:

dense    by meaning: the cosine of the embeddings
lexical  by words: BM25 over all passages, indexed in memory when it is first asked for; needs no embedder
fused    both: the passages nearest by meaning, ordered by ⅝ · cosine + ⅜ · the share of the question's words and
         pairs of words that they hold (`lexical.coverage`)

Words are only ever compared with texts that are read for this question or this session, so there is no index to keep
up to date and none to remove passages from. Figures behind every number here: docs/retrieval.md.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import replace
from itertools import islice
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from regrad_cli.bank import Snapshot
from regrad_cli.errors import UsageProblem
from regrad_cli.lexical import Bm25, Lexicon, Terms, coverage
from regrad_cli.records import BankSettings, Hit, RowRef

Vector = npt.NDArray[np.float32]
MinScore = float | Literal["auto"] | None  # a number, the measured one of the way that is used, or none at all

# The passage that answers is among so many nearest ones for all of 3,126 questions; with 200, two are lost.
CANDIDATES = 500
COSINE_SHARE = 0.625
# A passage that scores less does not fit. Found on the train splits by asking banks of 5 to 700 passages their own
# questions and those of other banks; cosines are MiniLM's, and say nothing about those of another embedder.
LEAST_SCORES = {"fused": 0.31, "dense": 0.37, "lexical": 0.20}
MEASURED_EMBEDDER = "24dae3c4c52ac160aa4a74e9e2d7a0d979c706ddfd98c8199a7bb7f71db1b410"
TERMS_KEPT = 200_000  # passages whose words a session keeps as numbers, 0.6 kB each


def way_for(settings: BankSettings, search: str) -> str:
    """The way that is used: "auto" is fused where the bank keeps text, dense where it does not.

    raises  UsageProblem where a bank without text is to be searched by words
    """
    if search == "auto":
        return "fused" if settings.keep_text else "dense"
    if search != "dense" and not settings.keep_text:
        raise UsageProblem("this bank keeps no text, so words cannot be looked for", "use --search dense")
    return search


def least_score(min_score: MinScore, way: str, settings: BankSettings) -> float | None:
    """What a passage must score to fit; None where everything does. "auto" has no number for cosines of an embedder
    that was not measured."""
    if min_score != "auto":
        return min_score
    if way != "lexical" and settings.embedder != MEASURED_EMBEDDER:
        return None
    return LEAST_SCORES[way]


class Retriever:
    """Finds passages of one snapshot, for one question or many.

    way     "dense", "lexical" or "fused", as `way_for` gives it
    vector  text → (d,) float32 of unit norm, the bank's own embedder; not called where the way is lexical
    """

    def __init__(self, snapshot: Snapshot, way: str, *, skip_damaged: bool = False) -> None:
        self.way = way
        self._snapshot = snapshot
        self._skip_damaged = skip_damaged
        self._lexicon = Lexicon()
        self._terms: dict[RowRef, Terms] = {}
        self._corpus: tuple[list[RowRef], Bm25] | None = None

    def find(
        self,
        question: str,
        vector: Callable[[str], Vector],
        k: int,
        *,
        min_score: MinScore = None,
        warm: bool = False,
    ) -> list[Hit]:
        """The k passages that fit best, best first, those that do not fit among them: `fits` says which.

        warm    many questions will follow
        raises  Damaged where what it needs is damaged and is not to be skipped
        """
        if k < 1:
            raise UsageProblem(f"k is {k}; at least one passage must be asked for")
        if self.way == "lexical":
            hits = self._by_words(question, k)
        elif self.way == "dense":
            found = self._snapshot.search(vector(question)[None], k, warm=warm, skip_damaged=self._skip_damaged)[0]
            hits = [replace(hit, dense=hit.score) for hit in found]
        else:
            hits = self._by_both(question, vector(question), k, warm)
        least = least_score(min_score, self.way, self._snapshot.settings)
        if least is None:
            return hits
        return [replace(hit, fits=hit.score >= least) for hit in hits]

    def _by_both(self, question: str, vector: Vector, k: int, warm: bool) -> list[Hit]:
        asked = self._lexicon.terms(question)
        wanted = min(k, self._snapshot.manifest.counts.passages)
        count = max(CANDIDATES, k)
        while True:
            (near,) = self._snapshot.nearest(vector[None], count, warm=warm, skip_damaged=self._skip_damaged)
            texts = self._terms_of([candidate.ref for candidate in near], warm)
            near = [candidate for candidate in near if candidate.ref in texts]
            shares = coverage(asked, [texts[candidate.ref] for candidate in near]).tolist()
            scored = [(-_fused(each.score, share), each.ref, share) for each, share in zip(near, shares, strict=True)]
            lexical = {ref: share for _, ref, share in scored}
            hits = [
                replace(hit, score=_fused(hit.score, lexical[hit.ref]), dense=hit.score, lexical=lexical[hit.ref])
                for hit in self._proved((ref for _, ref, _ in sorted(scored)), k, vector)
            ]
            if len(hits) == wanted or count >= self._snapshot.manifest.counts.passages:
                return _in_order(hits)
            count *= 4  # damaged rows took places of good ones

    def _by_words(self, question: str, k: int) -> list[Hit]:
        if self._corpus is None:
            passages = list(self._snapshot.passages(skip_damaged=self._skip_damaged))
            index = Bm25((passage.embedding_text for _, passage, _ in passages), self._lexicon)
            self._corpus = [ref for ref, _, _ in passages], index
        refs, index = self._corpus
        scores = index.scores(question)
        order = [place for place in np.argsort(-scores, kind="stable").tolist() if scores[place] > 0]
        of = {refs[place]: float(scores[place]) for place in order}
        hits = self._proved((refs[place] for place in order), k)
        return _in_order([replace(hit, score=of[hit.ref], lexical=of[hit.ref]) for hit in hits])

    def _proved(self, refs: Iterable[RowRef], k: int, vector: Vector | None = None) -> Iterable[Hit]:
        return islice(self._snapshot.hits(refs, vector, skip_damaged=self._skip_damaged), k)

    def _terms_of(self, refs: list[RowRef], warm: bool) -> dict[RowRef, Terms]:
        """The words of these passages as numbers; those that are damaged are missing, where that is to be skipped."""
        unread = [ref for ref in refs if ref not in self._terms]
        if len(self._terms) + len(unread) > TERMS_KEPT:
            self._terms.clear()
            unread = refs
        for ref, passage in self._snapshot.texts(unread, warm=warm, skip_damaged=self._skip_damaged):
            self._terms[ref] = self._lexicon.terms(passage.embedding_text)
        return self._terms


def _fused(cosine: float, share: float) -> float:
    return COSINE_SHARE * cosine + (1 - COSINE_SHARE) * share


def _in_order(hits: list[Any]) -> list[Hit]:
    return sorted(hits, key=lambda hit: (-hit.score, hit.passage.document, hit.passage.ordinal))
