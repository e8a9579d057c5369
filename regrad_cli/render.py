"""The only place that prints: one object that owns the streams and the terminal. Knows no command and no use case.

stdout is data, stderr is everything else. Text from elsewhere goes through `shown` here, so callers cannot forget it:
every method takes plain text and escapes what a terminal would obey. Rich is imported only to draw a table or a
progress bar on a terminal.
"""

from __future__ import annotations

import errno
import io
import os
import re
import sys
import traceback
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from itertools import chain, islice
from typing import Any, BinaryIO, TextIO

from regrad_cli.errors import EXIT_INTERRUPTED, UsageProblem, describe_error
from regrad_cli.records import Progress
from regrad_cli.shown import apportioned, json_text, percent, visible, visible_line

STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33"}
STYLES |= {"blue": "34", "magenta": "35", "cyan": "36"}
_COLOUR = re.compile("\x1b\\[[0-9;]*m")
TABLE_ROWS = 500  # rows that are drawn as one table; a longer listing is drawn as several


@dataclass(frozen=True, slots=True)
class Column:
    """A column of a table: its heading, whether it holds numbers, and its share of the width where room is short."""

    heading: str
    number: bool = False
    share: int | None = None


class _ClosedOutput(io.StringIO):
    """In the place of a standard output that was closed: a flush says once that what was printed is lost."""

    is_lost = False

    def write(self, text: str) -> int:
        self.is_lost = True
        return len(text)

    def flush(self) -> None:
        lost, self.is_lost = self.is_lost, False
        if lost:
            raise OSError(errno.EBADF, "standard output is closed, and what was to be printed is lost")


