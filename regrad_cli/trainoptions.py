"""What a training run is asked for: its options, what cannot be done, which tasks are learned from and which choose.
Knows no model and no tensor.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from regrad_cli.episodes import OBJECTIVES, EpisodeRules
from regrad_cli.errors import UsageProblem
from regrad_cli.segments import SEGMENT_TEMPERATURE, SEGMENT_TOKENS
from regrad_cli.tasks import Task

RANK = 8
SEGMENTS = 1
EXACT = "none"  # in a codec's place
KEPT = ("best", "last")
TEMPERATURE = 0.05
EARLIER = {
    "reading": 0,
    "segment_tokens": SEGMENT_TOKENS,
    "normalized": False,
}  # of a run whose version had no such option yet
HELD_OUT = 20  # one title in so many is kept aside where no dev tasks are given


@dataclass(frozen=True, slots=True)
class MetaTrainOptions:
    """What to learn from, and how.

    steps           how many; batch: tasks in each; reading: further tasks in each that are read at θ itself, with their
                    passages in the prompt and no gradient of them
    dev             task files to validate on and choose the best by; none: the last step's prior is the result
    init            a prior to begin with, or "shipped"; None: a seeded start
    learning_rate   of θ; step_rate: of log α
    rank            of θ; None: that of `init`, RANK without it
    gradient_layers gradients are of the uppermost so many layers' tensors; None: of all that `init`'s are of
    normalized      passages' gradients are brought to norm 1, tensor by tensor; also where `init` was learned so
    segments        a passage is cut into at most so many, each with a gradient of its own and weighed by the question
    segment_tokens  and into about as many as it has so many tokens
    temperature     of the rule for weights: softmax(score / temperature) over the passages' scores
    segment_temperature  the same for what a passage's weight is shared by among its segments
                    Of these four None is what `init` was learned with; without it SEGMENTS, SEGMENT_TOKENS,
                    TEMPERATURE and SEGMENT_TEMPERATURE
    codec           gradients of the inner step go through this codec, straight through; "none": exact ones; None: what
                    `init` was learned through
    keep            which step's prior is the result: "best", by the dev tasks, or "last"
    validate_every  steps; checkpoint_s: seconds between files to go on from
    """

    tasks: tuple[Path, ...]
    out: Path
    dev: tuple[Path, ...] = ()
    model: str = "starter"
    embedder: str = "minilm"
    init: Path | None = None
    objective: str = "regrad"
    steps: int = 1000
    batch: int = 4
    learning_rate: float = 1e-3
    step_rate: float = 1e-2
    rank: int | None = None
    mix_context: float = 0.25
    reading: int = 0
    strangers: float = 0.4
    k: int = 3
    gradient_layers: int | None = None
    normalized: bool = False
    segments: int | None = None
    segment_tokens: int | None = None
    temperature: float | None = None
    segment_temperature: float | None = None
    questions: int = 4
    first_order: bool = False
    codec: str | None = None
    seed: int = 0
    keep: str = KEPT[0]
    validate_every: int = 100
    dev_tasks: int = 96
    checkpoint_s: float = 120.0
    device: str = "auto"
    dtype: str = "auto"

    @property
    def rules(self) -> EpisodeRules:
        strangers = self.strangers if self.objective != "direct" else 0.0
        segments = self.segments or SEGMENTS
        shared_by = self.segment_temperature or SEGMENT_TEMPERATURE
        return EpisodeRules(
            objective=self.objective,
            mix_context=self.mix_context,
            reading=self.reading,
            strangers=strangers,
            k=self.k,
            segments=segments,
            segment_tokens=self.segment_tokens or SEGMENT_TOKENS,
            segment_temperature=shared_by,
            questions=self.questions,
        )

    def settled(self, card: Mapping[str, Any]) -> MetaTrainOptions:
        """With everything decided that the card of the prior to begin with decides; {} without one."""
        segments = card.get("segments", 1) if card else SEGMENTS
        codec = self.codec or card.get("codec")
        temperature = card.get("temperature", TEMPERATURE)
        return replace(
            self,
            rank=self.rank or card.get("rank", RANK),
            codec=codec if codec != EXACT and self.objective == "regrad" else None,
            normalized=self.normalized or (self.objective == "regrad" and card.get("normalized", False)),
            segments=self.segments or segments,
            segment_tokens=self.segment_tokens or card.get("segment_tokens", SEGMENT_TOKENS),
            temperature=self.temperature or temperature,
            segment_temperature=self.segment_temperature or card.get("segment_temperature", SEGMENT_TEMPERATURE),
        )


def refuse(options: MetaTrainOptions) -> None:
    """raises UsageProblem for what cannot be done"""
    if options.objective not in OBJECTIVES:
        raise UsageProblem(f"there is no objective '{options.objective}'", f"use one of {', '.join(OBJECTIVES)}")
    if options.keep not in KEPT:
        raise UsageProblem(f"there is no step '{options.keep}' to keep", f"use one of {', '.join(KEPT)}")
    for name in (
        "steps", "batch", "k", "gradient_layers", "segments", "segment_tokens", "questions", "rank", "validate_every",
        "dev_tasks",
    ):  # fmt: skip
        number = getattr(options, name)
        if number is not None and number < 1:
            raise UsageProblem(f"{name.replace('_', '-')} must be at least 1")
    if options.reading < 0:
        raise UsageProblem("--reading must not be below 0")
    if options.reading and options.objective != "regrad":
        raise UsageProblem(
            f"objective {options.objective} has no other tasks for --reading to stand beside", "leave --reading out"
        )
    if options.gradient_layers and options.objective != "regrad":
        raise UsageProblem(
            f"objective {options.objective} takes no gradients of passages", "leave --gradient-layers out"
        )
    if options.normalized and (options.init is None or options.objective != "regrad"):
        raise UsageProblem(
            "--normalized needs a prior to begin with, and gradients of passages",
            "learn one without it first, then --init it",
        )
    for name in ("mix_context", "strangers"):
        if not 0 <= getattr(options, name) <= 1:
            raise UsageProblem(f"--{name.replace('_', '-')} is a share, between 0 and 1")
    above = {
        "--lr": options.learning_rate,
        "--temperature": options.temperature,
        "--segment-temperature": options.segment_temperature,
    }
    for option, value in above.items():
        if value is not None and not (value > 0 and math.isfinite(value)):
            raise UsageProblem(f"{option} must be above 0")
    if not (options.step_rate >= 0 and math.isfinite(options.step_rate)):
        raise UsageProblem("--step-lr must not be below 0")
    if options.codec is not None and options.codec != EXACT:
        if options.objective != "regrad":
            raise UsageProblem(
                f"objective {options.objective} has no gradients of passages, so none go through a codec",
                "leave --codec out",
            )
        from regrad_cli.learn.codec import parse_codec

        parse_codec(options.codec)
    out = options.out.resolve()
    for read in (*options.tasks, *options.dev, *([options.init] if options.init is not None else [])):
        if read.resolve() == out:
            raise UsageProblem(f"--out is {read}, which is to be read", "give --out another name")


def spread(tasks: Sequence[Task], count: int) -> list[Task]:
    """At most `count` tasks, taken evenly over all of them."""
    if len(tasks) <= count:
        return list(tasks)
    return [tasks[place * len(tasks) // count] for place in range(count)]


def held_out(tasks: Sequence[Task]) -> tuple[list[Task], list[Task]]:
    """Tasks to learn from and tasks to choose by: one title in twenty, the same ones whatever else is in the files.

    A task without a title goes by its first passage. Of few tasks none is kept aside.
    """
    parts: tuple[list[Task], list[Task]] = ([], [])
    for task in tasks:
        digest = hashlib.sha256((task.title or task.passages[0]).encode()).digest()
        parts[int.from_bytes(digest[:8], "big") % HELD_OUT == 0].append(task)
    return parts if all(parts) and len(tasks) >= 2 * HELD_OUT else (list(tasks), [])
