"""The baseline of ingest: one passage at a time, PEFT LoRA, torch.autograd.grad, gradients saved in fp32, nothing else.

Run as a process: python -m benchmarks.plain_loop FOLDER DTYPE DEVICE PASSAGES.jsonl OUT. It is written as well as a
plain loop can be: no key-value cache, adapters in the model's own dtype, one forward and one backward a passage, no
graph below the first adapted module (autograd leaves that out by itself, since nothing there asks for a gradient).
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

RANK = 32  # the shipped prior's
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}


def lora_network(folder: Path, dtype: str, device: str) -> tuple[Any, Any]:
    """(PEFT model with LoRA of the rank, and twice that as alpha, on the modules that regrad adapts, its tokenizer)."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from regrad_cli.learn.model import find_projections

    network: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, DTYPES[dtype]))
    network.eval().to(device)
    modules = [projection.path for projection in find_projections(network)]
    config = LoraConfig(r=RANK, lora_alpha=2 * RANK, target_modules=modules, task_type="CAUSAL_LM")
    return get_peft_model(network, config, autocast_adapter_dtype=False), AutoTokenizer.from_pretrained(folder)


def gradients(network: Any, passages: Sequence[Sequence[int]]) -> Iterator[dict[str, Any]]:
    """{PEFT's parameter name: fp32 tensor on the CPU} of each passage's own loss."""
    import torch

    named = {name: tensor for name, tensor in network.named_parameters() if tensor.requires_grad}
    for passage in passages:
        ids = torch.tensor([list(passage)], device=network.device)
        loss = network(input_ids=ids, labels=ids, use_cache=False).loss
        found = torch.autograd.grad(loss, list(named.values()))
        yield {name: tensor.float().cpu() for name, tensor in zip(named, found, strict=True)}


def main(arguments: Sequence[str]) -> None:
    folder, dtype, device, passages, out = arguments
    from safetensors.torch import save_file

    network, tokenizer = lora_network(Path(folder), dtype, device)
    lines = Path(passages).read_text(encoding="utf-8").splitlines()
    texts = [f"{record['title']}\n{record['text']}" for record in map(json.loads, lines)]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
    Path(out).mkdir(parents=True, exist_ok=True)
    for number, found in enumerate(gradients(network, ids)):
        save_file(found, Path(out) / f"{number:06d}.safetensors")


if __name__ == "__main__":
    main(sys.argv[1:])
