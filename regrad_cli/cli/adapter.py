"""The command that gives a question's adapted weights to other programs: export. Parse, call the use case, render."""

from pathlib import Path
from typing import Annotated

import typer

from regrad_cli.cli import answers
from regrad_cli.cli.call import Call, SkipDamaged, Snapshot, command
from regrad_cli.cli.work import SECTION, Combine, Gamma, K, MinScore, Search
from regrad_cli.errors import EXIT_DONE, UsageProblem
from regrad_cli.records import Exported
from regrad_cli.settings import DTYPES


def export(
    call: Call,
    text: Annotated[str, typer.Argument(metavar="TEXT", help="The question.")],
    out: Annotated[Path, typer.Option("--out", metavar="FOLDER", help="The folder to write.")],
    k: K = None,
    gamma: Gamma = None,
    search: Search = None,
    min_score: MinScore = None,
    combine: Combine = None,
    model: Annotated[str | None, typer.Option("--model", metavar="NAME", help="Where the bank's model lies.")] = None,
    snapshot: Snapshot = None,
    skip_damaged: SkipDamaged = False,
    force: Annotated[bool, typer.Option("--force", help="Replace an adapter that is there.")] = False,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            metavar="|".join(DTYPES),
            help="Number format of the adapter; auto is fp32, which loses nothing.",
            autocompletion=lambda: list(DTYPES),
        ),
    ] = None,
) -> int:
    # --dtype is declared here for its help alone: like every command's, its value comes with the call.
    """Write the adapted weights for a question as a PEFT LoRA adapter.

    PEFT and vLLM load the folder onto the bank's model, which then answers this question as `ask` does in mode regrad,
    given the prompt that is printed. The adapter tells about the passages it was made of.
    """
    if not text.strip() or text == "-":
        raise UsageProblem("export takes one question", 'name it: regrad export "What is …?" --out FOLDER')
    flags = {"k": k, "gamma": gamma, "min_score": min_score, "combine": combine}
    settings = {name: call.value(name, flag) for name, flag in flags.items()}
    device, dtype = call.value("device", call.device), call.value("dtype", call.dtype)
    bank = call.bank_path()
    from regrad_cli import export as use_case
    from regrad_cli.answer import AskOptions

    events = use_case.export(
        bank,
        text,
        out,
        AskOptions(mode="regrad", **settings),
        force=force,
        device=device,
        dtype=dtype,
        snapshot=snapshot,
        skip_damaged=skip_damaged,
        model=model,
        search=call.value("search", search),
    )
    with call.follow(events) as results:
        for event in results:
            if isinstance(event, Exported):
                answers.exported(call.terminal, event)
    return EXIT_DONE


def register(app: typer.Typer) -> None:
    """Put the command into the application."""
    command(app, "export", bank=True, device=True, dtype=True, section=SECTION)(export)
