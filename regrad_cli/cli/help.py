"""How help looks: sections of options and commands, headings and names in colour on a terminal. Knows no command.

Typer's own rich help costs about 70 ms of imports (Markdown and syntax highlighting among them); this one costs none.
"""

import re
from typing import Any

from typer.core import TyperCommand, TyperGroup

from regrad_cli.cli.values import read_plainly

COMMON = "Common options"
PARAMETER_ORDER = {"Arguments": 0, "Options": 1, COMMON: 3}
COMMAND_ORDER = ("Documents and answers", "Learn and measure", "Look after it", "This machine")
# Types and ranges, which our own words already say.
_NOISE = re.compile(r" <[^<>]*>$|\s*\[x>=?[\d.]+\]$|; x>=?[\d.]+(?=\]$)")


def _style(ctx: Any, text: str, *names: str) -> str:
    terminal = getattr(ctx.find_root().obj, "terminal", None)
    return text if terminal is None else terminal.style(text, *names)


def _write_parameters(command: Any, ctx: Any, formatter: Any) -> None:
    """Arguments, then options by the section they were declared in; those that all commands share stand last."""
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        record = parameter.get_help_record(ctx)
        if record is None:
            continue
        section = getattr(parameter, "rich_help_panel", None) or "Options"
        if parameter.param_type_name == "argument":
            section = "Arguments"
        elif parameter.name == "help":
            section = COMMON
        term, description = (_NOISE.sub("", part) for part in record)
        sections.setdefault(section, []).append((_style(ctx, term, "cyan"), description))
    for name in sorted(sections, key=lambda section: PARAMETER_ORDER.get(section, 2)):
        with formatter.section(_style(ctx, name, "bold", "green")):
            formatter.write_dl(sections[name], col_max=26)


class Command(TyperCommand):
    """A command whose options stand in sections."""

    def get_params(self, ctx: Any) -> list[Any]:
        return read_plainly(super().get_params(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        _write_parameters(self, ctx, formatter)


class Group(TyperGroup):
    """A group whose commands and options stand in sections."""

    def get_params(self, ctx: Any) -> list[Any]:
        return read_plainly(super().get_params(ctx))

    def format_options(self, ctx: Any, formatter: Any) -> None:
        sections: dict[str, list[tuple[str, str]]] = {}
        commands = [(name, self.get_command(ctx, name)) for name in self.list_commands(ctx)]
        shown = [(name, command) for name, command in commands if command is not None and not command.hidden]
        widest = max((len(name) for name, _ in shown), default=0)
        for name, command in shown:
            section = getattr(command, "rich_help_panel", None)
            section = section if isinstance(section, str) else "Commands"
            row = (_style(ctx, f"{name:<{widest}}", "cyan"), command.get_short_help_str(200))
            sections.setdefault(section, []).append(row)
        for section in sorted(sections, key=lambda name: COMMAND_ORDER.index(name) if name in COMMAND_ORDER else 9):
            with formatter.section(_style(ctx, section, "bold", "green")):
                formatter.write_dl(sections[section])
        _write_parameters(self, ctx, formatter)
