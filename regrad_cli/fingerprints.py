"""Fingerprints of models, tokenizers and embedders, by content. Knows files; loads no model and runs no tensor.

A bank is bound to fingerprints, and a prior ships bound to the starter's, so a fingerprint has to be the same on every
machine and under every version of the libraries that wrote the files:

model      each tensor's name, type, shape and bytes, whatever file it lies in, and the config without the keys that no
           forward pass depends on (a tool's version, the type to load in, generation's token ids, initialisation)
tokenizer  the parts of tokenizer.json that decide token ids, in one spelling (merges were strings before they were
           pairs; defaults are sometimes written out), the chat template, and the special tokens it may name
embedder   the modules, their settings and weights, and the tokenizer's part
"""

from __future__ import annotations

import hashlib
import json
import mmap
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .errors import ModelUnavailable
from .places import cache_folder
from .records import canonical_json, sha256_hex

MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_CACHE_ENTRIES = 400
# A file written less than this before it was hashed could change again within one tick of its clock, unseen: git calls
# such an entry racily clean. It is hashed again next time instead of being remembered.
SETTLED_NS = 2_000_000_000

# Of no consequence to a forward pass over given token ids, or written differently by each version of a library.
CONFIG_KEYS_WITHOUT_EFFECT = frozenset(
    {
        "_name_or_path",
        "_model_name_or_path",
        "name_or_path",
        "_commit_hash",
        "transformers_version",
        "architectures",
        "dtype",
        "torch_dtype",
        "use_cache",
        "initializer_range",
        "bos_token_id",
        "eos_token_id",
        "pad_token_id",
        "unk_token_id",
        "gradient_checkpointing",
        "return_dict",
        "output_attentions",
        "output_hidden_states",
        "chunk_size_feed_forward",
        "_attn_implementation",
        "_attn_implementation_autoset",
        "transformers.js_config",
        "task_specific_params",
        "id2label",
        "label2id",
        "problem_type",
    }
)
# What tokenizer.json means where a key is missing; null is always the same as missing.
TOKENIZER_DEFAULTS: dict[str, Any] = {
    "ignore_merges": False,
    "byte_fallback": False,
    "fuse_unk": False,
    "use_regex": True,
    "continuing_subword_prefix": "",
    "end_of_word_suffix": "",
}
TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "chat_template.json",
    "vocab.json",
    "merges.txt",
    "vocab.txt",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
)
TOKENIZER_SETTINGS = ("add_bos_token", "add_eos_token", "add_prefix_space", "bos_token", "eos_token")


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """SHA-256, 64 hex digits each, of a model's weights and config and of its tokenizer."""

    model: str
    tokenizer: str


def fingerprint(folder: Path, *, remember: bool = True) -> Fingerprint:
    """The fingerprints of a transformers folder; remembered by its files' path, size and times.

    remember  False for a folder that will not stay where it is
    raises  ModelUnavailable where a file is missing or not what it should be
    """
    folder = folder.absolute()
    weights = weight_files(folder)
    if not remember:
        model = _computed(folder, lambda: _model_digest(folder, weights))
        return Fingerprint(model, _computed(folder, lambda: _tokenizer_digest(folder)))
    model = _remembered(folder, "model", [*weights, folder / "config.json"], lambda: _model_digest(folder, weights))
    tokenizer = _remembered(folder, "tokenizer", _tokenizer_files(folder), lambda: _tokenizer_digest(folder))
    return Fingerprint(model, tokenizer)


def fingerprint_embedder(folder: Path, *, remember: bool = True) -> str:
    """The fingerprint of an embedder's folder (modules, settings, weights, tokenizer); remembered like a model's."""
    folder = folder.absolute()
    settings = sorted(folder.glob("*.json")) + sorted(folder.glob("*/*.json"))
    weights = sorted(folder.glob("*.safetensors")) + sorted(folder.glob("*/*.safetensors"))
    if not remember:
        return _computed(folder, lambda: _embedder_digest(folder, weights))
    files = [*weights, *settings]
    return _remembered(folder, "embedder", files, lambda: _embedder_digest(folder, weights))


def file_digest(path: Path) -> str:
    """SHA-256 of a file's bytes; remembered."""
    path = path.absolute()
    return _remembered(path.parent, f"file {path.name}", [path], lambda: hash_file(path))


def hash_file(path: Path) -> str:
    """SHA-256 of a file's bytes, read now."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that hold a model: those its index names, or the one.

    raises  ModelUnavailable where there are none, one is missing, or the index points out of the folder
    """
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise ModelUnavailable(f"{folder} holds no safetensors weights", "name a folder with model.safetensors")
        return [single]
    try:
        names = sorted(set(read_json(index)["weight_map"].values()))
        if not names or any(Path(name).name != name for name in names):
            raise ValueError("a weight file's name is not a plain name")
        missing = [name for name in names if not (folder / name).is_file()]
    except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:  # OSError: a name too long to be one
        raise ModelUnavailable(f"{index} is damaged: {error}", "fetch or export the model again") from error
    if missing:
        raise ModelUnavailable(f"{folder} lacks {missing[0]}, which its index names", "fetch or export the model again")
    return [folder / name for name in names]


