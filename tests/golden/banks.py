"""What the golden banks are read for: everything that the public readers tell of a bank of format 1, as plain values.

The same function tells it when a bank is made, and then forever after: what it tells must not change.
"""

from __future__ import annotations

import hashlib
import tarfile
from pathlib import Path
from typing import Any

import numpy as np

from regrad_cli.bank import Snapshot, log, open_bank
from regrad_cli.learn.prior import Prior
from regrad_cli.learn.rows import layout_of

FOLDER = Path(__file__).parent
NAMES = tuple(sorted(path.stem for path in FOLDER.glob("*.json")))
LOGGED = ("snapshot", "parent", "operation", "time", "documents", "passages", "dead", "prior")
COUNTED = ("documents", "passages", "tokens", "stale", "dead", "codec", "prior", "prior_trained", "keep_text", "shards")


def brought_out(name: str, folder: Path) -> Path:
    """A copy of a golden bank in a folder: the live form's, or the packed file's path."""
    packed = FOLDER / f"{name}.gbank"
    if packed.exists():
        (folder / packed.name).write_bytes(packed.read_bytes())
        return folder / packed.name
    with tarfile.open(FOLDER / f"{name}.tar.xz") as archive:
        archive.extractall(folder / name, filter="data")
    return folder / name


def told(path: Path) -> dict[str, Any]:
    """Everything that a bank holds, by its public readers."""
    entries = log(path)
    with open_bank(path) as bank:
        stats, moved = bank.stats(), bank.moved()
        return {
            "bank": bank.manifest.bank,
            "oldest": bank.manifest.oldest,
            "log": [{name: entry[name] for name in LOGGED} for entry in entries],
            "counts": {name: stats[name] for name in COUNTED} | {"move": stats["move"]},
            "settings": bank.settings.to_json(),
            "prior": _prior(bank.prior_bytes()),
            "documents": list(bank.documents()),
            "rows": _rows(bank),
            "gradients": _gradients(bank),
            "found": _found(bank),
            "moved": None if moved is None else _rows(moved) | {"prior": _prior(moved.prior_bytes())},
            "older": {str(entry["snapshot"]): _older(path, entry["snapshot"]) for entry in entries[1:]},
            "files": sorted([name, file.bytes] for name, file in bank.manifest.files()),
        } | _segments(bank)


def _older(path: Path, number: int) -> list[str]:
    with open_bank(path, number) as bank:
        return [f"{passage.id} {key.hex()}" for _, passage, key in bank.passages()]


def _rows(bank: Snapshot) -> dict[str, Any]:
    """By passage, what a row holds; codes, scales and embedding as their SHA-256."""
    found = {}
    for ref, passage, key in bank.passages():
        row = bank.row(ref)
        assert (row.passage, row.key) == (passage, key)
        words = [passage.source, passage.title, passage.text]
        digests = [hashlib.sha256(part).hexdigest() for part in (row.codes, row.scales, row.embedding)]
        found[passage.id] = [*words, passage.offset, passage.tokens, key.hex(), *digests]
    return found


def _gradients(bank: Snapshot) -> dict[str, dict[str, list[float]]]:
    """Of each document's first passage, in numbers, its segments added up; of the others the bytes are told."""
    made = layout_of(bank.settings)
    found = {}
    for ref, passage, _ in bank.passages():
        if passage.ordinal:
            continue
        rows = bank.read_rows([ref])
        decoded = made.sums(rows.codes, rows.scales)
        found[passage.id] = {name: _numbers(tensor[0].flatten().numpy()) for name, tensor in decoded.items()}
    return found


def _segments(bank: Snapshot) -> dict[str, list[Any]]:
    """Where each passage's segments begin, and their vectors; nothing where passages are whole."""
    if bank.settings.segments == 1:
        return {}
    made, found = layout_of(bank.settings), {}
    for ref, passage, _ in bank.passages():
        rows = bank.read_rows([ref])
        parts = made.split(rows.codes, rows.scales)
        assert parts.vectors is not None
        found[passage.id] = list(map(list, zip(parts.begins.tolist(), map(_numbers, parts.vectors), strict=True)))
    return {"segments": found}


def _prior(data: bytes) -> dict[str, Any]:
    prior = Prior.from_bytes(data)
    tensors = {name: _numbers(tensor.flatten().numpy()) for name, tensor in prior.tensors.items()}
    return {"card": prior.card, "log_step_sizes": prior.log_step_sizes, "tensors": tensors}


def _numbers(values: np.ndarray) -> list[float]:
    """Six digits, of the seven that float32 has."""
    return [float(f"{value:.6g}") for value in values.tolist()]


def _found(bank: Snapshot) -> list[list[Any]]:
    """What two questions find, by passage and score."""
    vectors = np.eye(2, bank.settings.embedding_dim, dtype=np.float32)
    return [[[hit.passage.id, round(hit.score, 12)] for hit in hits] for hits in bank.search(vectors, 5)]
