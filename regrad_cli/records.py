"""The plain records that cross the walls between modules. Standard library only: no arrays, no files, no models.

A passage flows one way: Document → Passage → (gradient row) → Hit → Answer.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


def canonical_json(value: Any) -> str:
    """One spelling for one value: keys sorted, no spaces, UTF-8 kept. What is hashed is always this text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


def canonical_object(spelled: Mapping[str, str]) -> str:
    """Canonical JSON of an object whose values are that already; names that need no escapes."""
    return "{" + ",".join(f'"{name}":{spelled[name]}' for name in sorted(spelled)) + "}"


def sha256_hex(data: bytes | str) -> str:
    """SHA-256 of bytes (or of a string's UTF-8), 64 hex digits."""
    return hashlib.sha256(data.encode() if isinstance(data, str) else data).hexdigest()


def document_id(source: str) -> str:
    """A document's id: the first 16 hex digits of the SHA-256 of its source, so it stays when the text changes."""
    return hashlib.sha256(source.encode("utf-8", "surrogateescape")).hexdigest()[:16]


@dataclass(frozen=True, slots=True)
class Document:
    """One document as read: `source` is where it came from (bank-format rule 4), `title` its own or its file's."""

    source: str
    title: str
    text: str

    @property
    def id(self) -> str:
        return document_id(self.source)


@dataclass(frozen=True, slots=True)
class Skipped:
    """An input that was not ingested, with the reason in words a user can act on."""

    source: str
    reason: str


@dataclass(frozen=True, slots=True)
class Passage:
    """A piece of a document: what one gradient is made of, and what one row of a bank stands for.

    ordinal   position among the document's passages, from 0
    offset    where the text starts in the document's text, in characters
    tokens    tokens of `training_text` under the model's tokenizer
    text      None where the bank was made with --no-text
    """

    document: str
    source: str
    title: str
    ordinal: int
    offset: int
    tokens: int
    text: str | None

    @property
    def id(self) -> str:
        return f"{self.document}:{self.ordinal}"

    @property
    def training_text(self) -> str:
        """The exact text the gradient is taken on: title first, at training and at ingest alike."""
        return training_text(self.title, self.text or "")

    @property
    def embedding_text(self) -> str:
        """The exact text that is embedded for retrieval."""
        return embedding_text(self.title, self.text or "")


def embedding_text(title: str, text: str) -> str:
    """Title and text as one passage for retrieval."""
    return f"{title}. {text}" if title else text


def training_text(title: str, text: str) -> str:
    """Title and text as one passage for the document loss."""
    return f"{title}\n{text}" if title else text


def row_key(passage: Passage, model: str, tokenizer: str, prior: str) -> bytes:
    """The identity of a row, 32 bytes: the text as trained on, and the fingerprints its gradient depends on."""
    parts = [passage.training_text, model, tokenizer, prior]
    return hashlib.sha256(canonical_json(parts).encode("utf-8", "surrogatepass")).digest()


class TensorShape(NamedTuple):
    """One adapted tensor, by the name it has in the prior: a matrix of rows × cols."""

    name: str
    rows: int
    cols: int


@dataclass(frozen=True, slots=True)
class CodecSettings:
    """How a gradient becomes bytes.

    kind    "lowrank" (rank-`rank` factors of every tensor) or "full" (the tensors themselves)
    rank    number of factor pairs; 0 for "full"
    bits    1 (of low rank alone), 2, 4 or 8, for what is stored
    group   values that share one fp16 scale; of 1 bit only what vectors are filled up to
    """

    kind: str = "lowrank"
    rank: int = 1
    bits: int = 4
    group: int = 64

    def __str__(self) -> str:
        return f"r{self.rank}-int{self.bits}" if self.kind == "lowrank" else f"int{self.bits}"


@dataclass(frozen=True, slots=True)
class BankSettings:
    """What a bank was made for; fixed at `init`, stored in every manifest, compared before anything is computed.

    model, tokenizer, prior, embedder are fingerprints (64 hex digits); the *_name fields are what a person calls them.
    code_bytes and scale_count are a row's gradients: (code_bytes,) uint8 and (scale_count,) float16, of at most
    `segments` segments of its passage.
    """

    model: str
    model_name: str
    tokenizer: str
    prior: str
    prior_name: str
    prior_trained: bool
    tensors: tuple[TensorShape, ...]
    codec: CodecSettings
    code_bytes: int
    scale_count: int
    embedder: str
    embedder_name: str
    embedding_dim: int
    chunk_tokens: int = 192
    chunk_overlap: int = 24
    keep_text: bool = True
    segments: int = 1

    @property
    def estimated_row_bytes(self) -> int:
        """About what one more row takes on disk, its text included."""
        row = self.code_bytes + 2 * self.scale_count + 2 * self.embedding_dim + 64
        return row + (6 * self.chunk_tokens if self.keep_text else 0)

    def to_json(self) -> dict[str, Any]:
        data = asdict(self) | {"tensors": [list(tensor) for tensor in self.tensors]}
        if self.segments == 1:  # as banks were before there were segments, and as their readers know them
            del data["segments"]
        return data

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BankSettings:
        tensors = tuple(TensorShape(*tensor) for tensor in data["tensors"])
        return cls(**(data | {"tensors": tensors, "codec": CodecSettings(**data["codec"])}))


