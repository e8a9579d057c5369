"""Evaluation on tiny models: every mode is what it says it is, controls are what they should be, and no mode, order or
company changes another's answers."""

from __future__ import annotations

import json
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import use_cases
from faketerminal import call
from test_answer import write_prior
from use_cases import answered, ingest

from regrad_cli.answer import Answerer
from regrad_cli.bank import open_bank
from regrad_cli.errors import Mismatch, UsageProblem
from regrad_cli.evaluate import EvaluateOptions, evaluate
from regrad_cli.evidence import derangement, read_questions
from regrad_cli.records import Notice, Progress, Skipped, training_text
from regrad_cli.results import Evaluated, Scored
from regrad_cli.tasks import Task, read_tasks
from regrad_cli.trials import summary

PLACES = ("Velmora", "Skerry", "Brannoch", "Ostrey", "Tarn")
MAX_TOKENS = 6
UNTUNED = ("direct", "rag", "regrad", "both", "prior", "other", "random")


def task_line(name: str, questions: int = 1, *, passages: int = 1, **changes: Any) -> str:
    texts = [f"The lamp of {name} is lit at {hour} by Oda, its ferry is the Grey {name}." for hour in range(passages)]
    asked = [{"question": f"Which ferry {n} has {name}?", "answers": [f"the Grey {name}"]} for n in range(questions)]
    return json.dumps({"id": name, "title": name, "passages": texts, "questions": asked} | changes)


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Two files of tasks: three tasks with four questions, two tasks with two; one has two passages."""
    root = tmp_path_factory.mktemp("tasks")
    first, second = root / "north.jsonl", root / "south.jsonl"
    first.write_text("\n".join([task_line("Velmora", 2), task_line("Skerry"), task_line("Brannoch")]) + "\n")
    second.write_text("\n".join([task_line("Ostrey", passages=2), task_line("Tarn")]) + "\n")
    return first, second


@pytest.fixture(scope="module")
def prior_file(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> Path:
    return write_prior(tmp_path_factory.mktemp("prior") / "prior.safetensors", tiny_model_folder)


def write_baseline(path: Path, model: Path, objective: str | None, seed: int = 3) -> Path:
    from regrad_cli.learn.prior import Prior

    prior = Prior.from_bytes(write_prior(path, model, seed=seed).read_bytes())
    card = prior.card | {"name": f"tuned for {objective}"} | ({"objective": objective} if objective else {})
    path.write_bytes(replace(prior, card=card).to_bytes())
    return path


@pytest.fixture(scope="module")
def baselines(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> tuple[Path, Path]:
    root = tmp_path_factory.mktemp("baselines")
    direct = write_baseline(root / "direct.safetensors", tiny_model_folder, "direct", seed=3)
    return direct, write_baseline(root / "rag.safetensors", tiny_model_folder, "rag", seed=4)


@pytest.fixture(scope="module")
def made_bank(
    tmp_path_factory: pytest.TempPathFactory,
    files: tuple[Path, Path],
    prior_file: Path,
    tiny_model_folder: Path,
    tiny_embedder_folder: Path,
) -> Path:
    """A bank of the tasks' passages and two others."""
    root = tmp_path_factory.mktemp("bank")
    return fill(root, files, prior_file, tiny_model_folder, tiny_embedder_folder)


