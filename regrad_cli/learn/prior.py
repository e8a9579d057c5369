"""The prior θ: LoRA tensors for the adapted projections, and a step size α for each. Knows tensors, not files.

A prior travels as the bytes of one safetensors file: the tensors by name, `log_step_sizes`, and a card in its metadata.
Of one whose card says `"values": "int8"`, θ is stored in a quarter of the bytes: integers, and beside each tensor
`….scale`, a power of two for each of the rank's components.
Source: ReGrad, arXiv 2606.15734.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save

from regrad_cli.errors import Damaged, PriorMismatch
from regrad_cli.learn.model import Model, Projection
from regrad_cli.records import TensorShape, canonical_json, sha256_hex
from regrad_cli.segments import SEGMENT_TEMPERATURE, SEGMENT_TOKENS

FORMAT = "regrad prior 1"
LOG_STEP_SIZES = "log_step_sizes"
CHANGED = "changed"  # in a file's card: the names that step sizes are of, where they are not of all tensors
VALUES, INT8 = "values", "int8"
MOST_K = 1000
MOST_SEGMENTS = 64
STEEPEST = 60.0  # of log α in size: beyond it a step leaves float32, or does nothing
AMONG = "strength_among_passages"
NORMALIZED = "normalized"
UNTRAINED_CARD = {"name": "untrained", "trained": False, "k": 3, "weights": "mean", "gamma": 1.0}


@dataclass(frozen=True)
class Prior:
    """θ and α.

    tensors         {name: (rows, cols) float32}, `lora_A` (rank, inputs) and `lora_B` (outputs, rank) of each
                    projection, in the model's order
    log_step_sizes  {name: log α}, one for every tensor that a passage's gradient changes, in the same order
    card            what it is: name, trained, model (fingerprint), rank, gamma, k and weights (see `weights_for`);
                    "values" where θ is rounded (see `rounded`), "codec" where one was chosen for it, "f1" by codec
                    where that was measured, "segments" and "segment_temperature" where passages were cut,
                    "segment_tokens" the same, "strength_among_passages" (see `among_passages`), "normalized" (see
                    `normalized`)
    strength        what its LoRA branch is multiplied by
    """

    tensors: dict[str, torch.Tensor]
    log_step_sizes: dict[str, float]
    card: dict[str, Any]
    strength: float = 1.0

    @property
    def step_sizes(self) -> dict[str, float]:
        """{name: α}"""
        return {name: math.exp(log) for name, log in self.log_step_sizes.items()}

    @property
    def scale(self) -> float:
        """lora_alpha / rank; lora_alpha is twice the rank, times the strength."""
        return 2.0 * self.strength

    def among_passages(self) -> Prior:
        """As it is applied where the prompt shows the passages: the weights then stay nearer to the model's own, which
        can read. Source: interpolation of weights, Wortsman et al., arXiv 2109.01903; docs/experiments.md, 12."""
        return replace(self, strength=float(self.card.get(AMONG, 1.0)))

    @property
    def rank(self) -> int:
        """Of its LoRA: `lora_A` is (rank, inputs)."""
        return next(len(tensor) for name, tensor in self.tensors.items() if name.endswith("lora_A"))

    @property
    def trained(self) -> bool:
        return bool(self.card["trained"])

    @property
    def normalized(self) -> bool:
        """Whether a passage's gradient is brought to norm 1, tensor by tensor, so that α is the length of a step: what
        it teaches is a direction, and a passage that surprises the model more does not weigh more."""
        return bool(self.card.get(NORMALIZED, False))

    def with_normalized(self, norms: Mapping[str, float]) -> Prior:
        """This prior for gradients of norm 1: its steps are as long as they were for gradients of these norms, which
        must be above 0, {name: float}."""
        logs = {name: log + math.log(norms[name]) for name, log in self.log_step_sizes.items()}
        return replace(self, log_step_sizes=logs, card=self.card | {NORMALIZED: True})

    @property
    def weighs_by_score(self) -> bool:
        """Whether a passage weighs the more the better it fits the question."""
        return bool(self.card["weights"] == "softmax")

    @property
    def codec(self) -> str | None:
        """The codec that it was learned through: under another one its gradients answer worse."""
        named = self.card.get("codec")
        return None if named is None else str(named)

    def f1_under(self, codec: str) -> float | None:
        """F1 of answers from gradients under this codec, 0 to 100; None where the card does not have it."""
        found = self.card.get("f1", {}).get(codec)
        return None if found is None else float(found)

    @property
    def segments(self) -> int:
        """Into at most how many segments a passage was cut in its training, each with a gradient of its own."""
        return int(self.card.get("segments", 1))

    @property
    def segment_temperature(self) -> float:
        """By which a passage's weight is shared among its segments (segments.shared)."""
        return float(self.card.get("segment_temperature", SEGMENT_TEMPERATURE))

    @property
    def segment_tokens(self) -> int:
        """A passage is cut into about as many segments as it has so many tokens."""
        return int(self.card.get("segment_tokens", SEGMENT_TOKENS))

    @property
    def shapes(self) -> tuple[TensorShape, ...]:
        """Of what a passage's gradient has."""
        return tuple(TensorShape(name, *self.tensors[name].shape) for name in self.log_step_sizes)

    def check(self, projections: Sequence[Projection]) -> None:
        """raises PriorMismatch unless this prior is of exactly these projections."""
        own = [(name, *tensor.shape) for name, tensor in self.tensors.items()]
        rank = next(iter(self.tensors.values())).shape[0]
        wanted = []
        for projection in projections:
            wanted.append((projection.name_a, rank, projection.inputs))
            wanted.append((projection.name_b, projection.outputs, rank))
        if own != wanted:
            difference = next((pair for pair in zip(own, wanted, strict=False) if pair[0] != pair[1]), None)
            detail = f"first at {difference[0][0]}" if difference else f"{len(own)} tensors against {len(wanted)}"
            raise PriorMismatch(
                f"the prior '{self.card['name']}' is of another model: its tensors differ, {detail}",
                "use the model that the prior was trained for, or a prior of this model",
            )

    def rounded(self) -> Prior:
        """This prior with θ rounded to what int8 holds: a quarter of the bytes. Rounding again changes nothing."""
        tensors = {}
        for name, tensor in self.tensors.items():
            scale = _scale(tensor)
            tensors[name] = torch.round(tensor.detach().float().cpu() / scale) * scale
        return replace(self, tensors=tensors, card=self.card | {VALUES: INT8})

    def to_bytes(self) -> bytes:
        """The prior as a safetensors file; same prior, same bytes (one metadata key: their order is not kept)."""
        changed = [name for name in self.tensors if name in self.log_step_sizes]
        logs = torch.tensor([self.log_step_sizes[name] for name in changed], dtype=torch.float64)
        tensors = {name: tensor.detach().float().cpu().contiguous() for name, tensor in self.tensors.items()}
        if self.card.get(VALUES) == INT8:
            scales = {name: _scale(tensor) for name, tensor in tensors.items()}
            tensors = {name: (tensor / scales[name]).to(torch.int8) for name, tensor in tensors.items()}
            tensors |= {f"{name}.scale": scale for name, scale in scales.items()}
        card = {"format": FORMAT, "order": list(self.tensors), **self.card}
        if len(changed) < len(self.tensors):
            card[CHANGED] = changed
        return save(tensors | {LOG_STEP_SIZES: logs}, metadata={"card": canonical_json(card)})

    @classmethod
    def from_bytes(cls, data: bytes, name: str = "the prior") -> Prior:
        """raises Damaged where the bytes are no prior."""
        try:
            length = int.from_bytes(data[:8], "little")
            card = json.loads(json.loads(data[8 : 8 + length])["__metadata__"]["card"])
            order = card.pop("order")
            if card.pop("format") != FORMAT:
                raise ValueError("another format")
            _refuse_odd_card(card)
            tensors = load(data)
            changed = card.pop(CHANGED, order)
            if not changed or changed != [name for name in order if name in changed]:
                raise ValueError("it changes other tensors than it has")
            logs = dict(zip(changed, tensors.pop(LOG_STEP_SIZES).tolist(), strict=True))
            if not all(isinstance(log, float) and abs(log) <= STEEPEST for log in logs.values()):
                raise ValueError("a step size cannot be")
            if card.get(VALUES) == INT8:
                tensors = {name: _whole(tensors.pop(name), tensors.pop(f"{name}.scale")) for name in order} | tensors
            prior = cls({name: tensors[name] for name in order}, logs, card)
            if not len(prior.tensors) == len(tensors) == len(order) > 0:
                raise ValueError("it holds other tensors than its card says")
            if any(each.dtype != torch.float32 or each.dim() != 2 or not each.numel() for each in tensors.values()):
                raise ValueError("a tensor is no matrix of fp32")
        except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RuntimeError) as error:
            message = f"{name} is not a prior that this version reads: {error}"
            raise Damaged(message, "take it from its source again") from error
        if not all(bool(torch.isfinite(tensor).all()) for tensor in prior.tensors.values()):
            raise Damaged(f"{name} holds values that are not finite", "take it from its source again")
        return prior

    @property
    def fingerprint(self) -> str:
        return sha256_hex(self.to_bytes())

    def weights_for(self, scores: Sequence[float]) -> list[float]:
        """The weight of each retrieved gradient, by the rule of this prior's training.

        scores  how well each passage fits the question, best first
        rule    "sum": 1 each; "mean": 1/k each; "softmax": exp(score / temperature), normalised to 1
        """
        if self.weighs_by_score and scores:
            peak = max(scores)
            raw = [math.exp((score - peak) / float(self.card["temperature"])) for score in scores]
            return [value / sum(raw) for value in raw]
        return [1.0 if self.card["weights"] == "sum" else 1.0 / max(1, len(scores))] * len(scores)


