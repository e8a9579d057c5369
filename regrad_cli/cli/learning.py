"""The command that learns: meta-train. Parse, call the use case, render."""

from collections.abc import Sequence
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from regrad_cli.cli.call import Call, command
from regrad_cli.errors import EXIT_DONE, EXIT_PARTIAL
from regrad_cli.records import Progress
from regrad_cli.render import Terminal
from regrad_cli.trainevents import Trained, TrainStep, Validated


class Keep(StrEnum):
    """Which step's prior is the result."""

    best = "best"
    last = "last"


class Objective(StrEnum):
    """What is learned."""

    regrad = "regrad"
    direct = "direct"
    rag = "rag"


def meta_train(
    call: Call,
    tasks: Annotated[
        list[Path],
        typer.Argument(metavar="TASKS", help="JSON lines: passages and the questions that they answer."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="FILE", help="Where the prior goes.")] = Path(
        "prior.safetensors"
    ),
    dev: Annotated[
        list[Path] | None,
        typer.Option(
            "--dev",
            metavar="FILE",
            help="Tasks to choose the best by; repeatable. If not set, a twentieth of the titles is kept aside.",
        ),
    ] = None,
    init: Annotated[
        Path | None,
        typer.Option("--init", metavar="PRIOR", help="A prior of the same model to begin with; `shipped` for its own."),
    ] = None,
    objective: Annotated[
        Objective,
        typer.Option(
            "--objective",
            metavar="regrad|direct|rag",
            help="A prior, or a fine-tuned baseline that answers without or with the passages.",
        ),
    ] = Objective.regrad,
    steps: Annotated[int, typer.Option("--steps", metavar="N", min=1, help="Steps.")] = 1000,
    batch: Annotated[int, typer.Option("--batch", metavar="N", min=1, help="Tasks a step.")] = 4,
    learning_rate: Annotated[
        float, typer.Option("--lr", metavar="R", min=0, help="Learning rate of the prior at its height.")
    ] = 1e-3,
    step_rate: Annotated[
        float, typer.Option("--step-lr", metavar="R", min=0, help="Learning rate of the log step sizes.")
    ] = 1e-2,
    rank: Annotated[
        int | None,
        typer.Option("--rank", metavar="N", min=1, help="Rank of the adapted tensors; 8, or --init's, if not set."),
    ] = None,
    mix_context: Annotated[
        float,
        typer.Option("--mix-context", metavar="P", help="Share of tasks of which a question also sees the passages."),
    ] = 0.25,
    reading: Annotated[
        int,
        typer.Option(
            "--reading",
            metavar="N",
            help="Beside them N tasks a step with the passages in the prompt and no gradients.",
        ),
    ] = 0,
    strangers: Annotated[
        float,
        typer.Option("--strangers", metavar="P", help="Share of tasks with other tasks' passages among their own."),
    ] = 0.4,
    k: Annotated[int, typer.Option("-k", metavar="N", min=1, help="Passages of a task, then; and of an answer.")] = 3,
    segments: Annotated[
        int | None,
        typer.Option(
            "--segments",
            metavar="N",
            min=1,
            help="Cut a passage into at most N segments, each with a gradient; as the prior of --init, otherwise 1.",
        ),
    ] = None,
    segment_tokens: Annotated[
        int | None,
        typer.Option(
            "--segment-tokens",
            metavar="N",
            min=1,
            help="And into about as many as it has N tokens; as the prior of --init, otherwise 40.",
        ),
    ] = None,
    gradient_layers: Annotated[
        int | None,
        typer.Option(
            "--gradient-layers",
            metavar="N",
            min=1,
            help="Take gradients of the N uppermost layers alone: rows shrink with them. As --init's, otherwise half.",
        ),
    ] = None,
    normalized: Annotated[
        bool,
        typer.Option(
            "--normalized",
            help="Bring gradients to norm 1, tensor by tensor. Needs --init; goes on where --init has it.",
        ),
    ] = False,
    temperature: Annotated[
        float | None,
        typer.Option(
            "--temperature",
            metavar="T",
            help="Passages weigh softmax(score / T); as the prior of --init, otherwise 0.05.",
        ),
    ] = None,
    segment_temperature: Annotated[
        float | None,
        typer.Option(
            "--segment-temperature",
            metavar="T",
            help="A passage's weight is shared by softmax(fit / T); as the prior of --init, otherwise 0.3.",
        ),
    ] = None,
    questions: Annotated[
        int, typer.Option("--questions", metavar="N", min=1, help="The most questions of a task at a time.")
    ] = 4,
    first_order: Annotated[
        bool, typer.Option("--first-order", help="Leave out the second derivatives: a third of the time, less learned.")
    ] = False,
    through: Annotated[
        str | None,
        typer.Option(
            "--codec",
            metavar="none|CODEC",
            help="Learn through this codec, such as r2-int2; --init's own if not set, else none (exact gradients).",
        ),
    ] = None,
    validate_every: Annotated[
        int, typer.Option("--validate-every", metavar="N", min=1, help="Steps between validations.")
    ] = 100,
    keep: Annotated[
        Keep,
        typer.Option("--keep", metavar="best|last", help="Which step's prior FILE will be: the dev tasks' best."),
    ] = Keep.best,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="starter, a local folder, a GGUF file or a hub id.")
    ] = None,
    embedder: Annotated[
        str | None, typer.Option("--embedder", metavar="NAME", help="What finds the strangers; minilm if not set.")
    ] = None,
    seed: Annotated[int, typer.Option("--seed", metavar="N", help="Seed of the start and of every choice.")] = 0,
) -> int:
    """Learn a prior: one under which the gradient of a passage makes its questions answerable.

    Give the prior to `init --prior`, or to `ingest --stale --prior` for a bank that is there. Interrupted or killed,
    the same command again goes on to the same result. Beside FILE: FILE.metrics.jsonl, FILE.curve.html, and
    FILE.resume until it is done. A task that cannot be learned from is named and left out; the exit code is then 3.
    """
    options = {
        "model": call.value("model", model),
        "embedder": call.value("embedder", embedder),
        "device": call.value("device", call.device),
        "dtype": call.value("dtype", call.dtype),
    }
    from regrad_cli import metatrain

    events = metatrain.meta_train(
        metatrain.MetaTrainOptions(
            tasks=tuple(tasks),
            out=out,
            dev=tuple(dev or ()),
            init=init,
            objective=objective.value,
            steps=steps,
            batch=batch,
            learning_rate=learning_rate,
            step_rate=step_rate,
            rank=rank,
            mix_context=mix_context,
            reading=reading,
            strangers=strangers,
            k=k,
            gradient_layers=gradient_layers,
            normalized=normalized,
            segments=segments,
            segment_tokens=segment_tokens,
            temperature=temperature,
            segment_temperature=segment_temperature,
            questions=questions,
            first_order=first_order,
            codec=through,
            validate_every=validate_every,
            keep=keep.value,
            seed=seed,
            **options,
        )
    )
    call.resume = "run the same command again to go on"
    partial = False
    told: set[str] = set()  # names of tasks: one that is left out comes again and again
    with call.follow(events) as results:
        for event in results:
            if isinstance(event, TrainStep | Validated):
                _skipped(call.terminal, event.skipped, told)
            if isinstance(event, TrainStep):
                _step(call.terminal, event)
            elif isinstance(event, Validated):
                _validated(call.terminal, event)
            elif isinstance(event, Trained):
                _trained(call.terminal, event)
                partial = bool(event.skipped)
    return EXIT_PARTIAL if partial else EXIT_DONE


