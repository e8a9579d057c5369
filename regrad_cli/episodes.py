"""Tasks → episodes of training: which questions, which strangers, what each question weighs its passages' segments by,
with or without passages shown. Knows no gradient.

Every choice follows from the seed, the step and the place in it, so a run that goes on chooses what it would have.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from random import Random
from typing import TYPE_CHECKING, Any

from regrad_cli.errors import UsageProblem
from regrad_cli.records import Skipped, training_text
from regrad_cli.segments import LEAST_WEIGHT, SEGMENT_TEMPERATURE, SEGMENT_TOKENS, Segment, shared
from regrad_cli.tasks import Task
from regrad_cli.weighing import Cutter, Vectors

if TYPE_CHECKING:
    import numpy as np

    from regrad_cli.learn.meta import Episode, Prompted
    from regrad_cli.learn.model import Model
    from regrad_cli.passages import TokenSpans

OBJECTIVES = ("regrad", "direct", "rag")
WeightsFor = Callable[[Sequence[float]], list[float]]
Place = tuple[int, int]  # a task, and one of its passages


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """How a task becomes an episode.

    objective       "regrad" (gradients of its passages), "direct" (nothing but the question), "rag" (passages shown)
    mix_context     share of episodes in which one question also sees the passages
    reading         further tasks a step, at θ itself: passages shown to every question and no gradient of them
    strangers       share of episodes in which other tasks' passages, the nearest to the question, are in the sum
    k               passages in the sum, then
    segments        a passage is cut into at most so many, each with a gradient of its own
    segment_tokens  and into about as many as it has so many tokens
    segment_temperature  by which its weight is shared among them
    questions       at most so many of a task's in one episode
    passage_tokens  a longer passage is cut, as ingest would cut it
    """

    objective: str = "regrad"
    mix_context: float = 0.25
    reading: int = 0
    strangers: float = 0.4
    k: int = 3
    segments: int = 1
    segment_tokens: int = SEGMENT_TOKENS
    segment_temperature: float = SEGMENT_TEMPERATURE
    questions: int = 4
    passage_tokens: int = 512


class Episodes:
    """The episodes of every step of a run, and those of validation.

    token_spans  text → (start, end) characters of each token, to cut passages by; needed where segments are more than 1
    vectors      what passages are found and weighed by; None: no strangers, and all passages weigh the same
    """

    def __init__(
        self,
        model: Model,
        tasks: Sequence[Task],
        rules: EpisodeRules,
        weights_for: WeightsFor,
        *,
        seed: int,
        token_spans: TokenSpans | None = None,
        vectors: Vectors | None = None,
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._rules = rules
        self._weights_for = weights_for
        self._seed = seed
        self._vectors = vectors
        self._cutter: Cutter | None = None
        if rules.segments > 1 and token_spans is not None and vectors is not None:
            self._cutter = Cutter(token_spans, rules.segments, vectors, rules.segment_tokens)
        self._orders: dict[str, tuple[int, list[int]]] = {}  # by seed: a round, and the order of tasks in it
        self._places = [(number, place) for number, task in enumerate(tasks) for place in range(len(task.passages))]
        self._all: np.ndarray | None = None

    def texts_to_embed(self, tasks: Sequence[Task]) -> list[str]:
        """What `vectors` will be asked for, questions aside."""
        found = self._all_texts() if self._rules.strangers else []
        found += [text for task in tasks if len(task.passages) > 1 for text in task.embedding_texts]
        if self._cutter is not None:
            found += [part.embedding_text for task in tasks for own in self._own_parts(task) for part in own]
        return list(dict.fromkeys(found))

    def _all_texts(self) -> list[str]:
        """What the passages of all tasks are found by, in the order of `_places`."""
        return [text for task in self._tasks for text in task.embedding_texts]

    def at(self, step: int, batch: int) -> list[Episode | str]:
        """The episodes of one step, those of reading last; a task that cannot be one is its name and the reason
        instead."""
        seed, reading = str(self._seed), self._rules.reading
        return [
            *(self._taken(seed, step, slot, batch, self._rules.objective) for slot in range(batch)),
            *(self._taken(f"{seed}/reading", step, slot, reading, "rag") for slot in range(reading)),
        ]

    def _taken(self, seed: str, step: int, slot: int, batch: int, objective: str) -> Episode | str:
        """seed: of the order of tasks and of all that is drawn"""
        round_, place = divmod(step * batch + slot, len(self._tasks))
        number = self._in_round(seed, round_)[place]
        try:
            return self._drawn(number, Random(f"{seed}/{step}/{slot}"), objective)
        except UsageProblem as problem:
            return f"{self._tasks[number].id}: {problem}"

    def _in_round(self, seed: str, round_: int) -> list[int]:
        kept = self._orders.get(seed)
        if kept is None or kept[0] != round_:
            order = list(range(len(self._tasks)))
            Random(f"{seed}/{round_}").shuffle(order)
            self._orders[seed] = kept = (round_, order)
        return kept[1]

    def _drawn(self, number: int, draw: Random, objective: str) -> Episode:
        from regrad_cli.learn.meta import Episode

        task, rules = self._tasks[number], self._rules
        questions = list(task.questions)
        draw.shuffle(questions)
        questions = questions[: rules.questions]
        chosen = [(task, place) for place in range(len(task.passages))]
        if rules.k > len(chosen) and draw.random() < rules.strangers and self._vectors is not None:
            nearest = self._nearest(questions[0].question, number, rules.k - len(chosen))
            chosen += [(self._tasks[other], place) for other, place in nearest]
        shown = [False] * len(questions)
        if objective == "rag":
            shown = [True] * len(questions)
        elif objective == "regrad" and draw.random() < rules.mix_context:
            shown[0] = True
        in_prompt = [training_text(one.title, one.passages[place]) for one, place in chosen]
        draw.shuffle(in_prompt)
        prompted = [
            self.prompted(question.question, question.answers[0], in_prompt if show else ())
            for question, show in zip(questions, shown, strict=True)
        ]
        if objective != "regrad":
            return Episode(task.id, (), tuple(prompted))
        parts = [self._parts(one, place) for one, place in chosen]
        texts = [one.embedding_texts[place] for one, place in chosen]
        return self._weighed(task.id, parts, texts, [question.question for question in questions], prompted)

    def _weighed(
        self,
        name: str,
        passages: Sequence[Sequence[Segment]],
        texts: Sequence[str],
        questions: Sequence[str],
        prompted: Sequence[Prompted],
    ) -> Episode:
        """An episode of these passages' segments, each question with its own weights; what hardly weighs in any is left
        out.

        texts  of the passages, as they are embedded
        """
        from regrad_cli.learn.meta import Episode

        parts = [part for own in passages for part in own]
        weights = [self._weights_of(question, passages, texts) for question in questions]
        least = min(LEAST_WEIGHT, *map(max, weights))  # of very many passages each has less
        kept = [place for place in range(len(parts)) if max(row[place] for row in weights) >= least]
        asked = [
            replace(prompt, weights=tuple(row[place] for place in kept))
            for prompt, row in zip(prompted, weights, strict=True)
        ]
        return Episode(name, tuple(self.passage(parts[place].training_text) for place in kept), tuple(asked))

    def _own_parts(self, task: Task) -> list[tuple[Segment, ...]]:
        """The segments of each of its passages."""
        return [self._parts(task, place) for place in range(len(task.passages))]

    def _parts(self, task: Task, place: int) -> tuple[Segment, ...]:
        """A passage's segments."""
        if self._cutter is not None:
            return self._cutter.segments(task.title, task.passages[place])
        return (Segment(task.title, task.passages[place]),)

    def _weights_of(self, question: str, passages: Sequence[Sequence[Segment]], texts: Sequence[str]) -> list[float]:
        scores = [0.0] * len(passages)
        if self._vectors is not None and len(passages) > 1:
            scores = self._vectors.scores(question, self._vectors.of(texts)).tolist()
        weights = self._weights_for(scores)
        if self._cutter is None:
            return weights
        fits = [self._cutter.fits(question, own) for own in passages]
        return shared(weights, fits, self._rules.segment_temperature)

    def _nearest(self, question: str, own: int, k: int) -> list[Place]:
        """The k passages of other tasks that fit the question best."""
        assert self._vectors is not None
        if self._all is None:
            self._all = self._vectors.of(self._all_texts())
        order = (-self._vectors.scores(question, self._all)).argsort(kind="stable")
        others = (self._places[position] for position in order if self._places[position][0] != own)
        return list(islice(others, k))

    def passage(self, text: str) -> tuple[int, ...]:
        """A passage's tokens. raises UsageProblem where they are too few for a next-token loss"""
        most = min(self._rules.passage_tokens, self._model.positions or self._rules.passage_tokens)
        ids = tuple(self._model.token_ids(text)[:most])
        if len(ids) < 2:
            raise UsageProblem("a passage of fewer than two tokens has no next-token loss")
        return ids

    def prompted(self, question: str, answer: str, shown: Sequence[str]) -> Prompted:
        """The prompt as `ask` makes it, the answer, and the token that ends it.

        raises  UsageProblem where the model cannot read so much at once
        """
        from regrad_cli.learn.meta import Prompted
        from regrad_cli.learn.prompt import prompt_ids

        prompt = prompt_ids(self._model, question, shown)
        answered = self._model.token_ids(self.answer_text(answer)) + self._model.end_ids[:1]
        limit = self._model.positions
        if limit is not None and len(prompt) + len(answered) > limit:
            raise UsageProblem(
                f"its prompt takes {len(prompt)} tokens and its answer {len(answered)}, "
                f"more than the model's {limit} positions"
            )
        return Prompted(tuple(prompt + answered), len(prompt))

    def answer_text(self, answer: str) -> str:
        """As it follows the prompt: a chat template ends with a line break, `Answer:` without a blank."""
        chat: Any = getattr(self._model.tokenizer, "chat_template", None)
        return answer.strip() if chat else f" {answer.strip()}"

    def passages(self, tasks: Sequence[Task]) -> list[tuple[int, ...]]:
        """The token ids that gradients of these tasks' own passages are taken of; nothing of a task that has none."""
        found: list[tuple[int, ...]] = []
        for task in tasks:
            with contextlib.suppress(UsageProblem):
                found += [self.passage(part.training_text) for own in self._own_parts(task) for part in own]
        return found

    def for_validation(self, tasks: Sequence[Task]) -> tuple[dict[str, list[Episode]], list[Skipped]]:
        """What the dev tasks are measured by, {name: episodes}, one question of each task in every kind; and the tasks
        that cannot be measured.

        prior: θ alone · own: the task's own passages · other: another task's · shown: its own, and in the prompt too
        """
        from regrad_cli.learn.meta import Episode

        usable, problems = [], []
        for task in tasks:
            asked = task.questions[0]
            try:
                blind = self.prompted(asked.question, asked.answers[0], ())
                shown = self.prompted(asked.question, asked.answers[0], task.training_texts)
                own = self._weighed(task.id, self._own_parts(task), task.embedding_texts, [asked.question], [blind])
                usable.append((task, own, blind, shown))
            except UsageProblem as problem:
                problems.append(Skipped(task.id, str(problem)))
        objective = self._rules.objective
        if objective != "regrad":
            asked_as = [(task, blind if objective == "direct" else shown) for task, _, blind, shown in usable]
            return {objective: [Episode(task.id, (), (prompt,)) for task, prompt in asked_as]}, problems
        kinds: dict[str, list[Episode]] = {
            "prior": [Episode(task.id, (), (blind,)) for task, _, blind, _ in usable],
            "own": [own for _, own, _, _ in usable],
            "other": [],
            "shown": [],
        }
        for place, (task, own, blind, shown) in enumerate(usable):
            strange = usable[(place + 1) % len(usable)][1]
            kinds["other"].append(Episode(task.id, strange.passages, (replace(blind, weights=_weights(strange)),)))
            kinds["shown"].append(Episode(task.id, own.passages, (replace(shown, weights=_weights(own)),)))
        return kinds, problems


def _weights(episode: Episode) -> tuple[float, ...]:
    return episode.questions[0].weights