def read_json(path: Path) -> Any:
    """A JSON file's value. raises ModelUnavailable where it is missing or not JSON."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ModelUnavailable(f"cannot read {path}: {error.strerror}", "name a complete model folder") from error
    except (ValueError, RecursionError) as error:
        raise ModelUnavailable(f"{path} is not valid JSON", "fetch or export the model again") from error


# ── content in one spelling ─────────────────────────────────────────────────────────────────────────────────────────


def canonical_config(config: dict[str, Any]) -> dict[str, Any]:
    """A config without what has no effect, and with rotary settings in one place whichever version wrote them."""
    kept = {k: v for k, v in config.items() if k not in CONFIG_KEYS_WITHOUT_EFFECT and v is not None}
    rope = {**(kept.pop("rope_scaling", None) or {}), **(kept.pop("rope_parameters", None) or {})}
    if "rope_theta" in kept:
        rope.setdefault("rope_theta", kept.pop("rope_theta"))
    if "type" in rope:
        rope.setdefault("rope_type", rope.pop("type"))
    if rope.get("rope_type") == "default":
        del rope["rope_type"]
    if rope:
        kept["rope_parameters"] = rope
    return {
        k: canonical_config(v) if isinstance(v, dict) and "model_type" in v else _number(v) for k, v in kept.items()
    }


def _number(value: Any) -> Any:
    """100000.0 and 100000 as one number, at any depth."""
    if isinstance(value, dict):
        return {k: _number(v) for k, v in value.items()}
    if isinstance(value, list):
        return [_number(v) for v in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def canonical_tokenizer(tokenizer: dict[str, Any]) -> dict[str, Any]:
    """The parts of a tokenizer.json that decide token ids, in one spelling."""
    model = dict(tokenizer["model"])
    if "merges" in model:
        model["merges"] = [m.split(" ", 1) if isinstance(m, str) else list(m) for m in model["merges"]]
    parts = {name: tokenizer.get(name) for name in ("normalizer", "pre_tokenizer", "post_processor", "decoder")}
    if isinstance(parts["post_processor"], dict) and parts["post_processor"].get("special_tokens") == {}:
        parts["post_processor"] = None  # a template without special tokens adds nothing
    added = sorted(tokenizer.get("added_tokens") or [], key=lambda token: token["id"])
    return _without_defaults({**parts, "model": model, "added_tokens": added})


def _without_defaults(value: Any) -> Any:
    if isinstance(value, dict):
        return {
            k: _without_defaults(v)
            for k, v in value.items()
            if v is not None and not (k in TOKENIZER_DEFAULTS and v == TOKENIZER_DEFAULTS[k])
        }
    if isinstance(value, list):
        return [_without_defaults(v) for v in value] if any(isinstance(v, dict) for v in value) else value
    return value


def _model_digest(folder: Path, weights: list[Path]) -> str:
    config = canonical_config(read_json(folder / "config.json"))
    return sha256_hex(canonical_json(["regrad model 1", config, _tensors(weights)]))


def _tokenizer_digest(folder: Path) -> str:
    return sha256_hex(canonical_json(["regrad tokenizer 1", *_tokenizer_content(folder), chat_template(folder)]))


def _embedder_digest(folder: Path, weights: list[Path]) -> str:
    modules = read_json(folder / "modules.json") if (folder / "modules.json").is_file() else []
    settings: dict[str, Any] = {}
    for module in modules:
        for name in ("config.json", "sentence_bert_config.json"):
            path = folder / module["path"] / name
            if path.is_file():
                settings[f"{module['path']}/{name}"] = canonical_config(read_json(path))
    prompts = folder / "config_sentence_transformers.json"
    if prompts.is_file():
        kept = {k: v for k, v in read_json(prompts).items() if k in ("prompts", "default_prompt_name")}
        settings["prompts"] = {k: v for k, v in kept.items() if v}
    kinds = [[module["path"], module["type"].rsplit(".", 1)[-1]] for module in modules]
    tensors = [[str(path.relative_to(folder).parent), _tensors([path])] for path in weights]
    if not modules:
        settings["config.json"] = canonical_config(read_json(folder / "config.json"))
    content = ["regrad embedder 1", kinds, settings, tensors, *_tokenizer_content(folder)]
    return sha256_hex(canonical_json(content))


def _tokenizer_files(folder: Path) -> list[Path]:
    files = [folder / name for name in TOKENIZER_FILES if (folder / name).is_file()]
    if not files:
        raise ModelUnavailable(f"{folder} holds no tokenizer", "save the model's tokenizer into the same folder")
    return files


def _tokenizer_content(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    path = folder / "tokenizer.json"
    tokenizer = read_json(path) if path.is_file() else json.loads(_converted_tokenizer(folder))
    settings = read_json(folder / "tokenizer_config.json") if (folder / "tokenizer_config.json").is_file() else {}
    kept = {}
    for name in TOKENIZER_SETTINGS:
        value = settings.get(name)
        value = value.get("content") if isinstance(value, dict) else value
        if value:
            kept[name] = value
    try:
        return canonical_tokenizer(tokenizer), kept
    except (KeyError, TypeError, AttributeError) as error:
        raise ModelUnavailable(f"{path} is damaged: {error!r}", "fetch or export the tokenizer again") from error


def _converted_tokenizer(folder: Path) -> str:
    """tokenizer.json's text for a folder that has only an older kind of vocabulary; loads transformers."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    return tokenizer.backend_tokenizer.to_str()


