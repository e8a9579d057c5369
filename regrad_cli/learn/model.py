"""A causal language model as regrad sees it: its weights, tokenizer and the projections a prior adapts.

Knows Hugging Face models by their structure, never by a table of names. Knows nothing of priors, gradients or banks.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from threadpoolctl import ThreadpoolController
from torch import nn

from regrad_cli.errors import Mismatch, ModelUnavailable, UsageProblem, unreadable_model
from regrad_cli.learn.forked import Row, layout
from regrad_cli.processor import multiplies_bf16

NUMPY_BLAS = "libscipy_openblas"  # the library in numpy's wheels since 2.0
NEAR = ("sliding_window", "window_size", "attention_window", "attention_chunk_size")  # of a layer that sees only them
LAYERS_SEE = ("layer_types", "attention_layers")  # where a configuration says what each layer sees
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Projection:
    """One linear map of an upper layer's MLP: y (…, outputs) = x (…, inputs) · W.

    path    the module's path in the model; `lora_A` (rank, inputs) and `lora_B` (outputs, rank) are named after it
    """

    path: str
    module: nn.Module
    inputs: int
    outputs: int

    @property
    def name_a(self) -> str:
        return f"{self.path}.lora_A"

    @property
    def name_b(self) -> str:
        return f"{self.path}.lora_B"


@dataclass(frozen=True)
class Model:
    """A loaded, frozen causal language model with its tokenizer.

    projections     the MLP projections of the upper half of the layers, in the model's order
    """

    network: Any
    tokenizer: Any
    device: torch.device
    dtype: torch.dtype
    projections: tuple[Projection, ...]

    @property
    def end_ids(self) -> list[int]:
        """The tokens that end an answer."""
        ends = self.network.generation_config.eos_token_id
        if ends is None:
            ends = self.tokenizer.eos_token_id
        if ends is None:
            return []
        return list(ends) if isinstance(ends, list | tuple) else [ends]

    @property
    def positions(self) -> int | None:
        """The most tokens it can read at once; None where its config names no limit."""
        return getattr(self.network.config.get_text_config(), "max_position_embeddings", None)

    @cached_property
    def has_plain_head(self) -> bool:
        """Whether logits are the last hidden states times the output matrix and nothing else.

        Some architectures scale or cap them, or add a bias; a short probe tells.
        """
        body, head = self.network.base_model, self.network.get_output_embeddings()
        if not isinstance(head, nn.Linear) or head.bias is not None or body is self.network:
            return False
        probe = torch.arange(4, device=self.device)[None] % self.network.config.get_text_config().vocab_size
        with torch.no_grad():
            ours = head(body(input_ids=probe, use_cache=False).last_hidden_state)
            return torch.equal(ours, self.network(input_ids=probe, use_cache=False).logits)

    @cached_property
    def reads_forked_rows(self) -> bool:
        """Whether texts that begin alike can be read as one row (`forked.py`).

        They can where this architecture keeps to a mask and to positions that it is given, which a short probe tells,
        and its layers see everything before them, which its configuration tells.
        """
        config = self.network.config.get_text_config()
        near = any(getattr(config, name, None) for name in NEAR)
        kinds = {kind for name in LAYERS_SEE for kind in getattr(config, name, None) or ()}
        if near or kinds - {"full_attention", "global"} or config.vocab_size < 32:
            return False
        texts = (tuple(range(24)), (*range(16), *range(24, 32)))
        row = Row(texts, 16)
        body, close = self.network.base_model, max(8 * torch.finfo(self.dtype).eps, 1e-5)

        def states(ids: Sequence[int], **read_as: torch.Tensor) -> torch.Tensor:
            return body(input_ids=torch.tensor([ids], device=self.device), use_cache=False, **read_as)[0][0].float()

        with torch.no_grad():
            try:
                found = states(row.ids, **layout([row], len(row.ids), self.device, self.dtype))
            except (RuntimeError, TypeError, ValueError):
                return False
            apart = row.joined([states(text) for text in texts])
        return bool((found - apart).norm() <= close * apart.norm())

    def token_ids(self, text: str) -> list[int]:
        """The text's tokens, without any that a chat template or a tokenizer would put around it."""
        return self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]