def fill(root: Path, files: tuple[Path, ...], prior: Path, model: Path, embedder: Path, **options: Any) -> Path:
    bank = use_cases.make_bank(root / ".gbank", model, embedder, prior=prior, **options)
    tasks, _ = read_tasks(files)
    records = [{"title": task.title, "text": text} for task in tasks for text in task.passages]
    records += [{"title": "Elsewhere", "text": "Release 4.2 of the tide table corrects an error in the figures."}]
    (root / "all.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    ingest(bank, root / "all.jsonl")
    return bank


class Run:
    """One evaluation's events, sorted."""

    def __init__(self, events: Iterator[Any]) -> None:
        found = list(events)
        self.scored = [event for event in found if isinstance(event, Scored)]
        self.skipped = [event for event in found if isinstance(event, Skipped)]
        self.notices = [event.message for event in found if isinstance(event, Notice)]
        self.progress = [event for event in found if isinstance(event, Progress)]
        assert isinstance(found[-1], Evaluated)
        self.result: Evaluated = found[-1]

    def answers(self, mode: str, run: int | None = None) -> list[str]:
        own = sorted((s for s in self.scored if s.mode == mode and s.run == run), key=lambda s: s.number)
        return [one.answer for one in own]


def run(files: tuple[Path, ...], model: Path, **options: Any) -> Run:
    if options.get("bank") is None:
        options = {"model": str(model)} | options
    settings: dict[str, Any] = {"max_tokens": MAX_TOKENS, "device": "cpu", "dtype": "fp32"} | options
    return Run(evaluate(EvaluateOptions(tasks=tuple(files), **settings)))


@pytest.fixture(scope="module")
def gold(files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path, baselines: tuple[Path, Path]) -> Run:
    """Everything that can be measured by default, with gold passages."""
    return run(files, tiny_model_folder, prior=prior_file, baselines=baselines)


@pytest.fixture(scope="module")
def loaded(tiny_model_folder: Path) -> Any:
    from regrad_cli.learn.model import load_model

    return load_model(tiny_model_folder, device="cpu", dtype="fp32")


def by_hand(model: Any, question: str, shown: tuple[str, ...], prior: Any = None, change: Any = None) -> str:
    """One answer, one token after the other."""
    from contextlib import nullcontext

    from regrad_cli.learn.adapt import adapted
    from regrad_cli.learn.prompt import greedy, prompt_ids

    with adapted(model, prior, change) if prior else nullcontext():
        tokens = list(greedy(model, prompt_ids(model, question, shown), MAX_TOKENS))
    return model.tokenizer.decode(tokens, skip_special_tokens=True).strip()


def change_by_hand(model: Any, prior: Any, texts: tuple[str, ...], codec: str | None) -> Any:
    """The change by these passages' gradients, each taken and coded alone, with equal weights."""
    import torch

    from regrad_cli.learn.adapt import combine
    from regrad_cli.learn.codec import Codec, parse_codec
    from regrad_cli.learn.gradients import passage_gradients

    rows = []
    for text in texts:
        (part,) = passage_gradients(model, prior, [model.token_ids(text)])
        tensors = part.tensors
        if codec is not None:
            coded = Codec(parse_codec(codec), prior.shapes)
            tensors = coded.decode(*coded.encode(tensors))
        rows.append(tensors)
    stacked = {name: torch.cat([row[name] for row in rows]) for name in prior.tensors}
    return combine(stacked, [1 / len(texts)] * len(texts), prior.step_sizes, float(prior.card["gamma"]))


def read_prior(file: Path) -> Any:
    from regrad_cli.learn.prior import Prior

    return Prior.from_bytes(file.read_bytes())


# ── what each mode is ────────────────────────────────────────────────────────────────────────────────────────────────


def test_all_modes_but_cpt_are_measured_on_every_question(gold: Run) -> None:
    assert list(gold.result.pooled.modes) == [
        "direct", "rag", "direct-tuned", "rag-tuned", "regrad", "both", "prior", "other", "random"
    ]  # fmt: skip
    assert (gold.result.pooled.tasks, gold.result.pooled.questions) == (5, 6)
    asked = {(one.mode, one.run, one.number) for one in gold.scored}
    assert len(asked) == len(gold.scored) == 6 * (8 + 5)
    assert gold.result.pooled.retrieval is None


def test_every_mode_answers_as_it_would_by_hand(
    gold: Run, files: tuple[Path, Path], loaded: Any, prior_file: Path, baselines: tuple[Path, Path]
) -> None:
    prior, direct, rag = map(read_prior, (prior_file, *baselines))
    asked, _ = read_questions(files, None)
    expected: dict[str, list[str]] = {mode: [] for mode in gold.result.pooled.modes if mode not in ("other", "random")}
    for one in asked:
        question, texts = one.question.question, one.task.training_texts
        change = change_by_hand(loaded, prior, texts, "r1-int4")
        expected["direct"].append(by_hand(loaded, question, ()))
        expected["rag"].append(by_hand(loaded, question, texts))
        expected["direct-tuned"].append(by_hand(loaded, question, (), direct))
        expected["rag-tuned"].append(by_hand(loaded, question, texts, rag))
        expected["regrad"].append(by_hand(loaded, question, (), prior, change))
        expected["both"].append(by_hand(loaded, question, texts, prior, change))
        expected["prior"].append(by_hand(loaded, question, (), prior))
    assert {mode: gold.answers(mode) for mode in expected} == expected
    assert len({tuple(answers) for answers in expected.values()}) == len(expected), "modes that cannot be told apart"


def test_gradients_without_a_codec_are_the_gradients_themselves(
    files: tuple[Path, Path], tiny_model_folder: Path, loaded: Any, prior_file: Path
) -> None:
    prior = read_prior(prior_file)
    plain = run(files, tiny_model_folder, prior=prior_file, modes=("regrad",), codec=None)
    asked, _ = read_questions(files, None)
    expected = []
    for one in asked:
        change = change_by_hand(loaded, prior, one.task.training_texts, None)
        expected.append(by_hand(loaded, one.question.question, (), prior, change))
    assert plain.answers("regrad") == expected
    assert plain.result.settings["codec"] == "none"


def test_cpt_answers_with_what_it_read(files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path) -> None:
    alone = run(files, tiny_model_folder, prior=prior_file, modes=("direct", "cpt"), cpt_rate=0.05)
    assert alone.answers("cpt") != alone.answers("direct")
    still = run(files, tiny_model_folder, prior=prior_file, modes=("direct", "cpt"), cpt_rate=0.0)
    assert still.answers("cpt") == still.answers("direct")
    more = run(files[:1], tiny_model_folder, prior=prior_file, modes=("cpt",), cpt_rate=0.05, corpus=files[1:])
    assert more.answers("cpt") != alone.answers("cpt")[:4] or more.progress != alone.progress
    assert {event.total for event in more.progress if event.stage == "continued pretraining"} == {6}


def test_prompts_are_the_same_but_for_the_passages_shown(gold: Run) -> None:
    tokens = {mode: [s.prompt_tokens for s in gold.scored if s.mode == mode] for mode in gold.result.pooled.modes}
    blind = [mode for mode in tokens if mode not in ("rag", "rag-tuned", "both")]
    assert all(sorted(set(tokens[mode])) == sorted(set(tokens["direct"])) for mode in blind)
    assert tokens["rag"] == tokens["rag-tuned"] == tokens["both"]
    assert min(tokens["rag"]) > max(tokens["direct"])


# ── controls ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_other_takes_another_tasks_gradient_and_always_the_same(
    gold: Run, files: tuple[Path, Path], loaded: Any, prior_file: Path, tiny_model_folder: Path
) -> None:
    prior = read_prior(prior_file)
    asked, _ = read_questions(files, None)
    tasks = {one.task.title: one.task for one in asked}
    others = {s.task: s.passages[0] for s in gold.scored if s.mode == "other"}
    assert all(task != other for task, other in others.items())
    assert sorted(others) == sorted(others.values())
    for one, answer in zip(asked, gold.answers("other"), strict=True):
        change = change_by_hand(loaded, prior, tasks[others[one.task.id]].training_texts, "r1-int4")
        assert answer == by_hand(loaded, one.question.question, (), prior, change)
    again = run(files, tiny_model_folder, prior=prior_file, modes=("other",))
    assert again.answers("other") == gold.answers("other")
    moved = [run(files, tiny_model_folder, prior=prior_file, modes=("other",), seed=seed) for seed in (1, 2)]
    assert any({s.task: s.passages[0] for s in each.scored} != others for each in moved)


