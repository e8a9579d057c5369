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

SEGMENT_TOKENS = 40  # a text is cut into about as many segments as it has so many tokens, unless its prior says else
LEAST_TOKENS = 4  # a shorter stretch goes with the one before it: of a single token there is no gradient
SHARED_WORDS = 0.08  # what a word that only one segment shares with the question adds, over log(segments + 1)
SEGMENT_TEMPERATURE = 0.3  # of a passage's segments; the best for answers, not for telling which one holds them
LEAST_WEIGHT = 0.03  # a gradient with less changes nothing, and would cost as much as any


@dataclass(frozen=True, slots=True)
class Segment:
    """A stretch of a passage, with the title of the passage; `begin` is its first character there."""

    title: str
    text: str
    begin: int = 0

    @property
    def training_text(self) -> str:
        """The exact text its gradient is taken on."""
        return training_text(self.title, self.text)

    @property
    def embedding_text(self) -> str:
        """The exact text that is embedded to weigh it."""
        return embedding_text(self.title, self.text)


def cosines(question: np.ndarray, vectors: np.ndarray) -> np.ndarray:
    """Of a question's vector (d,) and those of texts (n, d), which need not be of unit norm: (n,) float64."""
    import numpy as np

    # Not by a matrix product: its last bits, and with them the weights, would depend on the number of threads.
    products = np.einsum("nd,d->n", vectors, question, dtype=np.float64)
    return products / np.maximum(np.sqrt(np.einsum("nd,nd->n", vectors, vectors, dtype=np.float64)), 1e-12)


def fits(question: str, parts: Sequence[Segment], cosines: np.ndarray, lexicon: Lexicon) -> np.ndarray:
    """How well each segment fits the question, (n,): by meaning and by words, those of its title aside.

    cosines  (n,) of the question's vector and the segments'
    Of meaning alone, of words alone, and of both, both told best which segment holds the answer (docs/retrieval.md).
    """
    import numpy as np

    from regrad_cli.lexical import sharing

    terms = [np.setdiff1d(lexicon.terms(part.text), lexicon.terms(part.title)) for part in parts]
    return cosines + SHARED_WORDS * sharing(lexicon.terms(question), terms)


def shared(weights: Sequence[float], fits: Sequence[np.ndarray], temperature: float) -> list[float]:
    """Each passage's weight shared among its segments: by softmax(fit / temperature), passage by passage.

    weights  of the k passages; fits: of each one's segments
    returns  the weights of all segments, in order
    """
    import numpy as np

    found: list[float] = []
    for weight, own in zip(weights, fits, strict=True):
        raw = np.exp((own - own.max()) / temperature)
        found += (weight * raw / raw.sum()).tolist()
    return found


def heavy(weights: Sequence[float]) -> list[int]:
    """The places of those gradients that are applied; each of the others hardly weighs anything."""
    least = min(LEAST_WEIGHT, max(weights))  # of very many each has less
    return [place for place, weight in enumerate(weights) if weight >= least]


def cut(
    title: str, text: str, token_spans: TokenSpans, most: int, segment_tokens: int = SEGMENT_TOKENS
) -> tuple[Segment, ...]:
    """A passage's segments in order, at most `most`; the text itself where it is short or one sentence.

    token_spans     text → (start, end) characters of each token
    segment_tokens  about as many segments as the text has so many tokens
    The largest of them is as small as whole sentences, items and rows allow.
    """
    return pieces(title, text, _begins(text, token_spans, most, segment_tokens))


def pieces(title: str, text: str, begins: Sequence[int]) -> tuple[Segment, ...]:
    """The segments of a passage that begin with these characters of its text."""
    ends = [last_of(text, *stretch) for stretch in pairwise(begins)] + [len(text)]
    return tuple(Segment(title, text[begin:end], begin) for begin, end in zip(begins, ends, strict=True))


def _begins(text: str, token_spans: TokenSpans, most: int, segment_tokens: int) -> list[int]:
    if most < 2:
        return [0]
    tokens = Tokens(text, token_spans)
    wanted = min(most, round(len(tokens.ends) / segment_tokens))
    if wanted < 2:
        return [0]
    outline = read_outline(text)
    begins = sorted({0, *outline.starts, *(section.start for section in outline.sections)})
    sizes = [tokens.count(begin, end) for begin, end in pairwise([*begins, len(text)])]
    limit = max(*sizes, -(-sum(sizes) // wanted))
    while len(firsts := _packed(sizes, limit)) > wanted:
        limit += 1
    groups = pairwise([*firsts, len(sizes)])
    return [begins[first] for first, end in groups if not first or sum(sizes[first:end]) >= LEAST_TOKENS]


def _packed(sizes: list[int], limit: int) -> list[int]:
    """Places of the units that begin a new group, where none may grow over `limit`."""
    firsts, filled = [0], 0
    for place, size in enumerate(sizes):
        if filled + size > limit and place > firsts[-1]:
            firsts.append(place)
            filled = 0
        filled += size
    return firsts
