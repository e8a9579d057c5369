"""Small banks of random rows for the tests: real files, no model. A document is (source, number of passages)."""

from __future__ import annotations

import hashlib
import shutil
from pathlib import Path

import numpy as np

from regrad_cli.bank import create_bank, open_bank, write_bank
from regrad_cli.records import (
    BankSettings,
    CodecSettings,
    Passage,
    RowRef,
    TensorShape,
    document_id,
    row_key,
    sha256_hex,
)

PRIOR = b"a prior, as far as the bank can tell" * 3
DIMENSION = 16


def settings(**changes: object) -> BankSettings:
    values = {
        "model": sha256_hex("model"),
        "model_name": "tiny",
        "tokenizer": sha256_hex("tokenizer"),
        "prior": sha256_hex(PRIOR),
        "prior_name": "seeded",
        "prior_trained": False,
        "tensors": (TensorShape("layers.1.mlp.up_proj.lora_A", 8, 32),),
        "codec": CodecSettings(),
        "code_bytes": 40,
        "scale_count": 4,
        "embedder": sha256_hex("embedder"),
        "embedder_name": "minilm",
        "embedding_dim": DIMENSION,
    }
    return BankSettings(**(values | changes))  # type: ignore[arg-type]


def rows(source: str, count: int, *, text: str = "", made_for: BankSettings | None = None) -> tuple:
    """`count` rows of one document, a function of the source and the text alone: the arguments of Writer.add."""
    made_for = made_for or settings()
    passages = [
        Passage(
            document_id(source),
            source,
            f"Title of {source}",
            ordinal,
            100 * ordinal,
            7 + ordinal,
            f"{text} {ordinal} é",
        )
        for ordinal in range(count)
    ]
    seed = int.from_bytes(hashlib.sha256(f"{source}|{text}".encode("utf-8", "surrogatepass")).digest()[:8], "little")
    rng = np.random.default_rng(seed)
    embeddings = rng.normal(size=(count, made_for.embedding_dim))
    embeddings /= np.linalg.norm(embeddings, axis=1, keepdims=True)
    return (
        passages,
        [row_key(passage, made_for.model, made_for.tokenizer, made_for.prior) for passage in passages],
        rng.integers(0, 256, (count, made_for.code_bytes), dtype=np.uint8),
        rng.normal(size=(count, made_for.scale_count)).astype(np.float16),
        embeddings.astype(np.float16),
    )


def make_bank(path: Path, *commits: list[tuple[str, int]], **changes: object) -> Path:
    """A bank with one commit for each list of documents."""
    made_for = settings(**changes)
    create_bank(path, made_for, PRIOR)
    with write_bank(path) as writer:
        for documents in commits:
            for source, count in documents:
                writer.add(*rows(source, count, made_for=made_for))
            writer.commit("ingest")
        writer.finish()
    return path


def content(path: Path, snapshot: int | None = None) -> dict[str, tuple]:
    """Everything a reader gets from a bank: passage id → (passage, key, codes, scales, embedding), as bytes."""
    with open_bank(path, snapshot) as bank:
        bank.prior_bytes()
        found = {}
        for ref, passage, key in bank.passages():
            row = bank.row(ref)
            assert (row.passage, row.key) == (passage, key)
            found[passage.id] = (passage, key, row.codes, row.scales, row.embedding)
        list(bank.documents())
        question = np.ones((1, bank.settings.embedding_dim), np.float32) / np.sqrt(bank.settings.embedding_dim)
        for warm in (False, True):
            for hit in bank.search(question, len(found) or 1, warm=warm)[0]:
                assert found[hit.passage.id][0] == hit.passage
        return found


def tree(path: Path) -> dict[str, bytes]:
    """All files of a bank but the lock's signature."""
    return {
        str(file.relative_to(path)): file.read_bytes()
        for file in sorted(path.rglob("*"))
        if file.is_file() and file.name != "lock"
    }


def copy_of(bank: Path, target: Path) -> Path:
    shutil.copytree(bank, target)
    return target


def all_refs(path: Path) -> list[RowRef]:
    with open_bank(path) as bank:
        return [ref for ref, _, _ in bank.passages()]
