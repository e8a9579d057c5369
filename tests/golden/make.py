"""Makes the golden banks of format 1, which every later version must open: `python tests/golden/make.py`.

They are frozen. One that is there is not made again, unless `--replace NAME` says so, which is for the days before a
release; a new kind of bank gets a new name. Each is a tar archive of a bank's folder (or a packed bank) and a JSON file
with everything that reading it tells. What is in them depends on nothing but this script and regrad.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import os
import sys
import tarfile
import tempfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from unittest.mock import patch

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent))

from banks import FOLDER, told

from regrad_cli.bank import (
    create_bank,
    move_bank,
    pack_bank,
    plan_compaction,
    remove_documents,
    rows_to_move,
    write_bank,
)
from regrad_cli.bank.compact import compact_bank
from regrad_cli.learn.codec import Codec, parse_codec
from regrad_cli.learn.prior import Prior
from regrad_cli.learn.rows import Parts, RowLayout, layout_of
from regrad_cli.records import BankSettings, Passage, TensorShape, document_id, row_key, sha256_hex

DIMENSION = 8
# The small side first, last, and neither; lengths that are no multiple of a group, one of them more than one.
SHAPES = (
    TensorShape("up_proj.lora_A", 2, 5),
    TensorShape("up_proj.lora_B", 66, 2),
    TensorShape("down_proj.lora_A", 2, 2),
)
# Sources and texts that JSON, terminals and file systems find hard.
PLAIN = (
    ("notes/harbour.md", "Harbour", ("The harbour opens at seven.", "Its lamps are lit by Oda Brenk.")),
    ("odd/\U0001f41d line\nbreak \u2028 \x1b[31m.md", "", ('"quoted" back\\slash \x01 tab\t',)),
    ("/elsewhere/Ångström 北海.txt", "北海 – Ångström", ("Ein Maß für Längen, zehn je Nanometer.",)),
)
SIZES = {PLAIN[1][0]: 1e-30, PLAIN[2][0]: 1e30, "table.csv#3": 0.0}  # of a document's gradients; of others 0.001
LATER = (("table.csv#3", "Row", ("third, of the table",)), ("stdin#note", "Note", ("said once", "and once more")))


def prior(seed: int, name: str, *, rounded: bool = False, left_out: int = 0, **more: object) -> Prior:
    """Gradients change all of the shapes but so many of the first."""
    drawn = np.random.default_rng(seed)
    tensors = {s.name: torch.from_numpy(drawn.normal(0, 0.1, (s.rows, s.cols)).astype(np.float32)) for s in SHAPES}
    logs = {shape.name: float(place - 2) / 4 for place, shape in enumerate(SHAPES) if place >= left_out}
    card = {"name": name, "trained": True, "model": sha256_hex("model"), "rank": 2, "k": 3, "gamma": 1.5}
    made = Prior(tensors, logs, card | {"weights": "mean"} | more)
    return made.rounded() if rounded else made


def settings(of: Prior, codec: str, **changes: object) -> BankSettings:
    cut = int(str(changes.get("segments", 1)))
    made = RowLayout(parse_codec(codec), of.shapes, cut, DIMENSION)
    values: dict[str, object] = {
        "model": sha256_hex("model"),
        "model_name": "golden",
        "tokenizer": sha256_hex("tokenizer"),
        "prior": sha256_hex(of.to_bytes()),
        "prior_name": of.card["name"],
        "prior_trained": of.trained,
        "tensors": of.shapes,
        "codec": made.codec.settings,
        "code_bytes": made.code_bytes,
        "scale_count": made.scale_count,
        "embedder": sha256_hex("embedder"),
        "embedder_name": "golden",
        "embedding_dim": DIMENSION,
        "chunk_tokens": 64,
        "chunk_overlap": 8,
    }
    return BankSettings(**(values | changes))  # type: ignore[arg-type]


def gradients(made_for: BankSettings, passage: Passage) -> dict[str, torch.Tensor]:
    """Of one passage, a function of its key and its document's size."""
    key = row_key(passage, made_for.model, made_for.tokenizer, made_for.prior)
    drawn = np.random.default_rng(list(key))
    size = SIZES.get(passage.source, 1e-3)
    shapes = made_for.tensors
    return {s.name: torch.from_numpy((size * drawn.normal(size=(1, s.rows, s.cols))).astype("<f4")) for s in shapes}


