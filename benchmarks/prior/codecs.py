"""What each codec costs under the prior that ships: bytes, F1, time. Prints a table; keeps F1 in the prior's card.

    python -m benchmarks.prior.codecs DATA --work FOLDER [--write]

DATA holds {nq,xquad}-dev.jsonl. F1 (EM) of mode regrad on all their questions, from their own passages; what was
measured before lies in FOLDER and is not measured again. Minutes a codec on a CPU.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.prior.legs import learned
from regrad_cli.evaluate import EvaluateOptions, evaluate
from regrad_cli.records import sha256_hex
from regrad_cli.results import Evaluated

CODECS = (
    "int8",
    "int4",
    "int2",
    "r4-int4",
    "r4-int2",
    "r2-int2",
    "r1-int2",
    "r8-int1",
    "r4-int1",
    "r3-int1",
    "r2-int1",
)
TIMED = 12  # gradients
DIMENSION = 384  # of the segments' vectors, which lie in a row too


class Cost(NamedTuple):
    """A row's bytes (all segments), how often they go into a whole passage's gradient of all of θ in fp32, ms each."""

    row_bytes: int
    smaller: float
    encode_ms: float
    decode_ms: float


def scored(data: Path, work: Path, prior: Path, codec: str | None) -> dict[str, Any]:
    """{"f1": …, "em": …} of all, and of each file by its name; codec None is fp32."""
    kept = work / f"{sha256_hex(prior.read_bytes())[:12]}-{codec or 'fp32'}.json"
    if not kept.exists():
        tasks = (data / "nq-dev.jsonl", data / "xquad-dev.jsonl")
        *_, last = evaluate(EvaluateOptions(tasks=tasks, modes=("regrad",), prior=prior, codec=codec))
        assert isinstance(last, Evaluated)
        parts = {"all": last.pooled} | last.datasets
        found = {name: {"f1": part.modes["regrad"].f1, "em": part.modes["regrad"].em} for name, part in parts.items()}
        kept.write_text(json.dumps(found), encoding="utf-8")
    read: dict[str, Any] = json.loads(kept.read_text(encoding="utf-8"))
    return read


def costs(prior: Path, names: Sequence[str], data: Path) -> Iterator[tuple[str, Cost]]:
    """Time on the gradients of as many dev passages, one after the other."""
    from regrad_cli.learn.codec import Codec, parse_codec
    from regrad_cli.learn.gradients import passage_gradients
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.rows import widths
    from regrad_cli.models import resolve_model

    own = learned(prior)
    model = load_model(resolve_model("starter").path, device="cpu")
    lines = (data / "nq-dev.jsonl").read_text(encoding="utf-8").splitlines()[:TIMED]
    ids = [model.token_ids(json.loads(line)["passages"][0])[:64] for line in lines]
    gradients = [
        {name: tensor[row : row + 1].clone() for name, tensor in part.tensors.items()}
        for part in passage_gradients(model, own, ids)
        for row in range(len(part.positions))
    ]
    whole = 4 * sum(tensor.numel() for tensor in own.tensors.values())
    for name in names:
        codec = Codec(parse_codec(name), own.shapes)
        code_bytes, scales = widths(parse_codec(name), own.shapes, own.segments, DIMENSION)
        row_bytes = code_bytes + 2 * scales
        rows = [codec.encode(gradient) for gradient in gradients[:1]]  # the first is slower
        begun = time.perf_counter()
        rows += [codec.encode(gradient) for gradient in gradients[1:]]
        encoded = time.perf_counter()
        for row in rows[1:]:
            codec.decode(*row)
        per = 1000 / (len(rows) - 1)
        yield name, Cost(row_bytes, whole / row_bytes, per * (encoded - begun), per * (time.perf_counter() - encoded))


def table(found: dict[str, tuple[Cost | None, dict[str, Any]]]) -> str:
    lines = ["| codec | bytes a passage | of fp32 | F1 (EM) | encode, ms | decode, ms |", "| --- " * 6 + "|"]
    for name, (cost, score) in found.items():
        scores = f"{score['all']['f1']:.1f} ({score['all']['em']:.1f})"
        if cost is None:
            lines.append(f"| {name} | | 1 | {scores} | | |")
        else:
            lines.append(
                f"| {name} | {cost.row_bytes:,} | 1/{cost.smaller:.0f} | {scores} | {cost.encode_ms:.1f} "
                f"| {cost.decode_ms:.1f} |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", type=Path)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--codecs", nargs="+", default=CODECS)
    parser.add_argument("--write", action="store_true", help="keep F1 in the card of the prior that ships")
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    (file,) = (Path(__file__).parents[2] / "regrad_cli" / "data").glob("prior-*.safetensors")
    found: dict[str, tuple[Cost | None, dict[str, Any]]] = {"fp32": (None, scored(given.data, given.work, file, None))}
    for name, cost in costs(file, given.codecs, given.data):
        found[name] = cost, scored(given.data, given.work, file, name)
        print(table({name: found[name]}).splitlines()[-1], flush=True)
    print(table(found))
    if given.write:
        prior = learned(file)
        f1 = {name: round(score["all"]["f1"], 1) for name, (cost, score) in found.items() if cost is not None}
        file.write_bytes(replace(prior, card=prior.card | {"f1": f1}).to_bytes())


if __name__ == "__main__":
    main()
