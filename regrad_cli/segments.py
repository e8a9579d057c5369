"""A passage's text → its segments: stretches of whole sentences, nearly equal in tokens; and how well each fits a
question. Knows text and vectors; knows no gradient.

Each segment has a gradient of its own, so that a question can weigh what a passage says in one place against the rest.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

from regrad_cli.passages import Tokens, TokenSpans, last_of, read_outline
from regrad_cli.records import embedding_text, training_text

if TYPE_CHECKING:
    import numpy as np

    from regrad_cli.lexical import Lexicon

SEGMENT_TOKENS = 40  # a text is cut into about as many segments as it has so many tokens
SHARED_WORDS = 0.08  # what a word that only one segment shares with the question adds, over log(segments + 1)


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a passage, with the title of the passage."""

    title: str
    text: str

    @property
    def training_text(self) -> str:
        """The exact text its gradient is taken on."""
        return training_text(self.title, self.text)

    @property
    def embedding_text(self) -> str:
        """The exact text that is embedded to weigh it."""
        return embedding_text(self.title, self.text)


def fits(question: str, parts: Sequence[Segment], cosines: np.ndarray, lexicon: Lexicon) -> np.ndarray:
    """How well each segment fits the question, (n,): by meaning and by words, those of its title aside.

    cosines  (n,) of the question's vector and the segments'
    Of meaning alone, of words alone, and of both, both told best which segment holds the answer (docs/retrieval.md).
    """
    import numpy as np

    from regrad_cli.lexical import sharing

    terms = [np.setdiff1d(lexicon.terms(part.text), lexicon.terms(part.title)) for part in parts]
    return cosines + SHARED_WORDS * sharing(lexicon.terms(question), terms)


def segments(text: str, token_spans: TokenSpans, most: int) -> tuple[str, ...]:
    """The text's segments in order, at most `most`; the text itself where it is short or one sentence.

    token_spans  text → (start, end) characters of each token
    The largest of them is as small as whole sentences, items and rows allow.
    """
    if most < 2:
        return (text,)
    tokens = Tokens(text, token_spans)
    wanted = min(most, round(len(tokens.ends) / SEGMENT_TOKENS))
    if wanted < 2:
        return (text,)
    outline = read_outline(text)
    begins = sorted({0, *outline.starts, *(section.start for section in outline.sections)})
    sizes = [tokens.count(begin, end) for begin, end in pairwise([*begins, len(text)])]
    limit = max(*sizes, -(-sum(sizes) // wanted))
    while len(firsts := _packed(sizes, limit)) > wanted:
        limit += 1
    cuts = [begins[first] for first in firsts]
    return tuple(text[begin : last_of(text, begin, end)] for begin, end in pairwise([*cuts, len(text)]))


def _packed(sizes: list[int], limit: int) -> list[int]:
    """Places of the units that begin a new group, where none may grow over `limit`."""
    firsts, filled = [0], 0
    for place, size in enumerate(sizes):
        if filled + size > limit and place > firsts[-1]:
            firsts.append(place)
            filled = 0
        filled += size
    return firsts
