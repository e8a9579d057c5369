"""The command that measures: eval. Parse, call the use case, render; writes the files that were asked for."""

import os
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from enum import StrEnum
from pathlib import Path
from typing import Annotated, TextIO

import typer

from regrad_cli.cli import figures
from regrad_cli.cli.call import Call, command
from regrad_cli.cli.work import Combine, K, MinScore, Search
from regrad_cli.errors import EXIT_DONE, EXIT_PARTIAL, StorageFailed, UsageProblem
from regrad_cli.results import Evaluated, Scored
from regrad_cli.shown import json_text


class Retrieval(StrEnum):
    """Where the passages of a question come from."""

    gold = "gold"
    bank = "bank"


def evaluate(
    call: Call,
    tasks: Annotated[
        list[Path],
        typer.Argument(metavar="TASKS", help="JSON lines: passages and the questions that they answer."),
    ],
    retrieval: Annotated[
        Retrieval | None,
        typer.Option(
            "--retrieval",
            metavar="gold|bank",
            help="Each task's own passages, or what the bank finds; bank if --bank is given, else gold.",
        ),
    ] = None,
    modes: Annotated[
        str | None,
        typer.Option(
            "--modes",
            metavar="A,B,…",
            help="Some of direct, rag, direct-tuned, rag-tuned, cpt, regrad, both, prior, other, random; "
            "if not set all but cpt, tuned ones where their --baseline is given.",
        ),
    ] = None,
    baseline: Annotated[
        list[Path] | None,
        typer.Option(
            "--baseline",
            metavar="FILE",
            help="A fine-tuned baseline, of meta-train --objective direct or rag; repeatable.",
        ),
    ] = None,
    prior: Annotated[
        Path | None, typer.Option("--prior", metavar="FILE", help="The prior; the bank's or the model's if not set.")
    ] = None,
    model: Annotated[
        str | None, typer.Option("--model", metavar="NAME", help="The model; with a bank, where its model lies.")
    ] = None,
    codec: Annotated[
        str | None,
        typer.Option(
            "--codec",
            metavar="none|CODEC",
            help="What gradients go through without a bank: r1-int4, int8 …, none (fp32); the prior's own if not set.",
        ),
    ] = None,
    limit: Annotated[
        int | None,
        typer.Option("--limit", metavar="N", min=1, help="The most questions of each file, spread over its tasks."),
    ] = None,
    k: K = None,
    search: Search = None,
    min_score: MinScore = None,
    combine: Combine = None,
    max_tokens: Annotated[
        int, typer.Option("--max-tokens", metavar="N", min=1, help="Longest answer, in tokens.")
    ] = 32,
    seed: Annotated[
        int, typer.Option("--seed", metavar="N", help="Seed of intervals, of noise, of who is paired with whom.")
    ] = 0,
    report: Annotated[
        Path | None, typer.Option("--report", metavar="FILE", help="Write a page with tables, plots and all answers.")
    ] = None,
    answers: Annotated[
        Path | None,
        typer.Option("--answers", metavar="FILE", help="Write every answer as a JSON line as soon as it is there."),
    ] = None,
    drift: Annotated[
        str | None,
        typer.Option(
            "--drift",
            metavar="N1,N2,…",
            help="Measure also what adding N passages does to the model, in a bank and by continued pretraining.",
        ),
    ] = None,
    corpus: Annotated[
        list[Path] | None,
        typer.Option(
            "--corpus",
            metavar="FILE",
            help="More tasks whose passages are added, in cpt and --drift; repeatable.",
        ),
    ] = None,
    embedder: Annotated[
        str | None, typer.Option("--embedder", metavar="NAME", help="Embedder of the bank that --drift fills.")
    ] = None,
    cpt_rate: Annotated[
        float, typer.Option("--cpt-rate", metavar="R", min=0, help="Learning rate of continued pretraining.")
    ] = 1e-3,
) -> int:
    """Measure answers on tasks, in every mode and with controls that must lose: EM, F1, intervals, times.

    Answers are greedy, in batches, to the same prompt in every mode. direct is the untouched model, rag shows it the
    passages; tuned modes are fine-tuned baselines; cpt is trained on the passages' text first; regrad answers by their
    gradients, both by gradients and passages; prior is the prior without a gradient, other takes another task's,
    random noise as strong as the gradient (five seeds). Intervals are of 95 %, by a paired bootstrap over questions.
    """
    chosen = retrieval or (Retrieval.bank if call.bank_flag is not None else Retrieval.gold)
    if chosen is Retrieval.gold and call.bank_flag is not None:
        raise UsageProblem("gold retrieval uses no bank", "leave --bank out, or use --retrieval bank")
    if chosen is Retrieval.bank and codec is not None:
        raise UsageProblem("a bank's gradients have gone through its own codec", "leave --codec out")
    bank = call.bank_path() if chosen is Retrieval.bank else None
    flags = {"k": k, "search": search, "min_score": min_score, "combine": combine}
    if bank is None and drift is None:  # then settings of banks do not count, and flags are refused
        flags = {name: flag for name, flag in flags.items() if flag is not None}
    flags |= {"device": call.device, "dtype": call.dtype}
    settings = {name: call.value(name, flag) for name, flag in flags.items()}
    named_codec = call.value("codec", codec)
    named_prior = str(prior) if prior is not None else None if bank else call.value("prior")
    read = [*tasks, *(baseline or ()), *(corpus or ()), *([prior] if prior else [])]
    for file in (report, answers):
        _check_writable(file, read)
    from regrad_cli import evaluate as use_case

    options = use_case.EvaluateOptions(
        tasks=tuple(tasks),
        modes=None if modes is None else tuple(_listed(modes)),
        bank=bank,
        baselines=tuple(baseline or ()),
        prior=None if named_prior is None else Path(named_prior),
        model=model if bank else call.value("model", model),
        embedder=call.value("embedder", embedder),
        codec=None if named_codec == "none" else named_codec,
        limit=limit,
        max_tokens=max_tokens,
        seed=seed,
        corpus=tuple(corpus or ()),
        drift=_sizes(drift),
        cpt_rate=cpt_rate,
        **settings,
    )
    given: list[Scored] = []
    if answers is not None:
        call.resume = f"the answers so far are in {answers}"
    with ExitStack() as stack:
        lines: TextIO | None = None
        for event in stack.enter_context(call.follow(use_case.evaluate(options))):
            if isinstance(event, Scored):
                given.append(event)
                if answers is not None:  # opened late: what an earlier run left stays until there is something better
                    lines = lines or stack.enter_context(answers.open("w", encoding="utf-8"))
                    lines.write(json_text(asdict(event)) + "\n")
                    lines.flush()
            elif isinstance(event, Evaluated):
                figures.evaluated(call.terminal, event)
                result = event
    if report is not None:
        from regrad_cli.report import page

        try:
            report.write_text(page(result, given), encoding="utf-8")
        except OSError as error:
            raise StorageFailed(f"the report {report} could not be written: {error.strerror}") from None
        call.terminal.notice(f"the report is in {report}")
    return EXIT_PARTIAL if result.skipped else EXIT_DONE