def choose_device(name: str) -> torch.device:
    """`auto`, `cpu`, `cuda`, `cuda:N` or `mps` as a device that is really there.

    raises  ModelUnavailable where it is not: never silently the CPU
    """
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda:0")
        return torch.device("cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageProblem(f"'{name}' is no device", "use auto, cpu, cuda, cuda:N or mps") from None
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ModelUnavailable(
                "there is no CUDA device that this PyTorch can use",
                "leave --device out, or use --device cpu; `regrad doctor` shows what PyTorch sees",
            )
        device = torch.device("cuda", device.index or 0)
        if (device.index or 0) >= torch.cuda.device_count():
            raise ModelUnavailable(f"there is no {device}: PyTorch sees {torch.cuda.device_count()} CUDA device(s)")
    elif device.type == "mps":
        if not torch.backends.mps.is_available():
            raise ModelUnavailable("there is no MPS device that this PyTorch can use", "use --device cpu")
    elif device.type != "cpu":
        raise UsageProblem(f"'{name}' is no device that regrad knows", "use auto, cpu, cuda, cuda:N or mps")
    return device


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """`auto`, `fp32`, `bf16` or `fp16`; `auto` is bf16 where the device multiplies that faster, else fp32."""
    if name != "auto":
        if name not in DTYPES:
            raise UsageProblem(f"'{name}' is no dtype", f"use auto, {', '.join(DTYPES)}")
        return DTYPES[name]
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    if device.type == "cpu" and multiplies_bf16():
        return torch.bfloat16
    return torch.float32


def load_model(folder: Path, *, device: str = "auto", dtype: str = "auto") -> Model:
    """Load a transformers folder, frozen, for inference and for gradients of a prior.

    On a CPU numpy's products, which embed questions, keep to one thread from then on, where numpy has its own OpenBLAS.
    raises  ModelUnavailable where the folder holds no causal language model that transformers can load
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    chosen = choose_device(device)
    if chosen.type == "cpu":
        _leave_cores_to_torch()
    kind = choose_dtype(dtype, chosen)
    with unreadable_model(
        f"'{folder}' cannot be loaded as a causal language model",
        "it needs config.json, a tokenizer and weights in safetensors, of an architecture transformers knows",
    ):
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        network = AutoModelForCausalLM.from_pretrained(folder, dtype=kind, local_files_only=True, use_safetensors=True)
    network.eval().requires_grad_(False)
    network.to(chosen)  # type: ignore[arg-type]
    return Model(network, tokenizer, chosen, kind, find_projections(network))


def _leave_cores_to_torch() -> None:
    """Threads of numpy's OpenBLAS wait for more work by spinning, and PyTorch's wait for them: on two cores an answer
    of five tokens took 259 ms instead of 178 (2026-11, numpy 2.4). PyTorch's own OpenBLAS has another name."""
    ThreadpoolController().select(prefix=NUMPY_BLAS).limit(limits=1)


def find_projections(network: nn.Module) -> tuple[Projection, ...]:
    """The MLP projections of the upper half of the decoder's layers, in order of execution.

    A layer's MLP is each of its children that holds linear maps and is not an attention (the modules that keep a
    place in the key-value cache, `layer_idx`).
    raises  Mismatch where the model has no such structure
    """
    path, layers = decoder_layers(network)
    projections = []
    for index in range(first_adapted_layer(network), len(layers)):
        for child_name, child in layers[index].named_children():
            if hasattr(child, "layer_idx"):
                continue
            for name, module in child.named_modules():
                sizes = _linear_sizes(module)
                if sizes:
                    full = ".".join(part for part in (path, str(index), child_name, name) if part)
                    projections.append(Projection(full, module, *sizes))
    if not projections:
        raise Mismatch(
            f"no MLP projections were found in the upper layers of this {type(network).__name__}",
            "regrad adapts models whose MLP projections are linear modules (Llama, Qwen, Gemma, GPT-2 and their kin)",
        )
    return tuple(projections)


def first_adapted_layer(network: nn.Module) -> int:
    """The index of the lowest layer that a prior adapts; nothing below it ever changes."""
    return len(decoder_layers(network)[1]) // 2


def decoder_layers(network: nn.Module) -> tuple[str, Sequence[nn.Module]]:
    """The path of the list of decoder layers in the model, and the layers.

    raises  Mismatch where there is none
    """
    config = getattr(network, "config", None)
    config = config.get_text_config() if config is not None else None
    count = getattr(config, "num_hidden_layers", None)
    for path, module in network.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count:
            return path, list(module)
    raise Mismatch(f"this {type(network).__name__} has no list of decoder layers", "use a decoder-only language model")


def last(ids: torch.Tensor, count: int = 1) -> torch.Tensor:
    """The places of the last tokens of ids (B, L), for `logits_to_keep`: (count,).

    Places, for a number would hand the head a slice: with its strides a product in bf16 has the head's weights copied
    on a CPU (measured 2026-11, torch 2.13: 48 ms instead of 3 for one row, 650 instead of 3.5 for 16).
    """
    return torch.arange(ids.shape[1] - count, ids.shape[1], device=ids.device)


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map, or None. GPT-2's Conv1D keeps its weight the other way round."""
    if isinstance(module, nn.Linear):
        return module.in_features, module.out_features
    if type(module).__name__ == "Conv1D" and hasattr(module, "nf"):
        inputs, outputs = module.get_parameter("weight").shape
        return inputs, outputs
    return None


@contextmanager
def attention_for_gradients(model: Model) -> Iterator[None]:
    """On a CPU, plain matrix products: the fused kernel's backward takes 2–3 times as long at these lengths (measured
    2026-11 on AVX512-BF16, 192 tokens: 9.9 ms against 4.4 ms a layer)."""
    usual = model.network.config._attn_implementation
    if model.device.type != "cpu" or usual != "sdpa":
        yield
        return
    model.network.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.network.set_attn_implementation(usual)
