"""The commands as one application: groups, the options before a command's name, and what ends the process."""

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from regrad_cli import __version__
from regrad_cli.cli import adapter, ask, bank, learning, machine, measure, mending, packing, upkeep, work
from regrad_cli.cli.call import (
    EXIT_CLOSED_PIPE,
    Bank,
    Debug,
    Json,
    Quiet,
    State,
    apply_flags,
    interrupted,
)
from regrad_cli.cli.help import COMMON, Group
from regrad_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USAGE, RegradError, UsageProblem
from regrad_cli.render import Terminal

# Typer brings its own copy of click in new versions and uses click's in old ones; both derive these from one another.
_Usage: Any = typer.BadParameter.__bases__[0]
_CommandLineProblem: Any = _Usage.__bases__[0]

CONTEXT = {"help_option_names": ["-h", "--help"], "max_content_width": 100}

app = typer.Typer(
    cls=Group,
    context_settings=CONTEXT,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    invoke_without_command=True,
)


@app.callback()
def root(
    ctx: typer.Context,
    version: Annotated[bool, typer.Option("--version", help="Print the version.", rich_help_panel=COMMON)] = False,
    bank: Bank = None,
    json: Json = False,
    quiet: Quiet = False,
    debug: Debug = False,
) -> None:
    """Answers questions from your documents through gradients: each passage becomes one small gradient of a language
    model, kept in a bank; a question finds the passages that fit, and their gradients change the model's weights for
    this one answer.

    A start: regrad init, regrad ingest FOLDER, regrad ask "QUESTION".
    """
    state: State = ctx.obj
    apply_flags(state.terminal, json, quiet, debug)
    state.bank = bank
    if version:
        terminal = state.terminal
        terminal.document({"version": __version__}) if terminal.json else terminal.text(f"regrad {__version__}")
        raise typer.Exit()
    needs_command(ctx)


def needs_command(ctx: typer.Context) -> None:
    """A group called without a command shows its help and is a usage error."""
    state: State = ctx.obj
    if ctx.invoked_subcommand is not None:
        return
    state.code = EXIT_USAGE
    if state.terminal.json:
        state.terminal.error(UsageProblem("no command was given", f"see `{ctx.command_path} --help`"))
    else:
        state.terminal.help(ctx.get_help())


def group_options(
    ctx: typer.Context, bank: Bank = None, json: Json = False, quiet: Quiet = False, debug: Debug = False
) -> None:
    """The common options, where they stand between a group's name and the command's."""
    state: State = ctx.obj
    apply_flags(state.terminal, json, quiet, debug)
    state.bank = bank if bank is not None else state.bank
    needs_command(ctx)


def _add_group(name: str, group: typer.Typer, help: str, section: str) -> None:
    group.callback(invoke_without_command=True)(group_options)
    app.add_typer(group, name=name, cls=Group, help=help, rich_help_panel=section, context_settings=CONTEXT)


work.register(app)
ask.register(app)
adapter.register(app)
learning.register(app)
measure.register(app)
upkeep.register(app)
mending.register(bank.group)
packing.register(bank.group)
_add_group(
    "bank", bank.group, "Look after a bank: stats, ls, show, rm, log, verify, repair, pack, unpack.", "Look after it"
)
_add_group("model", machine.models, "Fetch models, and list what is there.", "This machine")
_add_group("config", machine.settings, "Show which settings are in force, and where each came from.", "This machine")
machine.register(app)


def run(arguments: Sequence[str], terminal: Terminal | None = None) -> int:
    """Run one command line and return its exit code. Everything printed goes through `terminal`."""
    terminal = terminal or Terminal.of_process()
    words = list(arguments)
    options = words[: words.index("--")] if "--" in words else words
    terminal.json = "--json" in options  # known before parsing, so that a wrong command line is JSON too
    terminal.debug = "--debug" in options
    state = State(terminal)
    try:
        code = _run(words, state)
        terminal.close()
        return code
    except BrokenPipeError:
        terminal.abandon_output()
        return EXIT_CLOSED_PIPE
    except KeyboardInterrupt:
        return interrupted(terminal)
    except OSError as error:  # what was to be printed could not be: a full disk behind stdout, say
        terminal.abandon_output()
        return state.code or terminal.error(error)


def _run(words: list[str], state: State) -> int:
    try:
        result = app(args=words, prog_name="regrad", standalone_mode=False, obj=state)
    except _CommandLineProblem as problem:
        ctx = getattr(problem, "ctx", None)
        path = ctx.command_path if ctx is not None else "regrad"
        message = problem.format_message().replace("\n\t", " ").replace("Value error, ", "").rstrip(".")
        return state.terminal.error(UsageProblem(message, f"see `{path} --help`"))
    except (typer.Abort, KeyboardInterrupt):
        return interrupted(state.terminal)
    except RegradError as error:
        return state.terminal.error(error)
    if state.code != EXIT_DONE:
        return state.code
    if result == EXIT_INTERRUPTED:  # Ctrl-C outside of a command, which Typer turned into this
        return interrupted(state.terminal)
    return result if isinstance(result, int) else EXIT_DONE
