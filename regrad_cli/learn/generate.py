"""Greedy answers to many prompts at once, each row with weights of its own where that is wanted. Knows no tasks.

A batch gives the tokens that `prompt.greedy` gives one by one. In fp32 a test holds that; in bf16 a sum of another
order may move a logit by its last bits, so that where two tokens are nearly tied a batch may take the other one.
"""

from __future__ import annotations

import math
from collections.abc import Generator, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from itertools import chain, islice
from typing import Any

import torch
from torch import nn

from regrad_cli.learn.adapt import Change, changed, check_change, hooked
from regrad_cli.learn.model import Model, Projection
from regrad_cli.learn.prior import Prior
from regrad_cli.learn.prompt import BEGINNING, Beginnings, answer_of, next_tokens, padded_width, said_once

# Prompts in one batch, and their tokens with padding: what a prompt of many passages may take of memory.
ROWS = {"cpu": 16, "cuda": 128, "mps": 32}
TOKENS = {"cpu": 8_192, "cuda": 131_072, "mps": 16_384}
ATTENDED = {"cpu": 512}  # keys that PyTorch's attention adds up at a time


def batches(model: Model, lengths: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Places of prompts (by their lengths in tokens) in batches of similar lengths, shortest first.

    Of prompts that with their answers may pass `ATTENDED` only those of one width are together: attention adds up so
    many keys at a time, and where a row begins elsewhere, its sums are others.
    """
    kind = model.device.type
    rows, tokens = ROWS.get(kind, ROWS["cpu"]), TOKENS.get(kind, TOKENS["cpu"])
    attended = ATTENDED.get(kind)
    found: list[list[int]] = []
    for place in sorted(range(len(lengths)), key=lambda place: (lengths[place], place)):
        width = padded_width(model, lengths[place])
        if (
            not found
            or len(found[-1]) >= rows
            or (len(found[-1]) + 1) * lengths[place] > tokens
            or (
                attended is not None
                and width + max_tokens > attended
                and width != padded_width(model, lengths[found[-1][0]])
            )
        ):
            found.append([])
        found[-1].append(place)
    return found


def greedy_batch(
    model: Model, prompts: Sequence[Sequence[int]], max_tokens: int, beginnings: Beginnings | None = None
) -> list[list[int]]:
    """The answer's tokens for each prompt, without the token that ends it and without what only repeats them.

    beginnings  is told of every step
    """
    ends = set(model.end_ids)
    answers: list[list[int]] = [[] for _ in prompts]
    going = set(range(len(prompts)))
    for tokens in next_tokens(model, prompts, max_tokens, beginnings):
        going -= {row for row in going if tokens[row] in ends}
        for row in going:
            answers[row].append(tokens[row])
        for row in tuple(going):
            if (once := said_once(answers[row])) is not None:
                del answers[row][once:]
                going.remove(row)
        if not going:
            break
    return answers


class Race:
    """A question in several ways, a row each in one batch: after `BEGINNING` tokens the likeliest one's are passed on.

    chances  how likely each way is the right one before it has answered, of 1
    winner   the place of that one, once a token was passed on
    source   Lewis et al., arXiv 2005.11401 (RAG-Sequence), by the beginnings alone: so that answers can be streamed,
             and a long answer is not the less likely for its length
    """

    def __init__(
        self, model: Model, prompts: Sequence[Sequence[int]], chances: Sequence[float], max_tokens: int
    ) -> None:
        self.winner = 0
        self._model, self._prompts, self._chances, self._max_tokens = model, prompts, chances, max_tokens

    def answer(self) -> Generator[int, None, int | None]:
        """The winner's tokens, as `greedy` yields and returns them."""
        return answer_of(self._model, self._tokens())

    def _tokens(self) -> Iterator[int]:
        beginnings = Beginnings(self._model, len(self._prompts))
        steps = next_tokens(self._model, self._prompts, self._max_tokens, beginnings)
        first = list(islice(steps, BEGINNING if len(self._prompts) > 1 else 0))
        self.winner = likeliest(self._chances, beginnings.log_probabilities)
        for tokens in chain(first, steps):
            yield tokens[self.winner]


def likeliest(chances: Sequence[float], beginnings: Sequence[float]) -> int:
    """The place of the answer that is likeliest: log chance + log p of how it begins; the first of equal ones."""
    scores = [math.log(max(chance, 1e-9)) + each for chance, each in zip(chances, beginnings, strict=True)]
    return max(range(len(scores)), key=lambda place: -math.inf if math.isnan(scores[place]) else scores[place])


@contextmanager
def adapted_rows(model: Model, prior: Prior, changes: Sequence[Change]) -> Iterator[None]:
    """`adapted` for a batch: row i of what goes through the model inside meets θ + changes[i].

    changes  as many as the batch has rows, as `adapted` has one
    raises   PriorMismatch where prior or changes are not of this model
    """
    prior.check(model.projections)
    for change in changes:
        check_change(prior, change)

    changing = set().union(*(change for change in changes if change is not None))

    def stacked(name: str, scale: float = 1.0) -> torch.Tensor:
        """(B, rows, cols) in the model's dtype, summed in float32 as `adapted` does; one for all rows, (rows, cols),
        where none is changed."""
        own = prior.tensors[name]
        if name in changing:
            own = torch.stack([changed(prior, change, name) for change in changes])
        return (scale * own).to(model.device, model.dtype)

    def hook(projection: Projection) -> Any:
        a = stacked(projection.name_a).mT  # (B, inputs, r) or (inputs, r)
        b = stacked(projection.name_b, prior.scale).mT  # (B, r, outputs) or (r, outputs)
        return partial(branch, a, b)

    def branch(a: torch.Tensor, b: torch.Tensor, _module: nn.Module, inputs: Any, output: torch.Tensor) -> Any:
        return output + inputs[0] @ a @ b

    with hooked(model, hook):
        yield
