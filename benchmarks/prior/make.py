"""Makes the prior that ships for the starter, and the fine-tuned baselines beside it, from the seed. Hours on a CPU.

    python -m benchmarks.prior.make --data FOLDER --work FOLDER prior       # → regrad_cli/data/prior-….safetensors
    python -m benchmarks.prior.make --data FOLDER --work FOLDER direct rag  # → benchmarks/baselines/

FOLDER of --data holds {nq,xquad}-{train,dev}.jsonl; everything else is generated. Killed, it goes on where it was.
Each baseline gets the prior's tasks, steps and number of parameters, and the best of three learning rates.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.prior import cloze, swapped
from benchmarks.prior.worlds import write_worlds
from regrad_cli.metatrain import MetaTrainOptions, meta_train
from regrad_cli.records import Notice
from regrad_cli.trainevents import Trained, TrainStep, Validated

ROOT = Path(__file__).parents[2]
RATES = (3e-4, 1e-3, 3e-3)
SEARCH_STEPS = 200
CODEC = "r1-int4"  # the best for its bytes (docs/experiments.md)


def recipe(data: Path, work: Path) -> tuple[MetaTrainOptions, MetaTrainOptions]:
    """The settings of the shipped prior's two legs: whole passages as they are; then segments, with other answers."""
    train = (data / "nq-train.jsonl", data / "xquad-train.jsonl")
    first = MetaTrainOptions(
        tasks=(*train, _worlds(work / "worlds.jsonl", seed=0, tasks=2500)),
        dev=(data / "nq-dev.jsonl", data / "xquad-dev.jsonl"),
        out=work / "first" / "starter.safetensors",
        rank=32,
        steps=1700,
        validate_every=425,
        dev_tasks=64,
        strangers=0.15,
        segments=1,
        temperature=0.03,
    )
    nq, xquad = (_read(file) for file in train)
    gaps = list(cloze.generate([*nq, *xquad], seed=0))
    others = {"nq": (nq, 1), "xquad": (xquad, 6), "cloze": (gaps, 1)}
    second = replace(
        first,
        tasks=(
            *(
                _written(work / f"swapped-{name}.jsonl", swapped.generate(tasks, 0, copies))
                for name, (tasks, copies) in others.items()
            ),
            _worlds(work / "worlds-1.jsonl", seed=1, tasks=500),
        ),
        out=work / "starter.safetensors",
        init=first.out,
        steps=1100,
        validate_every=275,
        dev_tasks=48,
        mix_context=0.3,
        segments=3,
        segment_temperature=0.08,
        seed=2,
    )
    first.out.parent.mkdir(exist_ok=True)
    return first, second


def _worlds(file: Path, *, seed: int, tasks: int) -> Path:
    if not file.exists():
        write_worlds(file, seed=seed, tasks=tasks)
    return file


def _read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]


def _written(file: Path, tasks: Iterable[dict[str, Any]]) -> Path:
    lines = [json.dumps(task, ensure_ascii=False) + "\n" for task in tasks]
    file.write_text("".join(lines), encoding="utf-8")
    return file


def learn(options: MetaTrainOptions) -> Iterator[Trained]:
    """Runs it, printing how it goes; yields its end, at once where it has been done before."""
    if options.out.exists() and not options.out.with_name(options.out.name + ".resume").exists():
        return
    for event in meta_train(options):
        match event:
            case TrainStep(step=step, loss=loss) if step % 20 == 0:
                print(
                    f"{options.out.stem} {step}/{options.steps} loss {loss} left {event.left_s / 60:.0f} min",
                    flush=True,
                )
            case Validated(step=step, losses=losses):
                print(f"{options.out.stem} {step}: {losses}", flush=True)
            case Notice(message=message):
                print(message, flush=True)
            case Trained():
                yield event


def make_prior(data: Path, work: Path) -> None:
    """The prior, into the package: rounded, for the package may grow by 4 MB at most."""
    for leg in recipe(data, work):
        list(learn(leg))
    from regrad_cli.learn.prior import Prior

    prior = Prior.from_bytes(leg.out.read_bytes()).rounded()
    prior = replace(prior, card=prior.card | {"codec": CODEC})
    (ROOT / "regrad_cli" / "data" / f"prior-{prior.card['model'][:16]}.safetensors").write_bytes(prior.to_bytes())


def make_baseline(objective: str, data: Path, work: Path) -> None:
    """A baseline by the same two legs, with the best of the learning rates in the first, and the curves of all."""
    folder = ROOT / "benchmarks" / "baselines"
    folder.mkdir(exist_ok=True)
    first, second = (
        replace(leg, objective=objective, segments=1, out=leg.out.with_name(f"{objective}.safetensors"))
        for leg in recipe(data, work)
    )
    found = {}
    for rate in RATES:
        out = work / f"{objective}-search-{rate:g}.safetensors"
        list(learn(replace(first, out=out, learning_rate=rate, steps=SEARCH_STEPS, validate_every=100)))
        found[rate] = min(entry["chosen"] for entry in _read(_metrics(out)) if "chosen" in entry)
        shutil.copyfile(_metrics(out), folder / _metrics(out).name)
    best = min(found, key=lambda rate: found[rate])
    print(f"{objective}: dev loss after {SEARCH_STEPS} steps by learning rate {found}: {best:g} is taken", flush=True)
    for number, leg in enumerate((first, replace(second, init=first.out)), 1):
        list(learn(replace(leg, learning_rate=best)))
        shutil.copyfile(_metrics(leg.out), folder / f"{objective}-{number}.metrics.jsonl")
    shutil.copyfile(second.out, folder / second.out.name)


def _metrics(out: Path) -> Path:
    return out.with_name(out.name + ".metrics.jsonl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("what", nargs="+", choices=["prior", "direct", "rag"])
    given = parser.parse_args()
    given.work.mkdir(parents=True, exist_ok=True)
    for what in given.what:
        make_prior(given.data, given.work) if what == "prior" else make_baseline(what, given.data, given.work)


if __name__ == "__main__":
    main()