@pytest.mark.parametrize("seed", range(20))
def test_a_derangement_gives_each_once_and_never_what_shares_a_passage(seed: int) -> None:
    generator = random.Random(seed)
    count = generator.randint(4, 60)
    groups = [frozenset({f"own {place}", f"article {generator.randrange(count // 2 + 2)}"}) for place in range(count)]
    groups = [*groups, frozenset({"x"}), frozenset({"y"})]
    found = derangement(groups, seed)
    assert found is not None and sorted(found) == list(range(len(groups)))
    assert all(groups[place].isdisjoint(groups[other]) for place, other in enumerate(found))
    assert derangement(groups, seed) == found


def test_where_there_is_no_derangement_none_is_given() -> None:
    assert derangement([frozenset({"a"})], 0) is None
    assert derangement([frozenset({"a", "b"}), frozenset({"b"})], 0) is None
    assert derangement([frozenset({"a"}), frozenset({"a"}), frozenset({"b"})], 0) is None


def test_one_task_alone_has_no_other(files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path) -> None:
    alone = run(files[:1], tiny_model_folder, prior=prior_file, limit=1)
    assert "other" not in alone.result.pooled.modes and "regrad" in alone.result.pooled.modes
    assert any("other" in notice for notice in alone.notices)
    with pytest.raises(UsageProblem, match="another task"):
        run(files[:1], tiny_model_folder, prior=prior_file, limit=1, modes=("other",))


def test_random_has_five_seeds_that_differ_and_come_back(
    gold: Run, files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path
) -> None:
    runs = [gold.answers("random", seed) for seed in range(5)]
    assert len(set(map(tuple, runs))) == 5
    again = run(files, tiny_model_folder, prior=prior_file, modes=("random",))
    assert [again.answers("random", seed) for seed in range(5)] == runs
    means = [sum(s.f1 for s in gold.scored if s.mode == "random" and s.run == seed) / 6 for seed in range(5)]
    assert gold.result.pooled.modes["random"].f1 == pytest.approx(sum(means) / 5)


# ── nothing depends on company ───────────────────────────────────────────────────────────────────────────────────────


def test_the_order_of_modes_changes_no_result(
    gold: Run, files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path, baselines: tuple[Path, Path]
) -> None:
    modes = tuple(reversed(gold.result.pooled.modes))
    turned = run(files, tiny_model_folder, prior=prior_file, baselines=baselines, modes=modes)

    def key(one: Scored) -> tuple[Any, ...]:
        return one.mode, one.run or 0, one.number

    def told(found: Run) -> list[Scored]:
        return sorted((replace(one, seconds=0.0) for one in found.scored), key=key)

    assert told(turned) == told(gold)
    for mode, score in gold.result.pooled.modes.items():
        assert replace(turned.result.pooled.modes[mode], seconds=score.seconds) == score
    assert turned.result.pooled.differences == gold.result.pooled.differences


def test_a_mode_alone_answers_as_in_company(
    gold: Run, files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path
) -> None:
    for mode in ("direct", "regrad"):
        assert run(files, tiny_model_folder, prior=prior_file, modes=(mode,)).answers(mode) == gold.answers(mode)


