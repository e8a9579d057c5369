"""The questions of an evaluation, and what each is answered from: its task's own passages, or those a bank finds.

Knows tasks, gradients and (through `answer`) a bank; generates and scores nothing.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Generator, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_cli.adaptation import Adaptation, Coded, Dense, Gradients
from regrad_cli.records import Notice, Progress, Skipped
from regrad_cli.segments import Segment, shared
from regrad_cli.settings import COMBINE_SUM
from regrad_cli.tasks import Task, TaskQuestion, read_tasks

if TYPE_CHECKING:
    from regrad_cli.answer import Answerer
    from regrad_cli.finding import Retrieved
    from regrad_cli.learn.codec import Codec
    from regrad_cli.learn.gradients import PassageGradients
    from regrad_cli.learn.model import Model
    from regrad_cli.learn.prior import Prior
    from regrad_cli.retrieval import MinScore
    from regrad_cli.weighing import Cutter

RECALL_AT = (1, 3, 10)
LEAST_OVERLAP = 20  # characters beside the answer that a hit shares with a task's passage, or all of either


@dataclass(frozen=True, eq=False, slots=True)
class Asked:
    """A question of a task, its place among all, and the file (by its name) that it came from."""

    number: int
    dataset: str
    task: Task
    question: TaskQuestion


@dataclass(frozen=True, eq=False)
class Evidence:
    """What an answer is given from; the same object for questions that share it.

    name    tells it from others, the same from run to run
    titles  of the passages, for people
    shown   the passages as they stand in a prompt
    adapt   question → the adaptation by their gradients; None where there are none
    found   the texts of a bank's hits, best first, at least ten where there are so many; None for a task's own passages
    combine what is made of their gradients, as `candidates` has it: a task's own passages are all right, and added up
    """

    name: str
    titles: tuple[str, ...]
    shown: tuple[str, ...]
    adapt: Callable[[str], Adaptation] | None
    found: tuple[str, ...] | None = None
    combine: str = COMBINE_SUM


def read_questions(files: Sequence[Path], limit: int | None) -> tuple[list[Asked], list[Skipped]]:
    """The questions of every file, and what was left out.

    limit   the most of one file: the first question of each task, then the second of each, until there are so many
    raises  UsageProblem where a file cannot be read or holds no task
    """
    asked: list[Asked] = []
    skipped: list[Skipped] = []
    seen: set[str] = set()
    stems = [file.stem for file in files]
    for file in files:
        name = file.stem if stems.count(file.stem) == 1 else str(file)
        tasks, wrong = read_tasks([file])
        skipped += wrong
        rounds: list[tuple[int, int]] = []
        for place, task in enumerate(tasks):
            if task.id in seen:
                skipped.append(Skipped(f"{file}: {task.id}", "another task has this id"))
                continue
            seen.add(task.id)
            rounds += [(turn, place) for turn in range(len(task.questions))]
        chosen = sorted((place, turn) for turn, place in sorted(rounds)[:limit])
        for place, turn in chosen:
            asked.append(Asked(len(asked), name, tasks[place], tasks[place].questions[turn]))
    return asked, skipped


def read_texts(files: Sequence[Path]) -> tuple[list[tuple[str, str]], list[Skipped]]:
    """(title, text) of every passage of these tasks files, as they stand there."""
    if not files:
        return [], []
    tasks, skipped = read_tasks(files)
    return [(task.title, text) for task in tasks for text in task.passages], skipped


def own_passages(task: Task) -> Evidence:
    """The task's own passages, without gradients."""
    return Evidence(task.id, (task.title or task.id,), task.training_texts, None)


class OwnGradients:
    """Gradients of the tasks' own passages, computed here and kept as a bank would keep them.

    codec     None keeps them whole, in fp32
    cutter    cuts and embeds passages; None where they stay whole
    unusable  {training text: why it has no gradient}
    """

    def __init__(self, model: Model, prior: Prior, codec: Codec | None, cutter: Cutter | None = None) -> None:
        self.model, self.prior, self.codec = model, prior, codec
        self.unusable: dict[str, str] = {}
        self._cutter = cutter
        self._kept: dict[str, Any] = {}

    def compute(self, tasks: Sequence[Task]) -> Iterator[Progress]:
        """Takes the gradient of each segment once."""
        from regrad_cli.learn.gradients import map_gradients

        parts = [part for task in tasks for own in self._segments(task) for part in own]
        if self._cutter is not None:
            self._cutter.vectors.add([part.embedding_text for part in parts])
        ids = {}
        for text in dict.fromkeys(part.training_text for part in parts):
            ids[text] = self.model.token_ids(text)
            limit = self.model.positions or len(ids[text])
            if not 2 <= len(ids[text]) <= limit:
                self.unusable[text] = f"a passage has {len(ids.pop(text))} tokens; the model takes 2 to {limit}"
        order = list(ids)
        yield Progress("gradients", 0, len(order))
        done = 0
        for part, kept in map_gradients(self.model, self.prior, list(ids.values()), self._keep):
            for row, position in enumerate(part.positions):
                if part.finite[row]:
                    self._kept[order[position]] = kept[row]
                else:
                    self.unusable[order[position]] = "the gradient of a passage is not finite"
            done += len(part.positions)
            yield Progress("gradients", done, len(order))

    def reason_against(self, task: Task) -> str | None:
        """Why one of its passages has no gradient; None where all have."""
        texts = (part.training_text for own in self._segments(task) for part in own)
        return next((self.unusable[text] for text in texts if text in self.unusable), None)

    def _segments(self, task: Task) -> list[tuple[Segment, ...]]:
        """Of each passage."""
        if self._cutter is None:
            return [(Segment(task.title, text),) for text in task.passages]
        return [self._cutter.segments(task.title, text) for text in task.passages]

    def _keep(self, part: PassageGradients) -> tuple[PassageGradients, list[Any]]:
        """One row a segment: (codes, scales) of the codec, or the tensors."""
        if self.codec is None:
            rows: list[Any] = [
                {name: tensor[row].clone() for name, tensor in part.tensors.items()}
                for row in range(len(part.positions))
            ]
        else:
            rows = list(zip(*self.codec.encode(part.tensors), strict=True))
        return replace(part, tensors={}), rows

    def evidence(self, task: Task) -> Evidence:
        """The task's own passages, all of them computed; their weights are those of equally good hits."""
        passages = self._segments(task)
        owners = [place for place, own in enumerate(passages) for _ in own]
        parts = [part for own in passages for part in own]

        def adapt(question: str) -> Adaptation:
            import numpy as np
            import torch

            weights = self.prior.weights_for([1.0] * len(passages))
            if self._cutter is not None:
                fits = [self._cutter.fits(question, own) for own in passages]
                weights = shared(weights, fits, self.prior.segment_temperature)
            rows = [self._kept[part.training_text] for part in parts]
            gradients: Gradients
            if self.codec is None:
                gradients = Dense({name: torch.stack([row[name] for row in rows]) for name in rows[0]})
            else:
                codes, scales = (np.stack(part) for part in zip(*rows, strict=True))
                gradients = Coded(self.codec, codes, scales, self.model.device)
            gamma = float(self.prior.card["gamma"])
            return Adaptation(self.prior, gradients, tuple(weights), gamma, tuple(owners))

        return replace(own_passages(task), adapt=adapt)


