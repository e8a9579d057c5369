"""Text to unit vectors, for retrieval. Knows an embedder's folder and a device; knows no bank, no document, no model.

Three ways, the lightest that fits. One question through numpy (`bert.py`) where the embedder is a plain BERT with mean
or first-token pooling; many texts of such an embedder through transformers' BertModel; any other embedder through
sentence-transformers, imported only then. A text's vector has the same bits whatever was embedded beside it: shapes are
fixed (a bucket of lengths × ROWS, padded with empty rows), or texts go one by one.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from .errors import ModelUnavailable, NonFinite, unreadable_model
from .fingerprints import read_json
from .models import quiet_libraries
from .processor import multiplies_bf16

if TYPE_CHECKING:
    import numpy as np

# Tokens are padded to a multiple of BUCKET, batches to ROWS. Measured per core at 192 tokens: 1 row 44 passages/s,
# 4 rows 49, 8 rows 47, 32 rows 50 (bfloat16); so few rows, of which a short ingest leaves few empty.
BUCKET = 16
ROWS = 8
MAX_DIMENSION = 1 << 16

POOLING = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class Embedder(Protocol):
    """What retrieval needs of an embedder."""

    dimension: int

    def encode_query(self, text: str) -> np.ndarray:
        """A question's vector, (d,) float32, of unit norm."""
        ...

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        """Documents' vectors, (n, d) float32, of unit norm; a text's own bits whatever its neighbours."""
        ...


def load_embedder(folder: Path, device: str = "cpu", dtype: str = "auto") -> Embedder:
    """The embedder of a folder in sentence-transformers' layout.

    device  "cpu", "cuda", "cuda:N" or "mps", for `encode`; a single question is always embedded on the CPU where it can
    dtype   what documents are computed in: "float32", "bfloat16" (the layers' products only; norms, pooling and the
            vector stay float32) or "auto": bfloat16 on a CPU that multiplies it faster, float32 elsewhere. A question
            is always computed in float32
    raises  ModelUnavailable where the folder is not an embedder's
    """
    plan = _light_plan(folder)
    return LightEmbedder(folder, plan, device, dtype) if plan else SentenceEmbedder(folder, device)