class RowRef(NamedTuple):
    """Where a row lies in one snapshot: the shard's position in the manifest and the row in that shard."""

    shard: int
    row: int


@dataclass(frozen=True, slots=True)
class Refused:
    """A question among several that cannot be answered, and why."""

    question: str
    reason: str


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved passage: its place, how well it fits the question, and the passage itself.

    score    what hits are ordered by, at most 1: comparable from question to question, not from one way of searching to
             another
    dense    the cosine of the embeddings, lexical the share of the question's words, from 0 to 1, where they were taken
    fits     whether the score reaches what a passage must; None where nothing is asked of it
    """

    ref: RowRef
    score: float
    passage: Passage
    dense: float | None = None
    lexical: float | None = None
    fits: bool | None = None


# ── events that use cases yield, and that render.py prints ──────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person should know while work goes on (a model is fetched, a prior is untrained); goes to stderr."""

    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is. `total` is None while it is not known; `note` says how it goes, in a word or two; `left_s`
    is the time left where the work knows it better than its own pace tells."""

    stage: str
    done: int
    total: int | None
    note: str = ""
    left_s: float | None = None


@dataclass(frozen=True, slots=True)
class DocumentDone:
    """One document is in the bank as it should be."""

    id: str
    source: str
    title: str
    passages: int
    added: int
    unchanged: int
    removed: int


@dataclass(frozen=True, slots=True)
class DocumentGone:
    """A document that was pruned, or with --dry-run would be: its file is gone, or the record from its file."""

    id: str
    source: str


@dataclass(frozen=True, slots=True)
class IngestSummary:
    """The end of an ingest. `replaced` counts documents whose earlier text went; `removed` documents that were pruned;
    `recomputed` passages that a move to another prior computed now. With --dry-run, `added` and `recomputed` are what
    would be, and `estimated_bytes` what it would take on disk."""

    documents: int = 0
    passages: int = 0
    added: int = 0
    unchanged: int = 0
    replaced: int = 0
    removed: int = 0
    recomputed: int = 0
    skipped: tuple[Skipped, ...] = ()
    seconds: float = 0.0
    snapshot: int | None = None
    dry_run: bool = False
    estimated_bytes: int = 0
    estimated_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class Piece:
    """The next piece of an answer's text, as it is generated."""

    text: str


@dataclass(frozen=True, slots=True)
class Used:
    """A passage that an answer used, with the weight its gradient got (None where no gradient was applied)."""

    id: str
    source: str
    title: str
    score: float
    weight: float | None
    text: str | None


@dataclass(frozen=True, slots=True)
class Effect:
    """What one passage's gradient does: by how many nats the answer's log-probability is higher with it than without.
    Where passages answered one by one, by itself; where they were added up, beside all others."""

    id: str
    weight: float
    change: float


@dataclass(frozen=True, slots=True)
class Explanation:
    """The log-probability of an answer, its end included, in nats: as it was given, by the prior alone, by the base
    model; and what each passage did."""

    log_probability: float
    without_gradients: float
    base_model: float
    passages: tuple[Effect, ...]


@dataclass(frozen=True, slots=True)
class Answer:
    """One answered question. `grounded` is False where the untouched base model answered because nothing fitted;
    `explain` is there where it was asked for and gradients were applied."""

    question: str
    answer: str
    mode: str
    grounded: bool
    passages: tuple[Used, ...]
    tokens: dict[str, int]
    seconds: dict[str, float]
    model: str
    prior: str | None
    bank: str | None
    partial: bool = False
    notices: tuple[str, ...] = field(default=())
    explain: Explanation | None = None


@dataclass(frozen=True, slots=True)
class Comparison:
    """One question's answers in several modes. Loading (once a session) and retrieval happened once, in these seconds;
    the retrieval counts in each answer that used it as well.
    """

    question: str
    answers: tuple[Answer, ...]
    seconds: dict[str, float]


@dataclass(frozen=True, slots=True)
class Exported:
    """An adapter that was written: the folder, what it holds, and the passages that it was made of.

    prompt    what the user's turn has to say for the question to be answered as `ask` does
    modules   how many of the model's modules it adapts
    """

    path: str
    question: str
    prompt: str
    base_model: str
    prior: str
    bank: str
    rank: int
    modules: int
    size_bytes: int
    passages: tuple[Used, ...]
    partial: bool = False
    notices: tuple[str, ...] = field(default=())
