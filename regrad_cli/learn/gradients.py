"""Per-passage gradients of the prior: many passages in one pass, no graph below the first tensor that has one.

Knows models and priors; knows no bank and no codec. Shapes: N passages of L tokens, hidden size H, vocabulary V.

A passage's gradient never depends on its company: every pass has one of a few fixed shapes (`SHAPES`: rows × length),
short batches are filled with empty rows, and each row's result is the same bits whatever stands in the others.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.nn.functional as F
from torch import nn

from regrad_cli.errors import UsageProblem
from regrad_cli.learn.adapt import Tensors, hooked
from regrad_cli.learn.model import Model, Projection, attention_for_gradients
from regrad_cli.learn.norms import all_held, normalize_, norms_of
from regrad_cli.learn.prior import Prior

T = TypeVar("T")
IGNORED = -100
LENGTH_STEP = 8
# Tokens in one pass. On a CPU, activations that stay in its caches beat larger matrix products.
TOKEN_BUDGET = {"cpu": 384, "cuda": 16384, "mps": 4096}
MAX_ROWS = 64  # passages in one pass: more are seldom of one length in a commit, and empty rows cost as much as full
MAX_WORKERS = 8  # passes at a time: each holds its activations and gradients
LOGITS = 256 * 49_152  # values that exist at a time: 256 tokens' of the starter
SOFTENED = {"cpu": 16 * 49_152}  # of these, how many become probabilities at a time: what a CPU's caches hold


@dataclass(frozen=True)
class PassageGradients:
    """What one pass yields.

    positions   (n,) places of these passages in the caller's sequence
    tensors     {name: (n, rows, cols) float32} of the prior's `shapes`; of a `normalized` prior each of norm 1
    losses      (n,) float32, mean next-token cross-entropy of each passage
    finite      (n,) bool; False where the loss or any gradient value is not finite: that passage's tensors are zeros
    """

    positions: tuple[int, ...]
    tensors: Tensors
    losses: torch.Tensor
    finite: torch.Tensor


def bucket_length(tokens: int) -> int:
    """The padded length of a passage: a multiple of 8, so that only a few shapes exist."""
    return -(-max(tokens, 2) // LENGTH_STEP) * LENGTH_STEP


def bucket_rows(length: int, device_type: str) -> int:
    """Passages in one pass of this padded length."""
    return max(1, min(MAX_ROWS, TOKEN_BUDGET.get(device_type, TOKEN_BUDGET["cpu"]) // length))


def passage_gradients(
    model: Model, prior: Prior, passages: Sequence[Sequence[int]], *, workers: int | None = None
) -> Iterator[PassageGradients]:
    """The gradient of the document loss at θ, for every passage by itself: `map_gradients` of nothing more."""
    return map_gradients(model, prior, passages, lambda gradients: gradients, workers=workers)


def map_gradients(
    model: Model,
    prior: Prior,
    passages: Sequence[Sequence[int]],
    then: Callable[[PassageGradients], T],
    *,
    workers: int | None = None,
) -> Iterator[T]:
    """The gradient of the document loss at θ, for every passage by itself, and what `then` makes of each pass.

    passages    token ids; at least two each, at most the model's positions
    then        called with each pass's PassageGradients, in the thread that computed it
    workers     passes at a time; on a CPU as many as PyTorch has threads, each in one thread, so that a row's bits
                do not depend on how many there are. The model is not to be used elsewhere until the last one is out.
    yields      one result a pass, shortest passages first; together they cover every position once
    raises      UsageProblem for a passage with fewer than two tokens (its mean over no tokens is not a number)
    """
    prior.check(model.projections)
    passes = list(_passes(model, passages))
    run = _Passes(model, prior)
    if workers is None:
        workers = min(MAX_WORKERS, torch.get_num_threads())
    with attention_for_gradients(model), hooked(model, run.tap_of):
        if model.device.type != "cpu":
            yield from (then(run.one(passages, positions, shape)) for positions, shape in passes)
            return

        def work(positions: tuple[int, ...], shape: tuple[int, int]) -> T:
            return then(run.one(passages, positions, shape))

        with _one_thread_each(workers) as pool:
            ahead: deque[Future[T]] = deque()
            for positions, shape in passes:
                ahead.append(pool.submit(work, positions, shape))
                if len(ahead) > workers:
                    yield ahead.popleft().result()
            while ahead:
                yield ahead.popleft().result()


def _passes(model: Model, passages: Sequence[Sequence[int]]) -> Iterator[tuple[tuple[int, ...], tuple[int, int]]]:
    """The passages of each pass and its shape (rows, length), shortest first."""
    limit = model.positions
    buckets: dict[int, list[int]] = {}
    for position, ids in enumerate(passages):
        if len(ids) < 2:
            raise UsageProblem("a passage of fewer than two tokens has no next-token loss")
        if limit is not None and len(ids) > limit:
            raise UsageProblem(f"a passage of {len(ids)} tokens is longer than the model's {limit} positions")
        buckets.setdefault(min(bucket_length(len(ids)), limit or len(ids) + LENGTH_STEP), []).append(position)
    for length in sorted(buckets):
        rows = bucket_rows(length, model.device.type)
        for start in range(0, len(buckets[length]), rows):
            yield tuple(buckets[length][start : start + rows]), (rows, length)


@contextmanager
def _one_thread_each(workers: int) -> Iterator[ThreadPoolExecutor]:
    """A pool whose threads compute with one thread each; what is not begun is dropped when the block is left."""
    threads = torch.get_num_threads()
    pool = ThreadPoolExecutor(workers, initializer=torch.set_num_threads, initargs=(1,))
    try:
        yield pool
    finally:
        pool.shutdown(cancel_futures=True)
        torch.set_num_threads(threads)


class _Passes:
    """Passes over one model, from several threads at a time: what a pass finds is kept a thread."""

    def __init__(self, model: Model, prior: Prior) -> None:
        self.model = model
        self.loss_of = _loss_function(model)
        self.scale = prior.scale
        self.placed = {name: tensor.to(model.device, model.dtype) for name, tensor in prior.tensors.items()}
        self.sought = tuple(prior.log_step_sizes)
        self.normalized = prior.normalized
        self.local = threading.local()

    def tap_of(self, projection: Projection) -> Callable[..., torch.Tensor]:
        """The forward hook of one projection: adds the LoRA branch, and catches its gradients on the way back."""
        name_a, name_b = projection.name_a, projection.name_b
        a, b = self.placed[name_a], self.placed[name_b]
        seeks = name_a in self.sought, name_b in self.sought

        def plain(_module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            return output + self.scale * ((inputs[0] @ a.T) @ b.T)

        def tap(_module: nn.Module, inputs: Any, output: torch.Tensor) -> torch.Tensor:
            local = self.local
            return output + _Tap.apply(inputs[0], local.anchor, a, b, self.scale, local.found, (name_a, name_b), seeks)

        return tap if any(seeks) else plain

    def one(
        self, passages: Sequence[Sequence[int]], positions: tuple[int, ...], shape: tuple[int, int]
    ) -> PassageGradients:
        """One pass over these passages, filled up with empty rows to `shape` (rows, length)."""
        ids = torch.zeros(shape, dtype=torch.long)
        labels = torch.full(shape, IGNORED, dtype=torch.long)
        for row, position in enumerate(positions):
            passage = torch.tensor(passages[position], dtype=torch.long)
            ids[row, : len(passage)] = passage
            labels[row, : len(passage) - 1] = passage[1:]
        found: Tensors = {}
        self.local.found = found
        # The only leaf: the graph starts at the first projection whose gradient is sought.
        self.local.anchor = torch.zeros((), requires_grad=True)
        with torch.enable_grad():
            losses = self.loss_of(ids.to(self.model.device), labels.to(self.model.device))  # (N,)
            losses.sum().backward()

        count = len(positions)
        whole = {name: found[name].float() for name in self.sought}
        norms = norms_of(whole)  # of empty rows too: how a norm is added up must not depend on how many are full
        finite = torch.isfinite(losses[:count])
        in_range = all_held({name: norm[:count] for name, norm in norms.items()})
        if not in_range:  # otherwise all is finite
            for tensor in whole.values():
                finite &= torch.isfinite(tensor[:count]).flatten(1).all(dim=1)
        if self.normalized:
            normalize_(whole, norms, careful=not in_range)
        tensors = {name: tensor[:count] for name, tensor in whole.items()}
        if not bool(finite.all()):
            for tensor in tensors.values():
                tensor[~finite] = 0
        return PassageGradients(positions, tensors, losses[:count].detach(), finite)


class _Tap(torch.autograd.Function):
    """scale · (x Aᵀ) Bᵀ, whose backward keeps those of each row's ∇A and ∇B that are sought, not their sum over rows.

    x (N, L, inputs), A (r, inputs), B (outputs, r); found[name] receives (N, r, inputs) and (N, outputs, r).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        _anchor: torch.Tensor,
        a: torch.Tensor,
        b: torch.Tensor,
        scale: float,
        found: Tensors,
        names: tuple[str, str],
        seeks: tuple[bool, bool],
    ) -> torch.Tensor:
        low = x @ a.T  # (N, L, r)
        ctx.save_for_backward(x, low, a, b)
        ctx.scale, ctx.found, ctx.names, ctx.seeks = scale, found, names, seeks
        return scale * (low @ b.T)

    @staticmethod
    def backward(ctx: Any, *deltas: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        delta = deltas[0]
        back = ctx.scale * (delta @ b)  # (N, L, r)
        name_a, name_b = ctx.names
        if ctx.seeks[0]:
            ctx.found[name_a] = back.transpose(1, 2) @ x
        if ctx.seeks[1]:
            ctx.found[name_b] = ctx.scale * (delta.transpose(1, 2) @ low)
        return (back @ a if ctx.needs_input_grad[0] else None), None, None, None, None, None, None, None


def _loss_function(model: Model) -> Callable[[torch.Tensor, torch.Tensor], torch.Tensor]:
    """(ids (N, L), labels (N, L)) → losses (N,), through the leanest path that computes this model's own logits."""
    network = model.network
    body, head = network.base_model, network.get_output_embeddings()

    def lean(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        hidden = body(input_ids=ids, use_cache=False).last_hidden_state  # (N, L, H)
        return _HeadLoss.apply(hidden, head.weight, labels)

    def full(ids: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        logits = network(input_ids=ids, use_cache=False).logits.float()  # (N, L, V)
        each = F.cross_entropy(logits.transpose(1, 2), labels, ignore_index=IGNORED, reduction="none")
        return each.sum(dim=1) / (labels != IGNORED).sum(dim=1).clamp(min=1)

    return lean if model.has_plain_head else full


class _HeadLoss(torch.autograd.Function):
    """Mean cross-entropy of each row from hidden states, without ever holding all logits.

    hidden (N, L, H), weight (V, H), labels (N, L) → (N,) float32. Only `hidden` gets a gradient, computed on the way.
    """

    @staticmethod
    def forward(ctx: Any, hidden: torch.Tensor, weight: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        flat, targets = hidden.flatten(0, 1), labels.flatten()
        counts = (labels != IGNORED).sum(dim=1).clamp(min=1)
        share = (1.0 / counts).repeat_interleave(labels.shape[1]) * (targets != IGNORED)  # (N·L,)
        each = torch.empty(flat.shape[0], dtype=torch.float32, device=flat.device)
        gradient = torch.empty_like(flat)
        chunk = max(16, LOGITS // weight.shape[0])  # tokens
        for start in range(0, flat.shape[0], chunk):
            part = slice(start, start + chunk)
            logits = flat[part] @ weight.T  # (chunk, V)
            each[part] = _softened(logits, targets[part], share[part])
            wanted = targets[part].clamp(min=0)
            gradient[part] = logits @ weight - share[part, None].to(weight.dtype) * weight[wanted]
        ctx.save_for_backward(gradient.view_as(hidden))
        return (each * share).view_as(labels).sum(dim=1)

    @staticmethod
    def backward(ctx: Any, *deltas: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        (gradient,) = ctx.saved_tensors
        return gradient * deltas[0][:, None, None].to(gradient), None, None


def _softened(logits: torch.Tensor, targets: torch.Tensor, share: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of each token (T,) float32, from logits (T, V), which become share (T,) · softmax in place: less
    share · one-hot that is d(share · loss) / d logits."""
    each = torch.empty(len(logits), dtype=torch.float32, device=logits.device)
    some = max(1, SOFTENED.get(logits.device.type, logits.numel()) // logits.shape[1])  # tokens
    for start in range(0, len(logits), some):
        part = slice(start, start + some)
        values = logits[part].float()
        peak = values.amax(dim=1, keepdim=True)
        chosen = values.gather(1, targets[part].clamp(min=0)[:, None]) - peak
        total = values.sub_(peak).exp_().sum(dim=1, keepdim=True)
        each[part] = (total.log() - chosen)[:, 0]
        logits[part] = values.mul_(share[part, None] / total)
    return each