def _skipped(terminal: Terminal, skipped: Sequence[str], told: set[str]) -> None:
    for name, reason in (each.split(": ", 1) for each in skipped):
        if name not in told:
            told.add(name)
            terminal.skipped(name, reason)


def _step(terminal: Terminal, event: TrainStep) -> None:
    if terminal.json:
        terminal.record({"type": "step", **asdict(event)})
    loss = "" if event.loss is None else f"loss {event.loss:.3f}"
    terminal.progress(Progress("learning", event.step, event.steps, loss, event.left_s))


def _validated(terminal: Terminal, event: Validated) -> None:
    if terminal.json:
        terminal.record({"type": "validated", **asdict(event)})
    else:
        best = ", the best so far" if event.best else ""
        terminal.notice(f"after step {event.step}, answer loss on dev tasks: {_losses(event.losses)}{best}")


def _trained(terminal: Terminal, event: Trained) -> None:
    if not event.best_step:
        terminal.notice(
            "no step was better on the dev tasks than what it began with, so that is in the file; "
            "the same command with --keep last puts what was learned there"
        )
    if terminal.json:
        terminal.record({"type": "trained", **asdict(event)})
        return
    kept = f", of step {event.best_step}" if event.best_step != event.steps else ""
    terminal.text(
        f"{event.file}: learned from {event.tasks} tasks in {event.steps} steps{kept}, {event.elapsed_s:.0f} s"
    )
    if event.losses:
        terminal.text(f"answer loss on dev tasks: {_losses(event.losses)}")


def _losses(losses: dict[str, float]) -> str:
    return ", ".join(f"{name} {loss:.3f}" for name, loss in losses.items())


def register(app: typer.Typer) -> None:
    """Put `meta-train` into the application."""
    command(app, "meta-train", device=True, dtype=True, section="Learn and measure")(meta_train)
