"""What an evaluation needs, made ready once: the model, the prior, baselines, and what each question is answered from.

With gold retrieval each question has its own task's passages and no bank is needed; with a bank, what `ask` would find
there. Yields notices and progress; answers nothing.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from regrad_cli.answer import Answerer
from regrad_cli.bank import open_bank
from regrad_cli.drift import Growth
from regrad_cli.engine import narrated
from regrad_cli.errors import Mismatch, UsageProblem
from regrad_cli.evidence import Asked, Evidence, OwnGradients, derangement, found_evidence, own_passages
from regrad_cli.fingerprints import Fingerprint, fingerprint
from regrad_cli.models import ModelFolder, quiet_libraries, resolve_embedder, resolve_model
from regrad_cli.priors import AUTO, chosen_codec, prior_for, refuse_baseline
from regrad_cli.records import Notice, Progress, Skipped
from regrad_cli.settings import COMBINE_AUTO
from regrad_cli.tasks import Task

if TYPE_CHECKING:
    from regrad_cli.learn.codec import Codec
    from regrad_cli.learn.model import Model
    from regrad_cli.learn.prior import Prior
    from regrad_cli.retrieval import MinScore
    from regrad_cli.weighing import Cutter

MODES = ("direct", "rag", "direct-tuned", "rag-tuned", "cpt", "regrad", "both", "prior", "other", "random")
SHOWING = frozenset({"rag", "rag-tuned", "both"})  # passages stand in the prompt
BY_GRADIENT = frozenset({"regrad", "both", "other", "random"})
BY_PRIOR = BY_GRADIENT | {"prior"}
OBJECTIVES = {"direct-tuned": "direct", "rag-tuned": "rag"}  # what a baseline's card says it was tuned for
BASELINE_HINT = "make one with `regrad meta-train TASKS --objective direct` (or rag), and give it with --baseline FILE"


@dataclass(frozen=True, slots=True)
class EvaluateOptions:
    """What to measure, on what.

    modes       None for all that can be measured but cpt
    bank        where passages are looked for; None answers from each task's own passages
    baselines   prior files whose card names what they were fine-tuned for
    prior       θ; None for the bank's, or for what a new bank of this model starts from
    model       without a bank, the model; with one, another place of the bank's model
    codec       what gradients go through without a bank: "auto" for the prior's own, None for none
    limit       the most questions of a file
    k, search, min_score, combine as `ask` has them
    corpus      more tasks files, whose passages are added in mode cpt and in measurements of drift
    drift       numbers of passages at which drift is measured
    """

    tasks: tuple[Path, ...]
    modes: tuple[str, ...] | None = None
    bank: Path | None = None
    baselines: tuple[Path, ...] = ()
    prior: Path | None = None
    model: str | None = None
    embedder: str = "minilm"
    codec: str | None = AUTO
    limit: int | None = None
    k: int | None = None
    search: str = "auto"
    min_score: MinScore = "auto"
    combine: str = COMBINE_AUTO
    max_tokens: int = 32
    device: str = "auto"
    dtype: str = "auto"
    seed: int = 0
    corpus: tuple[Path, ...] = ()
    drift: tuple[int, ...] = ()
    cpt_rate: float = 1e-3


class Bench:
    """The model with everything that the modes need, made ready once."""

    def __init__(self, options: EvaluateOptions, asked: list[Asked], corpus: list[tuple[str, str]]) -> None:
        self.options = options
        self.asked = asked
        self.corpus = corpus
        self.left_out: list[Skipped] = []
        self.modes: list[str] = []
        self.evidence: dict[int, Evidence] = {}
        self.partners: dict[str, Evidence] = {}  # {task's id: another task's}
        self.tuned: dict[str, Prior] = {}  # {objective: baseline}
        self.answerer: Answerer | None = None
        self.model: Model
        self.folder: ModelFolder
        self.identity: Fingerprint

    def prepare(self, stack: ExitStack) -> Generator[Notice | Progress, None, None]:
        """Everything but the answers."""
        options = self.options
        quiet_libraries()
        answerer = None
        if options.bank is not None:
            names = ("device", "dtype", "model", "search")
            given: dict[str, Any] = {name: getattr(options, name) for name in names}
            answerer = self.answerer = stack.enter_context(Answerer(options.bank, modes={"regrad"}, **given))
        name = options.model or (answerer.settings.model_name if answerer else "starter")
        folders: list[ModelFolder] = []
        yield from narrated(partial(resolve_model, name), folders)
        self.folder = folders[0]
        self.identity = fingerprint(self.folder.path)
        for file in options.baselines:
            self._add_baseline(file)
        self.modes = list(self._chosen())
        if answerer is not None:
            self.model = yield from answerer.load()
        else:
            from regrad_cli.learn.model import load_model

            self.model = load_model(self.folder.path, device=options.device, dtype=options.dtype)
            yield Notice(f"computing on {self.model.device}, {str(self.model.dtype).removeprefix('torch.')}")
            if self.uses_prior and not self.prior.trained:
                yield Notice("the prior is untrained: gradients of passages are not yet knowledge")
        if self.uses_prior:
            refuse_baseline(self.prior)
        if options.drift:
            yield from narrated(partial(resolve_embedder, options.embedder), [])
        yield from self._gather()
        self._leave_out_long_prompts()
        if not self.asked:
            raise UsageProblem("no question is left to ask", "see what was skipped, and why")
        yield from self._pair_tasks()
        if options.drift:
            self.growth = self.growth.checked()

    def _add_baseline(self, file: Path) -> None:
        prior = prior_for(self.folder, self.identity, file, seed=0)
        objective = str(prior.card.get("objective"))
        if objective not in OBJECTIVES.values():
            raise UsageProblem(f"{file} is no fine-tuned baseline: its card's objective is {objective}", BASELINE_HINT)
        if objective in self.tuned:
            raise UsageProblem(f"{file} is a second baseline of objective {objective}", "give one of each at most")
        self.tuned[objective] = prior

    def _chosen(self) -> Iterator[str]:
        """The modes to measure.

        raises  UsageProblem for one that was named and cannot be
        """
        hides = self.answerer is not None and not self.answerer.settings.keep_text
        for mode in dict.fromkeys(self.options.modes or [mode for mode in MODES if mode != "cpt"]):
            needs_baseline = mode in OBJECTIVES and OBJECTIVES[mode] not in self.tuned
            needs_text = hides and mode in SHOWING
            if not needs_baseline and not needs_text:
                yield mode
            elif self.options.modes and needs_baseline:
                raise UsageProblem(f"mode {mode} needs a baseline of objective {OBJECTIVES[mode]}", BASELINE_HINT)
            elif self.options.modes:
                raise UsageProblem(f"this bank keeps no text, so mode {mode} has nothing to show", "leave it out")
        for mode, objective in OBJECTIVES.items():
            if self.options.modes and objective in self.tuned and mode not in self.options.modes:
                raise UsageProblem(
                    f"a baseline of objective {objective} is given, and no mode takes it",
                    f"add {mode} to --modes, or leave the --baseline out",
                )

    @property
    def uses_prior(self) -> bool:
        """Whether anything is measured for which there has to be a θ."""
        return bool(self.options.drift or (BY_PRIOR | {"cpt"}) & set(self.modes))

    @cached_property
    def prior(self) -> Prior:
        """θ.

        raises  Mismatch for one that is not the model's, or not the bank's
        """
        given, bank = self.options.prior, self.options.bank
        prior = None
        if given is not None or bank is None:
            prior = prior_for(self.folder, self.identity, given, seed=self.options.seed)
        if bank is None:
            assert prior is not None
            return prior
        from regrad_cli.learn.prior import Prior

        with open_bank(bank) as opened:
            own = Prior.from_bytes(opened.prior_bytes(), f"the bank's prior '{opened.settings.prior_name}'")
        if prior is not None and prior.fingerprint != own.fingerprint:
            raise Mismatch(
                f"the bank's gradients were taken at its own prior '{own.card['name']}', not at {given}",
                "leave --prior out, or make a bank with this prior",
            )
        return own

    @cached_property
    def codec(self) -> Codec | None:
        """What the gradients go through, or have gone through."""
        from regrad_cli.learn.codec import Codec, parse_codec
        from regrad_cli.learn.rows import layout_of

        if self.answerer is not None:
            return layout_of(self.answerer.settings).codec
        if self.options.codec is None:
            return None
        return Codec(parse_codec(chosen_codec(self.prior, self.options.codec)), self.prior.shapes)

    def _gather(self) -> Iterator[Notice | Progress]:
        """What each question is answered from; tasks whose passages have no gradient are left out."""
        options = self.options
        if self.answerer is not None:
            chosen = options.k, options.min_score, options.combine
            self.evidence = yield from found_evidence(self.answerer, self.asked, *chosen)
            return
        make = own_passages
        if BY_GRADIENT & set(self.modes):
            cutter = (yield from self._cutter()) if self.prior.segments > 1 else None
            own = OwnGradients(self.model, self.prior, self.codec, cutter)
            make = own.evidence
            yield from own.compute(self._tasks())
            for task in self._tasks():
                reason = own.reason_against(task)
                if reason is not None:
                    self._leave_out(task.id, [one for one in self.asked if one.task is task], reason)
        made = {task.id: make(task) for task in self._tasks()}
        self.evidence = {one.number: made[one.task.id] for one in self.asked}

    def _cutter(self) -> Generator[Notice, None, Cutter]:
        """Cuts and embeds passages as a bank would."""
        from regrad_cli.embed import load_embedder
        from regrad_cli.learn.model import choose_device
        from regrad_cli.learn.tokens import Tokenizer
        from regrad_cli.weighing import Cutter, Vectors

        folders: list[ModelFolder] = []
        yield from narrated(partial(resolve_embedder, self.options.embedder), folders)
        embedder = load_embedder(folders[0].path, device=str(choose_device(self.options.device)))
        spans, vectors = Tokenizer(self.folder.path).spans, Vectors(embedder.encode)
        return Cutter(spans, self.prior.segments, vectors, self.prior.segment_tokens)

    def _tasks(self) -> list[Task]:
        return list({one.task.id: one.task for one in self.asked}.values())

    def _leave_out(self, name: str, questions: Sequence[Asked], reason: str) -> None:
        self.left_out.append(Skipped(f"{questions[0].dataset}: {name}", reason))
        self.asked = [one for one in self.asked if one not in questions]

    def _leave_out_long_prompts(self) -> None:
        from regrad_cli.learn.prompt import prompt_ids

        limit = self.model.positions
        if limit is None:
            return
        shows = bool(SHOWING & set(self.modes))
        for one in list(self.asked):
            shown = self.evidence[one.number].shown if shows else ()
            tokens = len(prompt_ids(self.model, one.question.question, shown))
            if tokens + self.options.max_tokens > limit:
                name = f"{one.task.id}, {one.question.question}"
                self._leave_out(name, [one], f"its prompt of {tokens} tokens leaves no room for an answer in {limit}")

    def _pair_tasks(self) -> Iterator[Notice]:
        """For mode other: another task's evidence for each task."""
        if "other" not in self.modes:
            return
        tasks = self._tasks()
        first: dict[str, Evidence] = {}
        for one in self.asked:
            first.setdefault(one.task.id, self.evidence[one.number])
        own = [frozenset(task.training_texts) for task in tasks]
        told = [
            texts.union(*(self.evidence[one.number].shown for one in self.asked if one.task is task))
            for task, texts in zip(tasks, own, strict=True)
        ]
        partners = derangement(told, self.options.seed) or derangement(own, self.options.seed)
        if partners is not None:
            self.partners = {task.id: first[tasks[other].id] for task, other in zip(tasks, partners, strict=True)}
            return
        reason = "mode other needs another task's passages for each task, and there are none"
        if self.options.modes:
            raise UsageProblem(reason, "give more tasks, or leave it out of --modes")
        self.modes.remove("other")
        yield Notice(reason + ": it is left out")

    @cached_property
    def growth(self) -> Growth:
        """The questions' own passages and the corpus, to be added one after the other."""
        from regrad_cli.learn.prior import seeded_prior

        options, prior = self.options, self.prior
        passages = [(one.task.title, text) for one in self.asked for text in one.task.passages]
        return Growth(
            model=self.model,
            model_folder=self.folder.path,
            prior=prior,
            fresh=seeded_prior(self.model, self.identity.model, rank=prior.rank, seed=options.seed),
            asked=tuple(self.asked),
            passages=tuple(dict.fromkeys([*passages, *self.corpus])),
            sizes=tuple(sorted(set(options.drift))),
            embedder=options.embedder,
            codec=str(self.codec.settings) if self.codec else AUTO,
            device=options.device,
            dtype=options.dtype,
            k=options.k,
            search=options.search,
            min_score=options.min_score,
            combine=options.combine,
            max_tokens=options.max_tokens,
            seed=options.seed,
            cpt_rate=options.cpt_rate,
        )

    def settings(self) -> dict[str, Any]:
        """What is measured with, for whoever reads the result."""
        options = self.options
        return {
            "retrieval": "gold" if options.bank is None else "bank",
            "bank": None if options.bank is None else str(options.bank),
            "tasks": [str(file) for file in options.tasks],
            "limit": options.limit,
            "model": self.folder.name,
            "prior": _named(self.prior) if self.uses_prior else None,
            "baselines": {objective: _named(prior) for objective, prior in self.tuned.items()},
            "codec": str(self.codec.settings) if self.uses_prior and self.codec else "none",
            "k": None if options.bank is None else options.k or int(self.prior.card["k"]),
            "search": None if options.bank is None else options.search,
            "min_score": None if options.bank is None else options.min_score,
            "combine": None if options.bank is None else options.combine,
            "max_tokens": options.max_tokens,
            "device": str(self.model.device),
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "seed": options.seed,
        }


def _named(prior: Prior) -> dict[str, Any]:
    return {"name": prior.card["name"], "trained": prior.trained, "sha256": prior.fingerprint}
