"""Synthetic rows for banks of any size: a function of their number alone, quickly made. Knows no bank and no codec.

Documents of eight passages, words with Zipf's frequencies, embeddings of one document near each other and near one of
256 subjects, codes and scales at random. Their shapes are those of a gradient of 1 kB (or, by `kind`, of the starter's
three a passage: 179 kB). Fingerprints are those of no model, for none is asked.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from regrad_cli.records import (
    BankSettings,
    CodecSettings,
    Passage,
    TensorShape,
    document_id,
    row_key,
    sha256_hex,
)

COMMIT_ROWS = 256  # as ingest does it
PASSAGES = 8  # a document
DIMENSION = 384
SUBJECTS = 256
QUESTIONS = 50


class Kind(NamedTuple):
    """What rows hold: gradients of these tensors, by this codec, so many a passage."""

    tensors: list[TensorShape]
    codec: CodecSettings
    segments: int


SEGMENT = 300  # characters, where passages are cut
KINDS = {
    "small": Kind([TensorShape("layer.lora_A", 8, 1856)], CodecSettings("lowrank", rank=1, bits=4, group=64), 1),
    "starter": Kind(
        [
            TensorShape(f"layers.{layer}.{name}", rows, cols)
            for layer in range(15, 30)
            for name, rows, cols in (
                ("gate.lora_A", 32, 576),
                ("gate.lora_B", 1536, 32),
                ("up.lora_A", 32, 576),
                ("up.lora_B", 1536, 32),
                ("down.lora_A", 32, 1536),
                ("down.lora_B", 576, 32),
            )
        ],
        CodecSettings("lowrank", rank=2, bits=2, group=64),
        3,
    ),
}
PRIOR = b"no prior: nothing here is ever applied to a model"
_WORDS = np.array([f"{a}{b}{c}" for a in "bdfglmnprst" for b in "aeiouy" for c in ("ld", "m", "rt", "vel", "x")])


def settings(kind: str) -> BankSettings:
    """Of a bank of such rows: the layout of docs/bank-format.md, worked out without the codec, which needs torch."""
    tensors, codec, segments = KINDS[kind]
    padded = codec.rank * sum(-(-max(shape.rows, shape.cols) // codec.group) * codec.group for shape in tensors)
    code_bytes = codec.rank * sum(1 + min(shape.rows, shape.cols) for shape in tensors) + padded * codec.bits // 8
    return BankSettings(
        model=sha256_hex("model"),
        model_name="none",
        tokenizer=sha256_hex("tokenizer"),
        prior=sha256_hex(PRIOR),
        prior_name="none",
        prior_trained=True,
        tensors=tuple(tensors),
        codec=codec,
        code_bytes=segments * (code_bytes + (4 + DIMENSION if segments > 1 else 0)),
        scale_count=segments * (padded // codec.group),
        segments=segments,
        embedder=sha256_hex("embedder"),
        embedder_name="none",
        embedding_dim=DIMENSION,
    )


def rows(made_for: BankSettings, block: int, count: int = COMMIT_ROWS) -> tuple[Any, ...]:
    """The `block`-th `count` rows: passages, keys, codes, scales, embeddings, as Writer.add takes them."""
    chance = np.random.default_rng([block, count])
    passages, words = [], _text(chance, count)
    for row in range(count):
        number, ordinal = divmod(block * count + row, PASSAGES)
        source, tokens = f"notes/{number % 97:02d}/{number:07d}.md", len(words[row])
        title, text = f"Note {number}", " ".join(words[row])
        passages.append(Passage(document_id(source), source, title, ordinal, 900 * ordinal, tokens, text))
    keys = [row_key(passage, made_for.model, made_for.tokenizer, made_for.prior) for passage in passages]
    codes = chance.integers(0, 256, (count, made_for.code_bytes), dtype=np.uint8)
    if made_for.segments > 1:
        begins = SEGMENT * np.arange(made_for.segments, dtype="<u4")
        codes.reshape(count, made_for.segments, -1)[:, :, :4] = begins.view(np.uint8).reshape(-1, 4)
    scales = chance.random((count, made_for.scale_count), np.float32).astype(np.float16)
    return passages, keys, codes, scales, embeddings(block, count)


def embeddings(block: int, count: int = COMMIT_ROWS) -> np.ndarray:
    """(count, d) float16 of unit norm: a subject, a document's own direction, and the passage's."""
    chance = np.random.default_rng([block, count, 1])
    subjects = np.random.default_rng(0).standard_normal((SUBJECTS, DIMENSION), np.float32)
    documents = -(-count // PASSAGES)
    own = subjects[chance.integers(0, SUBJECTS, documents)] + chance.standard_normal((documents, DIMENSION), np.float32)
    found = np.repeat(own, PASSAGES, axis=0)[:count] + 0.7 * chance.standard_normal((count, DIMENSION), np.float32)
    found /= np.linalg.norm(found, axis=1, keepdims=True)
    return found.astype(np.float16)


def _text(chance: np.random.Generator, count: int) -> list[list[str]]:
    """About 190 tokens of words a passage."""
    drawn = np.minimum(chance.zipf(1.3, (count, 150)), len(_WORDS)) - 1
    return _WORDS[drawn].tolist()


def questions(total: int, count: int = QUESTIONS) -> Iterator[tuple[str, np.ndarray, str]]:
    """(text, (d,) float32 vector, id of the passage it was made of) of questions spread over the rows."""
    chance = np.random.default_rng(total)
    for number in range(count):
        block, row = number * (total // COMMIT_ROWS) // count, int(chance.integers(0, COMMIT_ROWS))
        vector = embeddings(block)[row].astype(np.float32) + 0.02 * chance.standard_normal(DIMENSION, np.float32)
        passage = rows(settings("small"), block)[0][row]
        text = " ".join((passage.text or "").split()[40:48])
        yield text, vector / np.linalg.norm(vector), passage.id