def rows(made_for: BankSettings, source: str, title: str, texts: tuple[str, ...]) -> tuple:
    """One document's rows, as Writer.add takes them."""
    document = document_id(source)
    passages = [
        Passage(document, source, title, ordinal, 40 * ordinal, 5 + (len(text) + ordinal) % 60, text)
        for ordinal, text in enumerate(texts)
    ]
    coded = [encoded(made_for, passage) for passage in passages]
    drawn = np.random.default_rng(list(document.encode()))
    vectors = drawn.normal(size=(len(passages), made_for.embedding_dim))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    keys = [row_key(passage, made_for.model, made_for.tokenizer, made_for.prior) for passage in passages]
    codes, scales = (np.concatenate(parts) for parts in zip(*coded, strict=True))
    return passages, keys, codes, scales, vectors.astype(np.float16)


def encoded(made_for: BankSettings, passage: Passage) -> tuple[np.ndarray, np.ndarray]:
    """One row; where passages are cut, as many segments as its text has fours of letters, each with the same gradient
    times its number."""
    made = layout_of(made_for)
    gradient = gradients(made_for, passage)
    count = min(made_for.segments, len(passage.text or "") // 4)
    scaled = {name: torch.cat([tensor * (1 + place) for place in range(count)]) for name, tensor in gradient.items()}
    vectors = np.eye(count, made_for.embedding_dim, dtype=np.float32)
    begins = 4 * np.arange(count)
    return made.join(Parts(np.zeros(count, np.int64), begins, vectors, *made.codec.encode(scaled)), 1)


def filled(path: Path, codec: str = "r1-int4", *commits: tuple, of: Prior | None = None, **changes: object) -> None:
    """A bank with an ingest for each of the lists of documents."""
    of = of or prior(1, "first")
    made_for = settings(of, codec, **changes)
    create_bank(path, made_for, of.to_bytes())
    for documents in commits or (PLAIN,):
        ingested(path, *documents)


def ingested(path: Path, *documents: tuple) -> None:
    with write_bank(path) as writer:
        for document in documents:
            writer.add(*rows(writer.snapshot.settings, *document))
        writer.commit("ingest")
        writer.finish()


# ── the banks ───────────────────────────────────────────────────────────────────────────────────────────────────────


def several(path: Path) -> None:
    """Four snapshots: made, filled, added to, one document removed and one with another text."""
    filled(path, "r1-int4", PLAIN, LATER)
    with write_bank(path) as writer:
        bank = writer.snapshot
        writer.remove(ref for ref, _, _ in bank.passages(document_id("stdin#note")))
        writer.remove(ref for ref, _, _ in bank.passages(document_id("notes/harbour.md")))
        writer.add(*rows(bank.settings, "notes/harbour.md", "Harbour", ("It opens at eight now.", *PLAIN[0][2][1:])))
        writer.commit("ingest")
        writer.finish()


def removed(path: Path) -> None:
    """A document taken out with `bank rm`, its rows still on the disk."""
    filled(path, "r1-int4", PLAIN)
    remove_documents(path, ["notes/harbour.md"])


def moving(path: Path) -> None:
    """On its way to another prior, with two of its rows there."""
    filled(path, "r1-int4", PLAIN)
    second = prior(2, "second")
    with move_bank(path) as writer:
        bank = writer.snapshot
        target = replace(bank.settings, prior=sha256_hex(second.to_bytes()), prior_name="second")
        writer.begin(target, second.to_bytes())
        for ref in rows_to_move(bank, target)[:2]:
            passage = bank.row(ref).passage
            writer.add(*moved_row(target, passage, bank.read_rows([ref]).embeddings))
        writer.commit()


def moved_row(target: BankSettings, passage: Passage, embedding: np.ndarray) -> tuple:
    codes, scales = Codec(target.codec, target.tensors).encode(gradients(target, passage))
    key = row_key(passage, target.model, target.tokenizer, target.prior)
    return [passage], [key], codes, scales, embedding


def compacted(path: Path) -> None:
    """The first of these in its canonical form, with one older snapshot kept."""
    several(path)
    compact(path, keep=1)


def compact(path: Path, keep: int = 0) -> None:
    with compact_bank(path) as writer:
        plan = plan_compaction(writer.snapshot, keep=keep)
        list(writer.compact(plan))
        writer.end(plan)


def indexed(path: Path) -> None:
    """With a search graph; two rows came after it."""
    with patch.dict(os.environ, {"REGRAD_INDEX_FROM": "3"}):
        filled(path, "r1-int4", PLAIN)
    remove_documents(path, ["notes/harbour.md"])
    ingested(path, *LATER)


def codec(name: str, **options: bool) -> Callable[[Path], None]:
    return lambda path: filled(path, name, (*PLAIN, *LATER), of=prior(3, "rounded", **options))


BANKS: Mapping[str, Callable[[Path], None]] = {
    "several": several,
    "removed": removed,
    "moving": moving,
    "compacted": compacted,
    "indexed": indexed,
    "no-text": lambda path: filled(path, "r1-int4", PLAIN, keep_text=False),
    "segments": lambda path: filled(path, "r1-int4", PLAIN, LATER, of=prior(4, "cut", segments=3), segments=3),
    "some-tensors": lambda path: filled(path, "r2-int2", PLAIN, of=prior(5, "some", left_out=1, segment_tokens=30)),
    "empty": lambda path: filled(path, "r1-int4", ()),
    "packed": several,
    "r1-int4": codec("r1-int4", rounded=True),
    "r2-int8": codec("r2-int8"),
    "r9-int4": codec("r9-int4"),  # more pairs than a small side has values
    "int4": codec("int4"),
    "int8": codec("int8"),
    "r2-int2": codec("r2-int2"),
    "int2": codec("int2"),
    "r2-int1": codec("r2-int1"),
    "r9-int1": codec("r9-int1"),  # more pairs than there are values in a small side, and units that fill no byte
}


# ── making them ─────────────────────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def no_chance(name: str) -> Iterator[None]:
    """What a bank draws or reads from a clock is a function of its name; its graphs are noted elsewhere."""
    count = iter(range(10**9))

    def token(size_bytes: int) -> str:
        return hashlib.sha256(f"{name} {next(count)}".encode()).hexdigest()[: 2 * size_bytes]

    with ExitStack() as stack, tempfile.TemporaryDirectory() as state:
        stack.enter_context(patch("secrets.token_hex", token))
        stack.enter_context(patch.dict(os.environ, {"REGRAD_STATE": state}))
        for module in ("create", "writer"):
            stack.enter_context(patch(f"regrad_cli.bank.{module}.now", lambda: "2026-11-22T00:00:00Z"))
            stack.enter_context(patch(f"regrad_cli.bank.{module}.TOOL", "regrad 0.1.0"))
        yield


def archived(folder: Path) -> bytes:
    """A bank's folder as a compressed tar archive, its empty folders included, the lock's signature left out."""
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode="w:xz", format=tarfile.PAX_FORMAT) as archive:
        for path in sorted(folder.rglob("*")):
            entry = tarfile.TarInfo(str(path.relative_to(folder)))
            if path.is_dir():
                entry.type, entry.mode = tarfile.DIRTYPE, 0o755
                archive.addfile(entry)
            elif path.name != "lock":
                content = path.read_bytes()
                entry.size = len(content)
                archive.addfile(entry, io.BytesIO(content))
    return data.getvalue()


