"""What the prior's last leg learns from beside the train tasks: questions written to their passages, imagined passages.

Made once and kept in the work folder. An hour on two cores, of which half is imagining.
"""

from __future__ import annotations

from pathlib import Path
from random import Random
from typing import TYPE_CHECKING

from benchmarks.prior import asked, cloze, imagined, swapped
from benchmarks.prior.legs import Task, learn, learned, read, worlds, written
from regrad_cli.metatrain import MetaTrainOptions

if TYPE_CHECKING:
    from benchmarks.prior.asked import Asker

SEED = 11
ASKED = 1_100  # passages of NQ that get further questions
IMAGINED = 2_200  # passages, of which 1,300 or so read well


def further(data: Path, work: Path, reader: Path) -> tuple[Path, ...]:
    """The task files of the last leg.

    reader  the prior that judges what was written: the one that the leg begins with
    """
    from regrad_cli.learn.model import load_model
    from regrad_cli.models import resolve_model

    own = {name: work / f"further-{name}.jsonl" for name in ("imagined", "nq-asked", "swapped-asked")}
    if not all(file.exists() for file in own.values()):
        nq, xquad = read(data / "nq-train.jsonl"), read(data / "xquad-train.jsonl")
        folder = resolve_model("starter").path
        plain, writer, judge = (load_model(folder) for _ in range(3))
        asker = asked.Asker(
            asked.merged(writer, learned(_writer(data, work, nq, xquad))), asked.merged(judge, learned(reader)), SEED
        )
        aside = {
            task["title"].lower() for name in ("nq", "xquad", "covid") for task in read(data / f"{name}-dev.jsonl")
        }
        passages = list(imagined.generate(plain, [*nq, *xquad], aside, SEED, IMAGINED))
        rng = Random(SEED)
        more = list(asker(rng.sample(nq, ASKED)))
        written(own["imagined"], _with_gaps(passages, asker, rng))
        written(own["nq-asked"], more)
        written(own["swapped-asked"], rng.sample(list(swapped.generate(more, 7, 1)), 300))
    return (*own.values(), *drawn(data, work))


def drawn(data: Path, work: Path) -> tuple[Path, ...]:
    """Those of them in which the starter wrote nothing: train tasks again, with other answers too, and worlds."""
    names = ("nq", "xquad", "swapped-nq", "swapped-xquad")
    files = {name: work / f"further-{name}.jsonl" for name in names}
    if not all(file.exists() for file in files.values()):
        nq, xquad = read(data / "nq-train.jsonl"), read(data / "xquad-train.jsonl")
        rng = Random(SEED)
        written(files["nq"], rng.sample(nq, 900))
        written(files["xquad"], xquad)
        written(files["swapped-nq"], rng.sample(list(swapped.generate(nq, 7, 1)), 600))
        written(files["swapped-xquad"], swapped.generate(xquad, 7, 2))
    return (*files.values(), worlds(work / "further-worlds.jsonl", seed=SEED, tasks=300))


def _writer(data: Path, work: Path, nq: list[Task], xquad: list[Task]) -> Path:
    """The starter that writes questions, learned from the train tasks."""
    tasks = {}
    for split, own in (("train", (nq, xquad)), ("dev", [read(data / f"{name}-dev.jsonl") for name in ("nq", "xquad")])):
        ways = zip(own, (asked.SEARCHED, asked.EXAMINED), strict=True)
        turned = [task for some, asked_as in ways for task in asked.turned_round(some, asked_as)]
        tasks[split] = written(work / f"turned-{split}.jsonl", turned)
    options = MetaTrainOptions(
        tasks=(tasks["train"],),
        dev=(tasks["dev"],),
        out=work / "writer.safetensors",
        objective="rag",
        rank=32,
        steps=500,
        validate_every=125,
        learning_rate=2e-3,
        strangers=0.0,
        seed=1,
    )
    list(learn(options))
    return options.out


def _with_gaps(passages: list[Task], asker: Asker, rng: Random) -> list[Task]:
    """The passages with what was asked of them, and gaps to fill where that is less than three questions."""
    found = {task["id"].removesuffix("-asked"): task["questions"] for task in asker(passages)}
    tasks = []
    for task in passages:
        questions = found.get(task["id"], [])
        given = {question["answers"][0].lower() for question in questions}
        gaps = cloze.make(task["title"], task["passages"][0], given, rng)[: max(0, 3 - len(questions))]
        questions = [*questions, *({"question": gap.question, "answers": [gap.answer]} for gap in gaps)]
        if questions:
            tasks.append({**task, "questions": questions})
    return tasks
