"""Makes any number of passages of about 192 tokens out of examples/docs, each one document of one passage.

Passages of the examples are cut as `regrad ingest` cuts them; further ones have the same sentences in another order.
"""

from __future__ import annotations

import itertools
import json
import random
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from regrad_cli.documents import read_documents, split
from regrad_cli.records import Document, Passage

MAX_TOKENS = 192
MIN_TOKENS = 160  # shorter ones, the ends of documents, are left out: what is compared is a passage of full size

TokenSpans = Callable[[str], list[tuple[int, int]]]


def make_passages(documents: Path, count: int, token_spans: TokenSpans, *, seed: int = 0) -> list[Passage]:
    """`count` different passages of MIN_TOKENS to MAX_TOKENS tokens, title included; the same for the same seed.

    raises  ValueError where the documents hold no passage of that size
    """
    found = list(itertools.islice(_shuffled(documents, token_spans, random.Random(seed)), count))
    if len(found) < count:
        raise ValueError(f"{documents} gives {len(found)} passages of {MIN_TOKENS} to {MAX_TOKENS} tokens, not {count}")
    return found


def _shuffled(documents: Path, token_spans: TokenSpans, order: random.Random) -> Iterator[Passage]:
    base = []
    for document in read_documents([documents], base=documents.parent):
        if isinstance(document, Document):
            for passage in split(document, token_spans, max_tokens=MAX_TOKENS):
                base.append((document.title, " ".join((passage.text or "").split())))
    seen: set[str] = set()
    idle = 0
    while idle < 20:  # rounds over the documents that gave nothing new: there is nothing more to find
        idle += 1
        for title, text in base:
            found = whole(title, text, token_spans, len(seen))
            if found is not None and found.training_text not in seen:
                seen.add(found.training_text)
                yield found
                idle = 0
        base = [(title, _reordered(text, order)) for title, text in base]


def whole(title: str, text: str, token_spans: TokenSpans, number: int) -> Passage | None:
    """The text as the only passage of a document, or None where it would not be one of about the full size."""
    document = Document(f"passages.jsonl#{number}", title, text)
    passages = list(split(document, token_spans, max_tokens=MAX_TOKENS))
    if len(passages) != 1 or not MIN_TOKENS <= passages[0].tokens <= MAX_TOKENS or passages[0].text != text:
        return None
    return passages[0]


def _reordered(text: str, order: random.Random) -> str:
    sentences = re.split(r"(?<=[.!?|]) ", text)
    order.shuffle(sentences)
    return " ".join(sentences)


def write_jsonl(passages: list[Passage], path: Path) -> None:
    """As records that `regrad ingest` reads: a title and a text a line."""
    lines = [json.dumps({"title": passage.title, "text": passage.text}, ensure_ascii=False) for passage in passages]
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
