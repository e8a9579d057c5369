"""`regrad bank pack` and `unpack`: a bank as one file, and back. Parse, ask the bank, render; no torch."""

from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import typer

from regrad_cli.cli.call import Call, Snapshot, command
from regrad_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, UsageProblem
from regrad_cli.places import expanded
from regrad_cli.render import Terminal
from regrad_cli.shown import count, size


def pack(
    call: Call,
    out: Annotated[str, typer.Argument(metavar="OUT", help="The file to write (NAME.gbank), or - for a pipe.")],
    snapshot: Snapshot = None,
    force: Annotated[bool, typer.Option("--force", help="Replace a packed bank that is there.")] = False,
) -> int:
    """Write the bank as one file.

    Every command that reads a bank reads that file as it is: --bank NAME.gbank. The same snapshot gives the same bytes,
    and every file is checked on the way. It is a tar archive: `tar xf` takes out a bank, as `bank unpack` does.
    """
    from regrad_cli import bank

    _refuse_empty(out)
    path = call.bank_path()
    if out == "-":
        if call.terminal.out_is_terminal:
            raise UsageProblem("a packed bank is not for a terminal", "name a file, or pipe it somewhere")
        packed = bank.pack_bank(path, call.terminal.output, snapshot, report=call.megabytes("packing"))
    else:
        file = expanded(out).resolve()
        bank.refuse_to_replace(file, path, force=force or call.terminal.can_ask())
        if not force and file.exists():
            if not call.terminal.confirm(f"Replace {file}?"):
                call.terminal.notice("nothing was written")
                return EXIT_INTERRUPTED
            force = True
        packed = bank.pack_bank(path, file, snapshot, force=force, report=call.megabytes("packing"))
    if packed["dead"]:
        dead = count(packed["dead"], "removed passage")
        call.terminal.warning(f"still in the shards: {dead}; `regrad compact` first, if they must not travel")
    _say_packed(call.terminal, packed)
    return EXIT_DONE


def unpack(
    call: Call,
    file: Annotated[str, typer.Argument(metavar="FILE", help="What `bank pack` wrote, or - for a pipe.")],
    folder: Annotated[
        Path, typer.Argument(metavar="DIR", help="The bank to make: a folder that is not there yet, or is empty.")
    ],
) -> int:
    """Make a bank that can be written to of a packed one.

    Every byte is checked on the way; DIR is there when all of it is, or not at all.
    """
    from regrad_cli.bank import unpack_bank

    _refuse_empty(file)
    if file == "-" and call.terminal.in_is_terminal:
        raise UsageProblem("a packed bank does not come from a terminal", "name a file, or pipe it in")
    source = call.terminal.input if file == "-" else expanded(file)
    _say_unpacked(call.terminal, unpack_bank(source, folder, report=call.megabytes("unpacking")))
    return EXIT_DONE


def _refuse_empty(file: str) -> None:
    if not file:
        raise UsageProblem("a path is empty", "name a file, NAME.gbank, or - for a pipe")


def _say_packed(terminal: Terminal, result: Mapping[str, Any]) -> None:
    """A bank in one file, as `bank.pack_bank` tells it; where the file itself is on stdout, a notice."""
    held = f"{count(result['documents'], 'document')}, {count(result['passages'], 'passage')}"
    told = f"snapshot {result['snapshot']} ({held}, {size(result['bytes'])})"
    if result["path"] is None:
        terminal.notice(f"packed {told}")
    elif terminal.json:
        terminal.document(result)
    else:
        terminal.parts((f"Packed {told} into {result['path']}",))
        terminal.parts((f"sha256 {result['sha256']}", "dim"))


def _say_unpacked(terminal: Terminal, result: Mapping[str, Any]) -> None:
    """A packed bank that is a folder now, as `bank.unpack_bank` tells it."""
    if terminal.json:
        terminal.document(result)
        return
    held = f"{count(result['documents'], 'document')}, {count(result['passages'], 'passage')}"
    terminal.parts((f"Unpacked snapshot {result['snapshot']} ({held}) into {result['path']}",))


def register(group: typer.Typer) -> None:
    """Put the commands into the group of the bank's."""
    command(group, "pack", bank=True)(pack)
    command(group, "unpack")(unpack)
