"""What happened to a bank: its snapshots in a list. Knows manifests only."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from regrad_cli.bank import layout
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.manifest import Manifest
from regrad_cli.bank.opening import check_format, read_manifest
from regrad_cli.bank.packed import Packed
from regrad_cli.bank.store import Folder
from regrad_cli.errors import RegradError


def log(path: Path) -> list[dict[str, Any]]:
    """A dict a snapshot, newest first. One that cannot be read is listed with its number and "damaged": what is wrong.

    raises  NoBank, UnknownFormat; DamagedFile if FORMAT itself is damaged, or anything that opening a packed bank reads
    """
    if path.is_file():
        with Packed(path) as packed:
            return [_entry(packed.manifest)]
    check_format(path)
    entries: list[dict[str, Any]] = []
    for number in reversed(layout.snapshot_numbers(path)):
        name = layout.snapshot_name(number)
        try:
            with Folder(path).open(name) as region:
                manifest = read_manifest(region)
        except DamagedFile as error:
            entries.append({"snapshot": number, "damaged": error.finding.what})
            continue
        except RegradError as error:
            entries.append({"snapshot": number, "damaged": error.message})
            continue
        entries.append(_entry(manifest))
    return entries


def _entry(manifest: Manifest) -> dict[str, Any]:
    return {
        "snapshot": manifest.number,
        "time": manifest.time,
        "operation": manifest.operation,
        "prior": manifest.settings.prior_name,
        "parent": manifest.parent[0] if manifest.parent is not None else None,
        "documents": manifest.counts.documents,
        "passages": manifest.counts.passages,
        "dead": manifest.counts.dead,
        "bytes": sum({name: file.bytes for name, file in manifest.files()}.values()),
        "tool": manifest.tool,
    }
