"""From tasks to episodes: every choice follows from the seed, strangers are the nearest, prompts are those of `ask`."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from train_runs import LONG, PLACES
from train_runs import task as task_line

from regrad_cli.episodes import EpisodeRules, Episodes
from regrad_cli.learn.meta import Episode
from regrad_cli.learn.model import Model, load_model
from regrad_cli.learn.prompt import prompt_ids
from regrad_cli.tasks import Task, TaskQuestion
from regrad_cli.weighing import Vectors

COUNT = 8


@pytest.fixture(scope="module")
def model(tiny_model_folder: Path) -> Model:
    return load_model(tiny_model_folder, device="cpu", dtype="fp32")


def task(number: int, **changes: Any) -> Task:
    line = task_line(number, **changes)
    questions = tuple(TaskQuestion(each["question"], tuple(each["answers"])) for each in line["questions"])
    return Task(line["id"], line["title"], tuple(line["passages"]), questions)


TASKS = [task(number) for number in range(COUNT)]


def even(scores: Sequence[float]) -> list[float]:
    return [1.0 / len(scores)] * len(scores)


def by_score(scores: Sequence[float]) -> list[float]:
    total = sum(np.exp(np.array(scores) / 0.05))
    return [float(np.exp(score / 0.05) / total) for score in scores]


def episodes(model: Model, tasks: Sequence[Task] = TASKS, **changes: Any) -> Episodes:
    named = {name: changes.pop(name) for name in ("vectors", "token_spans", "seed", "weights_for") if name in changes}
    named = {"seed": 0, "weights_for": even} | named
    weights = named.pop("weights_for")
    return Episodes(model, tasks, EpisodeRules(**changes), weights, **named)


def drawn(made: Episodes, steps: int, batch: int = 3) -> list[Episode]:
    found = [each for step in range(steps) for each in made.at(step, batch)]
    assert all(isinstance(each, Episode) for each in found)
    return found  # type: ignore[return-value]


def words(model: Model, ids: Sequence[int]) -> str:
    return model.tokenizer.decode(list(ids))


def test_every_choice_follows_from_seed_step_and_place(model: Model) -> None:
    straight = drawn(episodes(model), 10)
    again = episodes(model)
    assert [each for step in (7, 3, 9) for each in again.at(step, 3)] == [
        straight[3 * step + slot] for step in (7, 3, 9) for slot in range(3)
    ]
    assert drawn(episodes(model, seed=1), 10) != straight


@pytest.mark.parametrize("batch", [1, 3, COUNT, COUNT + 3])
def test_every_round_takes_every_task_once_in_another_order(model: Model, batch: int) -> None:
    names = [each.name for each in drawn(episodes(model), -(-5 * COUNT // batch), batch)][: 5 * COUNT]
    rounds = [names[start : start + COUNT] for start in range(0, len(names), COUNT)]
    assert all(sorted(each) == sorted(task.id for task in TASKS) for each in rounds)
    assert len({tuple(each) for each in rounds}) > 1


def test_an_episode_holds_its_own_passages_and_the_prompts_that_ask_makes(model: Model) -> None:
    for episode in drawn(episodes(model, mix_context=0.0), 4):
        own = next(task for task in TASKS if task.id == episode.name)
        assert [words(model, ids) for ids in episode.passages] == list(own.training_texts)
        assert {prompted.weights for prompted in episode.questions} == {(1.0,)}
        asked = {question.question: question.answers for question in own.questions}
        assert len(episode.questions) == 2
        for prompted in episode.questions:
            prompt = list(prompted.ids[: prompted.start])
            (question,) = (text for text in asked if prompt == prompt_ids(model, text))
            answer = prompted.ids[prompted.start :]
            assert answer[-1] == model.end_ids[0]
            assert words(model, answer[:-1]) == asked[question][0]  # the first of its aliases


def test_no_more_questions_than_asked_for_and_each_in_its_turn(model: Model) -> None:
    many = [Task("one", "T", ("Text here.",), tuple(TaskQuestion(f"Q{i}?", ("A",)) for i in range(6)))]
    found = drawn(episodes(model, many, questions=2), 30, 1)
    assert {len(each.questions) for each in found} == {2}
    assert len({prompted.ids for each in found for prompted in each.questions}) > 5


@pytest.mark.parametrize("share", [0.0, 0.25, 1.0])
def test_a_share_of_episodes_shows_one_question_the_passages(model: Model, share: float) -> None:
    found = drawn(episodes(model, mix_context=share), 100, 2)
    shown = [
        sum("is called" in words(model, prompted.ids[: prompted.start]) for prompted in each.questions)
        for each in found
    ]
    assert set(shown) <= {0, 1}
    assert sum(shown) / len(shown) == pytest.approx(share, abs=0.1)


@pytest.mark.parametrize(("objective", "shown"), [("direct", 0), ("rag", 2)])
def test_a_baseline_takes_no_gradient_and_sees_passages_always_or_never(
    model: Model, objective: str, shown: int
) -> None:
    for episode in drawn(episodes(model, objective=objective, mix_context=1.0, strangers=0.0), 5):
        assert episode.passages == () and {each.weights for each in episode.questions} == {()}
        seen = ["is called" in words(model, prompted.ids[: prompted.start]) for prompted in episode.questions]
        assert sum(seen) == shown


def test_tasks_of_reading_stand_beside_those_with_gradients_and_change_none(model: Model) -> None:
    alone, beside = episodes(model), episodes(model, reading=COUNT)
    for step in range(3):
        found = beside.at(step, 2)
        assert found[:2] == alone.at(step, 2)
        reading = found[2:]
        assert sorted(each.name for each in reading) == sorted(task.id for task in TASKS)
        for episode in reading:
            assert episode.passages == () and {each.weights for each in episode.questions} == {()}
            assert all("is called" in words(model, each.ids[: each.start]) for each in episode.questions)
    assert beside.at(1, 2)[2:] == episodes(model, reading=COUNT).at(1, 2)[2:] != beside.at(2, 2)[2:]


def test_shown_and_summed_passages_are_the_same_and_shown_in_any_order(model: Model) -> None:
    tasks = [task(number, passages=3) for number in range(COUNT)]
    firsts = Counter()
    for episode in drawn(episodes(model, tasks, mix_context=1.0), 12):
        text = words(model, episode.questions[0].ids[: episode.questions[0].start])
        own = next(task for task in tasks if task.id == episode.name)
        places = [text.index(passage) for passage in own.training_texts]
        firsts[places.index(min(places))] += 1
        assert len(episode.passages) == 3
    assert len(firsts) == 3


# ── strangers ───────────────────────────────────────────────────────────────────────────────────────────────────────


def vectors_of(texts: Sequence[str]) -> np.ndarray:
    """A place's own direction and a little of everything's: texts of one place lie near one another."""
    found = np.full((len(texts), len(PLACES)), 0.1, np.float32)
    for row, text in enumerate(texts):
        for column, place in enumerate(PLACES):
            found[row, column] += place in text
    return found / np.linalg.norm(found, axis=1, keepdims=True)


def test_the_nearest_passages_of_other_tasks_are_found_best_first(model: Model) -> None:
    tasks = [task(number, passages=2) for number in range(2 * COUNT)]  # task 3 and 11 are of one place
    made = episodes(model, tasks, vectors=Vectors(vectors_of))
    others = made._nearest(f"Who keeps {PLACES[3]}?", 3, 3)
    assert others[:2] == [(11, 0), (11, 1)]  # equals in their order
    assert all(owner != 3 for owner, _ in others) and len(others) == 3
    assert len(made._nearest("anything", 0, 1000)) == 2 * (2 * COUNT - 1)


def test_strangers_fill_the_sum_up_to_k_and_weights_follow_the_scores(model: Model) -> None:
    tasks = [task(number) for number in range(2 * COUNT)]
    options = {"vectors": Vectors(vectors_of), "weights_for": by_score, "strangers": 1.0, "k": 3, "mix_context": 0.0}
    made = episodes(model, tasks, **options)
    for episode in drawn(made, 10):
        own = next(place for place, task in enumerate(tasks) if task.id == episode.name)
        assert words(model, episode.passages[0]) == tasks[own].training_texts[0]
        assert len(episode.passages) <= 3
        for prompted in episode.questions:
            assert len(prompted.weights) == len(episode.passages) and 0.9 < sum(prompted.weights) <= 1 + 1e-9
        assert all(max(column) >= 0.03 for column in zip(*(each.weights for each in episode.questions), strict=True))
    one = episodes(model, tasks, questions=1, **options)
    seen = Counter(len(episode.passages) for episode in drawn(one, 10))
    assert len(seen) > 1  # one that weighs next to nothing is not computed


# ── segments ────────────────────────────────────────────────────────────────────────────────────────────────────────

PARTED = Task(
    "parted",
    "Harbour",
    (
        "The lamp of Velmora is lit at dusk by its keeper. The ferry of Velmora is red and slow. "
        "The ferry of Tarn is called the Grey Gull by all. The bell of Tarn is rung by hand at dawn.",
    ),
    (
        TaskQuestion("When is the lamp of Velmora lit?", ("dusk",)),
        TaskQuestion("What is the Gull of Tarn?", ("ferry",)),
    ),
)


def by_words(text: str) -> list[tuple[int, int]]:
    """Each word as three tokens."""
    return [match.span() for match in re.finditer(r"\S+", text) for _ in range(3)]


def test_each_question_weighs_the_segments_of_its_passage_by_what_it_asks(model: Model) -> None:
    rules = {"segments": 3, "segment_temperature": 0.3, "mix_context": 0.0, "strangers": 0.0}
    made = episodes(model, [PARTED], vectors=Vectors(vectors_of), token_spans=by_words, weights_for=by_score, **rules)
    (episode,) = drawn(made, 1, 1)
    texts = [words(model, ids) for ids in episode.passages]
    assert len(texts) > 1 and all(text.startswith("Harbour\n") for text in texts)
    assert " ".join(text.removeprefix("Harbour\n") for text in texts) == PARTED.passages[0]
    best = {texts[prompted.weights.index(max(prompted.weights))] for prompted in episode.questions}
    assert len(best) == 2 and all(("Velmora" in text) != ("Tarn" in text) for text in best)
    (own,) = made.for_validation([PARTED])[0]["own"]
    assert set(own.passages) < set(episode.passages) and len(own.questions) == 1


def test_segments_that_weigh_next_to_nothing_for_every_question_are_not_computed(model: Model) -> None:
    only = replace(PARTED, questions=PARTED.questions[:1])
    rules = {"segments": 3, "segment_temperature": 0.01, "mix_context": 0.0, "strangers": 0.0}
    made = episodes(model, [only], vectors=Vectors(vectors_of), token_spans=by_words, weights_for=by_score, **rules)
    (episode,) = drawn(made, 1, 1)
    assert len(episode.passages) == 1 and "Velmora" in words(model, episode.passages[0])


def test_what_will_be_embedded_is_told_and_nothing_else_is_embedded_one_by_one(model: Model) -> None:
    asked: list[Sequence[str]] = []

    def encode(texts: Sequence[str]) -> np.ndarray:
        asked.append(texts)
        return vectors_of(texts)

    vectors = Vectors(encode)
    made = episodes(model, [*TASKS, PARTED], vectors=vectors, token_spans=by_words, segments=3, strangers=0.5, k=2)
    told = made.texts_to_embed([*TASKS, PARTED])
    vectors.add(told)
    drawn(made, 8)
    questions = {question.question for task in (*TASKS, PARTED) for question in task.questions}
    assert asked[0] == told and {text for texts in asked[1:] for text in texts} <= questions


def test_a_share_of_episodes_has_strangers(model: Model) -> None:
    made = episodes(model, vectors=Vectors(vectors_of), strangers=0.4, k=2)
    counts = Counter(len(episode.passages) for episode in drawn(made, 100))
    assert set(counts) == {1, 2} and counts[2] / 300 == pytest.approx(0.4, abs=0.08)


def test_a_task_with_k_passages_of_its_own_takes_no_stranger(model: Model) -> None:
    tasks = [task(number, passages=3) for number in range(COUNT)]
    made = episodes(model, tasks, vectors=Vectors(vectors_of), strangers=1.0, k=3)
    assert all(len(episode.passages) == 3 for episode in drawn(made, 6))


def test_of_very_many_passages_all_stay_in_the_sum(model: Model) -> None:
    (episode,) = drawn(episodes(model, [task(0, passages=50)]), 1, 1)
    assert len(episode.passages) == 50 and sum(episode.questions[0].weights) == pytest.approx(1)


# ── what cannot be an episode ───────────────────────────────────────────────────────────────────────────────────────


def test_a_prompt_that_is_too_long_is_named_in_place_of_its_episode(model: Model) -> None:
    long = Task("long", "T", ("A passage.",), (TaskQuestion(LONG, ("dusk",)),))
    found = episodes(model, [TASKS[0], long]).at(0, 2)
    (told,) = (each for each in found if isinstance(each, str))
    assert told.startswith("long: its prompt takes ") and "1024 positions" in told
    assert sum(isinstance(each, Episode) for each in found) == 1


def test_a_passage_of_one_token_is_named_in_place_of_its_episode(model: Model) -> None:
    short = Task("short", "", ("e",), TASKS[0].questions)
    (told,) = episodes(model, [short]).at(0, 1)
    assert told == "short: a passage of fewer than two tokens has no next-token loss"


def test_a_long_passage_is_cut_and_no_longer_than_the_model_reads(model: Model, monkeypatch: Any) -> None:
    long = Task("long", "T", (LONG,), TASKS[0].questions)
    (episode,) = drawn(episodes(model, [long], mix_context=0.0, passage_tokens=64), 1, 1)
    assert episode.passages == (tuple(model.token_ids(long.training_texts[0])[:64]),)
    monkeypatch.setattr(model.network.config, "max_position_embeddings", 100)
    (episode,) = drawn(episodes(model, [long], mix_context=0.0), 1, 1)
    assert len(episode.passages[0]) == 100


# ── validation ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_dev_tasks_are_measured_alone_by_their_own_by_anothers_and_shown(model: Model) -> None:
    kinds, problems = episodes(model).for_validation(TASKS[:3])
    assert problems == [] and list(kinds) == ["prior", "own", "other", "shown"]
    for place, task in enumerate(TASKS[:3]):
        prior, own, other, shown = (kinds[kind][place] for kind in kinds)
        assert {each.name for each in (prior, own, other, shown)} == {task.id}
        blind = tuple(prompt_ids(model, task.questions[0].question))
        assert prior.questions[0].ids[: prior.questions[0].start] == blind
        assert prior.questions[0].ids == own.questions[0].ids == other.questions[0].ids != shown.questions[0].ids
        assert [each.questions[0].weights for each in (prior, own, other, shown)] == [(), (1.0,), (1.0,), (1.0,)]
        assert prior.passages == () and own.passages == shown.passages
        assert words(model, own.passages[0]) == task.training_texts[0]
        assert other.passages == kinds["own"][(place + 1) % 3].passages
        read = tuple(prompt_ids(model, task.questions[0].question, task.training_texts))
        assert shown.questions[0].ids[: shown.questions[0].start] == read


@pytest.mark.parametrize("objective", ["direct", "rag"])
def test_a_baseline_is_measured_as_it_answers(model: Model, objective: str) -> None:
    regrad, _ = episodes(model).for_validation(TASKS[:2])
    kinds, _ = episodes(model, objective=objective).for_validation(TASKS[:2])
    assert list(kinds) == [objective]
    like = regrad["shown" if objective == "rag" else "prior"]
    assert [each.questions[0].ids for each in kinds[objective]] == [each.questions[0].ids for each in like]
    assert all(each.passages == () for each in kinds[objective])


def test_a_dev_task_that_cannot_be_measured_is_named(model: Model) -> None:
    long = Task("long", "T", ("A passage.",), (TaskQuestion(LONG, ("dusk",)),))
    kinds, problems = episodes(model).for_validation([TASKS[0], long])
    assert {len(found) for found in kinds.values()} == {1}
    assert [problem.source for problem in problems] == ["long"] and "positions" in problems[0].reason
    assert all(found == [] for found in episodes(model).for_validation([long])[0].values())


def test_which_titles_are_kept_aside_depends_on_the_title_alone() -> None:
    from regrad_cli.trainoptions import held_out, spread

    tasks = [task(number, title=f"Title {number // 3}") for number in range(300)]
    learned, aside = held_out(tasks)
    assert len(learned) + len(aside) == 300 and 5 <= len(aside) <= 30
    assert not {each.title for each in learned} & {each.title for each in aside}
    fewer_learned, fewer_aside = held_out(tasks[:150])
    assert set(fewer_learned) <= set(learned) and set(fewer_aside) <= set(aside)
    untitled = [Task(str(n), "", (f"Passage {n // 2}.",), TASKS[0].questions) for n in range(200)]
    learned, aside = held_out(untitled)
    assert aside and not {each.passages for each in learned} & {each.passages for each in aside}
    assert held_out(tasks[:39]) == (tasks[:39], [])
    assert spread(tasks, 4) == [tasks[0], tasks[75], tasks[150], tasks[225]] and spread(tasks[:3], 4) == tasks[:3]
