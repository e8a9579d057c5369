"""Questions that wait together → their answers in order, generated as one batch, each with its own gradients. Yields
events; prints nothing.

The answers are those that each question gets alone; in bf16, where two tokens are nearly tied, a batch may take the
other one (learn/generate.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Any

from regrad_cli.errors import UsageProblem
from regrad_cli.finding import Retrieved
from regrad_cli.records import Answer, Notice, Refused

if TYPE_CHECKING:
    from regrad_cli.answer import Answerer, AskOptions, Prepared
    from regrad_cli.learn.model import Model


def ask_together(
    answerer: Answerer, questions: Sequence[str], options: AskOptions
) -> Iterator[Notice | Answer | Refused]:
    """An Answer or a Refused for each question, in order. What `seconds` tells of adapting and generating is each
    answer's share of its batch.

    raises  what `Answerer.ask` raises but for UsageProblem, once the questions before are answered
    """
    start = time.perf_counter()
    model = yield from answerer.load()
    load_s = time.perf_counter() - start
    results: list[Answer | Refused | None] = [None] * len(questions)
    asked: dict[int, Prepared] = {}
    failure: Exception | None = None
    begun = time.perf_counter()
    for place, question in enumerate(questions):
        try:
            found = Retrieved()
            if not question.strip():
                raise UsageProblem("the question is empty")
            if options.mode != "direct":
                found = yield from answerer.retrieve(question, options)
            asked[place] = answerer.prepared(model, question, options, found)
        except UsageProblem as refusal:
            results[place] = Refused(question, refusal.message)
        except Exception as error:
            failure = error
            break
    adapt_s = time.perf_counter() - begun - sum(one.found.seconds for one in asked.values())
    for untouched in (False, True):
        group = [place for place, one in asked.items() if (one.adaptation is None) is untouched]
        for place, text, tokens, seconds in _generated(model, asked, group, options.max_tokens):
            laps = {
                "load": load_s,
                "retrieve": asked[place].found.seconds,
                "adapt": adapt_s / len(asked),
                "generate": seconds,
                "restore": 0.0,
            }
            results[place] = answerer.told(asked[place], text, tokens, laps | {"total": sum(laps.values())})
            load_s = 0.0
    for result in results:
        if result is not None:
            yield result
    if failure is not None:
        raise failure


def _generated(
    model: Model, asked: dict[int, Prepared], group: Sequence[int], max_tokens: int
) -> Iterator[tuple[int, str, int, float]]:
    """(place, answer, its tokens, its share of the seconds) of each of a group that all have gradients, or none has."""
    from regrad_cli.learn.generate import adapted_rows, batches, greedy_batch

    for batch in batches(model, [len(asked[place].prompt) for place in group], max_tokens):
        chosen = [group[place] for place in batch]
        start = time.perf_counter()
        context: AbstractContextManager[Any] = nullcontext()
        adaptations = [one for place in chosen if (one := asked[place].adaptation) is not None]
        if adaptations:
            context = adapted_rows(model, adaptations[0].prior, [one.change() for one in adaptations])
        with context:
            rows = greedy_batch(model, [asked[place].prompt for place in chosen], max_tokens)
        seconds = (time.perf_counter() - start) / len(chosen)
        for place, ids in zip(chosen, rows, strict=True):
            yield place, model.tokenizer.decode(ids, skip_special_tokens=True), len(ids), seconds
