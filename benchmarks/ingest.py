"""Measures `regrad ingest` against a plain loop over the same passages (plain_loop.py): passages a second and bytes.

Whole processes of two sizes, in turns; the slope between the sizes is the time a passage, so loading cancels.
"""

from __future__ import annotations

import json
import shutil
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path

from benchmarks.bench import EXAMPLES, Bench, Options, Result
from benchmarks.measure import Figure, Ran, Target, folder_bytes, interleaved, paired_ratio, shown, slope, spread
from benchmarks.passages import make_passages, write_jsonl
from regrad_cli.records import Passage

TITLE = "Ingest against a plain loop"
DEVICES = ("cpu", "cuda")
SIZES = {"cpu": (60, 200), "cuda": (200, 1200)}  # --sizes 100 600 takes longer and tells more
WARM_UP = 4
PLAIN = ("fp32", "bf16")


def run(place: Bench, options: Options) -> Result:
    from regrad_cli.learn.tokens import Tokenizer

    small, large = options.sizes or SIZES[options.device]
    rounds = options.rounds or 3
    passages = make_passages(EXAMPLES, large, Tokenizer(place.model_folder).spans)
    contenders: dict[int, dict[str, Callable[[], Ran]]] = {}
    for size in (WARM_UP, small, large):
        file = place.folder / f"passages-{size}.jsonl"
        write_jsonl(passages[:size], file)
        contenders[size] = {f"regrad {size}": _ours(place, file, size, options.device)} | {
            f"{dtype} {size}": _plain(place, file, size, dtype, options.device) for dtype in PLAIN
        }
    interleaved(contenders[WARM_UP], 1)
    results = interleaved(contenders[small] | contenders[large], rounds)  # A B C small, A B C large, and again

    def slopes(name: str, of: Callable[[Ran], float]) -> list[float]:
        pairs = zip(results[f"{name} {small}"], results[f"{name} {large}"], strict=True)
        return [slope((small, of(few)), (large, of(many))) for few, many in pairs]

    wall = {name: slopes(name, lambda ran: ran.seconds) for name in ("regrad", *PLAIN)}
    cpu = {name: slopes(name, lambda ran: ran.cpu_s) for name in ("regrad", *PLAIN)}
    faster = min(PLAIN, key=lambda dtype: statistics.median(wall[dtype]))
    ours, plain = 1 / statistics.median(wall["regrad"]), 1 / statistics.median(wall[faster])
    tokens = statistics.mean(passage.tokens for passage in passages)
    figures = [
        Figure("passages a second", ours, "/s", plain, paired_ratio(wall[faster], wall["regrad"]), Target("≥", 4)),
        Figure(
            "CPU seconds a passage (baseline over regrad)",
            statistics.median(cpu["regrad"]),
            "s",
            statistics.median(cpu[faster]),
            paired_ratio(cpu[faster], cpu["regrad"]),
        ),
    ]
    figures += _bytes(place, large, faster)
    notes = [
        f"{small} and {large} passages of {token_range(passages)} tokens ({tokens:.0f} on average) made from "
        f"examples/docs; {rounds} rounds of whole processes in turns; the ratio is the median of those of the rounds "
        f"({spread([a / b for a, b in zip(wall[faster], wall['regrad'], strict=True)])}).",
        f"The plain loop ran in fp32 ({shown(1 / statistics.median(wall['fp32']))} passages/s) and in bf16 "
        f"({shown(1 / statistics.median(wall['bf16']))} passages/s); the baseline is {faster}. "
        "regrad's time includes reading, cutting, embedding, the codec, checksums and commits. It takes a gradient of "
        "each of a passage's segments, the plain loop one of the whole passage.",
        "Peak memory: regrad "
        + shown(max(ran.peak_bytes for ran in results[f"regrad {large}"]) / 1e6, "MB")
        + ", plain loop "
        + shown(max(ran.peak_bytes for ran in results[f"{faster} {large}"]) / 1e6, "MB")
        + ".",
    ]
    (prior,) = (place.folder / f"ingest-{large}" / ".gbank" / "priors").iterdir()
    more, explained = _possible(place, prior, tokens, options.device, ours, plain)
    return Result(figures + more, notes + explained)


def token_range(passages: Sequence[Passage]) -> str:
    counts = [passage.tokens for passage in passages]
    return f"{min(counts)} to {max(counts)}"


def _ours(place: Bench, file: Path, size: int, device: str) -> Callable[[], Ran]:
    def ingest() -> Ran:
        bank = place.new_bank(f"ingest-{size}")
        ran = place.regrad("ingest", file, "--bank", bank, "--device", device, "--json")
        added = json.loads(ran.stdout.splitlines()[-1])["added"]
        if added != size:
            raise RuntimeError(f"ingest added {added} passages where the plain loop has {size}")
        return ran

    return ingest


def _plain(place: Bench, file: Path, size: int, dtype: str, device: str) -> Callable[[], Ran]:
    out = place.folder / f"plain-{dtype}-{size}"

    def loop() -> Ran:
        shutil.rmtree(out, ignore_errors=True)
        return place.python("plain_loop", place.model_folder, dtype, device, file, out)

    return loop


def _bytes(place: Bench, size: int, dtype: str) -> list[Figure]:
    """Bytes a passage on disk: every file of the bank, with and without the prior, against the plain loop's files."""
    bank = place.folder / f"ingest-{size}" / ".gbank"
    everything, prior = folder_bytes(bank), folder_bytes(bank / "priors")
    plain = folder_bytes(place.folder / f"plain-{dtype}-{size}") / size
    without, included = (everything - prior) / size, everything / size
    name = "bytes a passage, text, embedding and index included (baseline over regrad)"
    return [
        Figure(name, without, "B", plain, plain / without, Target("≥", 60)),
        Figure(f"the same with the bank's one prior, over {size} passages", included, "B", plain, plain / included),
    ]


def _possible(
    place: Bench, prior: Path, tokens: float, device: str, ours: float, plain: float
) -> tuple[list[Figure], list[str]]:
    """What share of the machine's matrix products both reach, and the ratio that a perfect program would.

    prior           the bank's: what its gradients are of
    ours, plain     passages a second
    """
    ran = place.python("flops", place.model_folder, place.embedder_folder, str(tokens), device, prior)
    found = json.loads(ran.stdout.splitlines()[-1])
    best = {dtype: max(rates.values()) for dtype, rates in found["rates"].items()}
    top = max(best.values())
    total = found["gradient"] + found["embedder"]
    figures = [
        Figure(
            "arithmetic done, as a share of this machine's best rate of matrix products",
            100 * ours * total / top,
            "%",
            100 * plain * found["plain"] / top,
            target=Target("≥", 50, "value"),
        ),
        Figure(
            "passages a second possible at most here: matrix products at that rate and nothing else",
            top / total,
            "/s",
            plain,
            top / total / plain,
        ),
    ]
    listed = "; ".join(
        f"{dtype} " + ", ".join(f"{rows} rows {value / 1e9:,.0f}" for rows, value in rates.items())
        for dtype, rates in found["rates"].items()
    )
    notes = [
        f"A passage is {total / 1e9:.1f} GFLOP, {found['embedder'] / 1e9:.1f} of them the embedder's, which the plain "
        f"loop does not have; the plain loop's is {found['plain'] / 1e9:.1f} (the formula is in flops.py); "
        "regrad's padding is not counted as work. Matrix products of "
        f"these shapes, measured in the same run, GFLOP/s: {listed}."
    ]
    return figures, notes
