"""Meta-gradients of a step's episodes: in threads of one thread each on a CPU, all together elsewhere. Knows no file.

On a CPU each episode's are the same bits whatever the number of threads, and they are summed in the episodes' order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from regrad_cli.learn.lowercache import LowerCache
from regrad_cli.learn.meta import Episode, MetaGradient, MetaLearner, Tensors

T = TypeVar("T")
U = TypeVar("U")


class Workers:
    """As many episodes at a time as PyTorch has threads; used in a `with` block, inside the learner's `ready()`.

    In the block the caller's own thread computes in one thread too: how a sum is split among threads changes its bits.
    """

    def __init__(self, learner: MetaLearner) -> None:
        self._learner = learner
        learner.lower_of = LowerCache(learner.upper.lower)
        self._pool: ThreadPoolExecutor | None = None
        self._threads = 0

    def __enter__(self) -> Workers:
        self._threads = torch.get_num_threads()
        if self._learner.model.device.type == "cpu":
            self._pool = ThreadPoolExecutor(self._threads, initializer=torch.set_num_threads, initargs=(1,))
        torch.set_num_threads(1)
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
        torch.set_num_threads(self._threads)

    def map(self, work: Callable[[T], U], items: Iterable[T]) -> Iterator[U]:
        """work(item) of each, in their order."""
        return self._pool.map(work, items) if self._pool is not None else map(work, items)

    def gradients(
        self, theta: Mapping[str, torch.Tensor], steps: Mapping[str, float], episodes: Sequence[Episode]
    ) -> list[tuple[Episode, MetaGradient]]:
        """Each episode's own meta-gradient on a CPU; elsewhere one of all, unless that is not finite."""
        learner = self._learner
        if self._pool is None and episodes:
            together = learner.meta_gradient(theta, steps, episodes)
            if together.finite:
                return [(episodes[0], together)]
        each = self.map(lambda episode: learner.meta_gradient(theta, steps, [episode]), episodes)
        return list(zip(episodes, each, strict=True))

    def losses(
        self, theta: Mapping[str, torch.Tensor], steps: Mapping[str, float], episodes: Sequence[Episode]
    ) -> list[float]:
        """Each episode's mean answer loss over its questions."""

        def one(episode: Episode) -> float:
            (losses,) = self._learner.losses(theta, steps, [episode])
            return sum(losses) / len(losses)

        return list(self.map(one, episodes))


def mean_gradient(parts: Sequence[MetaGradient]) -> tuple[Tensors | None, dict[str, float] | None]:
    """The mean gradient over all episodes, summed in their order: of θ and of log α. None where there is no part."""
    count = sum(len(part.losses) for part in parts)
    if not count:
        return None, None
    tensors = {name: tensor / count for name, tensor in parts[0].tensors.items()}
    logs = {name: value / count for name, value in parts[0].log_steps.items()}
    for part in parts[1:]:
        for name, tensor in part.tensors.items():
            tensors[name] = tensors[name] + tensor / count
        for name, log in part.log_steps.items():
            logs[name] += log / count
    return tensors, logs
