"""Tasks → a prior. Yields events; prints nothing. Resumable: killed at any moment, it goes on to the same result."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Generator, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_cli.characters import printable_name
from regrad_cli.engine import narrated
from regrad_cli.episodes import Episodes
from regrad_cli.errors import Damaged, Mismatch, NonFinite, UsageProblem
from regrad_cli.fingerprints import fingerprint, fingerprint_embedder
from regrad_cli.models import ModelFolder, quiet_libraries, resolve_embedder, resolve_model
from regrad_cli.priors import SHIPPED, shipped_prior
from regrad_cli.records import Notice, Progress, Skipped, sha256_hex
from regrad_cli.tasks import Task, read_tasks
from regrad_cli.trainevents import Trained, TrainStep, Validated
from regrad_cli.trainfiles import TrainFiles, last_losses
from regrad_cli.trainoptions import EARLIER, MetaTrainOptions, held_out, refuse, spread
from regrad_cli.weighing import Vectors

if TYPE_CHECKING:
    from regrad_cli.learn.meta import Episode
    from regrad_cli.learn.model import Model
    from regrad_cli.learn.optimise import Training
    from regrad_cli.learn.prior import Prior
    from regrad_cli.learn.workers import Workers

Event = Notice | Progress | Skipped | TrainStep | Validated | Trained
BAD_STEPS = 3  # in a row, before a run stops: what made them will not go away
NOT_FINITE = "its loss or gradient is not finite"
EMBEDDED = 128  # passages between two words of progress
MEASURED = 64  # tasks whose passages say how long steps along normalized gradients are


def meta_train(options: MetaTrainOptions) -> Iterator[Event]:
    """Learns a prior from tasks; the last event is Trained. Goes on where an earlier run of the same settings stopped.

    raises  UsageProblem, ModelUnavailable, Locked, StorageFailed, Mismatch for an --init of another model, NonFinite
            where nothing but losses that are not finite come; what was learned before is kept in the `.resume` file
    """
    refuse(options)
    tasks, problems = read_tasks(options.tasks)
    dev, dev_problems = read_tasks(options.dev) if options.dev else ([], [])
    problems += dev_problems
    yield from problems
    if not options.dev:
        tasks, dev = held_out(tasks)
        yield Notice(
            f"{len(dev)} tasks are kept aside to choose the best by (their titles are in no other task)"
            if dev
            else "too few tasks to keep some aside and choose the best by: the last step's prior will be the result"
        )
    with TrainFiles(options.out) as files:
        folders: list[ModelFolder] = []
        yield from narrated(partial(resolve_model, options.model), folders)
        run = _Run(options, files, folders[0], tasks, spread(dev, options.dev_tasks))
        run.skipped += [f"{problem.source}: {problem.reason}" for problem in problems]
        yield from run.events()


class _Run:
    """One run: model, start, episodes.

    whole   whether what was learned and what was noted of it are of one and the same step: what Ctrl-C may keep
    """

    def __init__(
        self, options: MetaTrainOptions, files: TrainFiles, folder: ModelFolder, tasks: list[Task], dev: list[Task]
    ) -> None:
        self.files = files
        self.folder = folder
        self.tasks = tasks
        self.dev = dev
        self.identity = fingerprint(folder.path)
        self.embedder: str | None = None  # the fingerprint of what found the strangers
        self.init = None if options.init is None else self._init_bytes(options.init)
        self.begun = None if self.init is None else self._begun(self.init, options)
        self.options = options.settled({} if self.begun is None else self.begun.card)
        self.data = {"data": _data(options.tasks), "dev": _data(options.dev)}
        self.settings = self._settings()
        self.skipped: list[str] = []
        self.whole = False
        self.kept_at = time.perf_counter()
        self.before_s = 0.0  # seconds that earlier processes spent on this run
        quiet_libraries()

    def _init_bytes(self, init: Path) -> bytes:
        """The file of the prior to begin with. raises UsageProblem where there is none"""
        if str(init) == SHIPPED:
            shipped = shipped_prior(self.identity)
            if shipped is None:
                raise UsageProblem(
                    f"no prior of {self.folder.name} comes with regrad", "name a file, or leave --init out"
                )
            return shipped
        try:
            return init.read_bytes()
        except OSError as error:
            raise UsageProblem(f"the prior {init} cannot be read: {error.strerror}") from None

    def _begun(self, data: bytes, options: MetaTrainOptions) -> Prior:
        from regrad_cli.learn.prior import Prior

        name = str(options.init)
        prior = Prior.from_bytes(data, name)
        if prior.card.get("model") != self.identity.model:
            raise Mismatch(f"the prior {name} is of another model than {self.folder.name}", "use a prior of this model")
        if options.rank not in (None, prior.rank):
            raise UsageProblem(f"the prior {name} has rank {prior.rank}, not {options.rank}", "leave --rank out")
        return prior

    def _settings(self) -> dict[str, Any]:
        """What a run must share with the one it goes on from."""
        free = ("out", "tasks", "dev", "init", "device", "checkpoint_s", "keep")
        kept = {name: value for name, value in asdict(self.options).items() if name not in free}
        init = None if self.init is None else sha256_hex(self.init)
        return kept | self.data | {"init": init, "model": self.identity.model}

    def events(self) -> Iterator[Event]:
        kept = self.files.kept(self.settings, EARLIER)
        from regrad_cli.learn.meta import MetaLearner
        from regrad_cli.learn.model import load_model
        from regrad_cli.learn.optimise import Training
        from regrad_cli.learn.steps import with_normalized_gradients
        from regrad_cli.learn.workers import Workers

        options = self.options
        model = load_model(self.folder.path, device=options.device, dtype=options.dtype)
        yield Notice(f"computing on {model.device}, {str(model.dtype).removeprefix('torch.')}")
        start = self._start(model, search=kept is None or not options.step_rate)
        episodes = yield from self._episodes(model, start)
        if options.normalized and not start.normalized:
            yield Notice("measuring how long steps are along gradients of norm 1")
            start = with_normalized_gradients(model, start, episodes.passages(spread(self.tasks, MEASURED)))
        training = Training(
            start,
            steps=options.steps,
            learning_rate=options.learning_rate,
            step_rate=options.step_rate if options.objective == "regrad" else 0.0,
        )
        yield from self._resumed(training, kept)
        kinds, problems = episodes.for_validation(self.dev)
        yield from problems
        self.skipped += [f"{problem.source}: {problem.reason}" for problem in problems]
        learner = MetaLearner(
            model, start.scale, first_order=options.first_order, normalized=start.normalized, codec=self._codec(start)
        )
        with learner.ready(), Workers(learner) as workers:
            self.whole = True
            try:
                yield from self._steps(training, episodes, kinds, workers)
            except BaseException:  # Ctrl-C and a full disk alike: what was learned stays
                if self.whole:
                    with contextlib.suppress(Exception):
                        self._keep(training)
                raise
        yield self._finish(training, start, model)

    def _start(self, model: Model, *, search: bool) -> Prior:
        """The prior to begin with. search: also its step size, where it is a seeded one"""
        from regrad_cli.learn.model import load_model
        from regrad_cli.learn.prior import seeded_prior
        from regrad_cli.learn.steps import of_uppermost, with_found_step_size

        options, start = self.options, self.begun
        if start is None:
            assert options.rank is not None  # settled
            start = seeded_prior(model, self.identity.model, rank=options.rank, seed=options.seed)
            if options.objective == "regrad" and search:
                # In fp32 on the CPU whatever computes later, so that one seed is one start on every machine.
                start = with_found_step_size(load_model(self.folder.path, device="cpu", dtype="fp32"), start)
        else:
            start.check(model.projections)
        return start if options.gradient_layers is None else of_uppermost(model, start, options.gradient_layers)

    def _resumed(self, training: Training, kept: bytes | None) -> Iterator[Notice]:
        files = self.files
        if kept is None:
            files.take_up(-1, -1)
            return
        try:
            training.restore(kept)
        except Damaged as error:
            raise files.damaged() from error
        files.take_up(training.step, training.validated)
        self.before_s = max((entry.get("elapsed_s", 0.0) for entry in files.entries), default=0.0)
        self.skipped += [told for entry in files.entries for told in entry.get("skipped", [])]
        yield Notice(f"going on after step {training.step} of {training.steps}, from {files.resume}")

    @property
    def _rule(self) -> dict[str, Any]:
        """The rule for w and k that this run trains for, as a prior's card says it."""
        options = self.options
        return {
            "k": options.k,
            "segments": options.segments,
            "segment_tokens": options.segment_tokens,
            "weights": "softmax",
            "temperature": options.temperature,
            "segment_temperature": options.segment_temperature,
            "gamma": 1.0,
        }

    def _codec(self, start: Prior) -> Any:
        if self.options.codec is None:
            return None
        from regrad_cli.learn.codec import Codec, parse_codec

        codec = Codec(parse_codec(self.options.codec), start.shapes)
        return lambda tensors: codec.decode(*codec.encode(tensors), next(iter(tensors.values())).device)

    def _episodes(self, model: Model, start: Prior) -> Generator[Event, None, Episodes]:
        """What is learned from; where questions find or weigh passages by meaning, those are embedded first."""
        from regrad_cli.learn.tokens import Tokenizer

        rules = self.options.rules
        weighed = rules.objective == "regrad" and rules.segments > 1
        vectors = None
        if weighed or (rules.strangers and rules.k > 1):
            vectors = yield from self._vectors()
        episodes = Episodes(
            model, self.tasks, rules, replace(start, card=start.card | self._rule).weights_for, seed=self.options.seed,
            token_spans=Tokenizer(self.folder.path).spans, vectors=vectors,
        )  # fmt: skip
        if vectors is not None:
            texts = episodes.texts_to_embed([*self.tasks, *self.dev] if rules.objective == "regrad" else [])
            texts.sort(key=len)  # like lengths fill a pass
            for begin in range(0, len(texts), EMBEDDED):
                yield Progress("embedding passages, for their weights in the sum", begin, len(texts))
                vectors.add(texts[begin : begin + EMBEDDED])
        return episodes

    def _vectors(self) -> Generator[Event, None, Vectors]:
        from regrad_cli.embed import load_embedder
        from regrad_cli.learn.model import choose_device

        folders: list[ModelFolder] = []
        yield from narrated(partial(resolve_embedder, self.options.embedder), folders)
        self.embedder = fingerprint_embedder(folders[0].path)
        return Vectors(load_embedder(folders[0].path, device=str(choose_device(self.options.device))).encode)

    def _steps(
        self,
        training: Training,
        episodes: Episodes,
        kinds: Mapping[str, Sequence[Episode]],
        workers: Workers,
    ) -> Generator[Event, None, None]:
        began, first = time.perf_counter(), training.step
        self.kept_at = began
        while True:
            self._keep_if_due(training)
            if self._validation_is_due(training, kinds):
                yield self._validated(training, kinds, workers)
                self._keep_if_due(training)
            if training.step >= training.steps:
                break
            yield self._step(training, episodes, workers, began, first)
        self.before_s += time.perf_counter() - began

    def _step(self, training: Training, episodes: Episodes, workers: Workers, began: float, first: int) -> TrainStep:
        from regrad_cli.learn.workers import mean_gradient

        drawn = episodes.at(training.step, self.options.batch)
        skipped = [item for item in drawn if isinstance(item, str)]
        usable = [item for item in drawn if not isinstance(item, str)]
        rate = training.learning_rate
        parts = workers.gradients(training.theta, training.step_sizes, usable)
        good = [part for _, part in parts if part.finite]
        broken = [f"{episode.name}: {NOT_FINITE}" for episode, part in parts if not part.finite]
        if broken and not good and training.failed + 1 >= BAD_STEPS:
            raise NonFinite(
                f"no task of the last {BAD_STEPS} steps has a finite loss and gradient; the last is {broken[-1]}",
                "look at the tasks named, or lower --lr; with other tasks or settings, give another --out",
            )
        losses = [float(loss) for part in good for loss in part.losses]
        self.whole = False
        training.update(*mean_gradient(good), failed=bool(broken))
        elapsed_s = time.perf_counter() - began
        event = TrainStep(
            step=training.step,
            steps=training.steps,
            loss=sum(losses) / len(losses) if losses else None,
            learning_rate=rate,
            elapsed_s=self.before_s + elapsed_s,
            left_s=elapsed_s / (training.step - first) * (training.steps - training.step),
            skipped=(*skipped, *broken),
        )
        self.skipped += event.skipped
        self.files.note(asdict(event))
        self.whole = True
        return event

    def _validation_is_due(self, training: Training, kinds: Mapping[str, Sequence[Episode]]) -> bool:
        step = training.step
        wanted = step % self.options.validate_every == 0 or step == training.steps
        return any(kinds.values()) and wanted and training.validated != step

    def _validated(self, training: Training, kinds: Mapping[str, Sequence[Episode]], workers: Workers) -> Validated:
        found = {
            kind: {
                episode.name: loss
                for episode, loss in zip(
                    episodes, workers.losses(training.theta, training.step_sizes, episodes), strict=True
                )
            }
            for kind, episodes in kinds.items()
        }
        own = (losses for kind, losses in found.items() if kind != "other")  # whose passages are another's
        broken = {name for losses in own for name, loss in losses.items() if not math.isfinite(loss)}
        kept = {
            kind: [loss for name, loss in losses.items() if name not in broken and math.isfinite(loss)]
            for kind, losses in found.items()
        }
        means = {kind: sum(losses) / len(losses) for kind, losses in kept.items() if losses}
        wanted = [means[kind] for kind in ("own", "shown") if kind in means] or list(means.values())
        chosen = sum(wanted) / len(wanted) if wanted else None
        self.whole = False
        event = Validated(
            step=training.step,
            losses=means,
            chosen=chosen,
            best=chosen is not None and training.keep_if_best(chosen, len(broken)),
            skipped=tuple(f"{name}: {NOT_FINITE}" for name in sorted(broken)),
        )
        training.validated = training.step
        self.skipped += event.skipped
        self.files.note(asdict(event))
        self.whole = True
        return event

    def _keep(self, training: Training) -> None:
        self.files.keep(training.to_bytes(self.settings))
        self.kept_at = time.perf_counter()

    def _keep_if_due(self, training: Training) -> None:
        if time.perf_counter() - self.kept_at >= self.options.checkpoint_s:
            self._keep(training)

    def _finish(self, training: Training, start: Prior, model: Model) -> Trained:
        if not training.updates:
            problem = NonFinite if training.failed else UsageProblem
            raise problem(f"nothing was learned: every task was left out, the last was {self.skipped[-1]}")
        step, theta, logs = training.step, training.theta, training.log_steps
        if training.best is not None and self.options.keep == "best":
            step, theta, logs = training.best.step, training.best.theta, training.best.log_steps
        losses = last_losses(self.files.entries, step)
        if self.options.step_rate == 0 or self.options.objective != "regrad":
            logs = start.log_step_sizes  # in all their digits
        card = self._card(model, step, training.steps, losses)
        if not step:  # nothing was better than what it began with: what was learned stays beside it, for --keep last
            self._keep(training)
        prior = replace(start, tensors=theta, log_step_sizes=logs, card=card)
        self.files.finish(prior.to_bytes(), over=step > 0)
        skipped = tuple(dict.fromkeys(self.skipped))
        return Trained(str(self.options.out), training.step, step, losses, len(self.tasks), skipped, self.before_s)

    def _card(self, model: Model, step: int, steps: int, losses: dict[str, float]) -> dict[str, Any]:
        """What the prior says of itself. No paths: it travels."""
        from regrad_cli.learn.model import DTYPES
        from regrad_cli.learn.prior import AMONG, NORMALIZED

        options = self.options
        elsewhere = ("tasks", "dev", "out", "init", "device", "model", "embedder", "checkpoint_s")
        settings = {name: value for name, value in asdict(options).items() if name not in elsewhere}
        settings["dtype"] = next(name for name, kind in DTYPES.items() if kind == model.dtype)
        among = self.begun.card.get(AMONG) if self.begun is not None and options.objective == "regrad" else None
        return {
            "name": printable_name(options.out.stem),
            "trained": True,
            "objective": options.objective,
            "rank": options.rank,
            "model": self.identity.model,
            "tokenizer": self.identity.tokenizer,
            "embedder": self.embedder,
            "init": None if self.init is None else sha256_hex(self.init),
            "seed": options.seed,
            "steps": steps,
            "best_step": step,
            "losses": losses,
            **self._rule,
            **({} if options.codec is None else {"codec": options.codec}),
            **({} if among is None else {AMONG: among}),
            **({NORMALIZED: True} if options.normalized else {}),
            **self.data,
            "settings": settings,
        }


def _data(files: Sequence[Path]) -> list[dict[str, str]]:
    return [{"file": printable_name(file.name), "sha256": sha256_hex(file.read_bytes())} for file in files]
