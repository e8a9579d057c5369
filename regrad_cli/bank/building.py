"""A new shard's bytes: rows and their lines as a shard's file, its docs file and its manifest entry. Knows the layout
that shards.py reads; writes no file.

The bytes are ours to the last one, not what some version of the safetensors library writes (they are the same, and a
test says so): a shard in canonical form is told by them.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from regrad_cli.bank.manifest import BLOCKS, FileEntry, ShardEntry
from regrad_cli.bank.shards import DTYPES, LINE_LIMIT, expected_tensors, passage_line, row_checksum
from regrad_cli.records import BankSettings, Passage


def build_shard(
    settings: BankSettings,
    passages: Sequence[Passage],
    keys: Sequence[bytes],
    codes: npt.NDArray[np.uint8],
    scales: npt.NDArray[np.float16],
    embeddings: npt.NDArray[np.float16],
) -> tuple[list[Any], bytes, ShardEntry]:
    """The shard's file as the buffers it is made of, its docs file, and its manifest entry. The same rows give the same
    bytes, always."""
    lines = [passage_line(passage) for passage in passages]
    if max(map(len, lines)) > LINE_LIMIT:
        raise ValueError(f"a passage's line is longer than {LINE_LIMIT} bytes")
    checksums = [
        row_checksum(keys[row], codes[row].tobytes(), scales[row].tobytes(), embeddings[row].tobytes(), lines[row])
        for row in range(len(lines))
    ]
    tensors: dict[str, npt.NDArray[Any]] = {
        "tokens": np.array([passage.tokens for passage in passages], np.int32),
        "embeddings": embeddings,
        "scales": scales,
        "checksums": np.frombuffer(b"".join(checksums), np.uint8),
        "codes": codes,
        "documents": np.frombuffer(bytes.fromhex("".join(p.document for p in passages)), np.uint8),
        "keys": np.frombuffer(b"".join(keys), np.uint8),
    }
    return lay_out(settings, lines, tensors)


def lay_out(
    settings: BankSettings, lines: Sequence[bytes], tensors: Mapping[str, npt.NDArray[Any]]
) -> tuple[list[Any], bytes, ShardEntry]:
    """As build_shard, of lines and tensors that are ready; `line_ends` are made here."""
    rows, docs = len(lines), b"".join(lines)
    made = {**tensors, "line_ends": np.cumsum([len(line) for line in lines], dtype=np.int64)}
    parts: dict[str, Any] = {"header": shard_header(settings, rows)}
    for name, (dtype, _) in expected_tensors(settings, rows).items():
        parts[name] = np.ascontiguousarray(made[name], DTYPES[dtype]).view(np.uint8).reshape(-1).data
    whole = hashlib.sha256()
    for part in parts.values():
        whole.update(part)
    documents = np.frombuffer(parts["documents"], ">u8")
    entry = ShardEntry(
        sha256=whole.hexdigest(),
        bytes=sum(len(memoryview(part).cast("B")) for part in parts.values()),
        rows=rows,
        first=f"{int(documents.min()):016x}",
        last=f"{int(documents.max()):016x}",
        tokens=int(made["tokens"].sum(dtype=np.int64)),
        blocks={block: hashlib.sha256(parts[block]).hexdigest() for block in BLOCKS},
        docs=FileEntry(hashlib.sha256(docs).hexdigest(), len(docs)),
    )
    return list(parts.values()), docs, entry


def shard_header(settings: BankSettings, rows: int) -> bytes:
    """A shard's safetensors header, its 8 length bytes included, filled with spaces to a multiple of 8."""
    body: dict[str, Any] = {}
    position = 0
    for tensor, (dtype, shape) in expected_tensors(settings, rows).items():
        end = position + math.prod(shape) * np.dtype(DTYPES[dtype]).itemsize
        body[tensor] = {"dtype": dtype, "shape": list(shape), "data_offsets": [position, end]}
        position = end
    text = json.dumps(body, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