def _refuse_odd_card(card: Mapping[str, Any]) -> None:
    """raises ValueError, KeyError or TypeError unless what is used of a card is what it must be"""
    canonical_json(card).encode()  # numbers that are none, halves of characters
    if not (isinstance(card["name"], str) and isinstance(card["trained"], bool)):
        raise ValueError("its card's name, or whether it is trained, is none")
    if type(card["k"]) is not int or not 1 <= card["k"] <= MOST_K:
        raise ValueError(f"its card's k is not from 1 to {MOST_K}")
    if not all(type(found) in (int, float) and 0 <= found <= 100 for found in dict(card.get("f1", {})).values()):
        raise ValueError("its card's F1 is not from 0 to 100")
    if not isinstance(card.get(NORMALIZED, False), bool):
        raise ValueError("its card does not say whether gradients are normalized")
    segments = card.get("segments", 1)
    if type(segments) is not int or not 1 <= segments <= MOST_SEGMENTS:
        raise ValueError(f"its card's segments are not from 1 to {MOST_SEGMENTS}")
    tokens = card.get("segment_tokens", SEGMENT_TOKENS)
    if type(tokens) is not int or not 1 <= tokens < 1 << 20:
        raise ValueError("its card's segments have no length")
    shares = card.get("segment_temperature", SEGMENT_TEMPERATURE)
    among = card.get(AMONG, 1.0)
    rules = {"mean": 1.0, "sum": 1.0, "softmax": card.get("temperature", 0.0)}
    for number in (card["gamma"], rules[card["weights"]], shares, among):
        if isinstance(number, bool) or not isinstance(number, int | float) or not abs(number) < 1e9:
            raise ValueError("its card's gamma, strength or temperature is no number")
    if not min(rules[card["weights"]], shares) > 1e-9:
        raise ValueError("its card's temperature is not above 0")