def test_only_direct_and_rag_need_no_prior(
    files: tuple[Path, Path], tiny_model_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrad_cli import preparation

    monkeypatch.setattr(preparation, "prior_for", lambda *_, **__: pytest.fail("a prior was looked for"))
    assert run(files, tiny_model_folder, modes=("direct", "rag")).result.settings["prior"] is None


# ── what is measured on ──────────────────────────────────────────────────────────────────────────────────────────────


def test_files_are_scored_by_themselves_and_pooled(gold: Run) -> None:
    pooled, parts = gold.result.pooled, gold.result.datasets
    assert {name: (part.tasks, part.questions) for name, part in parts.items()} == {"north": (3, 4), "south": (2, 2)}
    for mode, score in pooled.modes.items():
        weighed = (4 * parts["north"].modes[mode].f1 + 2 * parts["south"].modes[mode].f1) / 6
        assert score.f1 == pytest.approx(weighed)


def test_a_limit_is_of_each_file_and_spread_over_its_tasks(files: tuple[Path, Path], tmp_path: Path) -> None:
    asked, _ = read_questions(files, 3)
    assert [(one.dataset, one.task.id) for one in asked] == [
        ("north", "Velmora"), ("north", "Skerry"), ("north", "Brannoch"), ("south", "Ostrey"), ("south", "Tarn"),
    ]  # fmt: skip
    assert [one.number for one in asked] == list(range(5))
    again = tmp_path / "north.jsonl"
    again.write_text(task_line("Sund") + "\n")
    asked, _ = read_questions([files[0], again], 1)
    assert {one.dataset for one in asked} == {str(files[0]), str(again)}


def test_bad_lines_and_repeated_tasks_are_named_and_the_rest_is_measured(
    files: tuple[Path, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text("\n".join([task_line("Sund"), "{no json", task_line("Velmora"), task_line("x", questions=0)]))
    found = run((files[0], wrong), tiny_model_folder, modes=("direct",))
    assert found.result.pooled.questions == 5
    assert [one.source for one in found.skipped] == [f"{wrong}:2", f"{wrong}:4", f"{wrong}: Velmora"]
    assert found.result.skipped == tuple(found.skipped)


def test_a_question_that_does_not_fit_is_named_and_left_out_everywhere(
    files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path, tmp_path: Path
) -> None:
    long = tmp_path / "long.jsonl"
    fits, too_long = "The lamp is lit. " * 60, "The lamp is lit. " * 400
    lines = [
        task_line(
            "Sund",
            passages=2,
        ),
        task_line("Holm"),
        task_line("Far"),
    ]
    tasks = [json.loads(line) for line in lines]
    tasks[0]["passages"], tasks[1]["passages"] = [fits, fits + "So."], [too_long]
    long.write_text("\n".join(map(json.dumps, tasks)))
    found = run((long,), tiny_model_folder, prior=prior_file, modes=("direct", "both"))
    assert {one.task for one in found.scored} == {"Far"}
    named = {one.source: one.reason for one in found.skipped}
    assert list(named) == ["long: Holm", "long: Sund, Which ferry 0 has Sund?"]
    assert "tokens" in named["long: Holm"] and "no room" in named["long: Sund, Which ferry 0 has Sund?"]
    blind = run((long,), tiny_model_folder, prior=prior_file, modes=("direct", "regrad"))
    assert {one.task for one in blind.scored} == {"Far", "Sund"}
    with pytest.raises(UsageProblem, match="no question is left"):
        long.write_text(json.dumps(tasks[1]))
        run((long,), tiny_model_folder, prior=prior_file, modes=("regrad",))


def test_a_gradient_that_is_not_finite_leaves_its_task_out(
    files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrad_cli.learn import gradients

    real = gradients._Passes.one

    def broken(self: Any, passages: Any, positions: Any, shape: Any) -> Any:
        part = real(self, passages, positions, shape)
        finite = part.finite.clone()
        finite[[place for place, position in enumerate(positions) if position == 0]] = False
        return replace(part, finite=finite)

    monkeypatch.setattr(gradients._Passes, "one", broken)
    found = run(files, tiny_model_folder, prior=prior_file, modes=("direct", "regrad"))
    assert [(one.source, one.reason) for one in found.skipped] == [
        ("north: Velmora", "the gradient of a passage is not finite")
    ]
    assert "Velmora" not in {one.task for one in found.scored}


# ── baselines and priors ─────────────────────────────────────────────────────────────────────────────────────────────


def test_tuned_modes_are_there_where_their_baseline_is(
    files: tuple[Path, Path], tiny_model_folder: Path, baselines: tuple[Path, Path], prior_file: Path
) -> None:
    found = run(files, tiny_model_folder, baselines=baselines[:1], prior=prior_file, limit=1)
    assert "direct-tuned" in found.result.pooled.modes and "rag-tuned" not in found.result.pooled.modes
    assert found.result.settings["baselines"]["direct"]["name"] == "tuned for direct"
    with pytest.raises(UsageProblem, match="rag-tuned needs a baseline"):
        run(files, tiny_model_folder, baselines=baselines[:1], modes=("rag-tuned",))
    with pytest.raises(UsageProblem, match="no mode takes it"):
        run(files, tiny_model_folder, baselines=baselines[:1], modes=("direct",))


def test_what_is_no_baseline_is_refused(
    files: tuple[Path, Path], tiny_model_folder: Path, baselines: tuple[Path, Path], prior_file: Path, tmp_path: Path
) -> None:
    import tiny

    with pytest.raises(UsageProblem, match="no fine-tuned baseline"):
        run(files, tiny_model_folder, baselines=(prior_file,))
    with pytest.raises(UsageProblem, match="second baseline"):
        run(files, tiny_model_folder, baselines=(baselines[0], baselines[0]))
    with pytest.raises(UsageProblem, match="not to take gradients"):
        run(files, tiny_model_folder, prior=baselines[0])
    other = tiny.write_model(tmp_path / "other", seed=5)
    with pytest.raises(Mismatch):
        run(files, other, baselines=baselines)


def test_unknown_modes_and_options_that_do_not_go_together_are_refused(
    files: tuple[Path, Path], tiny_model_folder: Path
) -> None:
    for options in ({"modes": ("direct", "rgerad")}, {"modes": ()}, {"k": 2}, {"min_score": 0.1}, {"search": "dense"}):
        with pytest.raises(UsageProblem):
            run(files, tiny_model_folder, **options)


# ── from a bank ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def banked(files: tuple[Path, Path], tiny_model_folder: Path, made_bank: Path) -> Run:
    return run(files, tiny_model_folder, bank=made_bank)


def test_from_a_bank_every_mode_answers_as_ask_does(banked: Run, files: tuple[Path, Path], made_bank: Path) -> None:
    asked, _ = read_questions(files, None)
    modes = ("direct", "rag", "regrad", "both")
    with Answerer(made_bank, modes=set(modes), device="cpu", dtype="fp32") as answerer:
        for mode in modes:
            expected = [answered(answerer, one.question.question, mode, max_tokens=MAX_TOKENS) for one in asked]
            assert banked.answers(mode) == [answer.answer for answer in expected]
            titles = {s.number: s.passages for s in banked.scored if s.mode == mode}
            assert [titles[one.number] for one in asked] == [tuple(u.title for u in a.passages) for a in expected]


def test_how_passages_are_chosen_is_as_it_is_for_ask(
    files: tuple[Path, Path], tiny_model_folder: Path, made_bank: Path
) -> None:
    asked, _ = read_questions(files, None)
    found = run(files, tiny_model_folder, bank=made_bank, modes=("regrad",), k=1, search="lexical")
    options: dict[str, Any] = {"modes": {"regrad"}, "device": "cpu", "dtype": "fp32", "search": "lexical"}
    with Answerer(made_bank, **options) as answerer:
        expected = [answered(answerer, one.question.question, k=1, max_tokens=MAX_TOKENS).answer for one in asked]
    assert found.answers("regrad") == expected
    assert all(len(one.passages) == 1 for one in found.scored)
    assert (found.result.settings["k"], found.result.settings["search"]) == (1, "lexical")


def test_recall_is_by_the_passages_own_text(banked: Run, files: tuple[Path, Path], made_bank: Path) -> None:
    asked, _ = read_questions(files, None)
    with Answerer(made_bank, modes={"regrad"}, device="cpu", dtype="fp32") as answerer:
        ranks = []
        for one in asked:
            found = answered(answerer, one.question.question, "regrad", max_tokens=1, k=10, min_score=None).passages
            own = {training_text(one.task.title, text) for text in one.task.passages}
            ranks.append(next(n for n, used in enumerate(found) if training_text(used.title, used.text or "") in own))
    expected = {f"recall@{k}": sum(rank < k for rank in ranks) / len(ranks) for k in (1, 3, 10)}
    assert banked.result.pooled.retrieval == pytest.approx(expected)
    assert expected["recall@10"] == 1


def test_recall_counts_a_longer_hit_and_the_piece_with_the_answer_but_no_other_text() -> None:
    from regrad_cli.evidence import Asked, Evidence, recall
    from regrad_cli.tasks import TaskQuestion

    task = Task("t", "T", ("The lamp is lit by Oda.  Its ferry is the Grey Heron.",), (TaskQuestion("q", ("Heron",)),))
    asked = [Asked(0, "d", task, task.questions[0])]

    def at(*found: str) -> dict[str, float]:
        return recall(asked, {0: Evidence("", (), (), None, found)})

    assert at("Before. The lamp is lit by Oda. Its ferry\nis the Grey Heron. After.")["recall@1"] == 1
    assert at("no", "ferry is the Grey Heron.") == {"recall@1": 0, "recall@3": 1, "recall@10": 1}
    assert at("The lamp is lit by Oda.", "", "Grey Heron of elsewhere")["recall@10"] == 0
    assert at()["recall@10"] == 0
    assert at(*["no"] * 5)["recall@10"] == 0


@pytest.mark.parametrize(
    "hit, gold",
    [
        ("It is lit at dusk. Its ferry is the Grey Heron. It sails on Mondays.", True),  # begins before, goes on after
        ("Its ferry is the Grey Heron. It sails on Mondays.", True),
        ("Its ferry is the Grey Heron of elsewhere. It sails on Mondays.", False),  # the same words, another text
        ("Heron. It sails on Mondays.", False),  # hardly more than the answer
    ],
)
def test_recall_counts_a_hit_that_shares_the_stretch_with_the_answer(hit: str, gold: bool) -> None:
    from regrad_cli.evidence import Asked, Evidence, recall
    from regrad_cli.tasks import TaskQuestion

    text = "The lamp is lit by Oda. It is lit at dusk. Its ferry is the Grey Heron."
    task = Task("t", "T", (text,), (TaskQuestion("q", ("Heron",)),))
    found = recall([Asked(0, "d", task, task.questions[0])], {0: Evidence("", (), (), None, (hit,))})
    assert found["recall@1"] == gold


def test_where_nothing_fits_the_untouched_model_answers(
    files: tuple[Path, Path], tiny_model_folder: Path, made_bank: Path
) -> None:
    found = run(files, tiny_model_folder, bank=made_bank, min_score=1.0, modes=("direct", "rag", "regrad", "both"))
    for mode in ("rag", "regrad", "both"):
        assert found.answers(mode) == found.answers("direct")
    assert all(one.passages == () for one in found.scored)
    assert found.result.pooled.retrieval["recall@10"] == 1  # type: ignore[index]


def test_a_bank_without_text_has_no_modes_that_show_it(
    files: tuple[Path, Path], prior_file: Path, tiny_model_folder: Path, tiny_embedder_folder: Path, tmp_path: Path
) -> None:
    bank = fill(tmp_path, files, prior_file, tiny_model_folder, tiny_embedder_folder, keep_text=False)
    found = run(files, tiny_model_folder, bank=bank, limit=2)
    assert list(found.result.pooled.modes) == ["direct", "regrad", "prior", "other", "random"]
    with pytest.raises(UsageProblem, match="no text"):
        run(files, tiny_model_folder, bank=bank, modes=("rag",))


def test_another_prior_than_the_banks_is_refused(
    files: tuple[Path, Path], tiny_model_folder: Path, made_bank: Path, prior_file: Path, tmp_path: Path
) -> None:
    other = write_prior(tmp_path / "other.safetensors", tiny_model_folder, seed=11)
    with pytest.raises(Mismatch, match="its own prior"):
        run(files, tiny_model_folder, bank=made_bank, prior=other)
    assert run(files, tiny_model_folder, bank=made_bank, prior=prior_file, modes=("prior",), limit=1).scored


# ── drift ────────────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def grown(
    files: tuple[Path, Path], tiny_model_folder: Path, tiny_embedder_folder: Path, prior_file: Path,
    tmp_path_factory: pytest.TempPathFactory,
) -> Run:  # fmt: skip
    corpus = tmp_path_factory.mktemp("corpus") / "more.jsonl"
    corpus.write_text("\n".join([*(task_line(f"Isle {n}") for n in range(5)), "not a task"]))
    return run(
        files[:1], tiny_model_folder, prior=prior_file, modes=("direct", "regrad"), drift=(7, 3), corpus=(corpus,),
        embedder=str(tiny_embedder_folder), cpt_rate=0.01,
    )  # fmt: skip


def test_the_base_weights_stay_exactly_where_they_are_and_those_of_cpt_move(grown: Run) -> None:
    points = {(point.method, point.passages): point for point in grown.result.drift}
    assert list(points) == [("direct", 0), ("cpt", 3), ("cpt", 7), ("regrad", 3), ("regrad", 7)]
    start = points["direct", 0]
    for size in (3, 7):
        assert points["regrad", size].distance == 0.0
        assert points["regrad", size].perplexity == start.perplexity
        assert points["cpt", size].perplexity != start.perplexity
    assert 0 < points["cpt", 3].distance < points["cpt", 7].distance
    assert points["regrad", 7].retrieval is not None and points["cpt", 7].retrieval is None


def test_drift_is_measured_on_the_same_questions_throughout(grown: Run) -> None:
    modes = {one.mode for one in grown.scored}
    assert modes == {"direct", "regrad", "direct@0", "cpt@3", "cpt@7", "regrad@3", "regrad@7"}
    for mode in modes:
        assert {one.number for one in grown.scored if one.mode == mode} == set(range(4))
    assert list(grown.result.pooled.modes) == ["direct", "regrad"]
    assert grown.answers("direct@0") == grown.answers("direct")
    assert [one.reason for one in grown.skipped] and grown.result.drift_questions == 4


def test_drift_asks_only_what_the_first_passages_answer(
    files: tuple[Path, Path], tiny_model_folder: Path, tiny_embedder_folder: Path, prior_file: Path
) -> None:
    settings = {"prior": prior_file, "modes": ("direct",), "embedder": str(tiny_embedder_folder)}
    found = run(files, tiny_model_folder, drift=(2, 6), **settings)
    assert found.result.drift_questions == 3  # two of Velmora, one of Skerry
    for too_many in ((7,), (6, 100)):
        with pytest.raises(UsageProblem, match="there are 6"):
            run(files, tiny_model_folder, drift=too_many, **settings)


def test_continued_pretraining_goes_on_where_it_was(
    files: tuple[Path, Path],
    tiny_model_folder: Path,
    tiny_embedder_folder: Path,
    prior_file: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from regrad_cli.learn import cpt

    real, seen = cpt.continue_training, []

    def watched(model: Any, start: Any, passages: Any, **options: Any) -> Iterator[Any]:
        found = list(real(model, start, passages, **options))
        seen.append((start.tensors, [model.tokenizer.decode(ids) for ids in passages], found[-1][1].tensors))
        return iter(found)

    monkeypatch.setattr(cpt, "continue_training", watched)
    run(files, tiny_model_folder, prior=prior_file, modes=("direct",), drift=(2, 6), embedder=str(tiny_embedder_folder))
    (_, first, after), (start, second, _) = seen
    assert all(start[name] is after[name] for name in start)
    asked, _ = read_questions(files, None)
    own = list(dict.fromkeys(text for one in asked for text in one.task.training_texts))
    assert first + second == own and len(first) == 2


# ── figures ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def scored(number: int, mode: str, f1: float, run: int | None = None, **changes: Any) -> Scored:
    values = {"em": float(f1 == 100), "seconds": 0.5, "prompt_tokens": 10, "answer_tokens": 2} | changes
    return Scored(number, "d", f"t{number // 2}", "q", ("a",), mode, "x", f1=f1, run=run, **values)


def test_a_summary_by_hand() -> None:
    values = {"regrad": [100, 0, 50, 50], "direct-tuned": [50, 0, 0, 50]}
    results = [scored(n, mode, f1) for mode, column in values.items() for n, f1 in enumerate(column)]
    results += [scored(n, "random", f1, run) for run in range(2) for n, f1 in enumerate([10, 20, 30, 40 * run])]
    found = summary(results, seed=0)
    assert (found.tasks, found.questions) == (2, 4)
    assert [found.modes[mode].f1 for mode in found.modes] == [50, 25, 20]
    assert found.modes["regrad"].em == 0.25
    assert found.modes["random"].seconds == 0.5
    assert list(found.differences) == ["regrad - direct-tuned", "random - direct-tuned", "regrad - random"]
    gap = found.differences["regrad - direct-tuned"]
    assert gap.f1 == 25 and 0 <= gap.low < 25 < gap.high <= 50
    for one in found.modes.values():
        assert one.f1_low <= one.f1 <= one.f1_high


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def command(*words: str | Path, **options: Any) -> Any:
    return call("eval", *words, "--max-tokens", "4", "--device", "cpu", "--dtype", "fp32", **options)


def test_the_commands_json_has_the_names_that_others_rely_on(
    files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path, tmp_path: Path
) -> None:
    report, answers = tmp_path / "report.html", tmp_path / "answers.jsonl"
    result = command(
        *files, "--model", tiny_model_folder, "--prior", prior_file, "--modes", "direct,regrad, both",
        "--report", report, "--answers", answers, "--json",
    )  # fmt: skip
    assert result.code == 0, result.err
    document = result.document
    assert {"tasks", "questions", "modes", "differences", "retrieval", "drift", "datasets", "settings"} <= set(document)
    assert list(document["modes"]) == ["direct", "regrad", "both"]
    names = {"em", "f1", "f1_low", "f1_high", "seconds", "prompt_tokens", "answer_tokens"}
    assert all(set(score) == names for score in document["modes"].values())
    assert set(document["differences"]["regrad - direct"]) == {"f1", "low", "high"}
    assert document["retrieval"] is None and document["drift"] is None
    assert (document["tasks"], document["questions"]) == (5, 6)
    assert document["settings"]["codec"] == "r1-int4"
    lines = [json.loads(line) for line in answers.read_text().splitlines()]
    assert len(lines) == 18 and {"question", "mode", "answer", "em", "f1", "seconds"} <= set(lines[0])
    assert "Which ferry 0 has Tarn?" in report.read_text()


def test_the_codec_is_the_priors_own_unless_one_is_named(
    files: tuple[Path, Path], tiny_model_folder: Path, tiny_embedder_folder: Path, prior_file: Path, tmp_path: Path
) -> None:
    from regrad_cli.learn.prior import Prior

    prior = Prior.from_bytes(prior_file.read_bytes())
    chosen = tmp_path / "chosen.safetensors"
    chosen.write_bytes(replace(prior, card=prior.card | {"codec": "r3-int8"}).to_bytes())
    words = [*files, "--model", tiny_model_folder, "--prior", chosen, "--modes", "regrad", "--limit", "1", "--json"]
    assert command(*words).document["settings"]["codec"] == "r3-int8"
    assert command(*words, "--codec", "int8").document["settings"]["codec"] == "int8"
    for number, (options, codec) in enumerate([({}, "r3-int8"), ({"codec": "int8"}, "int8")]):
        bank = use_cases.make_bank(
            tmp_path / str(number), tiny_model_folder, tiny_embedder_folder, prior=chosen, **options
        )
        with open_bank(bank) as opened:
            assert str(opened.settings.codec) == codec


def test_from_a_bank_the_command_tells_recall(files: tuple[Path, Path], made_bank: Path) -> None:
    result = command(*files, "--bank", made_bank, "--modes", "regrad", "--limit", "1", "--json")
    assert result.code == 0, result.err
    assert set(result.document["retrieval"]) == {"recall@1", "recall@3", "recall@10"}
    assert result.document["settings"]["retrieval"] == "bank"
    table = command(*files, "--bank", made_bank, "--retrieval", "bank", "--modes", "regrad", "--limit", "1")
    assert table.out.splitlines()[0].split("\t")[:2] == ["all", "regrad"]


def test_tables_on_a_terminal(files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path) -> None:
    words = [*files, "--model", tiny_model_folder, "--prior", prior_file, "--modes", "direct,regrad"]
    result = command(*words, tty=True)
    assert result.code == 0
    for shown in ("F1", "regrad - direct", "north", "south", "all", "6 questions of 5 tasks"):
        assert shown in result.out


def test_bad_lines_give_exit_code_3(files: tuple[Path, Path], tiny_model_folder: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.jsonl"
    wrong.write_text(task_line("Sund") + "\n[]\n")
    result = command(wrong, "--model", tiny_model_folder, "--modes", "direct", "--json")
    assert result.code == 3
    assert json.loads(result.err.splitlines()[0])["skipped"]["source"] == f"{wrong}:2"
    assert result.document["skipped"][0]["source"] == f"{wrong}:2"


@pytest.mark.parametrize(
    "words",
    [
        ["--modes", "nothing"],
        ["--modes", ","],
        ["--drift", "a few"],
        ["--drift", ","],
        ["--retrieval", "gold", "--bank", "x"],
        ["--bank", "x", "--codec", "int8"],
        ["--report", "no/such/folder/r.html"],
        ["--answers", "."],
        ["--codec", "zip"],
        ["--limit", "0"],
        ["-k", "2"],
        ["--min-score", "none"],
    ],
    ids=" ".join,
)
def test_a_wrong_command_line_is_usage(words: list[str], files: tuple[Path, Path], tiny_model_folder: Path) -> None:
    result = command(files[0], "--model", tiny_model_folder, *words, "--json")
    assert (result.code, result.error["kind"]) == (2, "usage")
    assert result.out == ""


def test_a_file_that_is_read_is_never_written(
    files: tuple[Path, Path], tiny_model_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "x").mkdir()
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_bytes(files[0].read_bytes())
    for option in ("--answers", "--report"):
        result = command(
            tasks, "--model", tiny_model_folder, "--modes", "direct", option, tmp_path / "x/../tasks.jsonl"
        )
        assert result.code == 2
    assert tasks.read_bytes() == files[0].read_bytes()


def test_an_evaluation_that_cannot_begin_leaves_earlier_answers_alone(files: tuple[Path, Path], tmp_path: Path) -> None:
    answers = tmp_path / "answers.jsonl"
    answers.write_text("earlier\n")
    assert command(files[0], "--model", tmp_path / "none", "--answers", answers).code == 13
    assert answers.read_text() == "earlier\n"


def test_no_tasks_is_usage(tmp_path: Path) -> None:
    assert call("eval").code == 2
    assert call("eval", tmp_path / "none.jsonl").code == 2


def test_ctrl_c_keeps_the_answers_so_far_and_the_model(
    files: tuple[Path, Path], tiny_model_folder: Path, prior_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from regrad_cli.learn import generate

    real, calls, models = generate.greedy_batch, [], []

    def interrupted(model: Any, prompts: Any, max_tokens: int, beginnings: Any) -> Any:
        models.append(model)
        calls.append(len(prompts))
        if len(calls) == 3:
            raise KeyboardInterrupt
        return real(model, prompts, max_tokens, beginnings)

    monkeypatch.setattr(generate, "greedy_batch", interrupted)
    answers = tmp_path / "answers.jsonl"
    words = ["--model", tiny_model_folder, "--prior", prior_file, "--modes", "direct,prior,regrad"]
    result = command(*files, *words, "--answers", answers)
    assert result.code == 130
    assert str(answers) in result.err
    assert len(answers.read_text().splitlines()) == sum(calls[:2]) == 12
    assert not any(projection.module._forward_hooks for projection in models[0].projections)
