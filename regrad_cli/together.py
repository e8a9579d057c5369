"""Questions that wait together → their answers in order, generated as one batch, each with its own gradients. Yields
events; prints nothing.

The answers are those that each question gets alone; in bf16, where two tokens are nearly tied, a batch may take the
other one (learn/generate.py).
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from regrad_cli.candidates import answered
from regrad_cli.errors import UsageProblem
from regrad_cli.finding import Retrieved
from regrad_cli.records import Answer, Notice, Refused

if TYPE_CHECKING:
    from regrad_cli.answer import Answerer, AskOptions, Prepared


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
    places = list(asked)
    for number, given in answered(model, [asked[place].candidates for place in places], options.max_tokens):
        one = asked[places[number]]
        laps = {
            "load": load_s,
            "retrieve": one.found.seconds,
            "adapt": adapt_s / len(asked),
            "generate": given.seconds,
            "restore": 0.0,
        }
        text = model.tokenizer.decode(given.ids, skip_special_tokens=True)
        laps |= {"total": sum(laps.values())}
        results[places[number]] = answerer.told(one, given.candidate, text, len(given.ids), laps)
        load_s = 0.0
    for result in results:
        if result is not None:
            yield result
    if failure is not None:
        raise failure
