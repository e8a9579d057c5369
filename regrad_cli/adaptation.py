"""What the passages that a question found make of the prior: rows of a bank → gradients, weights, their change of θ.

Knows a snapshot and its engine; loads no language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Protocol

from regrad_cli.bank import Snapshot
from regrad_cli.engine import Engine
from regrad_cli.records import Hit
from regrad_cli.segments import cosines, heavy, shared

if TYPE_CHECKING:
    import numpy as np
    import torch

    from regrad_cli.learn.codec import Codec
    from regrad_cli.learn.prior import Prior
    from regrad_cli.learn.rows import Parts


class Gradients(Protocol):
    """Gradients of m segments."""

    def weighted(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        """Σ wᵢ gᵢ: {tensor name: (rows, cols) float32}."""

    def dense(self) -> dict[str, torch.Tensor]:
        """{tensor name: (m, rows, cols) float32}"""

    def picked(self, places: Sequence[int]) -> Gradients:
        """Those in these places."""


@dataclass(frozen=True, eq=False)
class Coded:
    """Gradients as a codec keeps them: codes (m, C) uint8, scales (m, S) float16; decoded on this device."""

    codec: Codec
    codes: np.ndarray
    scales: np.ndarray
    device: torch.device

    def weighted(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        return self.codec.weighted(self.codes, self.scales, weights, self.device)

    def dense(self) -> dict[str, torch.Tensor]:
        return self.codec.decode(self.codes, self.scales, self.device)

    def picked(self, places: Sequence[int]) -> Coded:
        return replace(self, codes=self.codes[list(places)], scales=self.scales[list(places)])


@dataclass(frozen=True, eq=False)
class Dense:
    """Gradients as they are: {tensor name: (m, rows, cols) float32}."""

    tensors: dict[str, torch.Tensor]

    def weighted(self, weights: Sequence[float]) -> dict[str, torch.Tensor]:
        return {
            name: sum((row * weight for row, weight in zip(stack, weights, strict=True)), stack.new_zeros(()))
            for name, stack in self.tensors.items()
        }

    def dense(self) -> dict[str, torch.Tensor]:
        return self.tensors

    def picked(self, places: Sequence[int]) -> Dense:
        return Dense({name: stack[list(places)] for name, stack in self.tensors.items()})


@dataclass(frozen=True)
class Adaptation:
    """θ and the gradients of k passages.

    gradients   of the passages' m segments
    weights     m floats, by the prior's rule
    gamma       strength, the prior's own included
    owners      m places: of which of the k passages each is
    """

    prior: Prior
    gradients: Gradients
    weights: tuple[float, ...]
    gamma: float
    owners: tuple[int, ...]

    def among_passages(self) -> Adaptation:
        """The same where the prompt shows the passages."""
        return replace(self, prior=self.prior.among_passages())

    def of_passages(self, k: int) -> tuple[float, ...]:
        """What those gradients of each of the k passages weigh that are applied."""
        return self.applied().shares(k)

    def shares(self, k: int) -> tuple[float, ...]:
        """What the gradients of each of the k passages weigh."""
        return tuple(
            sum(weight for owner, weight in zip(self.owners, self.weights, strict=True) if owner == place)
            for place in range(k)
        )

    def alone(self, place: int | None) -> Adaptation:
        """By the gradients of one of the passages, which get all the weight; None for all of them, as they are."""
        if place is None:
            return self
        share = self.shares(place + 1)[place]
        part = sum(self.weights) / share if share > 0 else 0.0
        own = (
            weight * part if owner == place else 0.0 for owner, weight in zip(self.owners, self.weights, strict=True)
        )
        return replace(self, weights=tuple(own))

    def applied(self) -> Adaptation:
        """Without the gradients that hardly weigh anything."""
        kept = heavy(self.weights)
        return replace(
            self,
            gradients=self.gradients.picked(kept),
            weights=tuple(self.weights[place] for place in kept),
            owners=tuple(self.owners[place] for place in kept),
        )

    def change(self, without: int | None = None) -> dict[str, torch.Tensor]:
        """What the gradients add to θ, −γ · α · Σ wᵢ gᵢ tensor by tensor: {tensor name: (rows, cols) float32}.

        without     the place of a passage that is left out; the others keep their weights
        source      ReGrad, arXiv 2606.15734, section on adaptation at inference
        """
        own = self.applied()
        weights = [0.0 if owner == without else weight for owner, weight in zip(own.owners, own.weights, strict=True)]
        steps = self.prior.step_sizes
        return {name: total.mul_(-self.gamma * steps[name]) for name, total in own.gradients.weighted(weights).items()}


def adaptation_by(
    engine: Engine, snapshot: Snapshot, question: str, hits: Sequence[Hit], gamma: float, device: str
) -> Adaptation:
    """The adaptation to a question by the gradients of these passages, decoded on this device.

    raises  Damaged where a row is not what its checksum says
    """
    from regrad_cli.learn.model import choose_device

    rows = snapshot.read_rows([hit.ref for hit in hits])
    parts = engine.layout.split(rows.codes, rows.scales)
    if parts.vectors is None:
        weights = engine.prior.weights_for([hit.score for hit in hits])
    else:
        near = _cosines(engine, question, parts, len(hits))
        weights = engine.prior.weights_for([_refined(hit, own) for hit, own in zip(hits, near, strict=True)])
        weights = shared(weights, _fits(engine, question, hits, parts, near), engine.prior.segment_temperature)
    gradients = Coded(engine.layout.codec, parts.codes, parts.scales, choose_device(device))
    strength = gamma * float(engine.prior.card["gamma"])
    return Adaptation(engine.prior, gradients, tuple(weights), strength, tuple(parts.owners.tolist()))


def _cosines(engine: Engine, question: str, parts: Parts, k: int) -> list[np.ndarray]:
    """Of the question and the segments of each of the k passages; zeros where there is no embedder."""
    import numpy as np

    near = np.zeros(len(parts.owners))
    if engine.embeds and parts.vectors is not None:
        near = cosines(engine.question_vector(question), parts.vectors)
    return [near[parts.owners == place] for place in range(k)]


def _refined(hit: Hit, near: np.ndarray) -> float:
    """A hit's score, with the cosine of its best segment for half of the passage's own (docs/retrieval.md)."""
    from regrad_cli.retrieval import COSINE_SHARE

    if hit.dense is None:
        return hit.score
    share = 1.0 if hit.lexical is None else COSINE_SHARE
    return hit.score + share * (float(near.max()) - hit.dense) / 2


def _fits(
    engine: Engine, question: str, hits: Sequence[Hit], parts: Parts, near: Sequence[np.ndarray]
) -> list[np.ndarray]:
    """How well each hit's segments fit the question. Without an embedder their words alone count, without text their
    meaning alone."""
    from regrad_cli.lexical import Lexicon
    from regrad_cli.segments import fits, pieces

    if not engine.settings.keep_text:
        return list(near)
    lexicon = Lexicon()
    begins = [parts.begins[parts.owners == place].tolist() for place in range(len(hits))]
    cut = [pieces(hit.passage.title, hit.passage.text or "", own) for hit, own in zip(hits, begins, strict=True)]
    return [fits(question, own, cosine, lexicon) for own, cosine in zip(cut, near, strict=True)]
