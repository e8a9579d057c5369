"""The commit of a snapshot: its shards get their names, then its manifest a copy and its name. Knows the order of the
calls; not what a manifest says.

A copy is the same bytes in a second file, so that damage in the newest manifest costs nothing. No reader looks at it,
and linking the manifest stays the one step that commits.
"""

from __future__ import annotations

import errno
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from regrad_cli.bank import files, layout
from regrad_cli.bank.manifest import MANIFEST_LIMIT, Manifest, ShardEntry
from regrad_cli.errors import StorageFailed


def write_shard(bank: Path, entry: ShardEntry, data: list[Any], docs: bytes) -> None:
    """A shard's docs file and then the shard, each synced and named by its content."""
    for name, parts in ((entry.docs_name, [docs]), (entry.name, data)):
        files.publish(files.write_temporary(bank / "tmp", parts), bank / name)


def sync_shards(bank: Path) -> None:
    """Makes the names of shards and docs files durable: before a manifest names them."""
    for folder in ("docs", "shards"):
        files.sync_folder(bank / folder)


def _leave_no_sign(temporary: Path) -> None:
    """Removes what lies in tmp/ of a manifest, or where that fails takes its meaning from it: of a snapshot that is
    linked, it would one day say that it never was."""
    if not files.discard(temporary) and temporary.exists():
        with suppress(OSError):
            files.SYSTEM.rename(temporary, temporary.with_name(layout.PUT_BACK + temporary.name))


def link_manifest(bank: Path, manifest: Manifest) -> Manifest:
    """Gives a manifest its name, and its copy before that. The caller syncs snapshots/, which makes both durable.
    Returns it with its own hash filled in.

    The manifest lies in tmp/ before its copy is named and until it is linked. So what a crash left is told from a loss:
    a copy without its manifest is the first if tmp/ has the same bytes (`lost_snapshot` in opening.py).

    raises  FileExistsError if the number is taken, OSError, StorageFailed for one that no reader would take for a
            manifest; none leaves a copy behind, or if it cannot be removed, the manifest stays in tmp/ beside it
    """
    data, manifest = manifest.to_bytes()
    if len(data) > MANIFEST_LIMIT:
        raise StorageFailed(
            "the bank has too many shards for one manifest", "ingest more documents at a time into a new bank"
        )
    target, copy = bank / manifest.name, bank / layout.copy_name(manifest.number)
    temporary = files.write_temporary(bank / "tmp", [data])
    try:
        if target.exists():  # before another writer's copy is overwritten
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        files.publish(files.write_temporary(bank / "tmp", [data]), copy)
        files.publish_once(temporary, target)
    except BaseException:
        if target.exists() or files.discard(copy) or not copy.exists():
            _leave_no_sign(temporary)
        raise
    _leave_no_sign(temporary)
    return manifest
