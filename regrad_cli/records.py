"""The plain records that cross the walls between modules. Standard library only: no arrays, no files, no models.

A passage flows one way: Document → Passage → (gradient row) → Hit → Answer.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from typing import Any, NamedTuple


def canonical_json(value: Any) -> str:
    """One spelling for one value: keys sorted, no spaces, UTF-8 kept. What is hashed is always this text."""
    return json.dumps(value, ensure_ascii=False, sort_keys=True, separators=(",", ":"), allow_nan=False)


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
        return f"{self.title}. {self.text}" if self.title else (self.text or "")


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
    bits    4 or 8, for what is stored
    group   values that share one fp16 scale
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
    code_bytes and scale_count are the codec's row: (code_bytes,) uint8 and (scale_count,) float16.
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

    def to_json(self) -> dict[str, Any]:
        return asdict(self) | {"tensors": [list(tensor) for tensor in self.tensors]}

    @classmethod
    def from_json(cls, data: dict[str, Any]) -> BankSettings:
        tensors = tuple(TensorShape(*tensor) for tensor in data["tensors"])
        return cls(**(data | {"tensors": tensors, "codec": CodecSettings(**data["codec"])}))


class RowRef(NamedTuple):
    """Where a row lies in one snapshot: the shard's position in the manifest and the row in that shard."""

    shard: int
    row: int


@dataclass(frozen=True, slots=True)
class Hit:
    """A retrieved passage: its place, its cosine similarity to the question, and the passage itself."""

    ref: RowRef
    score: float
    passage: Passage


# ── events that use cases yield, and that render.py prints ──────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Notice:
    """Something a person should know while work goes on (a model is fetched, a prior is untrained); goes to stderr."""

    message: str


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the work is. `total` is None while it is not known."""

    stage: str
    done: int
    total: int | None


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
class IngestSummary:
    """The end of an ingest. `replaced` counts documents whose earlier text went; `removed` documents that were pruned.
    With --dry-run, `added` is what would be added, and `estimated_bytes` what it would take on disk."""

    documents: int = 0
    passages: int = 0
    added: int = 0
    unchanged: int = 0
    replaced: int = 0
    removed: int = 0
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
class Answer:
    """One answered question. `grounded` is False where the untouched base model answered because nothing fitted."""

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


# ── tasks to learn from and to measure on, and the events of meta-train ─────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class TaskQuestion:
    """A question about a task's passages; `answers` are aliases of one answer, the first is what training teaches."""

    question: str
    answers: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Task:
    """Passages and the questions that they answer."""

    id: str
    title: str
    passages: tuple[str, ...]
    questions: tuple[TaskQuestion, ...]

    @property
    def training_texts(self) -> tuple[str, ...]:
        """The exact text of each passage that its gradient is taken on."""
        return tuple(training_text(self.title, text) for text in self.passages)


@dataclass(frozen=True, slots=True)
class TrainStep:
    """One step of training. `loss` is the mean answer loss of its questions, None where every task was left out."""

    step: int
    steps: int
    loss: float | None
    learning_rate: float
    elapsed_s: float
    left_s: float
    skipped: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Validated:
    """Scores on the dev tasks after `step` steps: {name: mean answer loss}; the lower `chosen`, the better."""

    step: int
    losses: dict[str, float]
    chosen: float
    best: bool


@dataclass(frozen=True, slots=True)
class Trained:
    """The end of training: the prior in `file` is that of `best_step`."""

    file: str
    steps: int
    best_step: int
    losses: dict[str, float]
    tasks: int
    skipped: tuple[str, ...]
    elapsed_s: float
