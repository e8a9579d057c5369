"""The store: snapshots of rows in a folder that survives crashes and notices damage. numpy, safetensors, hnswlib; never
torch. What the other modules use is named here; each name's module is loaded when it is first used, so that
`bank stats` starts without numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrad_cli.bank.create import create_bank
    from regrad_cli.bank.damage import DamagedFile, DamagedRow, Finding
    from regrad_cli.bank.history import log
    from regrad_cli.bank.layout import locate_bank
    from regrad_cli.bank.move import MovingWriter, move_bank, rows_to_move
    from regrad_cli.bank.opening import open_bank
    from regrad_cli.bank.snapshot import Rows, Snapshot
    from regrad_cli.bank.verification import verify
    from regrad_cli.bank.writer import Writer, remove_documents, write_bank

_PLACES = {
    "create_bank": "create",
    "DamagedFile": "damage",
    "DamagedRow": "damage",
    "Finding": "damage",
    "log": "history",
    "locate_bank": "layout",
    "MovingWriter": "move",
    "move_bank": "move",
    "rows_to_move": "move",
    "Rows": "snapshot",
    "Snapshot": "snapshot",
    "open_bank": "opening",
    "verify": "verification",
    "Writer": "writer",
    "remove_documents": "writer",
    "write_bank": "writer",
}

__all__ = [
    "DamagedFile",
    "DamagedRow",
    "Finding",
    "MovingWriter",
    "Rows",
    "Snapshot",
    "Writer",
    "create_bank",
    "locate_bank",
    "log",
    "move_bank",
    "open_bank",
    "remove_documents",
    "rows_to_move",
    "verify",
    "write_bank",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(import_module(f"regrad_cli.bank.{_PLACES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
