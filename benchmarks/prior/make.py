"""Makes the prior that ships for the starter, and the fine-tuned baselines beside it, from the seed. Hours on a CPU.

    python -m benchmarks.prior.make --data FOLDER --work FOLDER prior       # → regrad_cli/data/prior-….safetensors
    python -m benchmarks.prior.make --data FOLDER --work FOLDER direct rag  # → benchmarks/baselines/, after the prior

FOLDER of --data holds {nq,xquad}-{train,dev}.jsonl and covid-dev.jsonl (for its titles); everything else is generated.
Killed, it goes on where it was. Each baseline gets the prior's tasks and number of parameters, and the best of three
learning rates; `rag` without the tasks that the starter wrote itself.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import partial
from pathlib import Path
from random import Random
from typing import Any, NamedTuple

from benchmarks.prior import cloze, cropped, swapped
from benchmarks.prior.further import further
from benchmarks.prior.legs import (
    Task,
    begun_normalized,
    learn,
    learned,
    mean,
    metrics_file,
    read,
    stopped,
    validated,
    worlds,
    written,
)
from regrad_cli.learn.prior import AMONG, Prior
from regrad_cli.metatrain import MetaTrainOptions

ROOT = Path(__file__).parents[2]
RATES = (3e-4, 1e-3, 3e-3)
SEARCH_STEPS = 200
AMONG_PASSAGES = 0.7  # of the prior and its gradients, where the prompt shows the passages (docs/experiments.md, 12)
SHARED_BY = 0.5  # temperature among a passage's segments, once every gradient has the same length
TRAIN = ("nq-train.jsonl", "xquad-train.jsonl")
LAST_RATE = 0.5  # of the first leg's, as with the prior
SECOND_ENDS, THIRD_ENDS = 583, 225  # steps: later, what they were to learn from was known by heart


class Recipe(NamedTuple):
    """The settings of the prior's first four legs (docs/experiments.md, 3, 7 and 9); the fifth is `fifth_leg`'s, two
    more are `reading_legs`', and the rest `last_legs`'.

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
    nq, xquad = (read(file) for file in train)
    gaps = list(cloze.generate([*nq, *xquad], seed=0))
    invented = {seed: worlds(work / f"worlds-{seed}.jsonl", seed=seed, tasks=500) for seed in (1, 2)}

    def others(seed: int, **copies: tuple[list[Task], int]) -> tuple[Path, ...]:
        return tuple(
            written(work / f"swapped-{name}-{seed}.jsonl", swapped.generate(tasks, seed, count))
            for name, (tasks, count) in copies.items()
        )

    first = MetaTrainOptions(
        tasks=(*train, worlds(work / "worlds.jsonl", seed=0, tasks=2500)),
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
        tasks=(*others(0, nq=(nq, 1), xquad=(xquad, 6), cloze=(gaps, 1)), invented[1]),
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
    as_they_are = (*train, written(work / "cloze.jsonl", gaps))
    third = replace(
        second,
        tasks=(*as_they_are, *others(1, nq=(nq, 1), xquad=(xquad, 4)), invented[1]),
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
        tasks=(*as_they_are, *others(2, nq=(nq, 1), xquad=(xquad, 4)), invented[2]),
        out=work / "fourth" / "starter.safetensors",
        init=work / "third.safetensors",
        steps=320,
        validate_every=80,
        dev_tasks=64,
        learning_rate=3e-4,
        seed=5,
    )
    for leg in (first, second, third, fourth):
        leg.out.parent.mkdir(exist_ok=True)
    return Recipe(first, second, third, fourth)


def fifth_leg(
    data: Path, work: Path, fourth: MetaTrainOptions, tasks: Callable[[Path, Path], tuple[Path, ...]]
) -> MetaTrainOptions:
    """The fifth leg (docs/experiments.md, 10): passages that nobody has seen. Makes them, where they are not there."""
    return replace(
        fourth,
        tasks=tasks(data, work),
        out=work / "starter.safetensors",
        init=fourth.out,
        steps=600,
        validate_every=200,
        learning_rate=6e-4,
        mix_context=0.4,
        seed=11,
    )


def anew(data: Path, folder: Path, seed: int, *, copies: int, invented: int) -> dict[str, Any]:
    """The train tasks as they are, copies of them with other answers, and invented worlds, all of this seed, and where
    a leg on them ends: at its last step."""
    folder.mkdir(exist_ok=True)
    nq, xquad = (read(data / f"{name}-train.jsonl") for name in ("nq", "xquad"))
    tasks = (
        written(folder / "nq.jsonl", nq),
        written(folder / "xquad.jsonl", xquad),
        written(folder / "swapped-nq.jsonl", Random(seed).sample(list(swapped.generate(nq, seed, 1)), 1200)),
        written(folder / "swapped-xquad.jsonl", swapped.generate(xquad, seed, copies)),
        worlds(folder / "worlds.jsonl", seed=seed, tasks=invented),
    )
    return {"tasks": tasks, "out": folder / "starter.safetensors", "keep": "last", "seed": seed}


def reading_legs(data: Path, work: Path, fifth: MetaTrainOptions) -> tuple[MetaTrainOptions, MetaTrainOptions]:
    """The sixth leg, with tasks at θ itself, and the seventh, of finer segments and fewer layers' gradients
    (docs/experiments.md, 16). What is wanted of each is halfway from where it began."""
    sixth = replace(
        fifth, **anew(data, work / "sixth", 53, copies=3, invented=300), init=work / "fifth.safetensors", steps=560,
        validate_every=140, learning_rate=4e-4, mix_context=0.5, reading=4,
    )  # fmt: skip
    seventh = replace(
        fifth, **anew(data, work / "seventh", 67, copies=4, invented=500), init=work / "sixth.safetensors", steps=480,
        validate_every=120, learning_rate=4e-4, reading=2, gradient_layers=10, segments=4, segment_tokens=30,
    )  # fmt: skip
    return sixth, seventh


def last_legs(data: Path, work: Path, seventh: MetaTrainOptions) -> tuple[MetaTrainOptions, ...]:
    """Five legs from one start (docs/experiments.md, 17 and 19): two of the seventh's kind, the second of them on tasks
    with sentences left out, and three of normalized gradients through one bit, the second of those on such tasks. What
    is wanted is the mean of all and the start."""
    eighth = replace(
        seventh, **anew(data, work / "eighth", 83, copies=4, invented=500), init=work / "seventh-mean.safetensors",
        steps=440, validate_every=110,
    )  # fmt: skip
    ninth = replace(eighth, **anew(data, work / "ninth", 97, copies=4, invented=500))
    ninth = replace(ninth, tasks=(*left_out(data, work / "ninth", 97), ninth.tasks[-1]))
    tenth = replace(
        seventh, **anew(data, work / "tenth", 101, copies=4, invented=500), init=work / "normalized.safetensors",
        steps=500, validate_every=125, learning_rate=5e-4, codec="r4-int1", segment_temperature=SHARED_BY,
    )  # fmt: skip
    shorter = {"steps": 440, "validate_every": 110, "learning_rate": 4e-4}
    eleventh = replace(tenth, **anew(data, work / "eleventh", 107, copies=4, invented=500), **shorter)
    eleventh = replace(eleventh, tasks=(*left_out(data, work / "eleventh", 107), eleventh.tasks[-1]))
    twelfth = replace(tenth, **anew(data, work / "twelfth", 109, copies=4, invented=500), **shorter)
    return eighth, ninth, tenth, eleventh, twelfth


def left_out(data: Path, folder: Path, seed: int) -> tuple[Path, ...]:
    """Train tasks, some as they are and most with sentences left out, with their answers and with others."""
    nq, xquad = (read(data / f"{name}-train.jsonl") for name in ("nq", "xquad"))

    def some(tasks: Iterable[Task], count: int) -> list[Task]:
        return Random(seed).sample(list(tasks), count)

    return (
        written(folder / "nq.jsonl", some(nq, 600)),
        written(folder / "xquad.jsonl", xquad),
        written(folder / "cropped-nq.jsonl", some(cropped.generate(nq, seed), 1000)),
        written(folder / "cropped-xquad.jsonl", cropped.generate(xquad, seed, 2)),
        written(folder / "swapped-nq.jsonl", some(cropped.generate(swapped.generate(nq, seed), seed), 1000)),
        written(folder / "swapped-xquad.jsonl", cropped.generate(swapped.generate(xquad, seed, 4), seed)),
    )


def make_prior(data: Path, work: Path) -> None:
    """The prior, into the package: rounded, for the package may grow by 4 MB at most."""
    first, second, third, fourth = recipe(data, work)
    list(learn(first))
    assert third.init is not None and fourth.init is not None
    if not third.init.exists():
        begun = learned(first.out)
        third.init.write_bytes(mean(begun, stopped(second, begun, SECOND_ENDS)).to_bytes())
    if not fourth.init.exists():
        begun = learned(third.init)
        fourth.init.write_bytes(stopped(third, begun, THIRD_ENDS).to_bytes())
    list(learn(fourth))
    last = fifth_leg(data, work, fourth, partial(further, reader=fourth.out))
    list(learn(last))
    sixth, seventh = reading_legs(data, work, last)
    assert sixth.init is not None and seventh.init is not None
    begun = mean(learned(last.out), learned(fourth.out))
    begun = replace(begun, card=begun.card | {AMONG: AMONG_PASSAGES}).rounded()
    sixth.init.write_bytes(begun.to_bytes())
    list(learn(sixth))
    between = mean(begun, learned(sixth.out))
    seventh.init.write_bytes(between.rounded().to_bytes())
    list(learn(seventh))
    legs = last_legs(data, work, seventh)
    eighth, _, tenth, *_ = legs
    assert eighth.init is not None and tenth.init is not None
    start = mean(learned(seventh.out), between).rounded()
    eighth.init.write_bytes(start.to_bytes())
    some = Random(0).sample([task for name in TRAIN for task in read(data / name)], 60)
    start = begun_normalized(start, some, work)
    start = replace(start, card=start.card | {"codec": tenth.codec, "segment_temperature": SHARED_BY})
    tenth.init.write_bytes(start.to_bytes())
    for leg in legs:
        list(learn(leg))
    prior = mean_of_all(learned(tenth.out), start, *(learned(leg.out) for leg in legs if leg is not tenth))
    prior = replace(prior, card=prior.card | {"losses": validated(prior, tenth)}).rounded()
    (ROOT / "regrad_cli" / "data" / f"prior-{prior.card['model'][:16]}.safetensors").write_bytes(prior.to_bytes())


def mean_of_all(tenth: Prior, *others: Prior) -> Prior:
    """With the card of the first, which names the others."""
    means = [prior.fingerprint for prior in others]
    return mean(replace(tenth, card=tenth.card | {"mean_with": means}), *others)


def make_baseline(objective: str, data: Path, work: Path) -> None:
    """A baseline on the same tasks, in two legs, with the best of the learning rates in the first.

    `direct` gets as many steps as the prior's first five legs, and the prior comes first: what was written for its
    fifth is learned from there too. `rag` goes without, for what a prior answered with the passage in its prompt was
    kept there, so learning from it is learning from the prior: its second leg is of the kind and the tasks of the
    prior's tenth, and what is kept is the mean of both (docs/experiments.md, 12 and 22).
    """
    folder = ROOT / "benchmarks" / "baselines"
    folder.mkdir(exist_ok=True)
    legs = recipe(data, work)
    own = {"objective": objective, "segments": 1, "codec": "none"}
    first = replace(legs.first, **own, out=work / f"{objective}-first.safetensors")
    if objective == "rag":
        last = replace(
            first, **anew(data, work / "rag-second", 101, copies=4, invented=500), init=work / "rag-begun.safetensors",
            steps=440, validate_every=110,
        )  # fmt: skip
    else:
        fifth = fifth_leg(data, work, legs.fourth, partial(further, reader=legs.fourth.out))
        last = replace(
            fifth,
            **own,
            tasks=(*legs.fourth.tasks, *fifth.tasks),
            out=work / f"{objective}.safetensors",
            init=first.out,
            steps=SECOND_ENDS + THIRD_ENDS + legs.fourth.steps + fifth.steps,
        )
    found = {}
    for rate in RATES:
        out = work / f"{objective}-search-{rate:g}.safetensors"
        list(learn(replace(first, out=out, learning_rate=rate, steps=SEARCH_STEPS, validate_every=100)))
        found[rate] = min(entry["chosen"] for entry in read(metrics_file(out)) if "chosen" in entry)
        shutil.copyfile(metrics_file(out), folder / metrics_file(out).name)
    best = min(found, key=lambda rate: found[rate])
    print(f"{objective}: dev loss after {SEARCH_STEPS} steps by learning rate {found}: {best:g} is taken", flush=True)
    for number, (leg, rate) in enumerate(((first, best), (last, best * LAST_RATE)), 1):
        list(learn(replace(leg, learning_rate=rate)))
        shutil.copyfile(metrics_file(leg.out), folder / f"{objective}-{number}.metrics.jsonl")
        if leg is first and objective == "rag":
            (work / "rag-begun.safetensors").write_bytes(learned(first.out).rounded().to_bytes())
    kept = learned(last.out)
    if objective == "rag":
        kept = mean_of_all(kept, learned(work / "rag-begun.safetensors"))
        kept = replace(kept, card=kept.card | {"losses": validated(kept, last)})
    (folder / f"{objective}.safetensors").write_bytes(kept.rounded().to_bytes())  # as the prior that ships is


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
