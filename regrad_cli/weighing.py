"""Passages cut into segments and embedded, each once, and how well each segment fits a question. Knows text and
vectors; knows no gradient.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from regrad_cli.lexical import Lexicon
from regrad_cli.segments import SEGMENT_TOKENS, Segment, cosines, cut, fits

if TYPE_CHECKING:
    import numpy as np

    from regrad_cli.passages import TokenSpans


class Vectors:
    """Unit vectors (d,) of texts, each embedded once. `encode` gives (n, d) for n texts."""

    def __init__(self, encode: Callable[[Sequence[str]], np.ndarray]) -> None:
        self._encode = encode
        self._known: dict[str, np.ndarray] = {}

    def add(self, texts: Sequence[str]) -> None:
        """Embeds those that are new, together."""
        fresh = [text for text in dict.fromkeys(texts) if text not in self._known]
        if fresh:
            self._known.update(zip(fresh, self._encode(fresh), strict=True))

    def of(self, texts: Sequence[str]) -> np.ndarray:
        """(n, d)"""
        import numpy as np

        self.add(texts)
        return np.stack([self._known[text] for text in texts])

    def scores(self, question: str, vectors: np.ndarray) -> np.ndarray:
        """How well each of (n, d) fits the question, (n,) float64."""
        return cosines(self.of([question])[0], vectors)


class Cutter:
    """Cuts passages into at most `most` segments, each passage once, and tells how well those fit a question.

    token_spans     text → (start, end) characters of each token
    segment_tokens  as `segments.cut` has it
    """

    def __init__(
        self, token_spans: TokenSpans, most: int, vectors: Vectors, segment_tokens: int = SEGMENT_TOKENS
    ) -> None:
        self.vectors = vectors
        self._spans = token_spans
        self._most = most
        self._segment_tokens = segment_tokens
        self._lexicon = Lexicon()
        self._cut: dict[tuple[str, str], tuple[Segment, ...]] = {}

    def segments(self, title: str, text: str) -> tuple[Segment, ...]:
        """A passage's segments."""
        if (title, text) not in self._cut:
            self._cut[title, text] = cut(title, text, self._spans, self._most, self._segment_tokens)
        return self._cut[title, text]

    def fits(self, question: str, parts: Sequence[Segment]) -> np.ndarray:
        """How well each of a passage's segments fits the question, (n,)."""
        near = self.vectors.scores(question, self.vectors.of([part.embedding_text for part in parts]))
        return fits(question, parts, near, self._lexicon)
