"""Texts that begin alike, read as one row: what they share once, then what each has of its own. Knows no model.

Shapes: N rows, filled up to L tokens.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate, takewhile

import torch

SHARED = 16  # tokens; fewer are not worth a row
TEXTS = 8  # in a row at most: its attention grows with the square of them


@dataclass(frozen=True, slots=True)
class Row:
    """Texts whose first `shared` tokens are the same: those once, then each one's rest, which sees those and itself."""

    texts: tuple[tuple[int, ...], ...]
    shared: int = 0

    @property
    def ids(self) -> tuple[int, ...]:
        """The shared tokens and the rests, one after the other."""
        return self.texts[0][: self.shared] + tuple(token for text in self.texts for token in text[self.shared :])

    @property
    def rests(self) -> list[int]:
        """How many tokens each text has of its own."""
        return [len(text) - self.shared for text in self.texts]

    def joined(self, parts: Sequence[torch.Tensor]) -> torch.Tensor:
        """What belongs to the row's tokens, (length of ids, …), of what belongs to each text's, (its length, …)."""
        return torch.cat([parts[0][: self.shared], *(part[self.shared :] for part in parts)])

    @property
    def begins(self) -> list[int]:
        """Where each text's rest begins in the row."""
        return list(accumulate(self.rests[:-1], initial=self.shared))

    def at(self, text: int, position: int) -> int:
        """Where in the row a text's token stands, by its position in the text; one of the rest."""
        return self.begins[text] + position - self.shared


def in_common(texts: Sequence[Sequence[int]]) -> int:
    """The number of tokens that all texts begin with."""
    return sum(1 for _ in takewhile(lambda tokens: len(set(tokens)) == 1, zip(*texts, strict=False)))


def layout(rows: Sequence[Row], length: int, device: torch.device, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """What a model has to be told to read these rows, filled up to `length` at their end: nothing where each is one
    text, else the places that see each other, attention_mask (N, 1, L, L) to be added, and position_ids (N, L)."""
    if all(len(row.texts) == 1 for row in rows):
        return {}
    owner = torch.full((len(rows), length), -1)  # of each token: 0 is everyone's, then the texts; filling is apart
    positions = torch.zeros((len(rows), length), dtype=torch.long)  # of filling too: a model may have no further ones
    for number, row in enumerate(rows):
        owner[number, : row.shared] = 0
        positions[number, : row.shared] = torch.arange(row.shared)
        for text, (begin, rest) in enumerate(zip(row.begins, row.rests, strict=True), 1):
            owner[number, begin : begin + rest] = text
            positions[number, begin : begin + rest] = torch.arange(row.shared, row.shared + rest)
    everyones, own = owner[:, None, :] == 0, owner[:, None, :] == owner[:, :, None]
    seen = torch.ones(length, length, dtype=torch.bool).tril() & (everyones | own)
    mask = torch.zeros(seen.shape, dtype=dtype).masked_fill(~seen, torch.finfo(dtype).min)
    return {"attention_mask": mask[:, None].to(device), "position_ids": positions.to(device)}
