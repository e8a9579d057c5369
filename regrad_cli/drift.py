"""What adding documents does to a model: continued pretraining beside a bank of gradients.

The same passages in the same order, the questions' own first, and after each step the same questions: how far have the
base weights moved, how does the model read a fixed text, and what does it still answer? The bank is a real one, filled
by `ingest` in a temporary folder and asked through the retrieval of `ask`. Yields events; prints nothing.
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Generator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_cli import ingest
from regrad_cli.answer import Answerer
from regrad_cli.errors import UsageProblem
from regrad_cli.evidence import Asked, found_evidence, recall
from regrad_cli.records import Notice, Progress, Skipped, training_text
from regrad_cli.results import DriftPoint, Scored
from regrad_cli.trials import Way, answers, summary

if TYPE_CHECKING:
    from regrad_cli.learn.model import Model
    from regrad_cli.learn.prior import Prior
    from regrad_cli.retrieval import MinScore

Event = Notice | Progress | Skipped | Scored
BATCH = 8  # passages in a step of continued pretraining
REPORT_EVERY = 4 * BATCH  # passages between two events of progress; a multiple, so that no batch is cut short for it


@dataclass(frozen=True)
class Growth:
    """What a measurement starts from.

    model_folder   where the model lies, for the bank's own use
    prior          θ, of the bank's gradients
    fresh          a LoRA that nothing has been trained into, where continued pretraining starts
    passages       (title, text) without repetition, the questions' own first
    sizes          numbers of passages at which is measured, ascending
    embedder, codec, device, dtype, k, search, min_score, combine, max_tokens, seed, cpt_rate as in EvaluateOptions
    """

    model: Model
    model_folder: Path
    prior: Prior
    fresh: Prior
    asked: tuple[Asked, ...]
    passages: tuple[tuple[str, str], ...]
    sizes: tuple[int, ...]
    embedder: str
    codec: str
    device: str
    dtype: str
    k: int | None
    search: str
    min_score: MinScore
    combine: str
    max_tokens: int
    seed: int
    cpt_rate: float

    def checked(self) -> Growth:
        """With those questions alone whose passages are all among the first of the smallest size.

        raises  UsageProblem where there are fewer passages than asked for, or no such question
        """
        if self.sizes[-1] > len(self.passages):
            raise UsageProblem(
                f"drift over {self.sizes[-1]:,} passages needs as many, and there are {len(self.passages):,}",
                "add tasks files whose passages are to be added with --corpus FILE, or use a smaller --drift",
            )
        first = set(self.passages[: self.sizes[0]])
        kept = [one for one in self.asked if first.issuperset((one.task.title, text) for text in one.task.passages)]
        if not kept:
            raise UsageProblem(
                f"no question has all its passages among the first {self.sizes[0]}", "use a larger number with --drift"
            )
        return replace(self, asked=tuple(kept))


def measure(growth: Growth, found: list[DriftPoint]) -> Generator[Event, None, None]:
    """Both methods at every size; appends a point for each to `found`, and the untouched model's as the first."""
    yield from _point(growth, found, "direct", 0, Way("direct@0"), 0.0)
    yield from _continued_pretraining(growth, found)
    yield from _bank(growth, found)


def continued(growth: Growth, start: Prior, passages: Sequence[tuple[str, str]]) -> Generator[Progress, None, Prior]:
    """The LoRA after next-token training on these passages from `start`; Adam's memory starts afresh."""
    from regrad_cli.learn.cpt import continue_training

    limit = growth.model.positions
    texts = [growth.model.token_ids(training_text(title, text))[:limit] for title, text in passages]
    usable = [ids for ids in texts if len(ids) > 1]
    at = sorted({*range(0, len(usable), REPORT_EVERY), len(usable)})
    after = start
    run = continue_training(
        growth.model, start, usable, learning_rate=growth.cpt_rate, batch=BATCH, seed=growth.seed, at=at
    )
    for done, so_far in run:
        after = so_far
        yield Progress("continued pretraining", done, len(usable))
    return after


