"""Running the two use cases in a test: a bank of tiny models, an ingest as its events, a bank's rows as values."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from regrad_cli import ingest as use_case
from regrad_cli.answer import Answerer, AskOptions
from regrad_cli.bank import open_bank
from regrad_cli.records import Answer, IngestSummary, Progress, Skipped, document_id

Rows = dict[tuple[str, int], tuple[Any, ...]]  # (document, ordinal) → everything else a row holds

CHUNK_TOKENS = 80


def make_bank(path: Path, model: Path, embedder: Path, **options: Any) -> Path:
    """A bank with passages of at most 80 tokens."""
    options = {"chunk_tokens": CHUNK_TOKENS, "chunk_overlap": 0, "embedder": str(embedder)} | options
    list(use_case.initialise(path, model=str(model), **options))
    return path


def events_of(bank: Path, *paths: Path, dtype: str = "fp32", **options: Any) -> Iterator[Any]:
    return use_case.ingest(bank, use_case.IngestOptions(paths=paths, device="cpu", dtype=dtype, **options))


def ingest(bank: Path, *paths: Path, **options: Any) -> IngestSummary:
    return list(events_of(bank, *paths, **options))[-1]


def rows(bank: Path, snapshot: int | None = None) -> Rows:
    """Every live row, each proved by its checksum; no place holds two."""
    found: Rows = {}
    with open_bank(bank, snapshot) as opened:
        for ref, passage, key in opened.passages():
            row = opened.row(ref)
            assert row.key == key
            assert (passage.document, passage.ordinal) not in found, "two rows at one place of a document"
            found[passage.document, passage.ordinal] = (
                passage.source, passage.title, passage.offset, passage.tokens, passage.text,
                key, row.codes, row.scales, row.embedding,
            )  # fmt: skip
    return found


def rows_of(bank: Path, source: str) -> Rows:
    return {place: row for place, row in rows(bank).items() if place[0] == document_id(source)}


def sources(bank: Path) -> set[str]:
    with open_bank(bank) as opened:
        return {entry["source"] for entry in opened.documents()}


def number(bank: Path) -> int:
    with open_bank(bank) as opened:
        return opened.number


def files(bank: Path) -> dict[str, bytes]:
    return {str(path.relative_to(bank)): path.read_bytes() for path in sorted(bank.rglob("*")) if path.is_file()}


def write(root: Path, documents: dict[str, str | bytes]) -> Path:
    for name, content in documents.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


def skipped(summary: IngestSummary) -> dict[str, str]:
    return {one.source: one.reason for one in summary.skipped if isinstance(one, Skipped)}


def progress(events: list[Any]) -> list[Progress]:
    return [event for event in events if isinstance(event, Progress)]


@contextmanager
def counted() -> Iterator[list[int]]:
    """Inside, the numbers of passages that gradients are asked for, one entry a call."""
    from regrad_cli.learn import gradients

    real, calls = gradients.map_gradients, []

    def watched(model: Any, prior: Any, passages: Any, then: Any) -> Any:
        calls.append(len(passages))
        return real(model, prior, passages, then)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gradients, "map_gradients", watched)
        yield calls


def answered(answerer: Answerer, question: str, mode: str = "regrad", **options: Any) -> Answer:
    options = {"max_tokens": 8} | options
    return list(answerer.ask(question, AskOptions(mode=mode, **options)))[-1]


def ask(bank: Path | None, question: str, mode: str = "regrad", **options: Any) -> Answer:
    """One question to an Answerer of its own; `snapshot`, `skip_damaged` and `model` are the Answerer's."""
    kept = {name: options.pop(name) for name in ("snapshot", "skip_damaged", "model") if name in options}
    with Answerer(bank, modes={mode}, device="cpu", dtype="fp32", **kept) as answerer:
        return answered(answerer, question, mode, **options)


def returned(generator: Any) -> Any:
    """What a generator returns."""
    while True:
        try:
            next(generator)
        except StopIteration as stop:
            return stop.value


def story(name: str, parts: int = 3, about: str = "the lamp is lit at dusk") -> str:
    """A Markdown text of `parts` sections, each a passage of its own in a bank of `make_bank`."""
    sections = [
        f"## Part {part}\n\nHere in {name} {about}, and keeper {part} has {part + 3} keys." for part in range(parts)
    ]
    return "\n\n".join([f"# {name}", *sections]) + "\n"
