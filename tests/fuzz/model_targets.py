"""Targets: a model's folder, an embedder's, and a GGUF file. What is loaded afterwards is transformers' own subject."""

from __future__ import annotations

import json
import os
import shutil
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

import tiny

from regrad_cli import models
from regrad_cli.errors import RegradError
from regrad_cli.fingerprints import fingerprint, fingerprint_embedder

from .learning_targets import in_safetensors
from .mutations import Choose, in_bytes, in_json
from .targets import Target

MODEL_FILES = ("config.json", "tokenizer.json", "tokenizer_config.json", "model.safetensors.index.json")
EMBEDDER_FILES = ("modules.json", "config.json", "1_Pooling/config.json", "sentence_bert_config.json", "tokenizer.json")


class Folders:
    """A tiny model and a tiny embedder, and a copy of each to spoil."""

    def __init__(self, scratch: Path) -> None:
        self.scratch = scratch

    @cached_property
    def model(self) -> Path:
        folder = tiny.write_model(self.scratch / "model")
        names = json.loads((folder / "tokenizer_config.json").read_bytes())
        assert names
        index = {"metadata": {}, "weight_map": {"x": "model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index), encoding="utf-8")
        return folder

    @cached_property
    def embedder(self) -> Path:
        return tiny.write_embedder(self.scratch / "embedder")

    @cached_property
    def gguf(self) -> bytes:
        folder = self.scratch / "gguf"
        folder.mkdir()
        return tiny.write_gguf(folder / "tiny.gguf").read_bytes()

    def spoiled(self, folder: Path, name: str, data: bytes) -> Path:
        """A copy of links but for one file."""
        copy = folder.with_name(f"{folder.name}-copy")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(folder, copy, copy_function=os.link)
        (copy / name).unlink(missing_ok=True)
        (copy / name).write_bytes(data)
        return copy


def _quiet(work: Any) -> Any:
    try:
        return work()
    except RegradError as error:
        assert error.message and error.kind != "unexpected", repr(error)
        return None


def _named(data: bytes, choose: Choose) -> bytes:
    """The first byte says which file it is."""
    change = in_json if choose(4) else in_bytes
    return data[:1] + change(data[1:], choose)


def targets(scratch: Path) -> list[Target]:
    folders = Folders(scratch)

    def seeds_of(folder: Path, names: tuple[str, ...]) -> list[bytes]:
        return [bytes([number]) + (folder / name).read_bytes() for number, name in enumerate(names)]

    def model(data: bytes) -> None:
        name = MODEL_FILES[data[0] % len(MODEL_FILES)] if data else MODEL_FILES[0]
        folder = folders.spoiled(folders.model, name, data[1:])
        if _quiet(lambda: models.resolve_model(str(folder), fetch=False)) is not None:
            _quiet(lambda: fingerprint(folder, remember=False))
        from regrad_cli.learn.tokens import Tokenizer

        tokens = _quiet(lambda: Tokenizer(folder)) if name == "tokenizer.json" else None
        if tokens is not None:
            tokens.ids("Seven keys.")

    def weights(data: bytes) -> None:
        folder = folders.spoiled(folders.embedder, "model.safetensors", data)
        _quiet(lambda: fingerprint_embedder(folder, remember=False))
        from regrad_cli.embed import load_embedder

        _quiet(lambda: load_embedder(folder).encode_query("Seven keys."))

    def weights_seeds() -> list[bytes]:
        data = (folders.embedder / "model.safetensors").read_bytes()
        return [data, struct.pack("<Q", 2) + b"{}"]

    def embedder(data: bytes) -> None:
        name = EMBEDDER_FILES[data[0] % len(EMBEDDER_FILES)] if data else EMBEDDER_FILES[0]
        folder = folders.spoiled(folders.embedder, name, data[1:])
        if _quiet(lambda: models.resolve_embedder(str(folder), fetch=False)) is None:
            return
        _quiet(lambda: fingerprint_embedder(folder, remember=False))
        from regrad_cli.embed import _light_plan, load_embedder

        if _quiet(lambda: _light_plan(folder)) is not None:  # the others are sentence-transformers' subject
            _quiet(lambda: load_embedder(folder).encode_query("Seven keys."))

    def gguf(data: bytes) -> None:
        file = scratch / "foreign.gguf"
        file.write_bytes(data)
        shutil.rmtree(scratch / "cache", ignore_errors=True)
        os.environ["REGRAD_CACHE"] = str(scratch / "cache")
        _quiet(lambda: models.resolve_model(str(file)))

    return [
        Target(
            "model",
            "a model's config, tokenizer and list of weights",
            model,
            lambda: seeds_of(folders.model, MODEL_FILES),
            _named,
        ),
        Target(
            "embedder",
            "an embedder's settings and tokenizer",
            embedder,
            lambda: seeds_of(folders.embedder, EMBEDDER_FILES),
            _named,
        ),
        Target("weights", "an embedder's weights", weights, weights_seeds, in_safetensors),
        Target("gguf", "a GGUF file", gguf, lambda: [folders.gguf]),
    ]
