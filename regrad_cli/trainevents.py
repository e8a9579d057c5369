"""What a training run tells as it goes: steps, validations, its end. Plain records; knows no tensor and no file."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One step of training. `loss` is the mean answer loss of its questions, None where every task was left out."""

    step: int
    steps: int
    loss: float | None
    learning_rate: float
    elapsed_s: float
    left_s: float
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Validated:
    """Scores on the dev tasks after `step` steps: {name: mean answer loss}; the lower `chosen`, the better.

    skipped     tasks whose loss is not finite, each with its reason; they are in no mean
    """

    step: int
    losses: dict[str, float]
    chosen: float | None
    best: bool
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Trained:
    """The end of training: the prior in `file` is that of `best_step`.

    skipped     every task that was left out, by name with the reason
    """

    file: str
    steps: int
    best_step: int
    losses: dict[str, float]
    tasks: int
    skipped: tuple[str, ...]
    elapsed_s: float
