"""Makes the prior that ships for the starter, and the fine-tuned baselines beside it, from the seed. Hours on a CPU.

    python -m benchmarks.prior.make --data FOLDER --work FOLDER prior       # → regrad_cli/data/prior-….safetensors
    python -m benchmarks.prior.make --data FOLDER --work FOLDER direct rag  # → benchmarks/baselines/

FOLDER of --data holds {nq,xquad}-{train,dev}.jsonl; invented worlds are generated. Killed, it goes on where it was.
Each baseline gets the prior's tasks, steps and number of parameters, and the best of three learning rates.
"""

from __future__ import annotations

import argparse
import json
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from benchmarks.prior.worlds import write_worlds
from regrad_cli.metatrain import MetaTrainOptions, meta_train
from regrad_cli.records import Notice
from regrad_cli.trainevents import Trained, TrainStep, Validated

ROOT = Path(__file__).parents[2]
WORLDS = 2500
RATES = (3e-4, 1e-3, 3e-3)
SEARCH_STEPS = 200


def recipe(data: Path, work: Path) -> MetaTrainOptions:
    """The settings of the shipped prior."""
    worlds = work / "worlds.jsonl"
    if not worlds.exists():
        write_worlds(worlds, seed=0, tasks=WORLDS)
    return MetaTrainOptions(
        tasks=(data / "nq-train.jsonl", data / "xquad-train.jsonl", worlds),
        dev=(data / "nq-dev.jsonl", data / "xquad-dev.jsonl"),
        out=work / "starter.safetensors",
        rank=32,
        steps=1700,
        validate_every=425,
        dev_tasks=64,
        strangers=0.15,
        temperature=0.03,
    )


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
    options = recipe(data, work)
    list(learn(options))
    from regrad_cli.learn.prior import Prior

    prior = Prior.from_bytes(options.out.read_bytes()).rounded()
    (ROOT / "regrad_cli" / "data" / f"prior-{prior.card['model'][:16]}.safetensors").write_bytes(prior.to_bytes())


def make_baseline(objective: str, data: Path, work: Path) -> None:
    """A baseline with the best of the learning rates, and the curves of all of them."""
    folder = ROOT / "benchmarks" / "baselines"
    folder.mkdir(exist_ok=True)
    options = replace(recipe(data, work), objective=objective)
    found = {}
    for rate in RATES:
        out = work / f"{objective}-search-{rate:g}.safetensors"
        list(learn(replace(options, out=out, learning_rate=rate, steps=SEARCH_STEPS, validate_every=100)))
        lines = out.with_name(out.name + ".metrics.jsonl").read_text(encoding="utf-8").splitlines()
        found[rate] = min(entry["chosen"] for entry in map(json.loads, lines) if "chosen" in entry)
        shutil.copyfile(
            out.with_name(out.name + ".metrics.jsonl"), folder / f"{objective}-search-{rate:g}.metrics.jsonl"
        )
    best = min(found, key=lambda rate: found[rate])
    print(f"{objective}: dev loss after {SEARCH_STEPS} steps by learning rate {found}: {best:g} is taken", flush=True)
    out = work / f"{objective}.safetensors"
    list(learn(replace(options, out=out, learning_rate=best)))
    for file in (out, out.with_name(out.name + ".metrics.jsonl"), out.with_name(out.name + ".curve.html")):
        shutil.copyfile(file, folder / file.name)


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
