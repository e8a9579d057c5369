"""Tasks → episodes of training: which questions, which strangers, with or without passages shown. Knows no gradient.

Every choice follows from the seed, the step and the place in it, so a run that goes on chooses what it would have.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any

from regrad_cli.errors import UsageProblem
from regrad_cli.records import Skipped, training_text
from regrad_cli.tasks import Task

if TYPE_CHECKING:
    import numpy as np

    from regrad_cli.learn.meta import Episode, Prompted
    from regrad_cli.learn.model import Model

OBJECTIVES = ("regrad", "direct", "rag")
LEAST_WEIGHT = 0.03  # a stranger's gradient with less changes nothing, and would cost as much as any
WeightsFor = Callable[[Sequence[float]], list[float]]


@dataclass(frozen=True, slots=True)
class EpisodeRules:
    """How a task becomes an episode.

    objective       "regrad" (gradients of its passages), "direct" (nothing but the question), "rag" (passages shown)
    mix_context     share of episodes in which one question also sees the passages
    strangers       share of episodes in which other tasks' passages, the nearest to the question, are in the sum
    k               passages in the sum, then
    questions       at most so many of a task's in one episode
    passage_tokens  a longer passage is cut, as ingest would cut it
    """

    objective: str = "regrad"
    mix_context: float = 0.25
    strangers: float = 0.4
    k: int = 3
    questions: int = 4
    passage_tokens: int = 512


class Nearest:
    """Which passages of all tasks lie nearest to a question.

    vectors     (n, d) unit vectors of all tasks' `embedding_texts`, in order; `encode` gives such for questions
    """

    def __init__(
        self, tasks: Sequence[Task], vectors: np.ndarray, encode: Callable[[Sequence[str]], np.ndarray]
    ) -> None:
        self._encode = encode
        self._places = [(place, i) for place, task in enumerate(tasks) for i in range(len(task.passages))]
        self._vectors = vectors

    def __call__(self, question: str, own: int, k: int) -> tuple[list[float], list[tuple[float, int, int]]]:
        """Scores of the own task's passages, and (score, task, passage) of the k nearest of other tasks."""
        import numpy as np

        # Not by a matrix product: its last bits, and with them the weights, would depend on the number of threads.
        scores = np.einsum("nd,d->n", self._vectors, self._encode([question])[0], dtype=np.float64)
        mine = [float(score) for score, (place, _) in zip(scores, self._places, strict=True) if place == own]
        others = []
        for position in (-scores).argsort(kind="stable"):
            place, passage = self._places[position]
            if place != own:
                others.append((float(scores[position]), place, passage))
            if len(others) >= k:
                break
        return mine, others


class Episodes:
    """The episodes of every step of a run, and those of validation."""

    def __init__(
        self,
        model: Model,
        tasks: Sequence[Task],
        rules: EpisodeRules,
        weights_for: WeightsFor,
        *,
        seed: int,
        nearest: Nearest | None = None,
    ) -> None:
        self._model = model
        self._tasks = tasks
        self._rules = rules
        self._weights_for = weights_for
        self._seed = seed
        self._nearest = nearest
        self._order: dict[int, list[int]] = {}

    def at(self, step: int, batch: int) -> list[Episode | str]:
        """The episodes of one step; a task that cannot be one is its name and the reason instead."""
        found: list[Episode | str] = []
        for slot in range(batch):
            round_, place = divmod(step * batch + slot, len(self._tasks))
            number = self._in_round(round_)[place]
            draw = Random(f"{self._seed}/{step}/{slot}")
            try:
                found.append(self._drawn(number, draw))
            except UsageProblem as problem:
                found.append(f"{self._tasks[number].id}: {problem}")
        return found

    def _in_round(self, round_: int) -> list[int]:
        if round_ not in self._order:
            order = list(range(len(self._tasks)))
            Random(f"{self._seed}/{round_}").shuffle(order)
            self._order = {round_: order}
        return self._order[round_]

    def _drawn(self, number: int, draw: Random) -> Episode:
        from regrad_cli.learn.meta import Episode

        task, rules = self._tasks[number], self._rules
        questions = list(task.questions)
        draw.shuffle(questions)
        questions = questions[: rules.questions]
        texts = list(task.training_texts)
        scores = [0.0] * len(texts)
        if rules.k > len(texts) and draw.random() < rules.strangers and self._nearest is not None:
            scores, others = self._nearest(questions[0].question, number, rules.k - len(texts))
            for score, other, passage in others:
                texts.append(training_text(self._tasks[other].title, self._tasks[other].passages[passage]))
                scores.append(score)
        shown = [False] * len(questions)
        if rules.objective == "rag":
            shown = [True] * len(questions)
        elif rules.objective == "regrad" and draw.random() < rules.mix_context:
            shown[0] = True
        in_prompt = list(texts)
        draw.shuffle(in_prompt)
        prompted = tuple(
            self.prompted(question.question, question.answers[0], in_prompt if show else ())
            for question, show in zip(questions, shown, strict=True)
        )
        if rules.objective != "regrad":
            return Episode(task.id, (), (), prompted)
        weights = self._weights_for(scores)
        least = min(LEAST_WEIGHT, max(weights))  # of very many passages each has less
        kept = [(text, weight) for text, weight in zip(texts, weights, strict=True) if weight >= least]
        return Episode(
            task.id, tuple(self.passage(text) for text, _ in kept), tuple(weight for _, weight in kept), prompted
        )

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
                usable.append((task, tuple(self.passage(text) for text in task.training_texts), blind, shown))
            except UsageProblem as problem:
                problems.append(Skipped(task.id, str(problem)))
        objective = self._rules.objective
        if objective != "regrad":
            asked_as = [(task, blind if objective == "direct" else shown) for task, _, blind, shown in usable]
            return {objective: [Episode(task.id, (), (), (prompt,)) for task, prompt in asked_as]}, problems
        kinds: dict[str, list[Episode]] = {
            "prior": [Episode(task.id, (), (), (blind,)) for task, _, blind, _ in usable],
            "own": [],
            "other": [],
            "shown": [],
        }
        for place, (task, passages, blind, shown) in enumerate(usable):
            weights = tuple(self._weights_for([0.0] * len(passages)))
            strange = usable[(place + 1) % len(usable)][1]
            other_weights = tuple(self._weights_for([0.0] * len(strange)))
            kinds["own"].append(Episode(task.id, passages, weights, (blind,)))
            kinds["other"].append(Episode(task.id, strange, other_weights, (blind,)))
            kinds["shown"].append(Episode(task.id, passages, weights, (shown,)))
        return kinds, problems
