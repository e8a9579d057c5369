"""Writes docs/commands.md from the commands' own help: `python docs/make_commands.py`. A test holds it current."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import typer

from regrad_cli.cli.app import app
from regrad_cli.cli.help import COMMON

TARGET = Path(__file__).with_name("commands.md")
HEAD = """# Commands

Made by `python docs/make_commands.py` from what `regrad COMMAND --help` says; do not edit.

What holds for all of them:

- stdout is data, stderr is everything else. `--json` gives JSON, also for errors: one document for short commands,
  a line each for listings, `ingest`, `query` and `ask`.
- Piped, listings are lines of cells separated by tabs, without headings; on a terminal they are tables.
  A piped answer is the answer alone; the passages it used are listed below it on a terminal, with `--sources`, and
  in JSON.
- What a terminal would obey in documents, titles, file names and answers is shown as an escape (`\\x1b`). In JSON the
  text is exact, but that bytes of file names that are not UTF-8 are shown as `\\xff`.
- Notices with `--json` are lines on stderr: `{"notice": …}`, `{"warning": …}`, `{"skipped": {"source", "reason"}}`.
- Exit codes: 0 done · 1 `diff --exit-code` found a difference · 2 usage · 3 done, but some inputs could not be read
  (each named) · 10 no bank · 11 locked · 12 bank and model differ · 13 model not available · 14 bank damaged or of an
  unknown format · 70 unexpected · 130 interrupted, or answered with no · 141 the reader of a pipe has gone.
- Settings, the first that is there: flag, `REGRAD_*` variable, bank, `config.toml` in the user's config folder (or
  `REGRAD_CONFIG`), default. `regrad config show` lists them and says where each came from.
- `NO_COLOR`, `TERM=dumb` and `--quiet` are heeded.
"""


def walk(command: Any, path: str) -> Iterator[tuple[str, Any]]:
    """Every command with its full name, groups before what is in them."""
    yield path, command
    for name, inner in getattr(command, "commands", {}).items():
        if not inner.hidden:
            yield from walk(inner, f"{path} {name}")


def page() -> str:
    """The whole page."""
    root = typer.main.get_command(app)
    sections = [HEAD]
    common = [row for row in _rows(root) if row[2] == COMMON]
    sections.append(f"## Common options\n\n{_table(common)}")
    sections += [_section(path, command) for path, command in walk(root, "regrad")]
    return "\n".join(section.rstrip() + "\n" for section in sections)


def _section(path: str, command: Any) -> str:
    rows = [row for row in _rows(command) if row[2] != COMMON]
    names = [row[0] for row in rows if row[2] == "Arguments"]
    inner = " COMMAND" if getattr(command, "commands", None) else ""
    usage = " ".join([f"{path}{inner}", *names, "[OPTIONS]"])
    text = inspect.cleandoc(command.help or "")
    parts = [f"## {path}", f"    {usage}", text]
    if inner:
        listed = [(name, each.get_short_help_str(200)) for name, each in command.commands.items() if not each.hidden]
        parts.append(
            "\n".join(["| command | does |", "| --- | --- |", *(f"| `{n}` | {_cell(h)} |" for n, h in listed)])
        )
    if rows:
        parts.append(_table(rows))
    return "\n\n".join(part for part in parts if part) + "\n"


def _rows(command: Any) -> list[tuple[str, str, str]]:
    """(what to type, help, section) for every argument and option that is shown."""
    rows = []
    for parameter in command.params:
        if getattr(parameter, "hidden", False):
            continue
        metavar = parameter.metavar or ""
        if parameter.param_type_name == "argument":
            dots = "..." if parameter.nargs == -1 else ""
            name = f"{metavar}{dots}" if parameter.required else f"[{metavar}]{dots}"
            rows.append((name, parameter.help or "", "Arguments"))
            continue
        names = ", ".join(sorted(parameter.opts, key=len))
        names += "".join(f" / {name}" for name in parameter.secondary_opts)
        section = getattr(parameter, "rich_help_panel", None) or "Options"
        rows.append((f"{names} {metavar}".rstrip(), parameter.help or "", section))
    return rows


def _table(rows: list[tuple[str, str, str]]) -> str:
    lines = ["| | |", "| --- | --- |"]
    return "\n".join(lines + [f"| `{_cell(name)}` | {_cell(help)} |" for name, help, _ in rows])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    TARGET.write_text(page(), encoding="utf-8")
