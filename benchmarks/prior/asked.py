"""Further questions to passages: a writer asks for a span of the passage, a reader keeps what it answers with it.

The writer is the starter fine-tuned (`meta-train --objective rag`) on the train tasks turned round: given the passage
and the answer, what was asked? The reader is a prior that is there already, with the passage in its prompt.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.prior import cloze
from regrad_cli.learn.prompt import question_text

if TYPE_CHECKING:
    import torch

    from regrad_cli.learn.model import Model
    from regrad_cli.learn.prior import Prior

Task = dict[str, Any]
SEARCHED = 'Passage asked about as in a search engine. The answer is "{answer}". What was typed?'  # as in NQ
EXAMINED = 'Ask a question about this passage whose answer is "{answer}".'  # as in XQuAD
TASKS = 16  # at a time
SPANS = 5  # asked for, a passage
TOKENS = 30
TEMPERATURE = 0.6
LOSS = 0.7  # nats a token of the answer: above it the reader does not believe the question
_NOUNS = re.compile(
    r"\b(?:an?|the|its|his|her|their) ((?:[a-z-]{3,} ){1,2}[a-z]{3,})"
    r"(?=[,.;]| (?:in|of|by|for|and|that|which|with|to|at|on|from)\b)"
)


def turned_round(tasks: Iterable[Task], asked_as: str) -> Iterator[Task]:
    """What the writer learns from: its question names the answer, its answer is the question."""
    for task in tasks:
        questions = [
            {
                "question": asked_as.format(answer=min(question["answers"], key=len)),
                "answers": [question["question"]],
            }
            for question in task["questions"]
        ]
        yield {**task, "id": f"{task['id']}-ask", "questions": questions}


def spans(text: str, rng: Random) -> list[str]:
    """What can be asked for: dates, numbers, names and quoted words that stand once, and one group of nouns."""
    facts, nouns = [], []
    for sentence in cloze.sentences(text):
        found = [(start, words) for _, start, words in cloze.facts(sentence)]
        facts += [words for _, words in found if len(words.split()) <= 6]
        taken = [(start, start + len(words)) for start, words in found]
        groups = [match for match in _NOUNS.finditer(sentence) if not _overlap(match.span(), taken)]
        if groups:
            nouns.append(rng.choice(groups)[1])
    rng.shuffle(facts)
    rng.shuffle(nouns)
    kept: list[str] = []
    for span in facts:
        if _fresh(span, kept, text):
            kept.append(span)
    more = next((span for span in nouns if _fresh(span, kept, text)), None)
    return kept[:SPANS] if more is None else [*kept[: SPANS - 1], more]


def _overlap(span: tuple[int, int], others: Iterable[tuple[int, int]]) -> bool:
    return any(span[0] < end and start < span[1] for start, end in others)


def _fresh(span: str, kept: Iterable[str], text: str) -> bool:
    low = span.lower()
    once = len(re.findall(rf"(?<!\w){re.escape(span)}(?!\w)", text)) == 1
    return once and not any(low in other.lower() or other.lower() in low for other in kept)


def merged(model: Model, prior: Prior) -> Model:
    """The model with θ added to its weights, for good."""
    import torch

    with torch.no_grad():
        for projection in model.projections:
            change = prior.scale * (prior.tensors[projection.name_b] @ prior.tensors[projection.name_a])
            weight = projection.module.get_parameter("weight")
            weight += change.to(weight)
    return model


class Wanted(NamedTuple):
    """One question to be written: for which passage of a batch, for what answer, how."""

    passage: int
    answer: str
    asked_as: str


@dataclass
class Asker:
    """writer, reader: the starter with what each has learned in its weights (`merged`)"""

    writer: Model
    reader: Model
    seed: int = 0

    def __call__(self, tasks: Sequence[Task]) -> Iterator[Task]:
        """Each passage with the questions that were kept; ids with "-asked". One for which none was is left out."""
        rng = Random(self.seed)
        order = sorted(tasks, key=lambda task: len(task["passages"][0]))
        for start in range(0, len(order), TASKS):
            batch = order[start : start + TASKS]
            wanted = [
                Wanted(place, answer, SEARCHED if rng.random() < 0.4 else EXAMINED)
                for place, task in enumerate(batch)
                for answer in spans(task["passages"][0], rng)
            ]
            if not wanted:
                continue
            questions = self._written(batch, wanted, start)
            losses = self._answered(batch, wanted, questions)
            for place, task in enumerate(batch):
                own = [i for i, one in enumerate(wanted) if one.passage == place and losses[i] < LOSS]
                kept: dict[str, Task] = {}
                for i in sorted(own, key=lambda i: losses[i]):
                    if _asks(questions[i], wanted[i].answer):
                        key = questions[i].lower().strip(" ?")
                        kept.setdefault(key, {"question": questions[i], "answers": [wanted[i].answer]})
                if kept:
                    yield {**task, "id": f"{task['id']}-asked", "questions": list(kept.values())}

    def _written(self, tasks: Sequence[Task], wanted: Sequence[Wanted], place: int) -> list[str]:
        import torch

        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + place)
        ends = set(self.writer.end_ids)
        context = _Context(self.writer, [_prompt(self.writer, task)[0] for task in tasks]).of(
            [one.passage for one in wanted]
        )
        behind = _prompt(self.writer, tasks[0])[1]
        asked = [
            self.writer.token_ids(question_text(one.asked_as.format(answer=one.answer)) + behind) for one in wanted
        ]
        outputs = context.read(asked)[:, -1]
        written: list[list[int]] = [[] for _ in wanted]
        going = list(range(len(wanted)))
        for _ in range(TOKENS):
            chances = torch.softmax(self.writer.network.get_output_embeddings()(outputs).float() / TEMPERATURE, dim=-1)
            tokens = torch.multinomial(chances, 1, generator=generator)[:, 0].tolist()
            kept = [at for at, token in enumerate(tokens) if token not in ends]
            if not kept:
                break
            for at in kept:
                written[going[at]].append(tokens[at])
            context, going = context.of(kept), [going[at] for at in kept]
            outputs = context.read([[tokens[at]] for at in kept])[:, -1]
        return [self.writer.tokenizer.decode(ids).strip() for ids in written]

    def _answered(self, tasks: Sequence[Task], wanted: Sequence[Wanted], questions: Sequence[str]) -> list[float]:
        """The reader's loss of each wanted answer to what was written."""
        import torch
        import torch.nn.functional as F

        context = _Context(self.reader, [_prompt(self.reader, task)[0] for task in tasks])
        behind = _prompt(self.reader, tasks[0])[1]
        answers = [self.reader.token_ids(one.answer) + self.reader.end_ids[:1] for one in wanted]
        rows = [
            self.reader.token_ids(question_text(question) + behind) + answer
            for question, answer in zip(questions, answers, strict=True)
        ]
        outputs = context.of([one.passage for one in wanted]).read(rows)
        head = self.reader.network.get_output_embeddings()
        return [
            float(F.cross_entropy(head(outputs[row, -len(answer) - 1 : -1]).float(), torch.tensor(answer)))
            for row, answer in enumerate(answers)
        ]


