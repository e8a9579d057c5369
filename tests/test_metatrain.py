"""Training as a use case: what is learned, tasks that are not numbers, the step that is kept, what the result says."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import tiny
import torch
import train_runs
from train_runs import (
    LONG,
    NAN,
    metrics,
    metrics_lines,
    model_with_a_nan_token,
    options,
    resume_file,
    run,
    started,
    task,
    trained,
)

from regrad_cli import metatrain
from regrad_cli.errors import Damaged, Mismatch, NonFinite, UsageProblem
from regrad_cli.learn.prior import AMONG, Prior
from regrad_cli.learn.workers import Workers
from regrad_cli.metatrain import MetaTrainOptions, meta_train
from regrad_cli.records import Notice, Skipped
from regrad_cli.trainevents import TrainStep, Validated


@pytest.fixture(scope="module")
def nan_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return model_with_a_nan_token(tmp_path_factory.mktemp("models") / "nan")


@pytest.fixture(scope="module")
def learned(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> bytes:
    """The bytes of a prior learned by the usual options."""
    given = options(tmp_path_factory.mktemp("learned"), tiny_model_folder, tiny_embedder_folder)
    run(given)
    return given.out.read_bytes()


@pytest.fixture
def usual(tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path) -> MetaTrainOptions:
    return options(tmp_path / "run", tiny_model_folder, tiny_embedder_folder)


@pytest.fixture
def plain(tmp_path: Path, tiny_model_folder: Path) -> MetaTrainOptions:
    """Without strangers, so without an embedder."""
    return options(tmp_path / "run", tiny_model_folder)


def prior_of(given: MetaTrainOptions) -> Prior:
    return Prior.from_bytes(given.out.read_bytes())


# ── tasks that are not numbers, or too long ───────────────────────────────────────────────────────────────────────────


def with_bad(tmp_path: Path, model: Path, *, bad: tuple[int, ...], **changes: Any) -> MetaTrainOptions:
    """The usual run, with tasks 0 to 7 of which these are not numbers."""
    given = options(tmp_path / "run", model)
    lines = [task(number, mark=NAN if number in bad else "") for number in range(8)]
    return replace(given, tasks=(train_runs.write(tmp_path / "some.jsonl", lines),), **changes)


def refusing(patch: pytest.MonkeyPatch, names: set[str]) -> None:
    """Episodes of these tasks are not made at all."""
    real = metatrain.Episodes._drawn

    def drawn(self: Any, number: int, *args: Any) -> Any:
        found = real(self, number, *args)
        if self._tasks[number].id in names:
            raise UsageProblem("left out here")
        return found

    patch.setattr(metatrain.Episodes, "_drawn", drawn)


def test_a_task_whose_loss_is_not_a_number_is_named_and_takes_no_part(tmp_path: Path, nan_model: Path) -> None:
    given = with_bad(tmp_path, nan_model, bad=(2, 5))
    events = run(given)
    steps = [event for event in events if isinstance(event, TrainStep)]
    named = {told for step in steps for told in step.skipped}
    assert named == {"t2: its loss or gradient is not finite", "t5: its loss or gradient is not finite"}
    assert all(step.loss is not None and math.isfinite(step.loss) for step in steps)
    assert set(events[-1].skipped) == named
    prior = prior_of(given)
    assert all(bool(torch.isfinite(tensor).all()) for tensor in prior.tensors.values())
    found = given.out.read_bytes()

    with pytest.MonkeyPatch.context() as patch:
        refusing(patch, {"t2", "t5"})
        run(given)
    assert given.out.read_bytes() == found


def test_a_gradient_that_is_not_a_number_is_as_bad_as_a_loss(plain: MetaTrainOptions, monkeypatch: Any) -> None:
    from regrad_cli.learn.meta import MetaLearner

    real = MetaLearner.meta_gradient

    def poisoned(self: Any, theta: Any, steps: Any, episodes: Any) -> Any:
        found = real(self, theta, steps, episodes)
        if any(episode.name == "t1" for episode in episodes):
            name = next(iter(found.tensors))
            found.tensors[name][0, 0] = math.inf
        return found

    monkeypatch.setattr(MetaLearner, "meta_gradient", poisoned)
    assert trained(plain).skipped == ("t1: its loss or gradient is not finite",)
    prior_of(plain)  # refuses what is not finite


def test_a_run_of_nothing_but_bad_tasks_stops_and_keeps_what_was_learned_before(
    tmp_path: Path, nan_model: Path
) -> None:
    given = with_bad(tmp_path, nan_model, bad=tuple(range(8)), steps=50)
    for _ in range(2):  # going on with the same tasks ends in the same way, and at once
        events: list[Any] = []
        with pytest.raises(NonFinite, match="no task of the last 3 steps") as stopped:
            events.extend(meta_train(given))
        assert stopped.value.exit_code == 70 and stopped.value.hint
        assert resume_file(given.out).exists() and not given.out.exists()
        assert [line["step"] for line in metrics(given.out) if "loss" in line] == [1, 2]


def test_bad_steps_in_a_row_are_counted_across_a_kill(tmp_path: Path, nan_model: Path) -> None:
    given = with_bad(tmp_path, nan_model, bad=tuple(range(8)), steps=50, checkpoint_s=0)
    for _ in range(2):
        events = meta_train(given)
        next(event for event in events if isinstance(event, TrainStep))
        events.close()  # type: ignore[attr-defined]
    with pytest.raises(NonFinite):
        run(given)
    assert [line["step"] for line in metrics(given.out) if "loss" in line] == [1, 2]


def test_good_steps_between_bad_ones_let_a_run_go_on(tmp_path: Path, nan_model: Path) -> None:
    given = with_bad(tmp_path, nan_model, bad=tuple(range(1, 8)), batch=4, steps=8, validate_every=8)
    assert len(trained(given).skipped) == 7  # each second step holds the good one


@pytest.mark.parametrize("steps", [1, 2])
def test_a_run_in_which_nothing_was_learned_makes_no_prior(tmp_path: Path, nan_model: Path, steps: int) -> None:
    given = with_bad(tmp_path, nan_model, bad=tuple(range(8)), steps=steps)
    with pytest.raises(NonFinite, match="nothing was learned"):
        run(given)
    assert not given.out.exists()


def test_a_task_that_is_too_long_is_named_and_left_out(plain: MetaTrainOptions) -> None:
    lines = [task(number) for number in range(8)]
    lines[3]["questions"] = [{"question": LONG, "answers": ["dusk"]}]
    train_runs.write(plain.tasks[0], lines)
    train_runs.write(plain.dev[0], [task(20), task(21) | {"questions": lines[3]["questions"]}])
    events = run(plain)
    left_out = [event for event in events if isinstance(event, Skipped)]
    assert [event.source for event in left_out] == ["t21"]
    told = {text for event in events if isinstance(event, TrainStep) for text in event.skipped}
    assert len(told) == 1
    (text,) = told
    assert text.startswith("t3: its prompt takes ") and "the model's 1024 positions" in text
    assert set(events[-1].skipped) == {text, f"t21: {left_out[0].reason}"}


def test_a_run_of_nothing_but_long_tasks_says_that(plain: MetaTrainOptions) -> None:
    lines = [task(number) | {"questions": [{"question": LONG, "answers": ["dusk"]}]} for number in range(8)]
    train_runs.write(plain.tasks[0], lines)
    with pytest.raises(UsageProblem, match="nothing was learned: every task was left out"):
        run(plain)
    assert not plain.out.exists()


def test_skipped_tasks_are_told_of_by_a_run_that_went_on_too(tmp_path: Path, nan_model: Path) -> None:
    given = with_bad(tmp_path, nan_model, bad=(2, 5))
    expected = trained(given).skipped
    for file in given.out.parent.glob(f"{given.out.name}*"):
        file.unlink()
    started(given, 5)
    assert set(trained(given).skipped) == set(expected) and len(expected) == 2


# ── which step is kept ────────────────────────────────────────────────────────────────────────────────────────────────


def scripted(patch: pytest.MonkeyPatch, script: list[list[float]]) -> list[dict[str, torch.Tensor]]:
    """Dev losses of each validation, the same in every kind; returns θ at each."""
    seen: list[dict[str, torch.Tensor]] = []
    calls = [0]

    def losses(self: Any, theta: Any, steps: Any, episodes: Any) -> list[float]:
        place, kind = divmod(calls[0], 4)
        calls[0] += 1
        if kind == 0:
            seen.append({name: tensor.clone() for name, tensor in theta.items()})
        return script[place]

    patch.setattr(Workers, "losses", losses)
    return seen


@pytest.mark.parametrize(
    ("script", "best"),
    [
        ([[3.0] * 3, [2.0] * 3, [1.0] * 3, [2.0] * 3], 2),
        ([[3.0] * 3, [2.0] * 3, [2.5] * 3, [1.0] * 3], 3),
        ([[1.0] * 3, [2.0] * 3, [2.5] * 3, [1.0] * 3], 0),
        ([[9.0] * 3, [3.0] * 3, [math.nan, 1.0, 1.0], [4.0] * 3], 1),  # a mean over fewer is no better score
        ([[math.nan, 9.0, 9.0], [math.inf, 5.0, 1.0], [math.nan, 1.0, 1.0], [math.nan, 3.0, 3.0]], 2),
    ],
)
def test_the_best_validation_is_kept_not_the_last(
    plain: MetaTrainOptions, monkeypatch: Any, script: list[list[float]], best: int
) -> None:
    seen = scripted(monkeypatch, script)
    events = run(plain)
    validated = [event for event in events if isinstance(event, Validated)]
    assert [event.step for event in validated] == [0, 2, 4, 6]
    assert max(place for place, event in enumerate(validated) if event.best) == best
    assert events[-1].best_step == 2 * best
    assert events[-1].losses == validated[best].losses
    for name, tensor in prior_of(plain).tensors.items():
        assert torch.equal(tensor, seen[best][name]), name
    for event, losses in zip(validated, script, strict=True):
        left_out = sum(not math.isfinite(loss) for loss in losses)
        assert len(event.skipped) == left_out
        assert event.chosen == pytest.approx(sum(filter(math.isfinite, losses)) / (3 - left_out))
    assert set(events[-1].skipped) == {told for event in validated for told in event.skipped}


def test_what_was_learned_is_not_lost_where_no_step_was_better_than_the_start(
    plain: MetaTrainOptions, monkeypatch: Any
) -> None:
    seen = scripted(monkeypatch, [[1.0] * 3, [2.0] * 3, [2.5] * 3, [3.0] * 3])
    assert trained(plain).best_step == 0
    assert all(torch.equal(tensor, seen[0][name]) for name, tensor in prior_of(plain).tensors.items())
    again = trained(replace(plain, keep="last"))  # which learns nothing anew: the script has no more losses
    assert again.best_step == 6 and again.losses == dict.fromkeys(again.losses, 3.0)
    assert all(torch.equal(tensor, seen[3][name]) for name, tensor in prior_of(plain).tensors.items())
    assert not plain.out.with_name(plain.out.name + ".resume").exists()


def test_what_a_run_left_at_its_end_is_in_no_other_runs_way(plain: MetaTrainOptions, monkeypatch: Any) -> None:
    scripted(monkeypatch, [[1.0] * 3, [2.0] * 3, [2.0] * 3, [2.0] * 3, [1.0] * 3, [0.5] * 3, [2.0] * 3])
    assert trained(plain).best_step == 0
    kept = plain.out.with_name(plain.out.name + ".resume").read_bytes()
    assert trained(replace(plain, steps=4)).best_step == 2
    plain.out.unlink()  # a run that was killed between its last step and its result is not over
    plain.out.with_name(plain.out.name + ".resume").write_bytes(kept)
    with pytest.raises(UsageProblem, match="other settings"):
        run(replace(plain, steps=4))


def test_the_choice_survives_a_kill(plain: MetaTrainOptions, monkeypatch: Any) -> None:
    seen = scripted(monkeypatch, [[3.0] * 3, [1.0] * 3, [2.0] * 3, [2.0] * 3])
    started(plain, 3)
    assert trained(plain).best_step == 2
    assert all(torch.equal(tensor, seen[1][name]) for name, tensor in prior_of(plain).tensors.items())


def test_dev_tasks_that_are_all_not_numbers_are_named_and_the_last_step_is_kept(
    tmp_path: Path, nan_model: Path
) -> None:
    given = options(tmp_path / "run", nan_model)
    train_runs.write(given.dev[0], [task(20, mark=NAN), task(21, mark=NAN)])
    events = run(given)
    validated = [event for event in events if isinstance(event, Validated)]
    assert [(event.losses, event.chosen, event.best) for event in validated] == [({}, None, False)] * 4
    assert len(events[-1].skipped) == 2 and events[-1].best_step == 6
    for line in metrics_lines(given.out):
        json.loads(line, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_a_bad_dev_task_does_not_hide_what_the_others_say(tmp_path: Path, nan_model: Path) -> None:
    given = options(tmp_path / "run", nan_model)
    train_runs.write(given.dev[0], [task(20), task(21, mark=NAN), task(22)])
    events = run(given)
    with_bad_one = [event for event in events if isinstance(event, Validated)]
    assert all(event.skipped == ("t21: its loss or gradient is not finite",) for event in with_bad_one)
    train_runs.write(given.dev[0], [task(20), task(22)])
    without = [event for event in run(given) if isinstance(event, Validated)]
    for one, other in zip(with_bad_one, without, strict=True):
        assert (one.chosen, one.best) == (other.chosen, other.best) and math.isfinite(one.losses["other"])
        for kind in ("prior", "own", "shown"):  # "other" takes the next task's passages
            assert one.losses[kind] == other.losses[kind]


def test_without_dev_tasks_titles_are_kept_aside_and_nothing_is_learned_from_them(
    plain: MetaTrainOptions, monkeypatch: Any
) -> None:
    lines = [task(number, title=f"Title {number // 2}") for number in range(80)]
    train_runs.write(plain.tasks[0], lines)
    made: list[tuple[set[str], set[str]]] = []
    real = metatrain.Episodes.for_validation

    def watched(self: Any, tasks: Any) -> Any:
        made.append(({each.title for each in self._tasks}, {each.title for each in tasks}))
        return real(self, tasks)

    monkeypatch.setattr(metatrain.Episodes, "for_validation", watched)
    events = run(replace(plain, dev=(), steps=2))
    ((learned, aside),) = made
    assert aside and learned and not learned & aside
    assert learned | aside == {line["title"] for line in lines}
    assert events[-1].tasks == 2 * len(learned)
    assert any("kept aside" in event.message for event in events if isinstance(event, Notice))
    assert [event.step for event in events if isinstance(event, Validated)] == [0, 2]
    card = prior_of(plain).card
    assert card["dev"] == [] and card["losses"]


def test_of_few_tasks_none_is_kept_aside_and_that_is_said(plain: MetaTrainOptions) -> None:
    events = run(replace(plain, dev=(), steps=2))
    assert any("too few tasks" in event.message for event in events if isinstance(event, Notice))
    assert events[-1].tasks == 8 and events[-1].best_step == 2 and not prior_of(plain).card["losses"]


# ── what is learned ───────────────────────────────────────────────────────────────────────────────────────────────────


def losses(events: list[Any]) -> list[float]:
    return [event.loss for event in events if isinstance(event, TrainStep)]


def test_a_run_learns(tmp_path: Path, tiny_model_folder: Path) -> None:
    given = options(tmp_path, tiny_model_folder, steps=30, learning_rate=0.03, mix_context=0.0, validate_every=30)
    train_runs.write(given.dev[0], [task(number) for number in range(8)])
    first, last = (event for event in run(given) if isinstance(event, Validated))
    assert last.best and last.losses["own"] < first.losses["own"] - 0.3


def test_what_the_prior_to_begin_with_decides_is_not_to_be_given_otherwise(plain: MetaTrainOptions) -> None:
    run(plain)
    begin = plain.out.rename(plain.out.with_name("begin.safetensors"))
    with pytest.raises(UsageProblem, match="has rank 2, not 3"):
        run(replace(plain, init=begin, rank=3))
    first = Prior.from_bytes(begin.read_bytes())
    begin.write_bytes(replace(first, card=first.card | {AMONG: 0.6}).to_bytes())
    run(replace(plain, init=begin, rank=None))
    assert prior_of(plain).rank == 2
    assert prior_of(plain).among_passages().scale == pytest.approx(0.6 * first.scale) and first.strength == 1.0
    with pytest.raises(UsageProblem, match="no gradients of passages"):
        run(replace(plain, objective="rag", codec="int8", out=plain.out.with_name("other.safetensors")))


@pytest.mark.parametrize("objective", ["direct", "rag"])
def test_a_baseline_needs_no_gradient_of_a_passage_and_leaves_the_step_sizes_alone(
    usual: MetaTrainOptions, monkeypatch: Any, objective: str
) -> None:
    from regrad_cli.learn.meta import MetaLearner

    def inner(*_: Any, **__: Any) -> Any:
        raise AssertionError("a passage's gradient was computed")

    monkeypatch.setattr(MetaLearner, "_inner", inner)
    events = run(replace(usual, objective=objective))
    prior = prior_of(usual)
    assert set(prior.log_step_sizes.values()) == {0.0}
    assert prior.card["objective"] == objective
    assert set(events[-1].losses) == {objective}
    assert any(float(tensor.abs().sum()) > 0 for name, tensor in prior.tensors.items() if name.endswith("lora_B"))


def test_a_baseline_that_begins_with_a_prior_keeps_its_step_sizes_to_the_last_digit(plain: MetaTrainOptions) -> None:
    run(plain)
    begin = plain.out.rename(plain.out.with_name("begin.safetensors"))
    prior = Prior.from_bytes(begin.read_bytes())
    odd = replace(prior, log_step_sizes={name: 0.1 + place / 3 for place, name in enumerate(prior.tensors)})
    begin.write_bytes(odd.to_bytes())
    run(replace(plain, objective="direct", init=begin))
    assert prior_of(plain).log_step_sizes == odd.log_step_sizes


def test_training_moves_step_sizes_by_their_own_rate(plain: MetaTrainOptions) -> None:
    run(plain)
    assert len(set(prior_of(plain).log_step_sizes.values())) > 1
    run(replace(plain, step_rate=0.0))
    assert len(set(prior_of(plain).log_step_sizes.values())) == 1


def test_training_through_a_codec_sees_what_a_bank_would_give_back(plain: MetaTrainOptions) -> None:
    from regrad_cli.learn.codec import Codec

    exact = losses(run(plain))
    theirs = prior_of(plain)
    calls = []
    real = Codec.decode

    def counted(self: Any, *given: Any) -> Any:
        calls.append(1)
        return real(self, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Codec, "decode", counted)
        coarse = losses(run(replace(plain, codec="r1-int4")))
    assert calls
    assert coarse != exact and coarse == pytest.approx(exact, rel=0.2)
    assert prior_of(plain).card["settings"]["codec"] == "r1-int4"
    assert any(not torch.equal(tensor, theirs.tensors[name]) for name, tensor in prior_of(plain).tensors.items())


def test_first_order_is_another_gradient_and_is_written_down(plain: MetaTrainOptions) -> None:
    run(plain)
    exact = prior_of(plain)
    run(replace(plain, first_order=True))
    first = prior_of(plain)
    assert first.card["settings"]["first_order"] is True
    assert any(not torch.equal(tensor, exact.tensors[name]) for name, tensor in first.tensors.items())


# ── the result ────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_card_says_what_the_prior_was_made_of_and_names_no_place(usual: MetaTrainOptions) -> None:
    import hashlib

    from regrad_cli.fingerprints import fingerprint, fingerprint_embedder

    last = trained(usual)
    prior = prior_of(usual)
    card = prior.card
    identity = fingerprint(Path(usual.model))
    assert (card["model"], card["tokenizer"]) == (identity.model, identity.tokenizer)
    assert card["embedder"] == fingerprint_embedder(Path(usual.embedder))
    for name, files in (("data", usual.tasks), ("dev", usual.dev)):
        assert card[name] == [{"file": f.name, "sha256": hashlib.sha256(f.read_bytes()).hexdigest()} for f in files]
    assert {"k": 2, "weights": "softmax", "temperature": 0.05, "gamma": 1.0}.items() <= card.items()
    assert card["losses"] == last.losses and set(last.losses) == {"prior", "own", "other", "shown"}
    assert (card["steps"], card["best_step"]) == (6, last.best_step)
    assert card["trained"] is True and card["name"] == "prior" and card["init"] is None
    settings = card["settings"]
    assert (settings["steps"], settings["batch"], settings["rank"], settings["dtype"]) == (6, 3, 2, "fp32")
    assert settings["first_order"] is False and settings["codec"] is None and settings["strangers"] == 0.5
    text = json.dumps(card)
    for place in (str(usual.out.parent), usual.model, usual.embedder):
        assert place not in text
    assert "/" not in text


def test_weights_follow_the_scores_and_sum_to_one(learned: bytes) -> None:
    prior = Prior.from_bytes(learned)
    weights = prior.weights_for([0.62, 0.57, 0.40])
    assert sum(weights) == pytest.approx(1) and weights == sorted(weights, reverse=True)
    assert weights[0] / weights[1] == pytest.approx(math.exp(0.05 / 0.05))
    assert prior.weights_for([0.3, 0.3]) == [0.5, 0.5] and prior.weights_for([0.9]) == [1.0]


def test_ask_uses_the_rule_for_weights_of_training(
    learned: bytes, tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    import use_cases

    file = tmp_path / "learned.safetensors"
    file.write_bytes(learned)
    bank = use_cases.make_bank(tmp_path / "bank", tiny_model_folder, tiny_embedder_folder, prior=file)
    use_cases.ingest(bank, use_cases.write(tmp_path / "docs", {"a.md": use_cases.story("Tarn", 4)}))
    answer = use_cases.ask(bank, "Who keeps the lamp of Tarn?", combine="sum")
    assert answer.prior == "prior" and len(answer.passages) == 2
    expected = Prior.from_bytes(learned).weights_for([used.score for used in answer.passages])
    assert [used.weight for used in answer.passages] == pytest.approx(expected)
    assert sum(expected) == pytest.approx(1) and expected[0] >= expected[1]


def test_a_prior_is_a_start_for_its_own_model_only(plain: MetaTrainOptions, tmp_path: Path) -> None:
    from regrad_cli.records import sha256_hex

    run(plain)
    begin = plain.out.rename(tmp_path / "begin.safetensors")
    first = Prior.from_bytes(begin.read_bytes())
    again = replace(plain, init=begin, learning_rate=1e-9, step_rate=0.0, rank=None)
    last = trained(again)
    found = prior_of(again)
    for name, tensor in found.tensors.items():
        assert torch.allclose(tensor, first.tensors[name], atol=1e-6)
    assert found.card["init"] == sha256_hex(begin.read_bytes())
    assert found.card["rank"] == found.card["settings"]["rank"] == 2
    assert last.losses["own"] == pytest.approx(first.card["losses"]["own"], rel=1e-3)

    other = tiny.write_model(tmp_path / "other", seed=1)
    with pytest.raises(Mismatch, match="of another model"):
        run(replace(again, model=str(other), out=tmp_path / "new.safetensors"))
    with pytest.raises(UsageProblem, match="cannot be read"):
        run(replace(again, init=tmp_path / "none"))
    (tmp_path / "rubbish").write_bytes(b"rubbish")
    with pytest.raises(Damaged):
        run(replace(again, init=tmp_path / "rubbish", out=tmp_path / "new.safetensors"))


def test_metrics_are_a_line_a_step_and_a_validation_and_the_curve_stands_alone(usual: MetaTrainOptions) -> None:
    import re

    run(usual)
    lines = [json.loads(line) for line in metrics_lines(usual.out)]
    steps = [line for line in lines if "loss" in line]
    assert [line["step"] for line in steps] == [1, 2, 3, 4, 5, 6]
    assert [line["step"] for line in lines if "losses" in line] == [0, 2, 4, 6]
    assert all(line["elapsed_s"] >= 0 and line["left_s"] >= 0 and line["learning_rate"] > 0 for line in steps)
    assert steps[-1]["left_s"] == 0
    page = usual.out.with_name(usual.out.name + ".curve.html").read_text(encoding="utf-8")
    assert "<svg" in page and "dev: own" in page and "training" in page
    assert not re.search(r"(https?:)?//|src=|href=|<script|@import|url\(", page)


@pytest.mark.parametrize("name", ["<script>alert(1)<.safetensors", "caf\udce9.safetensors", "of two words"])
def test_a_strange_name_is_no_trouble_at_the_end(plain: MetaTrainOptions, name: str) -> None:
    given = replace(plain, out=plain.out.parent / name, steps=1)
    run(given)
    assert prior_of(given).card["name"]
    page = given.out.with_name(name + ".curve.html").read_text(encoding="utf-8")
    assert "<script" not in page
