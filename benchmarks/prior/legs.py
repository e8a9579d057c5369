"""Legs of a long training: run to their end or stopped, printing how they go, and what is made of their priors."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks.prior.worlds import write_worlds
from regrad_cli.metatrain import MetaTrainOptions, meta_train
from regrad_cli.records import Notice
from regrad_cli.trainevents import Trained, TrainStep, Validated

if TYPE_CHECKING:
    from regrad_cli.learn.prior import Prior

Task = dict[str, Any]


def read(file: Path) -> list[Task]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def written(file: Path, tasks: Iterable[Task]) -> Path:
    lines = [json.dumps(task, ensure_ascii=False) + "\n" for task in tasks]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def worlds(file: Path, *, seed: int, tasks: int) -> Path:
    if not file.exists():
        write_worlds(file, seed=seed, tasks=tasks)
    return file


def learn(options: MetaTrainOptions) -> Iterator[Trained]:
    """Runs it, printing how it goes; yields its end, or nothing where it has been done before."""
    if options.out.exists() and not options.out.with_name(options.out.name + ".resume").exists():
        return
    for event in meta_train(options):
        match event:
            case TrainStep(step=step, loss=loss) if step % 20 == 0:
                print(
                    f"{options.out.stem} {step}/{options.steps} loss {loss} left {event.left_s / 60:.0f} min",
                    flush=True,
                )
            case Validated(step=step, losses=losses):
                print(f"{options.out.stem} {step}: {losses}", flush=True)
            case Notice(message=message):
                print(message, flush=True)
            case Trained():
                yield event


def learned(file: Path) -> Prior:
    from regrad_cli.learn.prior import Prior

    return Prior.from_bytes(file.read_bytes())


def stopped(options: MetaTrainOptions, begun: Prior, step: int) -> Prior:
    """What a run that begins with this prior has learned after so many of its steps."""
    from regrad_cli.learn.optimise import Training

    with closing(meta_train(options)) as events:  # which keeps what was learned, as Ctrl-C does
        for event in events:
            if isinstance(event, TrainStep) and event.step >= step:
                break
    training = Training(begun, steps=options.steps, learning_rate=0.0, step_rate=0.0)
    training.restore(options.out.with_name(options.out.name + ".resume").read_bytes())
    return replace(begun, tensors=training.theta, log_step_sizes=training.log_steps)


def mean(first: Prior, *others: Prior) -> Prior:
    """The mean of priors' θ, with the first one's card, and gradients of what the first has them of. Of log α it is the
    mean of those whose steps are of the first one's kind: a length, or not."""
    every = (first, *others)
    alike = [prior for prior in every if prior.normalized == first.normalized]
    logs = {name: sum(prior.log_step_sizes[name] for prior in alike) / len(alike) for name in first.log_step_sizes}
    tensors = {name: sum(prior.tensors[name] for prior in every) / len(every) for name in first.tensors}
    return replace(first, tensors=tensors, log_step_sizes=logs)


def begun_normalized(prior: Prior, tasks: Sequence[Task], work: Path) -> Prior:
    """The prior for gradients of norm 1, its steps as long as they are on average for these tasks' passages."""
    from regrad_cli.embed import load_embedder
    from regrad_cli.episodes import EpisodeRules, Episodes
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.steps import with_normalized_gradients
    from regrad_cli.learn.tokens import Tokenizer
    from regrad_cli.models import resolve_embedder, resolve_model
    from regrad_cli.tasks import read_tasks
    from regrad_cli.weighing import Vectors

    folder = resolve_model("starter").path
    model = load_model(folder, device="cpu")
    rules = EpisodeRules(segments=prior.segments, segment_tokens=prior.segment_tokens)
    vectors = Vectors(load_embedder(resolve_embedder("minilm").path, device="cpu").encode)
    some = read_tasks([written(work / "normalized-by.jsonl", tasks)])[0]
    spans = Tokenizer(folder).spans
    episodes = Episodes(model, some, rules, prior.weights_for, seed=0, token_spans=spans, vectors=vectors)
    return with_normalized_gradients(model, prior, episodes.passages(some))


def validated(prior: Prior, options: MetaTrainOptions) -> dict[str, float]:
    """The losses of a prior on the dev tasks: the first thing that a run of these options from it tells."""
    begun = options.out.with_name("validated.safetensors")
    begun.write_bytes(prior.to_bytes())
    with closing(meta_train(replace(options, init=begun, out=begun.with_stem("validated-on")))) as events:
        return dict(next(event.losses for event in events if isinstance(event, Validated)))


def metrics_file(out: Path) -> Path:
    return out.with_name(out.name + ".metrics.jsonl")