def found_evidence(
    answerer: Answerer, asked: Sequence[Asked], k: int | None, min_score: MinScore, combine: str
) -> Generator[Progress | Notice, None, dict[int, Evidence]]:
    """{question's number: what it finds in the bank}, by the retrieval of `ask`."""
    from regrad_cli.answer import AskOptions

    found: dict[int, Evidence] = {}
    for one in asked:
        question = one.question.question
        options = AskOptions(k=k, min_score=min_score)
        used = yield from answerer.retrieve(question, options)
        wide = yield from answerer.retrieve(question, AskOptions(k=max(RECALL_AT), min_score=None))
        hits = used.hits

        def adapt(asked: str, used: Retrieved = used) -> Adaptation:
            return answerer.adaptation(asked, used, 1.0)

        found[one.number] = Evidence(
            name=" ".join(hit.passage.id for hit in hits),
            titles=tuple(hit.passage.title or hit.passage.source for hit in hits),
            shown=tuple(hit.passage.training_text for hit in hits),
            adapt=adapt if hits else None,
            found=tuple(hit.passage.text or "" for hit in wide.hits),
            combine=combine,
        )
        yield Progress("retrieval", len(found), len(asked))
    return found


def recall(asked: Sequence[Asked], evidence: dict[int, Evidence]) -> dict[str, float]:
    """{"recall@k": the share of questions with a passage of their task among the first k hits}, k = 1, 3, 10.

    A hit is such a passage where it holds one's whole text (space aside), or where both cover the stretch of a document
    that holds an answer: a bank cuts documents by its own rule.
    """
    first = []
    for one in asked:
        fits = (place for place, text in enumerate(evidence[one.number].found or ()) if _is_gold(text, one))
        first.append(next(fits, max(RECALL_AT)))
    return {f"recall@{k}": sum(place < k for place in first) / len(first) for k in RECALL_AT}


def _is_gold(text: str, asked: Asked) -> bool:
    hit = _spaced(text)
    for passage in asked.task.passages:
        own = _spaced(passage)
        if own in hit:
            return True
        for answer in map(_spaced, asked.question.answers):
            shifts = {a - b for a in _places(own, answer) for b in _places(hit, answer)}
            if any(_overlap(own, hit, shift, len(answer)) for shift in shifts):
                return True
    return False


def _overlap(own: str, hit: str, shift: int, answer: int) -> bool:
    """Whether two texts, one `shift` characters on in the other, are the same wherever both are, beyond the answer."""
    begin, end = max(0, shift), min(len(own), len(hit) + shift)
    whole = end - begin == min(len(own), len(hit))
    return (whole or end - begin >= answer + LEAST_OVERLAP) and own[begin:end] == hit[begin - shift : end - shift]


def _places(text: str, part: str) -> list[int]:
    return [match.start() for match in re.finditer(f"(?={re.escape(part)})", text)]


def _spaced(text: str) -> str:
    return " ".join(text.split())


def derangement(groups: Sequence[frozenset[Any]], seed: int) -> list[int] | None:
    """For each group the place of another that shares nothing with it, each taken once; None where there is none.

    Found by a seeded cycle through all and by exchanges where neighbours share something: it may miss one that exists
    where nearly all groups share.
    """
    places = list(range(len(groups)))
    order = places.copy()
    random.Random(seed).shuffle(order)
    partner = dict(zip(order, [*order[1:], *order[:1]], strict=True))

    def clash(place: int, other: int) -> bool:
        return place == other or not groups[place].isdisjoint(groups[other])

    for place in order:
        if clash(place, partner[place]):
            for other in order:
                if not clash(place, partner[other]) and not clash(other, partner[place]):
                    partner[place], partner[other] = partner[other], partner[place]
                    break
            else:
                return None
    return [partner[place] for place in places]
