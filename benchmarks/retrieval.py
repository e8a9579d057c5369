"""Measures how often retrieval finds the passage, against each of its ways alone, and whether "nothing fits" is right.

python -m benchmarks.retrieval DATA [--write]

DATA holds tasks as JSON lines: nq, xquad and covid, each -train and -dev. Banks are made of their passages and of
examples/docs, with the real chunking and embeddings and with one byte in place of each gradient, which retrieval never
looks at: no language model runs. With --write the tables are kept in benchmarks/RETRIEVAL.md.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from benchmarks import machine
from benchmarks.bench import EXAMPLES, QUESTIONS, Bench, Options, environment, told
from benchmarks.measure import interleaved, spread

RESULTS = Path(__file__).with_name("RETRIEVAL.md")
WAYS = ("dense", "lexical", "fused")
GENERAL = ("nq", "xquad")
FUSION_RANK = 60  # of reciprocal rank fusion
DEPTH = 100  # hits of each way that are fused by rank
FOREIGN = 100  # questions of another set, spread over its tasks
ROUNDS = 7


class Stage:
    """Banks, questions and vectors of one run."""

    def __init__(self, folder: Path, data: Path) -> None:
        from regrad_cli.embed import load_embedder
        from regrad_cli.learn.tokens import Tokenizer

        self.data = data
        self.bench = Bench(folder, Options())
        self.embedder = load_embedder(self.bench.embedder_folder)
        self.spans = Tokenizer(self.bench.model_folder).spans
        self._vectors: dict[str, Any] = {}

    def vector(self, question: str) -> Any:
        if question not in self._vectors:
            self._vectors[question] = self.embedder.encode_query(question)
        return self._vectors[question]

    def questions(self, *names: str, limit: int | None = None) -> list[Any]:
        """Questions of the sets named (as `regrad eval --limit` takes them), or of the examples."""
        from regrad_cli.evidence import read_questions

        files = [QUESTIONS if name == "examples" else self.data / f"{name}.jsonl" for name in names]
        return read_questions(files, limit)[0]

    def bank(self, name: str, documents: Iterable[Any]) -> Path:
        """A bank of these documents whose gradients are one byte each."""
        import numpy as np

        from regrad_cli.bank import create_bank, write_bank
        from regrad_cli.fingerprints import fingerprint_embedder
        from regrad_cli.passages import split
        from regrad_cli.records import BankSettings, CodecSettings, TensorShape, row_key, sha256_hex

        prior = b"no prior: nothing is answered from this bank"
        settings = BankSettings(
            model=sha256_hex("none"),
            model_name="none",
            tokenizer=sha256_hex("none"),
            prior=sha256_hex(prior),
            prior_name="none",
            prior_trained=False,
            tensors=(TensorShape("none", 1, 1),),
            codec=CodecSettings(),
            code_bytes=1,
            scale_count=1,
            embedder=fingerprint_embedder(self.bench.embedder_folder),
            embedder_name=self.bench.options.embedder,
            embedding_dim=self.embedder.dimension,
        )
        path = self.bench.folder / f"{name}.gbank"
        create_bank(path, settings, prior)
        passages = [piece for document in documents for piece in split(document, self.spans)]
        told(f"{name}: embedding {len(passages):,} passages …")
        with write_bank(path) as writer:
            for start in range(0, len(passages), 256):
                part = passages[start : start + 256]
                keys = [row_key(passage, settings.model, settings.tokenizer, settings.prior) for passage in part]
                vectors = self.embedder.encode([passage.embedding_text for passage in part]).astype(np.float16)
                rows = np.zeros((len(part), 1))
                writer.add(part, keys, rows.astype(np.uint8), rows.astype(np.float16), vectors)
                writer.commit("ingest")
            writer.finish()
        return path

    def documents(self, *names: str) -> Iterator[Any]:
        """Each passage of these sets as a document."""
        from regrad_cli.documents import read_documents
        from regrad_cli.records import Document
        from regrad_cli.tasks import read_tasks

        for name in names:
            if name == "examples":
                read = read_documents([EXAMPLES], base=EXAMPLES.parents[1])
                yield from (each for each in read if isinstance(each, Document))
                continue
            for task in read_tasks([self.data / f"{name}.jsonl"])[0]:
                for number, text in enumerate(task.passages):
                    yield Document(f"{task.id}-{number}", task.title, text)


# ── recall ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def by_rank(rankings: Sequence[Sequence[Any]]) -> list[Any]:
    """Reciprocal rank fusion of several rankings of hits."""
    scores: dict[str, float] = {}
    hits = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking):
            scores[hit.passage.id] = scores.get(hit.passage.id, 0.0) + 1 / (FUSION_RANK + rank + 1)
            hits[hit.passage.id] = hit
    return [hits[name] for name in sorted(hits, key=lambda name: -scores[name])]


def recalls(stage: Stage, bank: Path) -> tuple[list[list[str]], list[str]]:
    """A row for each way: recall on the dev sets, alone and pooled, and on the train sets pooled; and how long a
    question took."""
    from regrad_cli.bank import open_bank
    from regrad_cli.evidence import Evidence, recall
    from regrad_cli.retrieval import Retriever

    splits = {split: stage.questions(*(f"{name}-{split}" for name in GENERAL)) for split in ("dev", "train")}
    rows: list[list[str]] = []
    times: list[str] = []
    with open_bank(bank) as snapshot:
        retrievers = {way: Retriever(snapshot, way) for way in WAYS}
        found: dict[tuple[str, str, int], list[Any]] = {}
        for way in WAYS:
            told(f"asking {sum(map(len, splits.values())):,} questions, {way} …")
            seconds = []
            for split, asked in splits.items():
                for one in asked:
                    question = one.question.question
                    stage.vector(question)
                    start = time.perf_counter()
                    found[way, split, one.number] = retrievers[way].find(question, stage.vector, DEPTH, warm=True)
                    seconds.append(time.perf_counter() - start)
            times.append(f"{way} {1000 * statistics.median(seconds):.1f} ms")
    for way in (*WAYS, "by rank"):

        def hits(split: str, number: int, way: str = way) -> list[Any]:
            if way != "by rank":
                return found[way, split, number]
            return by_rank([found["dense", split, number], found["lexical", split, number]])

        cells = [way]
        for split, asked in splits.items():
            evidence = {
                one.number: Evidence("", (), (), None, tuple(hit.passage.text for hit in hits(split, one.number)[:10]))
                for one in asked
            }
            groups = [[one for one in asked if one.dataset == f"{name}-{split}"] for name in GENERAL]
            for group in [*groups, asked] if split == "dev" else [asked]:
                cells.append(" / ".join(f"{100 * share:.1f}" for share in recall(group, evidence).values()))
        rows.append(cells)
    return rows, times


# ── nothing fits ────────────────────────────────────────────────────────────────────────────────────────────────────


def turned_away(stage: Stage, bank: Path, way: str, asked: Sequence[Any]) -> float:
    """The share of questions for which nothing in the bank fits, by the default rule."""
    from regrad_cli.bank import open_bank
    from regrad_cli.retrieval import Retriever

    with open_bank(bank) as snapshot:
        retriever = Retriever(snapshot, way)
        away = 0
        for one in asked:
            hits = retriever.find(one.question.question, stage.vector, 1, min_score="auto", warm=True)
            away += not any(hit.fits for hit in hits)
    return away / len(asked)


def refusals(stage: Stage, everything: Path, examples: Path) -> list[list[str]]:
    """A row for each bank and set of questions: whose they are, and the share that is turned away, by each way."""
    banks = {"examples/docs": (examples, ["examples"], ["nq-dev", "xquad-dev", "covid-dev"])}
    for name in ("nq-dev", "xquad-dev", "covid-dev"):
        others = [each for each in ("nq-dev", "xquad-dev", "covid-dev", "examples") if each != name]
        banks[name] = (stage.bank(name, stage.documents(name)), [name], others)
    banks["nq and xquad, all"] = (everything, ["nq-dev", "xquad-dev"], ["covid-dev", "examples"])
    rows = []
    for name, (bank, own, others) in banks.items():
        for asked in (own, *([other] for other in others)):
            chosen = stage.questions(*asked, limit=None if asked is own else FOREIGN)
            wanted = "few" if asked is own else "all"
            shares = [f"{100 * turned_away(stage, bank, way, chosen):.1f}" for way in WAYS]
            rows.append([name, f"{len(chosen)} of {', '.join(asked)}", wanted, *shares])
    return rows


# ── time ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def cold(stage: Stage, banks: dict[str, Path]) -> list[list[str]]:
    """A row for each bank and way: a whole `regrad query`, median and range of seconds."""
    question = "What material fills the hull of the Petrel 3?"

    def query(bank: Path, way: str) -> Callable[[], Any]:
        return lambda: stage.bench.regrad("query", question, "--bank", bank, "--search", way, "--json")

    rows = []
    for name, bank in banks.items():
        ran = interleaved({way: query(bank, way) for way in WAYS}, ROUNDS, warm_up=True)
        for way, runs in ran.items():
            seconds = [each.seconds for each in runs]
            rows.append([name, way, f"{statistics.median(seconds):.2f}", spread(seconds)])
    return rows


# ── the page ────────────────────────────────────────────────────────────────────────────────────────────────────────


def table(heading: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [heading, ["---"] * len(heading), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def page(stage: Stage, warning: str) -> str:
    everything = stage.bank(
        "all", stage.documents(*(f"{name}-{split}" for name in GENERAL for split in ("train", "dev")))
    )
    examples = stage.bank("examples", stage.documents("examples"))
    timed = cold(stage, {"examples/docs": examples, "nq and xquad, all": everything})
    found, warm = recalls(stage, everything)
    away = refusals(stage, everything, examples)
    return f"""# Retrieval

