"""The recipe of the prior that ships: a leg that is stopped, and the mean of two priors."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import tiny
import torch
from train_runs import options, resume_file, trained

from benchmarks.prior.legs import mean, stopped, validated
from benchmarks.prior.make import mean_of_all
from regrad_cli.learn.prior import Prior
from regrad_cli.records import sha256_hex


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model")
    tiny.write_model(folder)
    return folder


def test_halfway_from_a_prior_to_a_leg_that_was_stopped(tmp_path: Path, model: Path) -> None:
    first = options(tmp_path / "first", model)
    trained(first)
    begun = Prior.from_bytes(first.out.read_bytes())
    second = replace(options(tmp_path / "second", model), init=first.out, seed=3)
    reached = stopped(second, begun, 3)
    assert not second.out.exists() and resume_file(second.out).exists()
    trained(second)  # a whole run goes on from there: the stop cost nothing
    ended = Prior.from_bytes(second.out.read_bytes())
    middle = mean(begun, reached)
    for name, tensor in begun.tensors.items():
        assert not torch.equal(tensor, reached.tensors[name]) and not torch.equal(
            reached.tensors[name], ended.tensors[name]
        )
        assert torch.allclose(middle.tensors[name], (tensor + reached.tensors[name]) / 2)
        logs = (begun.log_step_sizes[name], reached.log_step_sizes[name])
        assert middle.log_step_sizes[name] == pytest.approx(sum(logs) / 2)
    assert middle.card == begun.card


def test_a_mean_takes_steps_of_one_kind_alone(model: Path, tmp_path: Path) -> None:
    run = options(tmp_path / "run", model)
    trained(run)
    prior = Prior.from_bytes(run.out.read_bytes())
    long = prior.with_normalized(dict.fromkeys(prior.log_step_sizes, 2.0))
    longer = replace(long, log_step_sizes={name: log + 1 for name, log in long.log_step_sizes.items()})
    other = replace(prior, tensors={name: tensor + 3 for name, tensor in prior.tensors.items()})
    found = mean_of_all(long, longer, other)
    assert found.normalized and found.card["mean_with"] == [longer.fingerprint, other.fingerprint]
    for name, log in found.log_step_sizes.items():
        assert log == pytest.approx(long.log_step_sizes[name] + 0.5)
        assert torch.allclose(found.tensors[name], prior.tensors[name] + 1)


def test_a_priors_losses_are_those_that_its_run_found(tmp_path: Path, model: Path) -> None:
    run = replace(options(tmp_path / "run", model), dtype="fp32")
    trained(run)
    prior = Prior.from_bytes(run.out.read_bytes())
    assert validated(prior, run) == pytest.approx(prior.card["losses"], rel=1e-4)


def test_what_a_codec_costs_is_told_with_what_was_measured_before(tmp_path: Path) -> None:
    from benchmarks.prior import codecs

    for name, f1 in (("fp32", 30.25), ("r1-int2", 29.75)):
        score = {"all": {"f1": f1, "em": 20.0}, "nq-dev": {"f1": 1.0, "em": 2.0}}
        (tmp_path / f"{sha256_hex(b'any')[:12]}-{name}.json").write_text(json.dumps(score), encoding="utf-8")
    prior = tmp_path / "any.prior"
    prior.write_bytes(b"any")
    exact, small = (codecs.scored(tmp_path, tmp_path, prior, name) for name in (None, "r1-int2"))
    told = codecs.table({"fp32": (None, exact), "r1-int2": (codecs.Cost(90_264, 134.8, 1.25, 0.5), small)})
    assert told.splitlines()[2:] == [
        "| fp32 | | 1 | 30.2 (20.0) | | |",
        "| r1-int2 | 90,264 | 1/135 | 29.8 (20.0) | 1.2 | 0.5 |",
    ]