def _whole(integers: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """θ from what it is stored as; a scale of another shape could make any size of it. raises ValueError"""
    rows, cols = integers.shape
    if integers.dtype != torch.int8 or tuple(scale.shape) not in ((rows, 1), (1, cols)):
        raise ValueError("a tensor does not fit its scale")
    return integers * scale


def _scale(tensor: torch.Tensor) -> torch.Tensor:
    """What a θ (rows, cols) is rounded to multiples of, for each of the rank's components: (rows, 1) for a wide one, as
    `lora_A` is, else (1, cols). The least power of two of which 127 reach as far, so what was rounded has the same."""
    rank_first = tensor.shape[0] < tensor.shape[1]
    peak = tensor.detach().float().cpu().abs().amax(dim=1 if rank_first else 0, keepdim=True)
    mantissa, exponent = torch.frexp(peak / 127)
    return torch.ldexp(torch.ones_like(peak), exponent - (mantissa == 0.5).int()).where(peak > 0, torch.ones_like(peak))


def seeded_prior(
    model: Model, model_fingerprint: str, *, rank: int = 8, seed: int = 0, step_size: float = 1.0
) -> Prior:
    """A LoRA start that nothing has been learned into: A uniform as PEFT draws it, B zero; ∇A is exactly 0 there."""
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, torch.Tensor] = {}
    for projection in model.projections:
        bound = 1.0 / math.sqrt(projection.inputs)
        a = torch.rand((rank, projection.inputs), generator=generator, dtype=torch.float32)
        tensors[projection.name_a] = (a * 2 - 1) * bound  # kaiming uniform with a = √5
        tensors[projection.name_b] = torch.zeros((projection.outputs, rank))
    card = UNTRAINED_CARD | {"model": model_fingerprint, "rank": rank, "seed": seed}
    return Prior(tensors, dict.fromkeys(tensors, math.log(step_size)), card)