def _listed(text: str) -> Iterator[str]:
    return (part.strip() for part in text.split(",") if part.strip())


def _sizes(text: str | None) -> tuple[int, ...]:
    """Numbers of passages, from `200,2000`."""
    sizes = []
    for part in _listed(text or ""):
        if not part.isdecimal() or int(part) < 1:
            raise UsageProblem(f"--drift: '{part}' is no number of passages", "write --drift 200,2000")
        sizes.append(int(part))
    if text is not None and not sizes:
        raise UsageProblem("--drift names no number of passages", "write --drift 200,2000")
    return tuple(sizes)


def _check_writable(file: Path | None, read: Sequence[Path]) -> None:
    """raises UsageProblem now rather than after an hour of work"""
    if file is None:
        return
    if any(file.resolve() == other.resolve() for other in read):
        raise UsageProblem(f"{file} is read from, so it is not written to", "name another file")
    if file.is_dir() or not file.parent.is_dir() or not os.access(file if file.exists() else file.parent, os.W_OK):
        raise UsageProblem(f"{file} cannot be written", "name a file in a folder that exists and is yours")


def register(app: typer.Typer) -> None:
    """Put `eval` into the application."""
    command(app, "eval", bank=True, device=True, dtype=True, section="Learn and measure")(evaluate)
