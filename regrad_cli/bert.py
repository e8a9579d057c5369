"""One text through a BERT encoder in numpy. Knows weights and token ids; knows no text, no pooling, no torch.

A cold `query` embeds one question. Importing torch and transformers for that takes about 5 s, this about 0.1 s; a test
holds the result equal to sentence-transformers' to 1e-5. Documents, of which there are many, go through torch.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from .errors import ModelUnavailable
from .fingerprints import read_json


class NumpyBert:
    """The encoder of a BertModel's folder, for one sequence at a time, in float32.

    raises  Unsupported where the config asks for something this does not do; the caller then uses torch
    """

    def __init__(self, folder: Path) -> None:
        from safetensors import SafetensorError, safe_open

        config = read_json(folder / "config.json")
        if not supported(config):
            raise Unsupported
        self.heads = int(config["num_attention_heads"])
        self.epsilon = np.float32(config.get("layer_norm_eps", 1e-12))
        self._weights: dict[str, np.ndarray] = {}
        path = folder / "model.safetensors"
        if not path.is_file():
            raise Unsupported
        try:
            self._file = safe_open(path, framework="numpy")
        except (SafetensorError, OSError) as error:
            raise ModelUnavailable(f"{path} is damaged: {error}", "fetch the embedder again") from error
        names = set(self._file.keys())
        self.layers = int(config["num_hidden_layers"])
        if not 0 <= self.layers <= len(names):
            raise ModelUnavailable(f"{path} has fewer layers than its config says", "fetch the embedder again")
        prefix = "bert." if "bert.embeddings.word_embeddings.weight" in names else ""
        kinds = {self._file.get_slice(name).get_dtype() for name in names if name.startswith(prefix)}
        if not kinds <= {"F32", "F16", "I64"}:
            raise Unsupported
        if not self._expected(self.layers) <= {name.removeprefix(prefix) for name in names}:
            raise ModelUnavailable(f"{path} lacks some of a BERT's tensors", "fetch the embedder again")
        # looked up row by row, never read whole: half of a small model is its vocabulary
        self._words = self._file.get_slice(f"{prefix}embeddings.word_embeddings.weight")
        for name in names:
            if name.startswith((f"{prefix}encoder.", f"{prefix}embeddings.")) and "word_emb" not in name:
                tensor = self._file.get_tensor(name)
                if tensor.dtype != np.int64:
                    self._weights[name.removeprefix(prefix)] = tensor.astype(np.float32, copy=False)

    @staticmethod
    def _expected(layers: int) -> set[str]:
        parts = [f"attention.self.{part}" for part in ("query", "key", "value")]
        parts += ["attention.output.dense", "attention.output.LayerNorm", "intermediate.dense", "output.dense"]
        parts += ["output.LayerNorm"]
        linear = [f"encoder.layer.{n}.{part}" for n in range(layers) for part in parts]
        tables = {f"embeddings.{kind}_embeddings.weight" for kind in ("word", "position", "token_type")}
        return tables | {f"{name}.{kind}" for name in [*linear, "embeddings.LayerNorm"] for kind in ("weight", "bias")}

    def __call__(self, token_ids: list[int]) -> np.ndarray:
        """Hidden states of the last layer, (tokens, d) float32."""
        words = np.concatenate([self._words[i : i + 1] for i in token_ids]).astype(np.float32, copy=False)
        weights = self._weights
        positions = weights["embeddings.position_embeddings.weight"][: len(token_ids)]
        kinds = weights["embeddings.token_type_embeddings.weight"][0]
        hidden = self._normalise(words + kinds + positions, "embeddings.LayerNorm")  # (T, d)
        for layer in range(self.layers):
            at = f"encoder.layer.{layer}."
            hidden = self._normalise(hidden + self._attend(hidden, at), at + "attention.output.LayerNorm")
            inner = gelu(self._linear(hidden, at + "intermediate.dense"))  # (T, 4d)
            hidden = self._normalise(hidden + self._linear(inner, at + "output.dense"), at + "output.LayerNorm")
        return hidden

    def _attend(self, hidden: np.ndarray, at: str) -> np.ndarray:
        tokens, width = hidden.shape
        query, key, value = (
            self._linear(hidden, f"{at}attention.self.{part}").reshape(tokens, self.heads, -1).swapaxes(0, 1)
            for part in ("query", "key", "value")
        )  # (H, T, d / H)
        scores = query @ key.swapaxes(1, 2) / np.float32(np.sqrt(width / self.heads))
        scores = np.exp(scores - scores.max(axis=2, keepdims=True))
        mixed = (scores / scores.sum(axis=2, keepdims=True)) @ value
        return self._linear(mixed.swapaxes(0, 1).reshape(tokens, width), at + "attention.output.dense")

    def _linear(self, x: np.ndarray, name: str) -> np.ndarray:
        return x @ self._weights[name + ".weight"].T + self._weights[name + ".bias"]

    def _normalise(self, x: np.ndarray, name: str) -> np.ndarray:
        centred = x - x.mean(axis=1, keepdims=True)
        variance = np.square(centred).mean(axis=1, keepdims=True)
        scaled = centred / np.sqrt(variance + self.epsilon)
        return scaled * self._weights[name + ".weight"] + self._weights[name + ".bias"]


class Unsupported(Exception):
    """The folder holds a model that this module does not compute."""


def supported(config: dict[str, Any]) -> bool:
    """Whether a config is that of a plain BERT encoder with the exact GELU and absolute positions."""
    return (
        config.get("model_type") == "bert"
        and config.get("hidden_act", "gelu") == "gelu"
        and config.get("position_embedding_type", "absolute") == "absolute"
        and not config.get("is_decoder", False)
        and not config.get("quantization_config")
    )


def gelu(x: np.ndarray) -> np.ndarray:
    """x · Φ(x), with erf to 1.5e-7 (Abramowitz and Stegun, 7.1.26), as numpy has none."""
    z = np.abs(x) * np.float32(0.7071067811865476)
    t = 1 / (1 + np.float32(0.3275911) * z)
    series = t * (0.254829592 + t * (-0.284496736 + t * (1.421413741 + t * (-1.453152027 + t * 1.061405429))))
    erf = np.sign(x) * (1 - series * np.exp(-z * z))
    return (x * np.float32(0.5) * (1 + erf)).astype(np.float32, copy=False)
