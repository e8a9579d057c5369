"""The state of training: rates, clips, the best so far, and the same bits after it was kept and taken up again."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest
import torch
from safetensors.torch import load, save

from regrad_cli.errors import Damaged
from regrad_cli.learn.model import Model
from regrad_cli.learn.optimise import Training, metadata_of
from regrad_cli.learn.prior import Prior


def training(prior: Prior, *, steps: int = 20, learning_rate: float = 0.1, step_rate: float = 0.01) -> Training:
    return Training(prior, steps=steps, learning_rate=learning_rate, step_rate=step_rate)


def gradients(prior: Prior, seed: int, size: float = 1.0) -> tuple[dict[str, torch.Tensor], dict[str, float]]:
    generator = torch.Generator().manual_seed(seed)
    tensors = {name: size * torch.randn(t.shape, generator=generator) for name, t in prior.tensors.items()}
    logs = {name: size * float(torch.randn((), generator=generator)) for name in prior.tensors}
    return tensors, logs


def advance(run: Training, prior: Prior, steps: range) -> Training:
    for step in steps:
        run.update(*gradients(prior, step))
        run.keep_if_best(abs(step - 4.5))
    return run


def same(one: Training, other: Training) -> bool:
    pairs = [(one.theta, other.theta), (one.best.theta, other.best.theta)]  # type: ignore[union-attr]
    tensors = all(torch.equal(a[name], b[name]) for a, b in pairs for name in a)
    return tensors and one.log_steps == other.log_steps and one.step == other.step


def test_the_start_is_not_written_to(prior: Prior) -> None:
    before = {name: tensor.clone() for name, tensor in prior.tensors.items()}
    advance(training(prior), prior, range(3))
    assert all(torch.equal(tensor, before[name]) for name, tensor in prior.tensors.items())


@pytest.mark.parametrize("at", [0, 1, 7])
def test_a_run_taken_up_again_goes_on_to_the_same_bits(prior: Prior, at: int) -> None:
    straight = advance(training(prior), prior, range(12))
    first = advance(training(prior), prior, range(at))
    first.validated, first.failed = at, 2
    again = training(prior)
    again.restore(first.to_bytes({"seed": 1}))
    assert (again.step, again.validated, again.failed, again.updates) == (at, at, 2, at)
    assert same(advance(again, prior, range(at, 12)), straight)


def test_what_a_run_is_of_is_kept_with_it(prior: Prior) -> None:
    assert json.loads(metadata_of(training(prior).to_bytes({"seed": 3, "k": [1]}))["settings"]) == {"seed": 3, "k": [1]}


def test_the_rate_warms_up_for_a_tenth_of_the_steps_and_falls_to_nothing(prior: Prior) -> None:
    run = training(prior, steps=40, learning_rate=0.5)
    rates = []
    while run.step < 40:
        rates.append(run.learning_rate)
        run.update(None)
    assert rates[:4] == pytest.approx([0.125, 0.25, 0.375, 0.5])
    assert rates[4] == 0.5 and all(a > b > 0 for a, b in pairwise(rates[4:]))
    assert run.learning_rate == 0
    assert training(prior, steps=1).learning_rate == pytest.approx(0.1)


def test_the_prior_and_the_step_sizes_have_rates_and_clips_of_their_own(prior: Prior) -> None:
    run = training(prior, steps=1, learning_rate=0.1, step_rate=0.02)
    tensors, logs = gradients(prior, 0)
    run.update(tensors, dict.fromkeys(logs, 1e-6))  # beside gradients a million times as large
    moved = torch.cat([(run.theta[name] - prior.tensors[name]).flatten() for name in tensors])
    assert moved.abs().max() == pytest.approx(0.1, rel=1e-3)  # Adam's first step is its rate, whatever the size
    for name, log in run.log_steps.items():
        assert prior.log_step_sizes[name] - log == pytest.approx(0.02, rel=0.02)
    kept = training(prior, steps=1, step_rate=0.0)
    kept.update(tensors, logs)
    assert kept.log_steps == training(prior).log_steps


def test_a_large_gradient_is_clipped_so_that_it_does_not_outlive_its_step(prior: Prior) -> None:
    """Adam forgets a gradient's size in the step itself; what it remembers of it is the clipped one's."""
    after = []
    for size in (1.0, 1e6):
        run = training(prior, steps=10)
        run.update(*gradients(prior, 0, size))
        run.update(*gradients(prior, 1))
        after.append(run.theta)
    assert all(torch.allclose(after[0][name], after[1][name], rtol=1e-4, atol=1e-6) for name in after[0])


def test_a_gradient_too_large_for_its_norm_changes_nothing_into_nan(prior: Prior) -> None:
    run = training(prior)
    run.update({name: torch.full_like(tensor, 3e38) for name, tensor in prior.tensors.items()}, None)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in run.theta.values())


def test_a_step_without_gradients_counts_and_changes_nothing(prior: Prior) -> None:
    run = advance(training(prior), prior, range(2))
    theta, logs = {name: tensor.clone() for name, tensor in run.theta.items()}, run.log_steps
    run.update(None)
    assert (run.step, run.updates) == (3, 2)
    assert run.log_steps == logs and all(torch.equal(tensor, theta[name]) for name, tensor in run.theta.items())


def test_failed_steps_are_counted_in_a_row(prior: Prior) -> None:
    run = training(prior)
    run.update(None, failed=True)
    run.update(None)  # nothing to learn from, and nothing that failed: no word on it
    run.update(None, failed=True)
    assert run.failed == 2
    run.update(*gradients(prior, 0), failed=True)  # one of its tasks failed, not all
    assert run.failed == 0


def test_only_a_lower_score_is_the_best_and_it_is_a_copy(prior: Prior) -> None:
    run = advance(training(prior), prior, range(1))
    run.best = None
    assert run.keep_if_best(2.0)
    kept = {name: tensor.clone() for name, tensor in run.theta.items()}
    run.update(*gradients(prior, 5))
    assert not run.keep_if_best(2.0) and not run.keep_if_best(math.nan) and not run.keep_if_best(math.inf)
    assert run.best is not None and run.best.step == 1
    assert all(torch.equal(tensor, kept[name]) for name, tensor in run.best.theta.items())
    assert run.keep_if_best(1.5) and run.best.step == 2


def test_a_score_over_fewer_tasks_is_never_the_better_one(prior: Prior) -> None:
    run = training(prior)
    assert run.keep_if_best(5.0, left_out=2)
    assert not run.keep_if_best(1.0, left_out=3)
    assert run.keep_if_best(6.0, left_out=1)
    again = training(prior)
    again.restore(run.to_bytes({}))
    assert not again.keep_if_best(5.0, left_out=2) and again.keep_if_best(5.5, left_out=1)


def test_what_is_no_such_run_is_refused(prior: Prior, model: Model) -> None:
    run = advance(training(prior), prior, range(2))
    data = run.to_bytes({})
    tensors, metadata = load(data), metadata_of(data)
    name = next(iter(prior.tensors))
    other = replace(prior, tensors={**prior.tensors, name: torch.zeros(3, 3)})
    broken = {
        "cut": data[:-1],
        "empty": b"",
        "no metadata": save(tensors),
        "another format": save(tensors, metadata=metadata | {"card": json.dumps({"format": "regrad training 9"})}),
        "no card": save(tensors, metadata={"settings": "{}"}),
        "a tensor is missing": save({n: t for n, t in tensors.items() if n != f"theta.{name}"}, metadata=metadata),
        "a moment is missing": save({n: t for n, t in tensors.items() if n != f"exp_avg.{name}"}, metadata=metadata),
        "another shape": training(other).to_bytes({}),
        "not finite": save(tensors | {f"best.{name}": tensors[f"best.{name}"] * math.nan}, metadata=metadata),
    }
    card = json.loads(metadata["card"])
    for changes in ({"updates": -1}, {"step": "2"}, {"step": 1 << 60}, {"failed": None}, {"validated": -2}):
        broken[str(changes)] = save(tensors, metadata=metadata | {"card": json.dumps(card | changes)})
    for changes in ({"score": "low"}, {"score": math.nan}, {"logs": {}}, {"step": []}):
        other_card = card | {"best": card["best"] | changes}
        broken[f"best {changes}"] = save(tensors, metadata=metadata | {"card": json.dumps(other_card)})
    for stored in (f"exp_avg.{name}", f"exp_avg_sq.{name}", f"theta.{name}", f"best.{name}"):
        broken[f"a single value for {stored}"] = save(tensors | {stored: torch.ones(1, 1)}, metadata=metadata)
    broken["squares below zero"] = save(
        tensors | {"exp_avg_sq.logs": -tensors["exp_avg_sq.logs"] - 1}, metadata=metadata
    )
    for what, bytes_ in broken.items():
        run = training(prior)
        with pytest.raises(Damaged):
            run.restore(bytes_)
            pytest.fail(what)
        assert (run.step, run.failed, run.validated, run.updates, run.best) == (0, 0, -1, 0, None), what
        assert all(torch.equal(run.theta[each], prior.tensors[each]) for each in prior.tensors), what
