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
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from benchmarks.prior import cloze, swapped
from benchmarks.prior.worlds import write_worlds
from regrad_cli.metatrain import MetaTrainOptions, meta_train
from regrad_cli.records import Notice
from regrad_cli.trainevents import Trained, TrainStep, Validated

if TYPE_CHECKING:
    from regrad_cli.learn.prior import Prior

ROOT = Path(__file__).parents[2]
RATES = (3e-4, 1e-3, 3e-3)
SEARCH_STEPS = 200
LAST_RATE = 0.5  # of the first leg's, as with the prior
SECOND_ENDS, THIRD_ENDS = 583, 225  # steps: later, what they were to learn from was known by heart


class Recipe(NamedTuple):
    """The settings of the prior's four legs (docs/experiments.md, 3, 7 and 9).

    first   whole passages as they are
    second  segments, with other answers; what is wanted is halfway from the first to where it stops
    third   from there, segments through the codec that ships; stopped too
    fourth  the same with other answers again, and steps that end at nothing
    """

    first: MetaTrainOptions
    second: MetaTrainOptions
    third: MetaTrainOptions
    fourth: MetaTrainOptions


def recipe(data: Path, work: Path) -> Recipe:
    train = (data / "nq-train.jsonl", data / "xquad-train.jsonl")
    nq, xquad = (_read(file) for file in train)
    gaps = list(cloze.generate([*nq, *xquad], seed=0))
    worlds = {seed: _worlds(work / f"worlds-{seed}.jsonl", seed=seed, tasks=500) for seed in (1, 2)}

    def others(seed: int, **copies: tuple[list[dict[str, Any]], int]) -> tuple[Path, ...]:
        return tuple(
            _written(work / f"swapped-{name}-{seed}.jsonl", swapped.generate(tasks, seed, count))
            for name, (tasks, count) in copies.items()
        )

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
    second = replace(
        first,
        tasks=(*others(0, nq=(nq, 1), xquad=(xquad, 6), cloze=(gaps, 1)), worlds[1]),
        out=work / "second" / "starter.safetensors",
        init=first.out,
        steps=1100,
        validate_every=275,
        dev_tasks=48,
        mix_context=0.3,
        segments=3,
        segment_temperature=0.08,
        seed=2,
    )
    as_they_are = (*train, _written(work / "cloze.jsonl", gaps))
    third = replace(
        second,
        tasks=(*as_they_are, *others(1, nq=(nq, 1), xquad=(xquad, 4)), worlds[1]),
        out=work / "third" / "starter.safetensors",
        init=work / "halfway.safetensors",
        steps=900,
        validate_every=225,
        learning_rate=5e-4,
        mix_context=0.5,
        temperature=0.05,
        segment_temperature=0.3,
        codec="r2-int2",
        seed=4,
    )
    fourth = replace(
        third,
        tasks=(*as_they_are, *others(2, nq=(nq, 1), xquad=(xquad, 4)), worlds[2]),
        out=work / "starter.safetensors",
        init=work / "third.safetensors",
        steps=320,
        validate_every=80,
        dev_tasks=64,
        learning_rate=3e-4,
        seed=5,
    )
    for leg in (first, second, third):
        leg.out.parent.mkdir(exist_ok=True)
    return Recipe(first, second, third, fourth)


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
    from regrad_cli.learn.prior import Prior

    first, second, third, fourth = recipe(data, work)
    list(learn(first))
    assert third.init is not None and fourth.init is not None
    if not third.init.exists():
        begun = Prior.from_bytes(first.out.read_bytes())
        third.init.write_bytes(halfway(begun, stopped(second, begun, SECOND_ENDS)).to_bytes())
    if not fourth.init.exists():
        begun = Prior.from_bytes(third.init.read_bytes())
        fourth.init.write_bytes(stopped(third, begun, THIRD_ENDS).to_bytes())
    list(learn(fourth))
    prior = Prior.from_bytes(fourth.out.read_bytes()).rounded()
    (ROOT / "regrad_cli" / "data" / f"prior-{prior.card['model'][:16]}.safetensors").write_bytes(prior.to_bytes())


def stopped(options: MetaTrainOptions, begun: Prior, step: int) -> Prior:
    """What a run that begins with this prior has learned after so many of its steps."""
    from regrad_cli.learn.optimise import Training

    with closing(meta_train(options)) as events:  # which keeps what was learned, as Ctrl-C does
        for event in events:
            if isinstance(event, TrainStep) and event.step >= step:
                break
    training = Training(begun, steps=options.steps, learning_rate=0.0, step_rate=0.0)
    training.restore(options.out.with_name(options.out.name + ".resume").read_bytes())
    return replace(begun, tensors=training.theta, log_step_sizes=training.log_steps)


def halfway(one: Prior, other: Prior) -> Prior:
    """The mean of two priors' θ and log α, with the first one's card."""
    logs = {name: (log + other.log_step_sizes[name]) / 2 for name, log in one.log_step_sizes.items()}
    tensors = {name: (tensor + other.tensors[name]) / 2 for name, tensor in one.tensors.items()}
    return replace(one, tensors=tensors, log_step_sizes=logs)


def make_baseline(objective: str, data: Path, work: Path) -> None:
    """A baseline of as many steps on the same tasks, in two legs, with the best of the learning rates in the first."""
    folder = ROOT / "benchmarks" / "baselines"
    folder.mkdir(exist_ok=True)
    legs = recipe(data, work)
    own = {"objective": objective, "segments": 1, "codec": "none"}
    first = replace(legs.first, **own, out=work / f"{objective}-first.safetensors")
    steps = SECOND_ENDS + THIRD_ENDS + legs.fourth.steps
    last = replace(legs.fourth, **own, out=work / f"{objective}.safetensors", init=first.out, steps=steps)
    found = {}
    for rate in RATES:
        out = work / f"{objective}-search-{rate:g}.safetensors"
        list(learn(replace(first, out=out, learning_rate=rate, steps=SEARCH_STEPS, validate_every=100)))
        found[rate] = min(entry["chosen"] for entry in _read(_metrics(out)) if "chosen" in entry)
        shutil.copyfile(_metrics(out), folder / _metrics(out).name)
    best = min(found, key=lambda rate: found[rate])
    print(f"{objective}: dev loss after {SEARCH_STEPS} steps by learning rate {found}: {best:g} is taken", flush=True)
    for number, (leg, rate) in enumerate(((first, best), (last, best * LAST_RATE)), 1):
        list(learn(replace(leg, learning_rate=rate)))
        shutil.copyfile(_metrics(leg.out), folder / f"{objective}-{number}.metrics.jsonl")
    shutil.copyfile(last.out, folder / last.out.name)


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
