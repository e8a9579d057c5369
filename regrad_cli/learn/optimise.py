"""The state of a training run: prior, step sizes, AdamW's moments, the best so far. Knows tensors and bytes, no tasks.

The prior follows one learning rate, log α another, each with a clip of its own; log α is never decayed.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from regrad_cli.errors import Damaged
from regrad_cli.learn.prior import STEEPEST, Prior

Tensors = dict[str, torch.Tensor]
FORMAT = "regrad training 1"
CLIP = 0.5
WARM_UP = 0.1  # of all steps; then linear to zero


class Best(NamedTuple):
    """The best so far: after which step, its score, and how many dev tasks had to be left out of that."""

    step: int
    score: float
    left_out: int
    theta: Tensors
    log_steps: dict[str, float]


class Training:
    """θ and log α under AdamW, on the CPU in fp32; same gradients in the same order, same bits.

    start           the prior to begin with
    steps           how many there will be: the learning rate falls to zero with the last
    learning_rate   of θ at its height; step_rate that of log α (0 keeps them)

    step        how many are done; `updates` of them changed something
    failed      how many in a row, up to now, found nothing but losses that are not finite
    validated   the step after which the dev tasks were measured last; -1: never
    """

    def __init__(self, start: Prior, *, steps: int, learning_rate: float, step_rate: float) -> None:
        self.step = self.failed = 0
        self.validated = -1
        self.steps = steps
        self.best: Best | None = None
        self._names, self._changed = list(start.tensors), list(start.log_step_sizes)
        self._theta = [tensor.detach().clone().float() for tensor in start.tensors.values()]
        self._logs = torch.tensor(list(start.log_step_sizes.values()), dtype=torch.float32)
        self._rates = (learning_rate, step_rate)
        groups = [{"params": self._theta, "lr": learning_rate}, {"params": [self._logs], "lr": step_rate}]
        self._adam = torch.optim.AdamW(groups, weight_decay=0.0, betas=(0.9, 0.99))

    @property
    def theta(self) -> Tensors:
        return dict(zip(self._names, self._theta, strict=True))

    @property
    def log_steps(self) -> dict[str, float]:
        return dict(zip(self._changed, self._logs.tolist(), strict=True))

    @property
    def step_sizes(self) -> dict[str, float]:
        """{name: α}"""
        return {name: math.exp(log) for name, log in self.log_steps.items()}

    @property
    def updates(self) -> int:
        return int(max((float(state["step"]) for state in self._adam.state.values()), default=0.0))

    @property
    def rate_share(self) -> float:
        """The share of the learning rates that the next step takes."""
        warm = max(1, round(WARM_UP * self.steps))
        if self.step < warm:
            return (self.step + 1) / warm
        return max(0.0, (self.steps - self.step) / max(1, self.steps - warm))

    @property
    def learning_rate(self) -> float:
        return self._rates[0] * self.rate_share

    def update(
        self,
        tensors: Mapping[str, torch.Tensor] | None,
        log_steps: Mapping[str, float] | None = None,
        *,
        failed: bool = False,
    ) -> None:
        """One step along mean gradients; None counts the step and changes nothing. failed: none of them was finite."""
        if tensors is not None:
            for group, rate in zip(self._adam.param_groups, self._rates, strict=True):
                group["lr"] = rate * self.rate_share
            for name, parameter in zip(self._names, self._theta, strict=True):
                parameter.grad = tensors[name].detach().to("cpu", torch.float32)
            logs = log_steps or dict.fromkeys(self._changed, 0.0)
            self._logs.grad = torch.tensor([logs[name] for name in self._changed], dtype=torch.float32)
            for part in (self._theta, [self._logs]):
                torch.nn.utils.clip_grad_norm_(part, CLIP)
            self._adam.step()
        if tensors is not None or failed:
            self.failed = 0 if tensors is not None else self.failed + 1
        self.step += 1

    def keep_if_best(self, score: float, left_out: int = 0) -> bool:
        """Keeps θ and α if nothing before scored lower, or fewer tasks had to be left out of the score; whether it did.

        Scores over fewer tasks do not compare: a θ under which some tasks have no finite loss is the worse one.
        """
        if not math.isfinite(score):
            return False
        if self.best is not None and (left_out, score) >= (self.best.left_out, self.best.score):
            return False
        theta = {name: tensor.clone() for name, tensor in self.theta.items()}
        self.best = Best(self.step, score, left_out, theta, self.log_steps)
        return True

    def to_bytes(self, settings: Mapping[str, Any]) -> bytes:
        """Everything that a later process needs to go on, as one safetensors file; `settings` says of which run."""
        tensors = {f"theta.{name}": tensor for name, tensor in self.theta.items()} | {"logs": self._logs}
        for name, parameter in zip([*self._names, "logs"], [*self._theta, self._logs], strict=True):
            for moment in ("exp_avg", "exp_avg_sq"):
                if parameter in self._adam.state:
                    tensors[f"{moment}.{name}"] = self._adam.state[parameter][moment]
        counts = {name: getattr(self, name) for name in ("step", "failed", "validated", "updates")}
        card: dict[str, Any] = {"format": FORMAT, **counts, "best": None}
        if self.best is not None:
            kept_best = self.best
            card["best"] = {"step": kept_best.step, "score": kept_best.score, "left_out": kept_best.left_out}
            card["best"]["logs"] = kept_best.log_steps
            tensors |= {f"best.{name}": tensor for name, tensor in kept_best.theta.items()}
        kept = {name: tensor.contiguous() for name, tensor in tensors.items()}
        return save(kept, metadata={"card": json.dumps(card), "settings": json.dumps(dict(settings))})

    def restore(self, data: bytes) -> None:
        """Goes on where `to_bytes` was called.

        raises  Damaged where the bytes are not of such a run, or hold a value that is not finite
        """
        try:
            card = json.loads(metadata_of(data)["card"])
            if card["format"] != FORMAT:
                raise ValueError("another format")
            tensors = load(data)
            step, updates = _count(card["step"]), _count(card["updates"])
            failed, validated = _count(card.get("failed", 0)), _count(card.get("validated", step), least=-1)
            parts = dict(zip([*self._names, "logs"], [*self._theta, self._logs], strict=True))
            kept = {name: self._kept(tensors, "logs" if name == "logs" else f"theta.{name}", name) for name in parts}
            moments = ("exp_avg", "exp_avg_sq") if updates else ()
            state = {name: {each: self._kept(tensors, f"{each}.{name}", name) for each in moments} for name in parts}
            if any(bool((each["exp_avg_sq"] < 0).any()) for each in state.values() if each):
                raise ValueError("a square is below zero")
            best = None if card["best"] is None else self._best(card["best"], tensors)
            if kept["logs"].abs().max() > STEEPEST:
                raise ValueError("a step size cannot be")
        except (SafetensorError, ValueError, LookupError, TypeError, AttributeError, RuntimeError) as error:
            raise Damaged(f"the run to go on with cannot be read: {error}", "remove that file to begin anew") from error
        for name, parameter in parts.items():
            parameter.copy_(kept[name])
            if updates:
                self._adam.state[parameter] = {"step": torch.tensor(float(updates)), **state[name]}
        self.step, self.failed, self.validated, self.best = step, failed, validated, best

    def _kept(self, tensors: Tensors, stored: str, name: str) -> torch.Tensor:
        """A stored tensor of one of ours. raises ValueError or KeyError where it is of another shape or type"""
        own = self._logs if name == "logs" else self._theta[self._names.index(name)]
        tensor = tensors[stored]
        if tensor.shape != own.shape or tensor.dtype != own.dtype or not bool(torch.isfinite(tensor).all()):
            raise ValueError(f"{stored} is of another shape, or not finite")
        return tensor.clone()

    def _best(self, card: Mapping[str, Any], tensors: Tensors) -> Best:
        theta = {name: self._kept(tensors, f"best.{name}", name) for name in self._names}
        score, logs = card["score"], {name: card["logs"][name] for name in self._changed}
        if not all(isinstance(each, float) and abs(each) < STEEPEST for each in logs.values()):
            raise ValueError("a step size of the best cannot be")
        if not isinstance(score, float) or not math.isfinite(score):
            raise ValueError("the best has no score")
        return Best(_count(card["step"]), score, _count(card.get("left_out", 0)), theta, logs)


def _count(value: Any, least: int = 0) -> int:
    """raises ValueError for what counts nothing"""
    if type(value) is not int or not least <= value < 1 << 40:
        raise ValueError(f"{value!r:.40} is no count")
    return value


def metadata_of(data: bytes) -> dict[str, str]:
    """The metadata of a safetensors file's bytes.

    raises  ValueError or KeyError where there is none
    """
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__"), dict):
        raise KeyError("__metadata__")
    return header["__metadata__"]
