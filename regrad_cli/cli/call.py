"""One invocation: the options that commands share, the terminal, the settings in force. Knows no single command."""

import functools
import inspect
import os
import signal
from collections.abc import Callable, Generator, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from typing import Annotated, Any, cast

import typer

from regrad_cli.cli.help import COMMON, Command
from regrad_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_USAGE, Damaged, RegradError, is_panic
from regrad_cli.places import expanded
from regrad_cli.records import Notice, Progress, Skipped
from regrad_cli.render import Terminal
from regrad_cli.settings import DTYPES, Settings, read_config

EXIT_CLOSED_PIPE = 141  # as a shell reports SIGPIPE

Json = Annotated[bool, typer.Option("--json", help="Print JSON, also for errors.", rich_help_panel=COMMON)]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress, no notices.", rich_help_panel=COMMON)]
Debug = Annotated[bool, typer.Option("--debug", help="Show tracebacks of errors.", rich_help_panel=COMMON)]
Bank = Annotated[
    str | None,
    typer.Option(
        "--bank",
        metavar="PATH",
        help="The bank to use; otherwise REGRAD_BANK, or .gbank here or in a parent folder.",
        rich_help_panel=COMMON,
    ),
]
Device = Annotated[
    str | None,
    typer.Option(
        "--device",
        metavar="auto|cpu|cuda[:N]|mps",
        help="Where to compute; auto takes a CUDA GPU where there is one.",
        autocompletion=lambda: ["auto", "cpu", "cuda", "mps"],
    ),
]
Dtype = Annotated[
    str | None,
    typer.Option(
        "--dtype",
        metavar="|".join(DTYPES),
        help="Number format; auto takes bf16 where the hardware multiplies it faster, else fp32.",
        autocompletion=lambda: list(DTYPES),
    ),
]
Snapshot = Annotated[
    int | None, typer.Option("--snapshot", metavar="N", min=0, help="Read this snapshot instead of the newest.")
]
SkipDamaged = Annotated[bool, typer.Option("--skip-damaged", help="Go on without damaged passages, and say so.")]
Yes = Annotated[bool, typer.Option("--yes", "-y", help="Do not ask.")]
Wait = Annotated[
    float, typer.Option("--wait", metavar="SECONDS", min=0, help="How long to wait for another writer of the bank.")
]


class State:
    """What one process carries from the first word of its command line to its exit code."""

    def __init__(self, terminal: Terminal) -> None:
        self.terminal = terminal
        self.bank: str | None = None
        self.code = EXIT_DONE