def _asks(question: str, answer: str) -> bool:
    """Whether it can be a question, and does not give its answer away."""
    given = re.search(rf"(?<!\w){re.escape(answer.lower())}(?!\w)", question.lower())
    return len(question.split()) >= 3 and not given and "passage" not in question.lower()


def _prompt(model: Model, task: Task) -> tuple[list[int], str]:
    """The prompt's tokens up to the end of the passage, and its text from the end of the question on."""
    turns = [{"role": "user", "content": "@@"}]
    before, behind = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False).split("@@")
    return model.token_ids(f"{before}{task['title']}\n{task['passages'][0]}\n\n"), behind


class _Context:
    """What a model has read, B rows of any lengths, padded on the left; from here on it reads more."""

    def __init__(self, model: Model, rows: Sequence[Sequence[int]]) -> None:
        import torch
        from transformers.cache_utils import DynamicCache

        self._model = model
        self._cache: Any = DynamicCache()
        self._mask = torch.zeros((len(rows), 0), dtype=torch.long)
        self.read(rows)

    def of(self, rows: Sequence[int]) -> _Context:
        """These rows, each as often as it is named; this object is no more to be used."""
        import torch

        chosen = torch.tensor(rows)
        self._cache.batch_select_indices(chosen)
        self._mask = self._mask[chosen]
        return self

    def read(self, rows: Sequence[Sequence[int]]) -> torch.Tensor:
        """The last hidden states (B, L, H) of more tokens."""
        import torch

        width = max(map(len, rows))
        ids = torch.zeros((len(rows), width), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, tokens in enumerate(rows):
            ids[row, width - len(tokens) :] = torch.tensor(tokens)
            mask[row, width - len(tokens) :] = 1
        self._mask = torch.cat([self._mask, mask], dim=1)
        positions = (self._mask.cumsum(dim=1) - 1).clamp(min=0)[:, -width:]
        with torch.inference_mode():
            return self._model.network.base_model(
                input_ids=ids,
                attention_mask=self._mask,
                position_ids=positions,
                past_key_values=self._cache,
                use_cache=True,
            ).last_hidden_state