class LightEmbedder:
    """A BERT encoder, pooled over tokens or at the first token, and normalised."""

    def __init__(self, folder: Path, plan: dict[str, Any], device: str, dtype: str) -> None:
        from tokenizers import Tokenizer

        self.dimension: int = plan["dimension"]
        self.folder = folder
        self.device = device
        self.dtype = dtype
        self.pooling: str = plan["pooling"]
        self.max_tokens: int = plan["max_tokens"]
        with self._reading_its_tokenizer():
            self._tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
            self._tokenizer.no_padding()
            self._tokenizer.enable_truncation(self.max_tokens)
        self._single: Any = None
        self._model: Any = None

    def _reading_its_tokenizer(self) -> AbstractContextManager[None]:
        return unreadable_model(f"{self.folder}/tokenizer.json is damaged", "fetch the embedder again")

    def encode_query(self, text: str) -> np.ndarray:
        import numpy as np

        from .bert import NumpyBert, Unsupported

        with self._reading_its_tokenizer():
            ids = self._tokenizer.encode(text).ids
        with unreadable_model(f"{self.folder} has settings that do not fit its weights", "fetch the embedder again"):
            if self._single is None:
                try:
                    self._single = NumpyBert(self.folder)
                except Unsupported:
                    self._single = False
            hidden = self._single(ids) if self._single is not False else None
        if hidden is None:
            return self._in_shape([ids], rows=1, dtype="float32")[0]
        pooled = hidden[0] if self.pooling == "cls" else hidden.mean(axis=0)
        return _checked(pooled / max(float(np.linalg.norm(pooled)), 1e-12))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        import numpy as np

        result = np.empty((len(texts), self.dimension), np.float32)
        with self._reading_its_tokenizer():
            token_ids = [encoding.ids for encoding in self._tokenizer.encode_batch(list(texts))]
        buckets: dict[int, list[int]] = {}
        for index, ids in enumerate(token_ids):
            buckets.setdefault(-(-len(ids) // BUCKET), []).append(index)
        for _, members in sorted(buckets.items()):
            for start in range(0, len(members), ROWS):
                group = members[start : start + ROWS]
                result[group] = self._in_shape([token_ids[index] for index in group], rows=ROWS, dtype=self.dtype)
        return result

    def _in_shape(self, token_ids: list[list[int]], *, rows: int, dtype: str) -> np.ndarray:
        """Vectors of up to `rows` texts of one bucket, computed as `rows` × the bucket's length."""
        import torch

        model = self._loaded()
        length = min(-(-max(map(len, token_ids)) // BUCKET) * BUCKET, model.config.max_position_embeddings)
        ids = torch.zeros((rows, length), dtype=torch.long)  # (R, T)
        mask = torch.zeros((rows, length), dtype=torch.long)
        mask[:, 0] = 1  # an empty row still attends to something: no NaN
        for row, one in enumerate(token_ids):
            ids[row, : len(one)] = torch.tensor(one)
            mask[row, : len(one)] = 1
        ids, mask = ids.to(self.device), mask.to(self.device)
        half = dtype == "bfloat16" or (dtype == "auto" and self.device == "cpu" and multiplies_bf16())
        kind = torch.device(self.device).type
        with torch.inference_mode(), torch.autocast(kind, torch.bfloat16) if half else nullcontext():
            hidden = model(input_ids=ids, attention_mask=mask).last_hidden_state.float()  # (R, T, d)
        if self.pooling == "cls":
            pooled = hidden[:, 0]
        else:
            weights = mask.unsqueeze(2).float()
            pooled = (hidden * weights).sum(1) / weights.sum(1)
        vectors = torch.nn.functional.normalize(pooled, dim=1)[: len(token_ids)]
        return _checked(vectors.cpu().numpy())

    def _loaded(self) -> Any:
        if self._model is None:
            quiet_libraries()
            from transformers.models.bert.modeling_bert import BertModel

            quiet_libraries()
            import torch

            try:
                model = BertModel.from_pretrained(
                    self.folder,
                    add_pooling_layer=False,
                    attn_implementation="sdpa",
                    dtype=torch.float32,
                    local_files_only=True,
                )
            except (OSError, ValueError, RuntimeError) as error:
                raise ModelUnavailable(
                    f"{self.folder} cannot be loaded: {error}", "fetch the embedder again"
                ) from error
            self._model = model.eval().to(self.device)
        return self._model


class SentenceEmbedder:
    """Any embedder that sentence-transformers loads, one text at a time: its shapes then depend on nothing else."""

    def __init__(self, folder: Path, device: str) -> None:
        quiet_libraries()
        from sentence_transformers import SentenceTransformer

        quiet_libraries()
        try:
            self._model = SentenceTransformer(
                str(folder), device=device, local_files_only=True, trust_remote_code=False
            )
        except (OSError, ValueError, RuntimeError, ImportError, AttributeError, TypeError, KeyError) as error:
            raise ModelUnavailable(
                f"{folder} cannot be loaded as an embedder: {error}", "name a folder that sentence-transformers saved"
            ) from error
        self.dimension = len(self.encode_query("dimension"))

    def encode_query(self, text: str) -> np.ndarray:
        vector = self._model.encode_query(text, normalize_embeddings=True, show_progress_bar=False)
        return _checked(vector.astype("float32"))

    def encode(self, texts: Sequence[str]) -> np.ndarray:
        import numpy as np

        if not texts:
            return np.empty((0, self.dimension), np.float32)
        vectors = self._model.encode_document(
            list(texts), batch_size=1, normalize_embeddings=True, show_progress_bar=False
        )
        return _checked(vectors.astype(np.float32))


def _checked(vectors: np.ndarray) -> np.ndarray:
    import numpy as np

    if not np.isfinite(vectors).all():
        raise NonFinite("the embedder gave a vector with a value that is not finite", "fetch the embedder again")
    return vectors


def _light_plan(folder: Path) -> dict[str, Any] | None:
    """What LightEmbedder needs to know, or None where the folder asks for anything else than it does."""
    from .bert import supported

    needed = [folder / name for name in ("modules.json", "config.json", "tokenizer.json")]
    if not all(path.is_file() for path in needed):
        return None
    modules, config = read_json(folder / "modules.json"), read_json(folder / "config.json")
    try:
        kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
        if kinds not in (["Transformer", "Pooling"], ["Transformer", "Pooling", "Normalize"]):
            return None
        if modules[0]["path"] or not supported(config):
            return None
        pooling = _pooling(read_json(folder / modules[1]["path"] / "config.json"))
        max_tokens = _max_tokens(folder, config)
        if pooling is None or max_tokens is None or _asks_for_prompts(folder):
            return None
        dimension = int(config["hidden_size"])
        if not (0 < dimension <= MAX_DIMENSION and max_tokens > 0):
            raise ValueError(f"{dimension} dimensions, {max_tokens} tokens")
        return {"dimension": dimension, "pooling": pooling, "max_tokens": max_tokens}
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise ModelUnavailable(f"{folder} has damaged settings: {error!r}", "fetch the embedder again") from error


def _pooling(config: dict[str, Any]) -> str | None:
    mode = config.get("pooling_mode")
    if mode is None:
        active = [name for name, value in config.items() if name.startswith("pooling_mode_") and value]
        mode = POOLING.get(active[0]) if len(active) == 1 else None
    return mode if mode in ("mean", "cls") else None


def _max_tokens(folder: Path, config: dict[str, Any]) -> int | None:
    """Where texts are cut, as sentence-transformers cuts them; None where the settings hold what is unknown here."""
    positions = int(config["max_position_embeddings"])
    path = folder / "sentence_bert_config.json"
    settings = read_json(path) if path.is_file() else {}
    known = {"max_seq_length", "do_lower_case", "transformer_task", "modality_config", "module_output_name"}
    if set(settings) - known or settings.get("do_lower_case"):
        return None
    if settings.get("transformer_task", "feature-extraction") != "feature-extraction":
        return None
    limit = settings.get("max_seq_length")
    if limit is None and (folder / "tokenizer_config.json").is_file():
        limit = read_json(folder / "tokenizer_config.json").get("model_max_length")
    return min(int(limit), positions) if limit else positions


def _asks_for_prompts(folder: Path) -> bool:
    path = folder / "config_sentence_transformers.json"
    settings = read_json(path) if path.is_file() else {}
    prompts = settings.get("prompts") or {}
    return any(prompts.values()) or bool(settings.get("truncate_dim"))