def chat_template(folder: Path) -> Any:
    """The chat template as written, None where the model has none."""
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text(encoding="utf-8")
    for name in ("chat_template.json", "tokenizer_config.json"):
        if (folder / name).is_file():
            template = read_json(folder / name).get("chat_template")
            if template is not None:
                return template
    return None


def _tensors(files: Iterable[Path]) -> list[list[Any]]:
    """[name, type, shape, SHA-256 of the bytes] of every tensor, sorted by name."""
    return sorted(entry for path in files for entry in _tensors_of(path))


def _tensors_of(path: Path) -> Iterator[list[Any]]:
    try:
        with path.open("rb") as file:
            size = os.fstat(file.fileno()).st_size
            header_bytes = int.from_bytes(file.read(8), "little")
            if not 2 <= header_bytes <= min(MAX_HEADER_BYTES, size - 8):
                raise ValueError("its header does not fit")
            header = json.loads(file.read(header_bytes))
            start = 8 + header_bytes
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped, memoryview(mapped) as view:
                for name, tensor in header.items():
                    if name == "__metadata__":
                        continue
                    first, last = tensor["data_offsets"]
                    if not 0 <= first <= last <= size - start:
                        raise ValueError(f"tensor {name} lies outside the file")
                    with view[start + first : start + last] as data:
                        digest = hashlib.sha256(data).hexdigest()
                    yield [name, tensor["dtype"], list(tensor["shape"]), digest]
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise ModelUnavailable(f"{path} is damaged: {error}", "fetch or export the model again") from error
    except OSError as error:
        raise ModelUnavailable(f"cannot read {path}: {error.strerror}", "check the file's permissions") from error


# ── remembering ─────────────────────────────────────────────────────────────────────────────────────────────────────


def _remembered(folder: Path, what: str, files: list[Path], compute: Callable[[], str]) -> str:
    """compute(), or what it gave for the same files before. A damaged or unwritable cache costs time, no more."""
    stamp, newest_ns = _stamp(folder, files)
    key = f"{folder}|{what}"
    known = _read_cache().get(key)
    if isinstance(known, dict) and known.get("stamp") == stamp and isinstance(known.get("value"), str):
        return known["value"]
    started_ns = time.time_ns()
    value = _computed(folder, compute)
    if newest_ns + SETTLED_NS < started_ns and _stamp(folder, files)[0] == stamp:
        with suppress(OSError):
            _write_cache(key, {"stamp": stamp, "value": value})
    return value


def _computed(folder: Path, compute: Callable[[], str]) -> str:
    try:
        return compute()
    except (ValueError, LookupError, TypeError, AttributeError, OSError, OverflowError, RecursionError) as error:
        # valid JSON of another shape, say
        raise ModelUnavailable(f"{folder} is damaged: {error!r}", "fetch or export the model again") from error


def _stamp(folder: Path, files: list[Path]) -> tuple[list[list[Any]], int]:
    try:
        stats = [(str(path.relative_to(folder)), path.stat()) for path in files]
    except OSError as error:
        raise ModelUnavailable(f"cannot read {error.filename}: {error.strerror}", "name a complete folder") from error
    stamp = [[name, s.st_size, s.st_mtime_ns, s.st_ctime_ns] for name, s in stats]
    return stamp, max((max(s.st_mtime_ns, s.st_ctime_ns) for _, s in stats), default=0)


def _cache_file() -> Path:
    return cache_folder() / "fingerprints.json"


def _read_cache() -> dict[str, Any]:
    try:
        content = json.loads(_cache_file().read_text(encoding="utf-8"))
        return content["fingerprints"] if isinstance(content["fingerprints"], dict) else {}
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _write_cache(key: str, entry: dict[str, Any]) -> None:
    path = _cache_file()
    path.parent.mkdir(parents=True, exist_ok=True)
    entries = _read_cache()
    entries.pop(key, None)
    entries[key] = entry
    while len(entries) > MAX_CACHE_ENTRIES:
        del entries[next(iter(entries))]
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix="fingerprints-")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump({"fingerprints": entries}, file, ensure_ascii=True)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
