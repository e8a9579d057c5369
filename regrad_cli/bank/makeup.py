"""What a bank is made of, in figures: from a manifest and the names and sizes of files alone. Opens no shard, and does
without numpy.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_cli.bank import layout
from regrad_cli.bank.manifest import Manifest

if TYPE_CHECKING:
    from regrad_cli.bank.snapshot import Snapshot


def figures(path: Path, form: str, manifest: Manifest) -> dict[str, Any]:
    """One snapshot in figures.

    "gradients" are the shards without their embeddings; "stale" are passages under a prior that the bank is leaving,
    all or none, for a move ends in one commit; "removed_bytes" is what removed rows take of "bytes", by kind, about.
    """
    settings, move = manifest.settings, manifest.move
    embeddings = sum(shard.rows for shard in manifest.shards) * settings.embedding_dim * 2
    shards = sum(shard.bytes for shard in manifest.shards)
    text = sum(shard.docs.bytes for shard in manifest.shards)
    index = manifest.index.bytes if manifest.index is not None else 0
    counts = manifest.counts
    own = {"gradients": shards - embeddings, "embeddings": embeddings, "text": text, "index": index}
    own["prior"] = manifest.prior.bytes
    if move is not None:
        named = {name: file.bytes for name, file in manifest.files()}
        own["moved"] = sum(named.values()) - sum(own.values())
    return {
        "path": str(path),
        "form": form,
        "snapshot": manifest.number,
        "documents": counts.documents,
        "passages": counts.passages,
        "tokens": counts.tokens,
        "stale": counts.passages if move is not None else 0,
        "dead": counts.dead,
        "bytes": own | {"total": sum(own.values())},
        "removed_bytes": _removed(manifest),
        "bytes_per_passage": round((shards + text) / counts.passages, 1) if counts.passages else None,
        "model": settings.model_name,
        "prior": settings.prior_name,
        "prior_trained": settings.prior_trained,
        "codec": str(settings.codec),
        "embedder": settings.embedder_name,
        "move": None if move is None else {"prior": move.settings.prior_name, "passages": move.passages},
        "shards": len(manifest.shards),
        "keep_text": settings.keep_text,
        "time": manifest.time,
        "fingerprints": {
            "model": settings.model,
            "tokenizer": settings.tokenizer,
            "prior": settings.prior,
            "embedder": settings.embedder,
        },
    }


def _removed(manifest: Manifest) -> dict[str, int]:
    """What removed rows take; text and gradients by the mean of their shard."""
    width = 2 * manifest.settings.embedding_dim
    text = sum(shard.docs.bytes * shard.dead // shard.rows for shard in manifest.shards)
    whole = sum(shard.bytes * shard.dead // shard.rows for shard in manifest.shards)
    embeddings = width * sum(shard.dead for shard in manifest.shards)
    return {"gradients": whole - embeddings, "embeddings": embeddings, "text": text, "total": whole + text}


def beside(snapshot: Snapshot) -> dict[str, int]:
    """What lies on the disk beside one snapshot: how many others there are, bytes of the files that it does not name
    (others' and leftovers), and bytes in quarantine."""
    bank = snapshot.path
    if snapshot.store.form == "packed":
        return {"snapshots": 0, "bytes": 0, "quarantine": 0}
    named = {name for name, _ in snapshot.manifest.files()}
    unnamed = (size for folder in layout.SUFFIXES for name, size in _files(bank, folder) if name not in named)
    others = [number for number in layout.snapshot_numbers(bank) if number != snapshot.number]
    quarantined = sum(size for _, size in _files(bank, "quarantine"))
    return {"snapshots": len(others), "bytes": sum(unnamed), "quarantine": quarantined}


def _files(bank: Path, folder: str) -> Iterator[tuple[str, int]]:
    """Files of a folder with their sizes; what goes or cannot be read meanwhile is left out."""
    with suppress(OSError), os.scandir(bank / folder) as entries:
        for entry in entries:
            with suppress(OSError):
                if entry.is_file(follow_symlinks=False):
                    yield f"{folder}/{entry.name}", entry.stat().st_size
