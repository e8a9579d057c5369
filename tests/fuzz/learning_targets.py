"""Targets: a prior's file, a training run to go on with, and rows under settings of somebody's choice."""

from __future__ import annotations

import json
import struct
from functools import cached_property
from pathlib import Path
from typing import Any

from regrad_cli.bank.parsing import _settings
from regrad_cli.errors import RegradError

from .mutations import Choose, in_bytes, in_json, in_lines
from .targets import Target

SETTINGS = {"seed": 0, "rank": 2, "objective": "regrad"}
ENTRIES = b'{"step": 0, "loss": 1.5, "elapsed_s": 0.1}\n{"step": 1, "losses": {"d": 2.0}}\n{"step": 2, "loss": null}\n'


class Made:
    """A prior of two small tensors, and a run of it."""

    @cached_property
    def prior(self) -> Any:
        import torch

        from regrad_cli.learn.prior import UNTRAINED_CARD, Prior

        torch.manual_seed(0)
        tensors = {"up.lora_A": torch.randn(2, 6), "up.lora_B": torch.randn(8, 2)}
        return Prior(tensors, dict.fromkeys(tensors, 0.5), UNTRAINED_CARD | {"model": "0" * 64, "rank": 2})

    def training(self) -> Any:
        from regrad_cli.learn.optimise import Training

        return Training(self.prior, steps=4, learning_rate=0.1, step_rate=0.1)

    @cached_property
    def run(self) -> bytes:
        import torch

        training = self.training()
        training.update({name: torch.ones_like(tensor) for name, tensor in self.prior.tensors.items()})
        training.keep_if_best(1.0)
        return training.to_bytes(SETTINGS)

    @cached_property
    def settings(self) -> dict[str, Any]:
        from made_banks import settings

        from regrad_cli.learn.codec import Codec

        made = settings(tensors=self.prior.shapes)
        codec = Codec(made.codec, made.tensors)
        return settings(tensors=self.prior.shapes, code_bytes=codec.code_bytes, scale_count=codec.scale_count).to_json()


def _with_header(data: bytes, change: Any) -> bytes:
    """A safetensors file with its header changed."""
    length = int.from_bytes(data[:8], "little")
    header = change(data[8 : 8 + length])
    return struct.pack("<Q", len(header)) + header + data[8 + length :]


def in_safetensors(data: bytes, choose: Choose) -> bytes:
    """The file's bytes, its header, or a JSON text in its metadata changed."""
    if choose(3) == 0:
        return in_bytes(data, choose)

    def change(header: bytes) -> bytes:
        try:
            body = json.loads(header)
            metadata = body["__metadata__"]
            name = sorted(metadata)[choose(len(metadata))]
            metadata[name] = in_json(metadata[name].encode(), choose).decode("utf-8", "replace")
            return json.dumps(body).encode() if choose(4) else in_json(header, choose)
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return in_bytes(header, choose)

    return _with_header(data, change)


def _quiet(work: Any) -> Any:
    try:
        return work()
    except RegradError as error:
        assert error.message and error.kind != "unexpected", repr(error)
        return None


def targets(scratch: Path) -> list[Target]:
    made = Made()

    def prior(data: bytes) -> None:
        """Whatever is read as a prior can be used as one."""
        from regrad_cli.learn.prior import Prior

        read = _quiet(lambda: Prior.from_bytes(data))
        if read is None:
            return
        assert all(size > 0 for size in read.step_sizes.values()) and read.trained in (True, False)
        assert int(read.card["k"]) >= 1 and abs(float(read.card["gamma"])) < float("inf")
        weights = read.weights_for([0.9, 0.3, -0.5])
        assert len(weights) == 3 and all(0 <= weight <= 1 for weight in weights), weights
        assert read.weights_for([]) == []
        str(read.card["name"]).encode()
        again = Prior.from_bytes(read.to_bytes())
        assert again.to_bytes() == read.to_bytes() and again.shapes == read.shapes
        assert len(read.fingerprint) == 64

    def run(data: bytes) -> None:
        """A training run of somebody's choice is gone on with, or refused whole."""
        from regrad_cli.trainfiles import TrainFiles

        out = scratch / "run" / "prior.safetensors"
        out.parent.mkdir(parents=True, exist_ok=True)
        with TrainFiles(out) as files:
            files.resume.write_bytes(data)
            if _quiet(lambda: files.kept(SETTINGS, {})) is None:
                return
            training = made.training()
            try:
                training.restore(data)
            except RegradError as error:
                assert error.message
                return
            files.take_up(training.step, training.validated)
            training.update({name: tensor.detach() * 0 + 1 for name, tensor in training.theta.items()})
            _quiet(lambda: made.training().restore(training.to_bytes(SETTINGS)))
            training.keep_if_best(0.5)

    def metrics(data: bytes) -> None:
        from regrad_cli.trainfiles import TrainFiles, last_losses

        out = scratch / "metrics" / "prior.safetensors"
        out.parent.mkdir(parents=True, exist_ok=True)
        (out.parent / "prior.safetensors.metrics.jsonl").write_bytes(data)
        with TrainFiles(out) as files:
            files.take_up(2, 1)
            last_losses(files.entries, 1)
            max((entry.get("elapsed_s", 0.0) for entry in files.entries), default=0.0)
            "".join(told for entry in files.entries for told in entry.get("skipped", []))
            files.finish(b"")

    def codec(data: bytes) -> None:
        """Rows of a bank whose settings are of somebody's choice, decoded."""
        import numpy as np

        from regrad_cli.learn.rows import Parts, layout_of

        try:
            settings = _settings(json.loads(data))  # what a manifest may say
        except (ValueError, KeyError, TypeError, RecursionError, AttributeError):
            return
        found = _quiet(lambda: layout_of(settings))
        if found is None:
            return
        codes = np.full((2, found.codec.code_bytes), 255, np.uint8)
        scales = np.ones((2, found.codec.scale_count), np.float16)
        vectors = np.ones((2, settings.embedding_dim), np.float32)
        joined = found.join(Parts(np.arange(2), np.zeros(2, np.int64), vectors, codes, scales), 2)
        assert [part.shape[1] for part in joined] == [settings.code_bytes, settings.scale_count]
        _quiet(lambda: found.split(np.full((2, settings.code_bytes), 255, np.uint8), joined[1]))
        decoded = found.sums(*joined)
        assert [tensor.shape[1:] for tensor in decoded.values()] == [shape[1:] for shape in settings.tensors]

    return [
        Target(
            "prior",
            "a prior's file",
            prior,
            lambda: [made.prior.to_bytes(), made.prior.rounded().to_bytes()],
            in_safetensors,
        ),
        Target("training-run", "a training run to go on with", run, lambda: [made.run], in_safetensors),
        Target("metrics", "what a training run has noted", metrics, lambda: [ENTRIES], in_lines),
        Target(
            "codec",
            "a bank's settings, to what decodes its rows",
            codec,
            lambda: [json.dumps(made.settings).encode()],
            in_json,
        ),
    ]
