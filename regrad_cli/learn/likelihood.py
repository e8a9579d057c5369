"""How likely a model holds a given answer: its log-probability, token by token as given. Knows no prior and no bank."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from regrad_cli.learn.model import Model, last


@torch.inference_mode()
def answer_log_probability(model: Model, prompt_ids: Sequence[int], answer_ids: Sequence[int]) -> float:
    """log p(answer | prompt) in nats, of the model as it is now, adapted or not; the softmax is taken in float32.

    prompt_ids  at least one token
    answer_ids  the answer's tokens, with the ending token where the answer ended by itself; none have log-probability 0
    """
    count = len(answer_ids)
    if not count:
        return 0.0
    ids = torch.tensor([[*prompt_ids, *answer_ids[:-1]]], device=model.device)
    # The logits before each token of the answer, never the prompt's: those of 1,000 tokens would take 200 MB.
    logits = model.network(input_ids=ids, use_cache=False, logits_to_keep=last(ids, count)).logits[0, -count:]  # (A, V)
    wanted = torch.tensor(list(answer_ids), device=model.device)[:, None]
    return float(logits.float().log_softmax(dim=-1).gather(1, wanted).sum())
