"""Measures how far the base weights are from their start after answers in every mode: exactly zero, by their hash.

Some answers are left in the middle, as Ctrl-C leaves them; and no hook may stay on the model.
"""

from __future__ import annotations

import hashlib
from typing import Any
from unittest.mock import patch

from benchmarks.bench import Bench, Options, Result
from benchmarks.measure import Figure, Target

TITLE = "Drift"
DEVICES = ("cpu", "cuda")
MODES = ("regrad", "both", "rag", "direct")
LEFT_EVERY = 5  # each fifth answer is left after its third piece


def run(place: Bench, options: Options) -> Result:
    from regrad_cli.answer import Answerer, AskOptions
    from regrad_cli.learn import model as models
    from regrad_cli.records import Piece

    bank = place.example_bank
    questions = place.questions[: options.questions or 20]
    seen: list[tuple[Any, dict[str, Any], str]] = []  # (model, its weights copied, their hash), when it was loaded
    load = models.load_model

    def remembered(*arguments: Any, **settings: Any) -> Any:
        loaded = load(*arguments, **settings)
        state = {name: tensor.detach().cpu().clone() for name, tensor in loaded.network.state_dict().items()}
        seen.append((loaded, state, weights_hash(loaded.network)))
        return loaded

    answered = left = 0
    with (
        patch.object(models, "load_model", remembered),
        Answerer(bank, modes=set(MODES), device=options.device, dtype="auto") as answerer,
    ):
        for question in questions:
            for mode in MODES:
                answered += 1
                pieces = 0
                events = answerer.ask(question, AskOptions(mode=mode, max_tokens=12))
                for event in events:
                    pieces += isinstance(event, Piece)
                    if pieces == 3 and answered % LEFT_EVERY == 0:
                        left += 1
                        break
                events.close()  # type: ignore[attr-defined]
    if len(seen) != 1:
        raise RuntimeError(f"{len(seen)} models were loaded for one session")
    loaded, before, start = seen[0]
    end = weights_hash(loaded.network)
    after = loaded.network.state_dict()
    changes = {name: (after[name].cpu().double() - old.double()).abs().max().item() for name, old in before.items()}
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in loaded.network.modules())
    zero = Target("≤", 0, "value")
    figures = [
        Figure(f"largest change of a weight after {answered} answers", max(changes.values()), target=zero),
        Figure("hash of all weights: 0 the same, 1 another", float(start != end), target=zero),
        Figure("hooks left on the model", float(hooks), target=zero),
    ]
    notes = [
        f"{len(questions)} questions × modes {', '.join(MODES)}; {left} answers were left after their third piece. "
        f"SHA-256 of all weights and buffers: {start[:16]}… before, {end[:16]}… after.",
    ]
    return Result(figures, notes)


def weights_hash(network: Any) -> str:
    """SHA-256 over names, shapes, dtypes and bits of all parameters and buffers, also those that are not saved."""
    import torch

    digest = hashlib.sha256()
    for kind in (network.named_parameters(), network.named_buffers()):
        for name, tensor in kind:
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()
