"""What the passages that a question found make of the prior: rows of a bank → gradients, weights, their change of θ.

Knows a snapshot and its engine; loads no language model.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from regrad_cli.bank import Snapshot
from regrad_cli.engine import Engine
from regrad_cli.records import Hit

if TYPE_CHECKING:
    import torch

    from regrad_cli.learn.prior import Prior


@dataclass(frozen=True)
class Adaptation:
    """θ and the gradients of k passages.

    gradients   {tensor name: (k, rows, cols) float32}
    weights     k floats, by the prior's rule
    gamma       strength, the prior's own included
    """

    prior: Prior
    gradients: dict[str, torch.Tensor]
    weights: tuple[float, ...]
    gamma: float

    def change(self, without: int | None = None) -> dict[str, torch.Tensor]:
        """What the gradients add to θ: {tensor name: (rows, cols) float32}.

        without     the place of a passage that is left out; the others keep their weights
        """
        from regrad_cli.learn.adapt import combine

        weights = [0.0 if place == without else weight for place, weight in enumerate(self.weights)]
        return combine(self.gradients, weights, self.prior.step_sizes, self.gamma)


def adaptation_by(engine: Engine, snapshot: Snapshot, hits: Sequence[Hit], gamma: float, device: str) -> Adaptation:
    """The adaptation by the gradients of these passages, decoded on this device.

    raises  Damaged where a row is not what its checksum says
    """
    from regrad_cli.learn.model import choose_device

    rows = snapshot.read_rows([hit.ref for hit in hits])
    gradients = engine.codec.decode(rows.codes, rows.scales, choose_device(device))
    weights = engine.prior.weights_for([hit.score for hit in hits])
    return Adaptation(engine.prior, gradients, tuple(weights), gamma * float(engine.prior.card["gamma"]))