def _continued_pretraining(growth: Growth, found: list[DriftPoint]) -> Generator[Event, None, None]:
    from regrad_cli.learn.cpt import weight_distance

    current, before = growth.fresh, 0
    for size in growth.sizes:
        start = time.perf_counter()
        current = yield from continued(growth, current, growth.passages[before:size])
        seconds = time.perf_counter() - start
        distance = weight_distance(growth.model, growth.fresh, current)
        way = Way(f"cpt@{size}", lora=current)
        yield from _point(growth, found, "cpt", size, way, seconds, distance=distance)
        before = size


def _bank(growth: Growth, found: list[DriftPoint]) -> Generator[Event, None, None]:
    from regrad_cli.learn.controls import weights_hash

    unchanged = weights_hash(growth.model)
    with tempfile.TemporaryDirectory(prefix="regrad-eval-") as name:
        folder = Path(name)
        bank = folder / "bank"
        prior_file = folder / "prior.safetensors"
        prior_file.write_bytes(growth.prior.to_bytes())
        made = ingest.initialise(
            bank, model=str(growth.model_folder), prior=prior_file, embedder=growth.embedder, codec=growth.codec,
            chunk_tokens=_longest(growth), chunk_overlap=0, seed=growth.seed,
        )  # fmt: skip
        yield from (event for event in made if isinstance(event, Notice))
        before = 0
        for size in growth.sizes:
            start = time.perf_counter()
            yield from _add(growth, bank, folder / f"{size}.jsonl", growth.passages[before:size])
            seconds = time.perf_counter() - start
            options: dict[str, Any] = {"device": growth.device, "dtype": growth.dtype, "search": growth.search}
            with Answerer(bank, modes={"regrad"}, **options) as answerer:
                chosen = growth.k, growth.min_score, growth.combine
                evidence = yield from found_evidence(answerer, growth.asked, *chosen)
                way = Way(f"regrad@{size}", lora=growth.prior, source=lambda one, e=evidence: e[one.number])  # type: ignore[misc]
                yield from _point(growth, found, "regrad", size, way, seconds, recalled=recall(growth.asked, evidence))
            if weights_hash(growth.model) != unchanged:
                found[-1] = replace(found[-1], distance=float("nan"))  # a bug of ours: said in the result, not hidden
                yield Notice("the base weights are not what they were: please report this")
            before = size


def _add(growth: Growth, bank: Path, file: Path, passages: Sequence[tuple[str, str]]) -> Generator[Event, None, None]:
    lines = [json.dumps({"title": title, "text": text}) for title, text in passages]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    options = ingest.IngestOptions(paths=(file,), device=growth.device, dtype=growth.dtype)
    for event in ingest.ingest(bank, options):
        if isinstance(event, Notice | Progress | Skipped):
            yield event


def _point(
    growth: Growth,
    found: list[DriftPoint],
    method: str,
    size: int,
    way: Way,
    seconds: float,
    *,
    distance: float = 0.0,
    recalled: dict[str, float] | None = None,
) -> Generator[Event, None, None]:
    """Answers the questions and reads the fixed text, both with the model as it stands between questions."""
    from regrad_cli.learn.adapt import adapted
    from regrad_cli.learn.cpt import perplexity
    from regrad_cli.learn.steps import fixed_texts

    results: list[Scored] = []
    for scored in answers(growth.model, growth.asked, {}, way, growth.max_tokens):
        results.append(scored)
        yield scored
        yield Progress(f"answers after {size:,} passages, {method}", len(results), len(growth.asked))
    context: Any = adapted(growth.model, way.lora) if way.lora is not None and way.source is None else nullcontext()
    with context:
        reading = perplexity(growth.model, "\n\n".join(fixed_texts()))
    (score,) = summary(results, seed=growth.seed).modes.values()
    found.append(
        DriftPoint(method, size, distance, reading, score.em, score.f1, score.f1_low, score.f1_high, seconds, recalled)
    )
    yield Notice(f"{method} after {size:,} passages: F1 {score.f1:.1f}, perplexity {reading:.4g}")


def _longest(growth: Growth) -> int:
    """So many tokens that every passage stays whole where the model and a bank allow it."""
    counts = (len(growth.model.token_ids(training_text(title, text))) for title, text in growth.passages)
    return max(16, min(max(counts) + BATCH, growth.model.positions or 4096, 4096))
