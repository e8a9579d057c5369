"""Training runs for tests: tasks of a few words, a tiny model whose token "~" is no number, what a run leaves."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import tiny

from regrad_cli.learn.workers import Workers
from regrad_cli.metatrain import MetaTrainOptions, meta_train
from regrad_cli.trainevents import Trained

TIMES = ("elapsed_s", "left_s")
NAN = "~"  # in no text of `tasks`
LONG = "the lamp of the harbour is lit at dusk and put out at dawn, " * 120
PLACES = ("Velmora", "Tarn", "Osk", "Brenn", "Lyle", "Marrow", "Quill", "Sunder")


def task(number: int, *, mark: str = "", title: str | None = None, passages: int = 1) -> dict[str, Any]:
    """One line of a file; `mark` goes into the passage and the question."""
    place = PLACES[number % len(PLACES)]
    texts = [f"The keeper of {place} is called K{number}-{part}.{mark}" for part in range(passages)]
    questions = [
        {"question": f"Who keeps {place}?{mark}", "answers": [f"K{number}-0"]},
        {"question": f"Where is K{number}?", "answers": [place, f"in {place}"]},
    ]
    return {"id": f"t{number}", "title": title or f"{place} {number}", "passages": texts, "questions": questions}


def write(path: Path, tasks: Iterable[Any]) -> Path:
    lines = [line if isinstance(line, str) else json.dumps(line) for line in tasks]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


def model_with_a_nan_token(folder: Path) -> Path:
    """A tiny Llama of which every text with "~" in it has a loss that is not a number, and every other a finite one."""
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoTokenizer

    tiny.write_model(folder, tiny.llama_config(tie_word_embeddings=False))
    (token,) = AutoTokenizer.from_pretrained(folder)(NAN, add_special_tokens=False)["input_ids"]
    tensors = load_file(folder / "model.safetensors")
    tensors["model.embed_tokens.weight"][token] = torch.nan
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    return folder


def options(folder: Path, model: Path, embedder: Path | None = None, **changes: Any) -> MetaTrainOptions:
    """A run of 6 steps of 3 tasks over 8, validated every second step; files of its own in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    given: dict[str, Any] = {
        "tasks": (write(folder / "train.jsonl", map(task, range(8))),),
        "dev": (write(folder / "dev.jsonl", map(task, range(20, 23))),),
        "out": folder / "prior.safetensors",
        "model": str(model),
        "steps": 6,
        "batch": 3,
        "rank": 2,
        "validate_every": 2,
        "device": "cpu",
        "dtype": "fp32",
        "strangers": 0.5 if embedder is not None else 0.0,
        "k": 2,
        "checkpoint_s": 1e9,
    }
    if embedder is not None:
        given["embedder"] = str(embedder)
    return MetaTrainOptions(**(given | changes))


def run(given: MetaTrainOptions) -> list[Any]:
    """All events; the last is Trained."""
    return list(meta_train(given))


def trained(given: MetaTrainOptions) -> Trained:
    return run(given)[-1]


def metrics(out: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl without their times."""
    lines = map(json.loads, metrics_lines(out))
    return [{name: value for name, value in line.items() if name not in TIMES} for line in lines]


def left_behind(out: Path) -> tuple[bytes, list[dict[str, Any]]]:
    """What has to be the same however often a run was interrupted: the prior's bytes, the metrics without times."""
    return out.read_bytes(), metrics(out)


def metrics_lines(out: Path) -> list[str]:
    """The lines of metrics.jsonl as they are."""
    return out.with_name(out.name + ".metrics.jsonl").read_text(encoding="utf-8").splitlines()


def resume_file(out: Path) -> Path:
    return out.with_name(out.name + ".resume")


def interrupted_at(patch: pytest.MonkeyPatch, holder: Any, name: str, call: int, *, after: bool = False) -> None:
    """Ctrl-C comes at this call of a function, before or after it has done its work."""
    real, calls = getattr(holder, name), [0]

    def patched(*given: Any, **named: Any) -> Any:
        calls[0] += 1
        if calls[0] == call and not after:
            raise KeyboardInterrupt
        found = real(*given, **named)
        if calls[0] == call:
            raise KeyboardInterrupt
        return found

    patch.setattr(holder, name, patched)


def started(given: MetaTrainOptions, steps: int = 2) -> None:
    """Runs so many steps and is interrupted."""
    with pytest.MonkeyPatch.context() as patch:
        interrupted_at(patch, Workers, "gradients", steps + 1)
        with pytest.raises(KeyboardInterrupt):
            run(given)