def made(name: str, folder: Path) -> tuple[str, bytes, str]:
    """One golden bank: its file's ending, its bytes, and what reading it tells."""
    path = folder / name
    with no_chance("several" if name in ("packed", "compacted") else name):
        BANKS[name](path)
        if name == "packed":
            pack_bank(path, folder / "packed.gbank")
            path = folder / "packed.gbank"
    lines = [f"{json.dumps(key)}: {json.dumps(value, sort_keys=True)}" for key, value in sorted(told(path).items())]
    text = "{\n" + ",\n".join(lines) + "\n}\n"
    return (".gbank", path.read_bytes(), text) if path.is_file() else (".tar.xz", archived(path), text)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=BANKS, default=list(BANKS))
    parser.add_argument("--replace", nargs="+", choices=BANKS, default=[], help="make these again")
    parser.add_argument("--out", type=Path, default=FOLDER)
    chosen = parser.parse_args(arguments)
    there = [name for name in chosen.only if (chosen.out / f"{name}.json").exists() and name not in chosen.replace]
    wanted = [name for name in chosen.only if name not in there]
    for name in wanted:
        with tempfile.TemporaryDirectory() as folder:
            ending, data, text = made(name, Path(folder))
        (chosen.out / f"{name}{ending}").write_bytes(data)
        (chosen.out / f"{name}.json").write_text(text, encoding="utf-8")
        print(f"made {name}{ending}: {len(data):,} bytes", file=sys.stderr)
    for name in there:
        print(f"{name} is frozen, and left as it is", file=sys.stderr)
    return 1 if there and not wanted else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