class Terminal:
    """The streams of one process, what they are, and how much is to be said on them.

    json, quiet and debug are set once the command line has been read; owns_process is False in tests.
    """

    def __init__(self, stdin: Any, stdout: TextIO, stderr: TextIO, environ: Mapping[str, str]) -> None:
        self.stdin, self.stdout, self.stderr, self.environ = stdin, stdout, stderr, environ
        self.json = self.quiet = self.debug = False
        self.owns_process = False
        self.in_is_terminal, self.out_is_terminal, self.err_is_terminal = map(_is_terminal, (stdin, stdout, stderr))
        self.is_dumb = environ.get("TERM") in ("dumb", "unknown")
        self._bars: Any = None
        self._tasks: dict[str, Any] = {}
        self._held = ""  # space that ended a piece of an answer: shown once more of the answer comes
        self._in_answer = False

    @classmethod
    def of_process(cls) -> Terminal:
        """The terminal of this process. A closed stdin reads as empty, a closed stderr swallows what is said."""
        for stream in (sys.stdout, sys.stderr):
            if hasattr(stream, "reconfigure"):
                stream.reconfigure(errors="backslashreplace")
        while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
            pass  # a closed stream's number is taken, so that no file gets it: a library might print into that
        null = os.fdopen(descriptor, "r+")
        terminal = cls(sys.stdin or null, sys.stdout or _ClosedOutput(), sys.stderr or null, os.environ)
        terminal.owns_process = True
        return terminal

    # ── what the streams are ──────────────────────────────────────────────────────────────────────────────────────

    @property
    def width(self) -> int:
        """Columns of the terminal; 80 where there is none."""
        if self.environ.get("COLUMNS", "").isdecimal():
            return max(20, int(self.environ["COLUMNS"]))
        try:  # a terminal that does not know its width says 0
            return max(20, os.get_terminal_size(self.stdout.fileno()).columns or 80)
        except (OSError, ValueError, AttributeError):
            return 80

    def _colours(self, is_terminal: bool) -> bool:
        return is_terminal and not self.is_dumb and not self.environ.get("NO_COLOR")

    def style(self, text: str, *names: str, err: bool = False) -> str:
        """Our own text in bold, dim or a colour, where the stream shows colours."""
        if not names or not self._colours(self.err_is_terminal if err else self.out_is_terminal):
            return text
        return f"\x1b[{';'.join(STYLES[name] for name in names)}m{text}\x1b[0m"

    @property
    def shows_progress(self) -> bool:
        """Bars are for people at a terminal; not where JSON lines would run through them."""
        lines_cross = self.json and self.out_is_terminal
        return self.err_is_terminal and not self.is_dumb and not self.quiet and not lines_cross

    # ── data: stdout ──────────────────────────────────────────────────────────────────────────────────────────────

    def _out(self, text: str) -> None:
        if self.out_is_terminal:
            self.stop_progress()
        self.stdout.write(text)

    def text(self, text: str, *styles: str) -> None:
        """A line or several of text for people, each escaped, then styled."""
        self._out(self.style(visible(text), *styles) + "\n")

    def parts(self, *parts: tuple[str, ...]) -> None:
        """One line made of (text, style, …) parts."""
        self._out("".join(self.style(visible_line(text), *styles) for text, *styles in parts) + "\n")

    def record(self, value: Mapping[str, Any]) -> None:
        """One JSON line, flushed, so that whoever reads the pipe has it now."""
        self._out(json_text(value, ascii_only=not self._is_utf8(self.stdout)) + "\n")
        self.stdout.flush()

    def document(self, value: Any) -> None:
        """One JSON document; indented for people, one line for programs."""
        indent = 2 if self.out_is_terminal else None
        self._out(json_text(value, indent=indent, ascii_only=not self._is_utf8(self.stdout)) + "\n")

    def piece(self, text: str) -> None:
        """The next piece of an answer, shown at once; space around the whole answer is left out."""
        text = self._held + text
        shown = text.rstrip()
        self._held = text[len(shown) :]
        shown = shown if self._in_answer else shown.lstrip()
        if shown:
            self._in_answer = True
            self._out(visible(shown))
            self.stdout.flush()

    def end_pieces(self) -> None:
        """The answer is over: the line ends."""
        self._out("\n")
        self._held, self._in_answer = "", False
        self.stdout.flush()

    def table(self, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
        """A table on a terminal; elsewhere a line a row, cells separated by tabs, without headings."""
        if not self.out_is_terminal:
            for row in rows:
                self._out("\t".join(map(visible_line, row)) + "\n")
            return
        rows = iter(rows)
        for first in rows:
            self._draw(columns, chain([first], islice(rows, TABLE_ROWS - 1)))

    def _draw(self, columns: Sequence[Column], rows: Iterable[Sequence[str]]) -> None:
        from rich import box
        from rich.table import Table
        from rich.text import Text

        table = Table(box=box.SIMPLE_HEAD if self._is_utf8(self.stdout) else box.ASCII, pad_edge=False, expand=False)
        for column in columns:
            table.add_column(
                Text(column.heading),
                justify="right" if column.number else "left",
                no_wrap=column.number,
                ratio=column.share,
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(Text(visible_line(cell)) for cell in row))
        self._console(self.stdout, self.out_is_terminal, self.width).print(table)

    def bars(self, rows: Sequence[tuple[str, float, str]]) -> None:
        """Named amounts as bars, longest first in width, each with its figure: (name, amount, figure)."""
        most = max((amount for _, amount, _ in rows), default=0) or 1
        name_width = max((len(name) for name, _, _ in rows), default=0)
        figure_width = max((len(figure) for _, _, figure in rows), default=0)
        room = max(8, min(40, self.width - name_width - figure_width - 6))
        block = "█" if self._is_utf8(self.stdout) else "#"
        for name, amount, figure in rows:
            bar = block * (max(1, round(room * amount / most)) if amount else 0)
            drawn = f"  {self.style(bar, 'cyan')}" if bar else ""
            self._out(f"  {name:<{name_width}}  {figure:>{figure_width}}{drawn}\n")

    def stack(self, parts: Sequence[tuple[str, float, str, str]]) -> None:
        """Amounts as parts of one bar, and below it what each is: (name, amount, figure, colour). Parts of nothing are
        left out; without colours the fillings tell them apart."""
        parts = [part for part in parts if part[1] > 0]
        fillings = "█▓▒░▚▖▪·" if self._is_utf8(self.stdout) else "#=+-:~*."
        total = sum(amount for _, amount, _, _ in parts)
        cells = apportioned([amount for _, amount, _, _ in parts], min(64, self.width - 4))
        drawn = zip(parts, cells, fillings, strict=False)
        self._out("  " + "".join(self.style(filling * many, part[3]) for part, many, filling in drawn) + "\n")
        name_width = max((len(name) for name, _, _, _ in parts), default=0)
        figure_width = max((len(figure) for _, _, figure, _ in parts), default=0)
        for (name, amount, figure, colour), filling in zip(parts, fillings, strict=False):
            told = f" {name:<{name_width}}  {figure:>{figure_width}}  {percent(amount / total):>5}"
            self._out(f"  {self.style(filling, colour)}{told}\n")

    # ── everything else: stderr ───────────────────────────────────────────────────────────────────────────────────

    def _err(self, text: str) -> None:
        self.stop_progress()
        if self.out_is_terminal and self.err_is_terminal:
            self.stdout.flush()  # the two meet on one screen, in the order they were said
        self.stderr.write(text + "\n")
        self.stderr.flush()

    def _err_record(self, value: Mapping[str, Any]) -> None:
        self._err(json_text(value, ascii_only=not self._is_utf8(self.stderr)))

    def notice(self, message: str) -> None:
        """Something worth knowing while work goes on; not with --quiet."""
        if self.quiet:
            return
        if self.json:
            self._err_record({"notice": {"message": message}})
        else:
            self._err(self.style(visible_line(message), "dim", err=True))

    def warning(self, message: str) -> None:
        """Something that makes the result other than expected; also with --quiet."""
        if self.json:
            self._err_record({"warning": {"message": message}})
        else:
            self._err(self.style("warning: ", "bold", "yellow", err=True) + visible_line(message))

    def skipped(self, source: str, reason: str) -> None:
        """An input that was left out, by name; also with --quiet."""
        if self.json:
            self._err_record({"skipped": {"source": source, "reason": reason}})
        else:
            self._err(self.style("skipped: ", "bold", "yellow", err=True) + visible_line(f"{source}: {reason}"))

    def error(self, error: BaseException, code: int | None = None) -> int:
        """A failure, as a sentence and the way out, or as {"error": …} with --json. Returns the exit code."""
        description = describe_error(error)
        if code is not None:
            description["code"] = code
        with self._last_words():
            if self.debug:
                trace = "".join(traceback.format_exception(error))
                if self.json:
                    description["traceback"] = trace
                else:
                    self._err(visible(trace.rstrip("\n")))
            if self.json:
                self._err_record({"error": description})
            else:
                self._err(self.style("error: ", "bold", "red", err=True) + visible_line(description["message"]))
                if description["hint"]:
                    self._err(self.style(" hint: ", "bold", "cyan", err=True) + visible_line(description["hint"]))
        return int(description["code"])

    def interrupted(self, resume: str = "") -> None:
        """Ctrl-C, in one line; `resume` says how to go on."""
        with self._last_words():
            if self.json:
                error = {"code": EXIT_INTERRUPTED, "kind": "interrupted", "message": "interrupted", "hint": resume}
                self._err_record({"error": error})
            else:
                at_line_start = "\n" if self.err_is_terminal else ""  # the terminal has just echoed ^C
                self._err(at_line_start + (f"interrupted: {resume}" if resume else "interrupted"))

    def help(self, text: str) -> None:
        """A command's help where it was called without what it needs: not data, so not stdout."""
        with self._last_words():
            self._err(text if self._colours(self.err_is_terminal) else _COLOUR.sub("", text))

    @contextmanager
    def _last_words(self) -> Iterator[None]:
        """For what is said before the process ends with a code: where stderr takes nothing, the code alone tells."""
        try:
            yield
        except OSError:
            self.abandon_output()

    def progress(self, event: Progress) -> None:
        """How far the work is, with the time left; one bar a stage, on a terminal only."""
        if not self.shows_progress:
            return
        if self._bars is None:
            self._bars = self._start_bars()
        task = self._tasks.get(event.stage)
        if task is None:
            task = self._tasks[event.stage] = self._bars.add_task(visible_line(event.stage), total=event.total)
        described = visible_line(f"{event.stage}  {event.note}" if event.note else event.stage)
        self._bars.update(task, completed=event.done, total=event.total, description=described, left_s=event.left_s)

    def _start_bars(self) -> Any:
        from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeRemainingColumn
        from rich.progress import Progress as Bars
        from rich.text import Text

        class Left(TimeRemainingColumn):
            def render(self, task: Any) -> Any:
                left_s = task.fields.get("left_s")
                if left_s is None:
                    return super().render(task)
                return Text(str(timedelta(seconds=round(left_s))), "progress.remaining")

        columns = (TextColumn("{task.description}", markup=False), BarColumn(), MofNCompleteColumn())
        console = self._console(self.stderr, self.err_is_terminal, None)
        bars = Bars(*columns, Left(compact=True), console=console, transient=True, refresh_per_second=5)
        bars.start()
        return bars

    def stop_progress(self) -> None:
        """Take the bars off the screen; the next event draws them again."""
        if self._bars is not None:
            bars, self._bars, self._tasks = self._bars, None, {}
            bars.stop()

    # ── stdin ─────────────────────────────────────────────────────────────────────────────────────────────────────

    @property
    def input(self) -> BinaryIO:
        """Standard input as bytes."""
        return getattr(self.stdin, "buffer", self.stdin)

    @property
    def output(self) -> BinaryIO:
        """Standard output as bytes."""
        self.stdout.flush()
        stream: Any = self.stdout
        return getattr(stream, "buffer", stream)

    def can_ask(self) -> bool:
        """Whether someone is there to answer."""
        return self.in_is_terminal and self.err_is_terminal

    def confirm(self, question: str) -> bool:
        """Ask for what destroys; anything but y or yes is a no.

        raises  UsageProblem where nobody is there to answer
        """
        if not self.can_ask():
            raise UsageProblem(f"{question} Nobody can be asked here", "say yes beforehand with --yes")
        self.stop_progress()
        self.stderr.write(visible_line(question) + " [y/N] ")
        self.stderr.flush()
        return str(self.stdin.readline()).strip().lower() in ("y", "yes")

    # ── the end ───────────────────────────────────────────────────────────────────────────────────────────────────

    def close(self) -> None:
        """Take the bars down and flush.

        raises  BrokenPipeError where the reader has gone
        """
        self.stop_progress()
        self.stdout.flush()
        self.stderr.flush()

    def abandon_output(self) -> None:
        """The reader has gone: nothing more is written, and nothing complains at exit."""
        self._bars = None
        with suppress(OSError, ValueError, AttributeError):
            null = os.open(os.devnull, os.O_WRONLY)
            for stream in (self.stdout, self.stderr):
                try:
                    stream.flush()
                except OSError:
                    os.dup2(null, stream.fileno())

    @staticmethod
    def _is_utf8(stream: Any) -> bool:
        return (getattr(stream, "encoding", None) or "utf-8").lower().replace("-", "").replace("_", "") == "utf8"

    def _console(self, stream: TextIO, is_terminal: bool, width: int | None) -> Any:
        from rich.console import Console

        colour = "standard" if self._colours(is_terminal) else None
        return Console(
            file=stream,
            width=width,
            force_terminal=is_terminal and not self.is_dumb,
            color_system=colour,  # type: ignore[arg-type]
            markup=False,
            emoji=False,
            highlight=False,
            no_color=colour is None,
        )


def _is_terminal(stream: Any) -> bool:
    with suppress(AttributeError, ValueError):
        return bool(stream.isatty())
    return False
