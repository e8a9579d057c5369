"""The store: snapshots of rows in a folder that survives crashes and notices damage. numpy, safetensors, hnswlib; never
torch. What the other modules use is named here; each name's module is loaded when it is first used, so that
`bank stats` starts without numpy.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from regrad_cli.bank.compact import CompactingWriter, compact_bank
    from regrad_cli.bank.create import create_bank
    from regrad_cli.bank.damage import DamagedFile, DamagedRow, Finding
    from regrad_cli.bank.diff import Difference, Likeness, changed_texts, differences
    from regrad_cli.bank.history import log
    from regrad_cli.bank.layout import locate_bank
    from regrad_cli.bank.makeup import beside
    from regrad_cli.bank.move import MovingWriter, move_bank, rows_to_move
    from regrad_cli.bank.opening import check_format, open_bank, way_out
    from regrad_cli.bank.pack import pack_bank, refuse_to_replace, unpack_bank
    from regrad_cli.bank.planning import AtStake, Compacted, at_stake, foreseen, plan_compaction
    from regrad_cli.bank.repair import Repaired, Repairer, repair_bank
    from regrad_cli.bank.snapshot import Rows, Snapshot
    from regrad_cli.bank.verification import Checked, Sample, verify
    from regrad_cli.bank.writer import Writer, remove_documents, write_bank

_PLACES = {
    "CompactingWriter": "compact",
    "compact_bank": "compact",
    "create_bank": "create",
    "DamagedFile": "damage",
    "DamagedRow": "damage",
    "Finding": "damage",
    "Difference": "diff",
    "Likeness": "diff",
    "changed_texts": "diff",
    "differences": "diff",
    "log": "history",
    "locate_bank": "layout",
    "beside": "makeup",
    "MovingWriter": "move",
    "move_bank": "move",
    "rows_to_move": "move",
    "pack_bank": "pack",
    "refuse_to_replace": "pack",
    "unpack_bank": "pack",
    "AtStake": "planning",
    "Compacted": "planning",
    "at_stake": "planning",
    "foreseen": "planning",
    "plan_compaction": "planning",
    "Repaired": "repair",
    "Repairer": "repair",
    "repair_bank": "repair",
    "Rows": "snapshot",
    "Snapshot": "snapshot",
    "check_format": "opening",
    "open_bank": "opening",
    "way_out": "opening",
    "Checked": "verification",
    "Sample": "verification",
    "verify": "verification",
    "Writer": "writer",
    "remove_documents": "writer",
    "write_bank": "writer",
}

__all__ = [
    "AtStake",
    "Checked",
    "Compacted",
    "CompactingWriter",
    "DamagedFile",
    "DamagedRow",
    "Difference",
    "Finding",
    "Likeness",
    "MovingWriter",
    "Repaired",
    "Repairer",
    "Rows",
    "Sample",
    "Snapshot",
    "Writer",
    "at_stake",
    "beside",
    "changed_texts",
    "check_format",
    "compact_bank",
    "create_bank",
    "differences",
    "foreseen",
    "locate_bank",
    "log",
    "move_bank",
    "open_bank",
    "pack_bank",
    "plan_compaction",
    "refuse_to_replace",
    "remove_documents",
    "repair_bank",
    "rows_to_move",
    "unpack_bank",
    "verify",
    "way_out",
    "write_bank",
]


def __getattr__(name: str) -> Any:
    if name in _PLACES:
        value = getattr(import_module(f"regrad_cli.bank.{_PLACES[name]}"), name)
        globals()[name] = value
        return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
