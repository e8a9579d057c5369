"""Which tensors gradients are learned for, and how long segments are: decided at the start, and kept ever after."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from train_runs import interrupted_at, options, resume_file, run

from regrad_cli.errors import UsageProblem
from regrad_cli.learn.gradients import passage_gradients
from regrad_cli.learn.model import load_model
from regrad_cli.learn.prior import Prior
from regrad_cli.learn.workers import Workers
from regrad_cli.metatrain import MetaTrainOptions

TOP = "model.layers.3."


@pytest.fixture
def plain(tmp_path: Path, tiny_model_folder: Path) -> MetaTrainOptions:
    return options(tmp_path / "run", tiny_model_folder, gradient_layers=1)


def stopped_in_the_middle(given: MetaTrainOptions) -> None:
    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        interrupted_at(patch, Workers, "gradients", 4)
        run(given)
    assert resume_file(given.out).exists()


def prior_of(given: MetaTrainOptions) -> Prior:
    return Prior.from_bytes(given.out.read_bytes())


@pytest.mark.parametrize("codec", [None, "r1-int4"])
def test_gradients_of_the_uppermost_layers_alone_are_learned(plain: MetaTrainOptions, codec: str | None) -> None:
    run(replace(plain, steps=2, codec=codec, keep="last"))
    found = prior_of(plain)
    assert len(found.shapes) == 6 and all(shape.name.startswith(TOP) for shape in found.shapes)
    assert found.card["settings"]["gradient_layers"] == 1
    below = [tensor for name, tensor in found.tensors.items() if name.endswith("lora_B") and not name.startswith(TOP)]
    assert below and all(bool(tensor.any()) for tensor in below), "θ is learned in all of the layers that it has"


def test_a_run_that_goes_on_ends_at_the_same_bytes(plain: MetaTrainOptions, tmp_path: Path) -> None:
    run(plain)
    whole = plain.out.read_bytes()
    again = replace(plain, out=tmp_path / "again" / plain.out.name)
    stopped_in_the_middle(again)
    run(again)
    assert again.out.read_bytes() == whole


def test_what_begins_with_such_a_prior_is_one(plain: MetaTrainOptions) -> None:
    run(replace(plain, segment_tokens=7))
    begin = plain.out.rename(plain.out.with_name("begin.safetensors"))
    run(replace(plain, init=begin, rank=None, gradient_layers=None))
    first, then = Prior.from_bytes(begin.read_bytes()), prior_of(plain)
    assert then.shapes == first.shapes and then.segment_tokens == first.segment_tokens == 7
    assert any(not torch.equal(first.tensors[name], tensor) for name, tensor in then.tensors.items())
    with pytest.raises(UsageProblem, match="2 layers are wanted, and there are some of 1"):
        run(replace(plain, init=begin, rank=None, gradient_layers=2, out=plain.out.with_name("more.safetensors")))


@pytest.mark.parametrize("wrong", [{"gradient_layers": 0}, {"segment_tokens": 0}, {"gradient_layers": 9}])
def test_what_cannot_be_is_refused(plain: MetaTrainOptions, wrong: dict[str, Any]) -> None:
    with pytest.raises(UsageProblem):
        run(replace(plain, **wrong))
    assert not plain.out.exists()


@pytest.mark.parametrize("objective", ["direct", "rag"])
def test_a_baseline_takes_no_gradients(plain: MetaTrainOptions, objective: str) -> None:
    with pytest.raises(UsageProblem, match="takes no gradients"):
        run(replace(plain, objective=objective))


def learned(plain: MetaTrainOptions) -> Path:
    """A prior whose gradients are not zero."""
    run(replace(plain, gradient_layers=None, keep="last"))
    return plain.out.rename(plain.out.with_name("begin.safetensors"))


@pytest.mark.parametrize("codec", [None, "r2-int1"])
def test_normalized_gradients_are_learned_and_computed(
    plain: MetaTrainOptions, codec: str | None, tiny_model_folder: Path
) -> None:
    begin = learned(plain)
    before = Prior.from_bytes(begin.read_bytes())
    normal = replace(plain, init=begin, rank=None, gradient_layers=None, normalized=True, codec=codec, keep="last")
    run(replace(normal, learning_rate=1e-9, step_rate=0.0, steps=1))
    start = prior_of(normal)
    assert start.normalized and not before.normalized
    model = load_model(tiny_model_folder, device="cpu", dtype="fp32")
    passages = [model.token_ids(text)[:24] for text in ("one passage of some words", "and another of a few more words")]
    raw, unit = (next(iter(passage_gradients(model, prior, passages))) for prior in (before, start))
    for name, tensor in unit.tensors.items():
        norms = raw.tensors[name].flatten(1).norm(dim=1)
        assert torch.allclose(tensor.flatten(1).norm(dim=1), torch.ones(2), rtol=1e-4)
        assert torch.allclose(
            tensor * norms[:, None, None], raw.tensors[name], rtol=1e-2, atol=1e-3 * norms.max().item()
        )
        longer = start.step_sizes[name] / before.step_sizes[name]
        assert 0.2 < longer / norms.mean() < 5, "a step is about as long as it was"

    on = replace(normal, normalized=False, init=normal.out.rename(begin.with_name("on.safetensors")))
    run(on)
    assert prior_of(on).normalized, "what begins with such a prior is one"
    whole = on.out.read_bytes()
    again = replace(on, out=on.out.with_name("again") / on.out.name)
    stopped_in_the_middle(again)
    run(again)
    assert again.out.read_bytes() == whole


def test_a_start_without_gradients_cannot_be_normalized(plain: MetaTrainOptions) -> None:
    with pytest.raises(UsageProblem, match="needs a prior to begin with"):
        run(replace(plain, normalized=True))
    with pytest.raises(UsageProblem, match="needs a prior to begin with"):
        run(replace(plain, objective="rag", init=plain.out, normalized=True, gradient_layers=None))
    begin = learned(plain)
    prior = Prior.from_bytes(begin.read_bytes())
    nothing = {name: t * (0 if name.endswith("lora_B") else 1) for name, t in prior.tensors.items()}
    begin.write_bytes(replace(prior, tensors=nothing).to_bytes())
    with pytest.raises(UsageProblem, match="whose gradients are not zero"):
        run(replace(plain, init=begin, rank=None, gradient_layers=None, normalized=True))


def test_a_run_begun_before_there_were_these_options_goes_on(plain: MetaTrainOptions, tmp_path: Path) -> None:
    usual = replace(plain, gradient_layers=None)
    run(usual)
    whole = usual.out.read_bytes()
    again = replace(usual, out=tmp_path / "again" / usual.out.name)
    stopped_in_the_middle(again)
    file = resume_file(again.out)
    data = file.read_bytes()
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    settings = json.loads(header["__metadata__"]["settings"])
    for name in ("reading", "gradient_layers", "segment_tokens", "normalized"):
        del settings[name]
    header["__metadata__"]["settings"] = json.dumps(settings)
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + data[8 + length :])
    run(again)
    assert again.out.read_bytes() == whole