class Call:
    """What a command gets: the terminal, the settings in force, and the bank that was meant.

    device, dtype  what --device and --dtype gave, None where they were left out
    resume         what Ctrl-C says beside "interrupted"; a command sets it once there is something to resume
    """

    def __init__(self, state: State, context: typer.Context, bank: str | None) -> None:
        self.terminal = state.terminal
        self.context = context
        self.bank_flag = bank if bank is not None else state.bank
        self.device: str | None = None
        self.dtype: str | None = None
        self.resume = ""

    @functools.cached_property
    def settings(self) -> Settings:
        """Environment and config file, read when first needed."""
        file = config_file()
        return Settings(os.environ, read_config(file), file)

    def value(self, name: str, flag: Any = None) -> Any:
        """A setting's value in force."""
        return self.settings.value(name, flag)

    def bank_path(self) -> Path:
        """Where the bank lies.

        raises  NoBank
        """
        from regrad_cli.bank import locate_bank

        return locate_bank(self.value("bank", self.bank_flag), Path.cwd())

    def usage_help(self, problem: str) -> int:
        """The command cannot go on without something: its help, or the error as JSON. Returns the exit code."""
        if self.terminal.json:
            from regrad_cli.errors import UsageProblem

            return self.terminal.error(UsageProblem(problem, f"see `{self.context.command_path} --help`"))
        self.terminal.help(self.context.get_help())
        return EXIT_USAGE

    def megabytes(self, stage: str) -> Callable[[int, int], None]:
        """What is told (bytes done, bytes in all), shown as progress in figures that people can read."""

        def report(done_bytes: int, total_bytes: int) -> None:
            self.terminal.progress(Progress(f"{stage} (MB)", done_bytes // 10**6, max(1, total_bytes // 10**6)))

        return report

    @contextmanager
    def follow(self, events: Iterator[Any]) -> Iterator[Iterator[Any]]:
        """Show notices, progress and skipped inputs of a use case; the rest is for the block.

        However the block is left, the use case is closed at once: weights restored, locks released.
        """
        with closing(cast("Generator[Any]", events)):
            yield self._rest(events)

    def _rest(self, events: Iterator[Any]) -> Iterator[Any]:
        for event in events:
            match event:
                case Notice():
                    self.terminal.notice(event.message)
                case Progress():
                    self.terminal.progress(event)
                case Skipped():
                    self.terminal.skipped(event.source, event.reason)
                case _:
                    yield event


def config_file() -> Path:
    """The user's config file: REGRAD_CONFIG, or config.toml in the platform's config folder for regrad."""
    value = os.environ.get("REGRAD_CONFIG")
    if value:
        return expanded(value).absolute()
    import platformdirs

    return platformdirs.user_config_path("regrad", appauthor=False) / "config.toml"


def command(
    group: typer.Typer,
    name: str,
    *,
    bank: bool = False,
    device: bool = False,
    dtype: bool = False,
    heavy: bool = False,
    section: str | None = None,
) -> Callable[[Callable[..., int | None]], Callable[..., int | None]]:
    """Register `function(call, …)` as a command, with the options that all share added to its own.

    `heavy` says that it may load transformers without taking a device: their chatter is kept away then too.
    The function returns its exit code, None for 0. What it raises becomes an error on stderr and a code.
    """
    shared: dict[str, tuple[Any, Any]] = {"json": (Json, False), "quiet": (Quiet, False), "debug": (Debug, False)}
    if bank:
        shared = {"bank": (Bank, None), **shared}
    own = {"device": (Device, None)} if device else {}
    own |= {"dtype": (Dtype, None)} if dtype else {}

    def register(function: Callable[..., int | None]) -> Callable[..., int | None]:
        def run(ctx: typer.Context, **values: Any) -> None:
            state: State = ctx.obj
            given = {name: values.pop(name) for name in shared}
            apply_flags(state.terminal, given["json"], given["quiet"], given["debug"])
            call = Call(state, ctx, given.get("bank"))
            call.device, call.dtype = values.pop("device", None), values.pop("dtype", None)
            if heavy or device:
                silence_libraries(state.terminal.debug)
            state.code = guarded(call, lambda: function(call, **values))

        parameters = [p for p in inspect.signature(function).parameters.values() if p.name != "call"]
        declared = {p.name for p in parameters}
        parameters += [_parameter(name, *pair) for name, pair in (own | shared).items() if name not in declared]
        context = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
        parameters = [context, *(p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in parameters)]
        run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in parameters}
        run.__doc__ = function.__doc__
        group.command(name, cls=Command, rich_help_panel=section)(run)
        return function

    return register


def _parameter(name: str, annotation: Any, default: Any) -> inspect.Parameter:
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def apply_flags(terminal: Terminal, json: bool, quiet: bool, debug: bool) -> None:
    """Switch on what was asked for, wherever on the command line it stood."""
    terminal.json |= json
    terminal.quiet |= quiet
    terminal.debug |= debug


def silence_libraries(debug: bool) -> None:
    """Libraries' chatter (bars, warnings, log lines) does not reach the user, except with --debug."""
    if debug:
        return
    import logging
    import warnings

    from regrad_cli.models import quiet_libraries

    quiet_libraries()
    warnings.simplefilter("ignore")
    logging.lastResort = None


def guarded(call: Call, work: Callable[[], int | None]) -> int:
    """Do the work; what it raises becomes a line on stderr and an exit code."""
    terminal = call.terminal
    try:
        return work() or EXIT_DONE
    except KeyboardInterrupt:
        return interrupted(terminal, call.resume)
    except BrokenPipeError:
        terminal.abandon_output()
        return EXIT_CLOSED_PIPE
    except RegradError as error:
        if isinstance(error, Damaged):
            _say_what_helps(call, error)
        return terminal.error(error)
    except (typer.Exit, typer.Abort, typer.BadParameter):
        raise
    except BaseException as error:
        if isinstance(error, Exception) or is_panic(error):
            return terminal.error(error)
        raise


def _say_what_helps(call: Call, error: Damaged) -> None:
    """Not every damaged bank is for our `repair`, and a packed one has no older snapshot. `finding` is what errors of a
    bank's files have."""
    with suppress(RegradError):
        if not hasattr(error, "finding"):
            return
        from regrad_cli.bank.damage import PRIOR_WAY_OUT, REPAIR
        from regrad_cli.bank.opening import way_out

        path = call.bank_path()
        way = way_out(path)
        if path.is_file():
            error.hint = way
        elif way != REPAIR:
            for ours in (REPAIR, PRIOR_WAY_OUT):
                error.hint = error.hint.replace(ours, way)


def interrupted(terminal: Terminal, resume: str = "") -> int:
    """Ctrl-C: one line, and no second Ctrl-C while the process ends."""
    if terminal.owns_process:
        signal.signal(signal.SIGINT, signal.SIG_IGN)
    terminal.interrupted(resume)
    return EXIT_INTERRUPTED
