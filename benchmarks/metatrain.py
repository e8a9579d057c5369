"""Measures `meta-train`'s steps against a plain loop that backpropagates through both levels: tasks a second, and loss.

The plain loop is fp32, the whole model, one task after another, one graph from the question through the inner step to
the prior, nothing kept from one task to the next. Both begin with the same prior and learn from the same episodes in
the same steps by the same update; they take turns, step by step. What they learn is thrown away.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from benchmarks.bench import QUESTIONS, Bench, Options, Result
from benchmarks.measure import Figure, Target, paired_ratio, shown, spread

if TYPE_CHECKING:
    from regrad_cli.learn.meta import Episode
    from regrad_cli.learn.model import Model
    from regrad_cli.tasks import Task

TITLE = "Training against a plain double-backward loop"
DEVICES = ("cpu", "cuda")
TASKS = {"cpu": 24, "cuda": 40}
ROUNDS = 3  # how often each task comes, as in the training of the prior that ships; in the first nothing is kept yet
BATCH = 4
LEARNING_RATE, STEP_RATE = 1e-3, 1e-2
K, TEMPERATURE = 3, 0.05

Tensors = dict[str, Any]


def run(place: Bench, options: Options) -> Result:
    import torch

    from regrad_cli.learn.meta import MetaLearner
    from regrad_cli.learn.model import load_model
    from regrad_cli.learn.optimise import Training
    from regrad_cli.learn.prior import seeded_prior
    from regrad_cli.learn.steps import with_found_step_size
    from regrad_cli.learn.workers import Workers, mean_gradient
    from regrad_cli.models import quiet_libraries

    quiet_libraries()
    rounds = options.rounds or ROUNDS
    count = options.tasks or TASKS[options.device]
    learned, kept_aside = split(count)
    plain_model = load_model(place.model_folder, device=options.device, dtype="fp32")
    model = load_model(place.model_folder, device=options.device)
    start = with_found_step_size(plain_model, seeded_prior(plain_model, "benchmark"))
    steps = rounds * len(learned) // BATCH
    ours, plain = (Training(start, steps=steps, learning_rate=LEARNING_RATE, step_rate=STEP_RATE) for _ in range(2))
    episodes = drawn(place, options, plain_model, learned, steps)
    threads = torch.get_num_threads()

    @contextmanager
    def all_threads() -> Iterator[None]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        yield
        torch.set_num_threads(before)

    def done() -> float:
        if options.device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def timed(work: Callable[[], None]) -> float:
        began = done()
        work()
        return done() - began

    learner = MetaLearner(model, start.scale)
    with learner.ready(), Workers(learner) as workers:

        def our_step(run: Training, batch: Sequence[Episode]) -> None:
            found = workers.gradients(run.theta, run.step_sizes, batch)
            run.update(*mean_gradient([part for _, part in found]))

        def plain_step(run: Training, batch: Sequence[Episode]) -> None:
            with all_threads():
                run.update(*mean_gradient([gradient(plain_model, run.theta, run.log_steps, one) for one in batch]))

        warm = Training(start, steps=1, learning_rate=LEARNING_RATE, step_rate=STEP_RATE)
        aside = drawn(place, options, plain_model, kept_aside, 1, batch=len(kept_aside))[0]
        our_step(warm, aside[:BATCH])
        plain_step(warm, aside[:1])
        seconds: dict[str, list[float]] = {"ours": [], "plain": []}
        for batch in episodes:
            seconds["ours"].append(timed(lambda batch=batch: our_step(ours, batch)))  # type: ignore[misc]
            seconds["plain"].append(timed(lambda batch=batch: plain_step(plain, batch)))  # type: ignore[misc]
    judge = MetaLearner(plain_model, start.scale)
    with judge.ready(), Workers(judge) as workers:
        before, our_loss, plain_loss = (
            statistics.mean(workers.losses(tensors, sizes, aside))
            for tensors, sizes in (
                (start.tensors, start.step_sizes), (ours.theta, ours.step_sizes), (plain.theta, plain.step_sizes),
            )
        )  # fmt: skip
    tasks = sum(map(len, episodes))
    ratios = [a / b for a, b in zip(seconds["plain"], seconds["ours"], strict=True)]
    first = ratios[: max(1, len(ratios) // rounds)]
    figures = [
        Figure(
            "tasks a second",
            tasks / sum(seconds["ours"]),
            "/s",
            tasks / sum(seconds["plain"]),
            paired_ratio(seconds["plain"], seconds["ours"]),
            Target("≥", 4),
        ),
        Figure(
            f"answer loss on {len(aside)} other tasks after {tasks} tasks",
            our_loss,
            "nats a token",
            plain_loss,
            our_loss / plain_loss,
            Target("≤", 1.01),
        ),
    ]
    lengths = [len(ids) for batch in episodes for episode in batch for ids in episode.passages]
    notes = [
        f"{tasks} tasks in {steps} steps of {BATCH}, each of {len(learned)} tasks of examples/questions.jsonl "
        f"{rounds} times; {statistics.mean(len(e.passages) for b in episodes for e in b):.1f} passages a task "
        f"({shown(statistics.mean(lengths))} tokens each on average, strangers included), up to 4 questions; "
        f"the ratio is the median of those of the steps ({spread(ratios)}; of the first round, where the lower half's "
        f"output is not kept yet, {shown(statistics.median(first))}).",
        f"regrad computes in {str(model.dtype).removeprefix('torch.')}, the plain loop in float32; losses are measured "
        f"in float32 for both, {shown(before)} at the start.",
    ]
    return Result(figures, notes)


def split(count: int) -> tuple[list[Task], list[Task]]:
    """`count` tasks of the examples to learn from, and eight others."""
    from regrad_cli.tasks import read_tasks

    tasks, _ = read_tasks([QUESTIONS])
    if not BATCH <= count <= len(tasks) - 8:
        raise ValueError(f"--tasks is between {BATCH} and {len(tasks) - 8}")
    return tasks[:count], tasks[-8:]


def drawn(
    place: Bench, options: Options, model: Model, tasks: Sequence[Task], steps: int, batch: int = BATCH
) -> list[list[Episode]]:
    """The episodes of every step, as `meta-train` draws them: strangers among the passages, some of them shown."""
    from regrad_cli.embed import load_embedder
    from regrad_cli.episodes import EpisodeRules, Episodes
    from regrad_cli.learn.prior import Prior
    from regrad_cli.weighing import Vectors

    embedder = load_embedder(place.embedder_folder, device=options.device)
    rule = Prior({}, {}, {"weights": "softmax", "temperature": TEMPERATURE})
    vectors = Vectors(embedder.encode)
    made = Episodes(model, tasks, EpisodeRules(k=K), rule.weights_for, seed=0, vectors=vectors)
    vectors.add(made.texts_to_embed(tasks))
    found: list[list[Episode]] = []
    for step in range(steps):
        usable = [each for each in made.at(step, batch) if not isinstance(each, str)]  # of a small model, not all
        found += [usable] if usable else []
    return found


def gradient(model: Model, theta: Mapping[str, Any], logs: Mapping[str, float], episode: Episode) -> Any:
    """One task's meta-gradient as the paper states it: autograd through the inner step, the whole model each time."""
    import torch
    import torch.nn.functional as F

    from regrad_cli.learn.meta import MetaGradient

    network, device = model.network, model.device
    leaves = {name: tensor.detach().to(device).requires_grad_() for name, tensor in theta.items()}
    log = {name: torch.tensor(value, device=device, requires_grad=True) for name, value in logs.items()}

    def logits(ids: Sequence[int], tensors: Tensors) -> Any:
        def branch(projection: Any) -> Callable[..., Any]:
            a, b = tensors[projection.name_a], tensors[projection.name_b]
            return lambda _module, inputs, output: output + 2.0 * (inputs[0] @ a.T) @ b.T

        hooks = [each.module.register_forward_hook(branch(each)) for each in model.projections]
        try:
            return network(input_ids=torch.tensor([list(ids)], device=device), use_cache=False).logits[0]
        finally:
            for hook in hooks:
                hook.remove()

    usual = network.config._attn_implementation
    network.set_attn_implementation("eager")  # fused attention has no second derivative
    inner = []
    for ids in episode.passages:
        loss = F.cross_entropy(logits(ids, leaves)[:-1], torch.tensor(ids[1:], device=device))
        inner.append(torch.autograd.grad(loss, list(leaves.values()), create_graph=True))
    losses = []
    for asked in episode.questions:
        adapted: Tensors = dict(leaves)
        for weight, found in zip(asked.weights, inner, strict=True):
            for name, value in zip(leaves, found, strict=True):
                adapted[name] = adapted[name] - log[name].exp() * weight * value
        wanted = torch.tensor(asked.ids[asked.start :], device=device)
        losses.append(F.cross_entropy(logits(asked.ids, adapted)[asked.start - 1 : len(asked.ids) - 1], wanted))
    total = torch.stack(losses).mean()
    found = torch.autograd.grad(total, [*leaves.values(), *log.values()], materialize_grads=True)
    network.set_attn_implementation(usual)
    tensors = dict(zip(leaves, found[: len(leaves)], strict=True))
    return MetaGradient(
        total.detach()[None].cpu(), tensors, dict(zip(log, map(float, found[len(leaves) :]), strict=True))
    )
