"""A passage's text → its segments: stretches of whole sentences, nearly equal in tokens. Knows text; knows no gradient.

Each segment has a gradient of its own, so that a question can weigh what a passage says in one place against the rest.
"""

from __future__ import annotations

from itertools import pairwise

from regrad_cli.passages import Tokens, TokenSpans, last_of, read_outline

SEGMENT_TOKENS = 40  # a text is cut into about as many segments as it has so many tokens


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
