"""Tiny models in the shapes of four families, loaded, and a prior with something in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch

from regrad_cli.learn.model import Model, load_model
from regrad_cli.learn.prior import Prior, seeded_prior

FAMILIES = ("llama", "qwen2", "gemma", "gemma2", "gpt2")


def family_config(family: str) -> object:
    from transformers import Gemma2Config, GemmaConfig, GPT2Config, Qwen2Config

    shape = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "initializer_range": 0.2,
        "max_position_embeddings": 512,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    if family == "gpt2":
        return GPT2Config(n_embd=32, n_layer=4, n_head=4, n_positions=512, initializer_range=0.2)
    if family == "gemma":
        return GemmaConfig(**shape, head_dim=8)
    if family == "gemma2":  # caps its logits after the output matrix
        return Gemma2Config(**shape, head_dim=8, final_logit_softcapping=3.0)
    return Qwen2Config(**shape) if family == "qwen2" else tiny.llama_config()


@pytest.fixture(scope="session")
def family(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Model]:
    """name → the loaded tiny model of that family, fp32 on the CPU."""
    loaded: dict[str, Model] = {}

    def load(name: str) -> Model:
        if name not in loaded:
            folder: Path = tiny.write_model(tmp_path_factory.mktemp("family") / name, family_config(name))
            loaded[name] = load_model(folder, device="cpu", dtype="fp32")
        return loaded[name]

    return load


@pytest.fixture(scope="session")
def model(family: Callable[[str], Model]) -> Model:
    return family("llama")


def filled_prior(model: Model, seed: int = 7) -> Prior:
    """A prior whose B is not zero, as after training, with a step size of its own for each tensor."""
    prior = seeded_prior(model, "f" * 64, rank=4, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: torch.randn(tensor.shape, generator=generator) * 0.1 for name, tensor in prior.tensors.items()}
    logs = {name: 0.1 * place for place, name in enumerate(prior.tensors)}
    return replace(prior, tensors=tensors, log_step_sizes=logs)


@pytest.fixture(scope="session")
def prior(model: Model) -> Prior:
    return filled_prior(model)


def random_passages(model: Model, lengths: tuple[int, ...], seed: int = 0) -> list[list[int]]:
    generator = torch.Generator().manual_seed(seed)
    vocabulary = model.network.config.vocab_size
    return [torch.randint(3, vocabulary, (length,), generator=generator).tolist() for length in lengths]
