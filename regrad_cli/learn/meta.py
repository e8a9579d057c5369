"""The meta-gradient: how an answer's loss after the inner step changes with prior and step sizes. Knows no file.

One inner step: θ′ = θ − α ⊙ Σᵢ wᵢ gᵢ(θ), with gᵢ the gradient of passage i's document loss. With v = ∇L_question at θ′:
    ∇θ = v − Σᵢ wᵢ ∇θ⟨gᵢ(θ), α ⊙ v⟩        ∂/∂log αₜ = −αₜ ⟨vₜ, Σᵢ wᵢ gᵢₜ⟩
which is backpropagation through both levels, without ever holding more than `held_tokens` of the inner graph, nor the
gradients of more passages than that: memory does not grow with their number. Of a prior whose passages' gradients are
`normalized`, gᵢ is ĝᵢ = gᵢ/|gᵢ| tensor by tensor, and ∇θ⟨ĝᵢ, t⟩ = ∇θ⟨gᵢ, (t − ĝᵢ⟨ĝᵢ, t⟩)/|gᵢ|⟩.
Source: ReGrad, arXiv 2606.15734. Shapes: P passages, T tasks, Q questions of L tokens, S distinct θ′ (one for the
questions of a task that weigh alike), hidden size H, vocabulary V.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.nn.utils.rnn import pad_sequence

from regrad_cli.learn.forked import SHARED, TEXTS, Row, in_common, layout
from regrad_cli.learn.gradients import IGNORED
from regrad_cli.learn.model import Model
from regrad_cli.learn.norms import normalized
from regrad_cli.learn.upper import Rows, UpperHalf

Tensors = dict[str, torch.Tensor]
LowerOf = Callable[[Sequence[int]], torch.Tensor]
LOGITS = 48 * 49_152  # values that one operation sees at a time
HELD_TOKENS = {"cpu": 768, "cuda": 16384, "mps": 2048}


@dataclass(frozen=True, slots=True)
class Prompted:
    """A question as the model reads it and the answer that it should give.

    ids      the prompt's tokens, then the answer's, the end of the turn included
    start    where the answer begins
    weights  of the gradients of its task's passages; none: the prior answers alone
    """

    ids: tuple[int, ...]
    start: int
    weights: tuple[float, ...] = ()


@dataclass(frozen=True, slots=True)
class Episode:
    """One task of a step: passages, and questions that weigh their gradients each in its own way."""

    name: str
    passages: tuple[tuple[int, ...], ...]
    questions: tuple[Prompted, ...]


@dataclass(frozen=True)
class MetaGradient:
    """What one group of episodes gives, summed over them.

    losses      (T,) mean answer loss of each episode's questions
    tensors     {name: (rows, cols) float32}, ∇θ
    log_steps   {name: float}, ∂/∂log α
    """

    losses: torch.Tensor
    tensors: Tensors
    log_steps: dict[str, float]

    @property
    def finite(self) -> bool:
        values = [self.losses, torch.tensor(list(self.log_steps.values())), *self.tensors.values()]
        return all(bool(torch.isfinite(value).all()) for value in values)


class MetaLearner:
    """Computes meta-gradients for one model; inside `ready()`, from several threads at a time.

    lower_of    the lower half's output for tokens, (L, H): `UpperHalf.lower`, or a cache of it
    normalized  whether passages' gradients are brought to norm 1, as by `Prior.normalized`
    codec       tensors {name: (P, rows, cols)} → what a bank would give back for them; its own gradient is taken for 1
                (straight through)
    """

    def __init__(
        self,
        model: Model,
        scale: float,
        *,
        first_order: bool = False,
        normalized: bool = False,
        codec: Callable[[Tensors], Tensors] | None = None,
        held_tokens: int | None = None,
    ) -> None:
        self.model = model
        self.upper = UpperHalf(model, scale)
        self.lower_of: LowerOf = self.upper.lower
        self._forks = model.reads_forked_rows
        self._first_order = first_order
        self._normalized = normalized
        self._codec = codec
        self._held_tokens = held_tokens or HELD_TOKENS[model.device.type]

    def ready(self) -> AbstractContextManager[None]:
        return self.upper.ready()

    def meta_gradient(
        self, theta: Mapping[str, torch.Tensor], steps: Mapping[str, float], episodes: Sequence[Episode]
    ) -> MetaGradient:
        """The meta-gradient of the sum of the episodes' losses.

        theta   {name: (rows, cols) float32}; steps {name: α} of those that passages' gradients change
        """
        device = self.model.device
        prior = {name: tensor.to(device, self.model.dtype) for name, tensor in theta.items()}
        kind = next(iter(theta.values())).dtype
        passages = [ids for episode in episodes for ids in episode.passages]
        member, places = _weights(episodes)
        member = member.to(device, kind)  # (S, P)
        groups = self._groups(passages)
        held: _Inner | None = None

        moved: Tensors = {}  # {name: (S, rows, cols)}, Σ w g
        for group in groups:
            whole = len(groups) == 1 and not self._first_order
            part = self._inner([passages[i] for i in group], prior, steps, graph=whole)
            held = part if len(groups) == 1 else None
            for name, tensor in self._kept(part.rows, kind).items():
                more = torch.einsum("sp,prc->src", member[:, group], tensor)
                moved[name] = moved[name] + more if name in moved else more
        adapted = {}  # {name: (S, rows, cols)}, every θ′
        for name, tensor in theta.items():
            start = tensor.to(device).expand(len(member), *tensor.shape)
            adapted[name] = start - steps[name] * moved[name] if name in moved else start
        losses, v = self._outer(episodes, adapted, places)  # v in the type of θ

        total = {name: value.sum(dim=0) for name, value in v.items()}
        log_steps = dict.fromkeys(steps, 0.0)
        if moved:
            log_steps = {name: -steps[name] * float((v[name] * moved[name]).sum()) for name in steps}
        if moved and not self._first_order:
            for group in groups:
                part = held or self._inner([passages[i] for i in group], prior, steps, graph=True)
                towards = []
                for name, row in part.rows.items():
                    toward = steps[name] * torch.einsum("sp,src->prc", member[:, group], v[name])
                    towards.append((_through_norm(row.detach(), toward) if self._normalized else toward).to(row))
                second = torch.autograd.grad(list(part.rows.values()), list(part.leaves.values()), towards)
                for name, value in zip(part.leaves, second, strict=True):
                    total[name] = total[name] - value.to(kind)
        return MetaGradient(losses, total, log_steps)

    @torch.no_grad()
    def losses(
        self, theta: Mapping[str, torch.Tensor], steps: Mapping[str, float], episodes: Sequence[Episode]
    ) -> list[list[float]]:
        """The answer loss of every question of every episode after its inner step; no graph."""
        found = []
        device = self.model.device
        prior = {name: tensor.to(device, self.model.dtype) for name, tensor in theta.items()}
        for episode in episodes:
            member, places = _weights([episode])
            tensors = {name: tensor.to(device).expand(len(member), *tensor.shape) for name, tensor in theta.items()}
            for group in self._groups(episode.passages):
                part = self._inner([episode.passages[i] for i in group], prior, steps, graph=False)
                for name, tensor in self._kept(part.rows, next(iter(theta.values())).dtype).items():
                    weights = member[:, group].to(tensor)
                    tensors[name] = tensors[name] - steps[name] * torch.einsum("sp,prc->src", weights, tensor)
            found.append(self._question_losses([episode], tensors, places).tolist())
        return found

    def _kept(self, rows: Rows, kind: torch.dtype) -> Tensors:
        """What answers get of passages' gradients {name: (P, rows, cols)}, in the type of θ."""
        kept = {name: tensor.detach().to(kind) for name, tensor in rows.items()}
        if self._normalized:
            kept = {name: normalized(tensor) for name, tensor in kept.items()}
        return kept if self._codec is None else self._codec(kept)

    def _groups(self, passages: Sequence[Sequence[int]]) -> list[list[int]]:
        """Places of passages that are computed together, shortest first, each group within the tokens that are held."""
        groups: list[list[int]] = []
        for place in sorted(range(len(passages)), key=lambda place: len(passages[place])):
            if groups and (len(groups[-1]) + 1) * len(passages[place]) <= self._held_tokens:
                groups[-1].append(place)
            else:
                groups.append([place])
        return groups

    def _inner(
        self, passages: Sequence[Sequence[int]], prior: Tensors, names: Collection[str], *, graph: bool
    ) -> _Inner:
        """Every passage's own gradient, for the tensors of these names, of the document loss at θ; with a graph, a
        function of θ."""
        ids, lower = self._padded([Row((tuple(passage),)) for passage in passages])
        labels = torch.full_like(ids, IGNORED)
        for row, passage in enumerate(passages):
            labels[row, : len(passage) - 1] = ids[row, 1 : len(passage)]
        with torch.enable_grad(), self._twice_differentiable(graph):
            leaves = {name: tensor.detach().requires_grad_() for name, tensor in prior.items()}
            each = {name: leaf.expand(len(passages), *leaf.shape) for name, leaf in leaves.items()}
            if not graph:  # rows of their own, so that nothing of the sum over them is kept, nor what is not sought
                each = {name: tensor.detach().requires_grad_(name in names) for name, tensor in each.items()}
            flat, targets = self.upper.outputs(ids, lower, each).flatten(0, 1), labels.flatten()
            wanted = (targets != IGNORED).nonzero()[:, 0]
            wide = torch.promote_types(self.model.dtype, torch.float32)
            shares = torch.tensor([1.0 / (len(passage) - 1) for passage in passages], device=ids.device, dtype=wide)
            share = shares.repeat_interleave(ids.shape[1])[wanted]
            loss = self._document_loss(flat[wanted], targets[wanted], share)
            sought = [name for name in each if name in names]
            rows = torch.autograd.grad(loss, [each[name] for name in sought], create_graph=graph)
        return _Inner(dict(zip(sought, rows, strict=True)), leaves)

    def _twice_differentiable(self, graph: bool) -> AbstractContextManager[Any]:
        """Fused attention has no second derivative. On a CPU, where threads would meet in this switch, `ready` has put
        it off already."""
        fused = self.model.network.config._attn_implementation == "sdpa"
        return sdpa_kernel(SDPBackend.MATH) if graph and fused else nullcontext()

    def _outer(
        self, episodes: Sequence[Episode], adapted: Tensors, places: Sequence[int]
    ) -> tuple[torch.Tensor, Tensors]:
        """Mean answer loss of each episode (T,), and the gradient of their sum at each θ′, {name: (S, rows, cols)}."""
        leaves = {name: tensor.to(self.model.dtype).detach().requires_grad_() for name, tensor in adapted.items()}
        counts = [len(episode.questions) for episode in episodes for _ in episode.questions]
        with torch.enable_grad():
            each = self._question_losses(episodes, leaves, places) / torch.tensor(counts, device=self.model.device)
            gradients = torch.autograd.grad(each.sum(), list(leaves.values()))
        owners = torch.tensor([place for place, episode in enumerate(episodes) for _ in episode.questions])
        losses = torch.zeros(len(episodes), dtype=each.dtype).index_add_(0, owners, each.detach().cpu())
        return losses, {name: value.to(adapted[name]) for name, value in zip(leaves, gradients, strict=True)}

    def _question_losses(self, episodes: Sequence[Episode], tensors: Tensors, places: Sequence[int]) -> torch.Tensor:
        """Mean cross-entropy over each answer's tokens, (Q,) in their order.

        tensors  {name: (S, rows, cols)}; places (Q,) says which of them each question has
        """
        questions = [question for episode in episodes for question in episode.questions]
        order = sorted(self._rows(questions, places), key=lambda found: len(found[0].ids))
        losses: list[torch.Tensor] = [torch.zeros(())] * len(questions)
        start = 0
        while start < len(order):  # batches of like lengths: a prompt with passages is ten times one without
            length = len(order[start][0].ids)
            batch = [found for found in order[start:] if len(found[0].ids) <= 1.5 * length + 16]
            start += len(batch)
            rows = [row for row, _ in batch]
            ids, lower = self._padded(rows)
            owners = [places[asked[0]] for _, asked in batch]
            chosen = owners[0] if len(set(owners)) == 1 else torch.tensor(owners, device=ids.device)
            adapted = {name: tensor[chosen].to(lower.dtype) for name, tensor in tensors.items()}
            outputs = self.upper.outputs(ids, lower, adapted, layout(rows, ids.shape[1], ids.device, lower.dtype))
            for number, (row, asked) in enumerate(batch):
                for text, place in enumerate(asked):
                    begin = row.at(text, questions[place].start)
                    end = row.at(text, len(questions[place].ids))
                    logits = self._logits(outputs[number, begin - 1 : end - 1])
                    losses[place] = F.cross_entropy(logits, ids[number, begin:end])
        return torch.stack(losses)

    def _rows(self, questions: Sequence[Prompted], places: Sequence[int]) -> Iterator[tuple[Row, list[int]]]:
        """What is read for these questions, each row with the questions in it: those with the same θ′ whose prompts
        begin alike share one, such as those of a task whose passages stand in every prompt."""
        together: dict[int, list[int]] = {}
        for place, owner in enumerate(places):
            together.setdefault(owner, []).append(place)
        for asked in together.values():
            for start in range(0, len(asked), TEXTS):
                some = asked[start : start + TEXTS]
                last = min(questions[place].start for place in some) - 1  # the token that an answer follows is its own
                shared = in_common([questions[place].ids[:last] for place in some])
                if len(some) > 1 and shared >= SHARED and self._forks:
                    yield Row(tuple(questions[place].ids for place in some), shared), some
                else:
                    yield from ((Row((questions[place].ids,)), [place]) for place in some)

    def _padded(self, rows: Sequence[Row]) -> tuple[torch.Tensor, torch.Tensor]:
        """ids (N, L) and the lower half's output (N, L, H), filled up at the end; the latter is kept text by text, for
        the texts of a row are other ones each time."""
        ids = pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True).to(self.model.device)
        lower = [row.joined([self.lower_of(text).to(self.model.device) for text in row.texts]) for row in rows]
        return ids, pad_sequence(lower, batch_first=True)

    def _logits(self, outputs: torch.Tensor) -> torch.Tensor:
        """(n, V) at least in fp32, from what the upper half gives."""
        if self.model.has_plain_head:
            outputs = outputs @ self.model.network.get_output_embeddings().weight.T
        return outputs.to(torch.promote_types(outputs.dtype, torch.float32))

    def _document_loss(self, outputs: torch.Tensor, targets: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
        """Σ share · cross-entropy of outputs (n, ·) against targets (n,)."""
        if self.model.has_plain_head:
            return _HeadLoss.apply(outputs, self.model.network.get_output_embeddings().weight, targets, share)
        return (F.cross_entropy(self._logits(outputs), targets, reduction="none") * share).sum()


def _weights(episodes: Sequence[Episode]) -> tuple[torch.Tensor, list[int]]:
    """The weights of all passages in each distinct θ′, (S, P), and which of these each question has, (Q,)."""
    rows: list[list[float]] = []
    places: list[int] = []
    total = sum(len(episode.passages) for episode in episodes)
    before = 0
    for episode in episodes:
        known: dict[tuple[float, ...], int] = {}
        for question in episode.questions:
            if question.weights not in known:
                known[question.weights] = len(rows)
                after = total - before - len(question.weights)
                rows.append([0.0] * before + list(question.weights) + [0.0] * after)
            places.append(known[question.weights])
        before += len(episode.passages)
    return torch.tensor(rows, dtype=torch.float64).view(len(rows), total), places


@dataclass(frozen=True)
class _Inner:
    """Gradients of passages, {name: (P, rows, cols)}, and the leaves they depend on, all of θ, where there is a
    graph."""

    rows: Rows
    leaves: Tensors


def _through_norm(gradients: torch.Tensor, toward: torch.Tensor) -> torch.Tensor:
    """The gradient of Σ⟨gᵢ/|gᵢ|, towardᵢ⟩ by the gᵢ, each (P, rows, cols) in the type of `toward`; 0 where gᵢ is."""
    wide = gradients.to(toward)
    units = normalized(wide)
    norms = (units * wide).sum(dim=(1, 2), keepdim=True)
    across = toward - units * (units * toward).sum(dim=(1, 2), keepdim=True)
    return torch.where(norms > 0, across / torch.where(norms > 0, norms, 1.0), 0.0)


class _HeadLoss(torch.autograd.Function):
    """Σ share · cross-entropy from hidden (n, H) through weight (V, H), differentiable twice by `hidden`.

    Keeps the softmax in the weights' type, once, where autograd would keep logits, log-softmax and copies in fp32.
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, share: torch.Tensor
    ) -> torch.Tensor:
        soft = torch.empty(len(hidden), len(weight), dtype=weight.dtype, device=weight.device)  # (n, V)
        wide = torch.promote_types(weight.dtype, torch.float32)
        loss = torch.zeros((), dtype=wide, device=weight.device)
        for part in _chunks(len(hidden), len(weight)):
            logits = (hidden[part] @ weight.T).to(wide)
            total = logits.logsumexp(dim=1)
            loss += ((total - logits.gather(1, targets[part, None])[:, 0]) * share[part]).sum()
            soft[part] = logits.sub_(total[:, None]).exp_()
        share = share.to(weight.dtype)[:, None]
        gradient = share * (soft @ weight - weight[targets])
        ctx.save_for_backward(hidden, gradient, soft, weight, share)
        return loss

    @staticmethod
    def backward(ctx: Any, *deltas: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        hidden, gradient, soft, weight, share = ctx.saved_tensors
        return deltas[0].to(gradient) * _HeadGradient.apply(hidden, gradient, soft, weight, share), None, None, None


class _HeadGradient(torch.autograd.Function):
    """The gradient that `_HeadLoss` found, as a function of `hidden`: its own derivative is the softmax's."""

    @staticmethod
    def forward(
        ctx: Any,
        _hidden: torch.Tensor,
        gradient: torch.Tensor,
        soft: torch.Tensor,
        weight: torch.Tensor,
        share: torch.Tensor,
    ) -> torch.Tensor:
        ctx.save_for_backward(soft, weight, share)
        return gradient.clone()

    @staticmethod
    def backward(ctx: Any, *deltas: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        soft, weight, share = ctx.saved_tensors
        changes = []
        for part in _chunks(len(soft), len(weight)):
            towards = deltas[0][part] @ weight.T  # (n, V)
            mean = torch.linalg.vecdot(soft[part], towards)[:, None]
            changes.append(towards.sub_(mean).mul_(soft[part]) @ weight)
        return share * torch.cat(changes), None, None, None, None


def _chunks(tokens: int, vocabulary: int) -> Iterator[slice]:
    """Slices of tokens whose logits stay in a CPU's caches between one operation and the next."""
    size = max(16, LOGITS // vocabulary)
    return (slice(start, start + size) for start in range(0, tokens, size))