Written by `python -m benchmarks.retrieval DATA --write`. What the figures mean and what was tried: docs/retrieval.md.

{machine.describe("cpu")}{f" · {warning}" if warning else ""}

## Recall

Recall@1 / 3 / 10 in percent, in one bank of all passages of nq and xquad, train and dev, as `regrad eval` counts: a hit
holds the whole passage, or is a piece of it that holds an answer. `by rank` is reciprocal rank fusion of dense and
lexical.

{table(["way", "nq-dev", "xquad-dev", "dev pooled", "train pooled"], found)}

A question takes, in a session, its embedding left out: {", ".join(warm)} (median).

## Nothing fits

Questions that are turned away by the default rule, in percent. Of a bank's own questions it should be few, of others
all, as far as the bank does not answer them by chance.

{table(["bank", "questions", "wanted", *WAYS], away)}

## Time

A whole `regrad query`, in seconds, files in the page cache.

{table(["bank", "way", "median", "range"], timed)}
"""


def main(arguments: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.retrieval", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("data", type=Path, metavar="DATA", help="the folder of the tasks")
    parser.add_argument("--write", action="store_true", help="keep the tables in benchmarks/RETRIEVAL.md")
    chosen = parser.parse_args(arguments)
    if warning := machine.busy():
        told(f"warning: {warning}")
    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="regrad-retrieval-")))
        stack.enter_context(patch.dict(os.environ, environment(folder), clear=True))
        text = page(Stage(folder, chosen.data), warning)
    print(text, end="")
    if chosen.write:
        RESULTS.write_text(text, encoding="utf-8")
        told(f"written to {RESULTS}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
