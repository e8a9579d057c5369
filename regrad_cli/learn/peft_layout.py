"""θ + change as a LoRA adapter in PEFT's layout, as bytes of files. Knows tensors and a model's structure; writes
nothing, and needs no PEFT.

Two files, as PEFT's own `save_pretrained` names them: `adapter_config.json` and `adapter_model.safetensors`, whose
tensors are `base_model.model.<module's path>.lora_A.weight` (rank, inputs) and `….lora_B.weight` (outputs, rank).
vLLM's loader reads the same two: of the config `r`, `lora_alpha` and `target_modules` must be there, `bias` "none",
and `modules_to_save`, `use_dora` and `use_rslora` off; each module is found by its path in the tensors' names.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save

from regrad_cli.learn.adapt import changed, check_change
from regrad_cli.learn.model import DTYPES, Projection, find_projections
from regrad_cli.learn.prior import Prior

CONFIG = "adapter_config.json"
WEIGHTS = "adapter_model.safetensors"


def projections_of(folder: Path) -> tuple[Projection, ...]:
    """The projections of the model in this folder, from its config alone: no weight is read."""
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.from_pretrained(folder, local_files_only=True)
    with torch.device("meta"):
        return find_projections(AutoModelForCausalLM.from_config(config))


def adapter_files(
    prior: Prior,
    change: Mapping[str, torch.Tensor],
    projections: tuple[Projection, ...],
    base_model: str,
    dtype: str = "auto",
) -> dict[str, bytes]:
    """The adapter that makes the base model what it is inside `adapted(model, prior, change)`: {file name: bytes}.

    change      {tensor name: (rows, cols)}, on any device
    base_model  what `base_model_name_or_path` says: a folder or a hub id
    dtype       the number format of the tensors; `auto` is fp32, which loses nothing
    raises      PriorMismatch where prior and projections do not belong together
    """
    prior.check(projections)
    kind = torch.float32 if dtype == "auto" else DTYPES[dtype]
    check_change(prior, change)
    tensors = {}
    for projection in projections:
        for part, name in (("lora_A", projection.name_a), ("lora_B", projection.name_b)):
            tensor = changed(prior, change, name)
            tensors[f"base_model.model.{projection.path}.{part}.weight"] = tensor.to("cpu", kind).contiguous()
    config = adapter_config(prior, projections, base_model)
    text = json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n"
    return {CONFIG: text.encode(), WEIGHTS: save(tensors, metadata={"format": "pt"})}


def adapter_config(prior: Prior, projections: tuple[Projection, ...], base_model: str) -> dict[str, Any]:
    """What PEFT has to know. Modules are named by their whole paths: a last name alone may be an attention's too
    (`c_proj`), and is of lower layers as well.
    """
    rank = next(iter(prior.tensors.values())).shape[0]
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_model,
        "revision": None,
        "inference_mode": True,
        "r": rank,
        "lora_alpha": int(prior.scale * rank),
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [projection.path for projection in projections],
        "layers_to_transform": None,
        "modules_to_save": None,
        "fan_in_fan_out": any(type(projection.module).__name__ == "Conv1D" for projection in projections),
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
