"""The upper half from what the lower half gave, kept in memory or on disk, against the whole model; from any thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from learn.conftest import FAMILIES, filled_prior, random_passages

from regrad_cli.learn import lowercache
from regrad_cli.learn.adapt import adapted
from regrad_cli.learn.forked import Row, in_common, layout
from regrad_cli.learn.lowercache import LowerCache
from regrad_cli.learn.meta import Episode, MetaLearner, Prompted
from regrad_cli.learn.model import Model, first_adapted_layer
from regrad_cli.learn.prior import Prior
from regrad_cli.learn.upper import UpperHalf
from regrad_cli.learn.workers import Workers, mean_gradient

LENGTHS = (5, 17, 9)


def logits(model: Model, upper: UpperHalf, ids: list[int], lower: torch.Tensor, prior: Prior) -> torch.Tensor:
    with torch.no_grad():
        out = upper.outputs(torch.tensor([ids]), lower[None], prior.tensors)
        return model.network.get_output_embeddings()(out)[0] if model.has_plain_head else out[0]


@pytest.mark.parametrize("name", FAMILIES)
def test_the_upper_half_gives_what_the_whole_adapted_model_gives(family: Callable[[str], Model], name: str) -> None:
    model = family(name)
    prior = filled_prior(model)
    upper = UpperHalf(model, prior.scale)
    passages = random_passages(model, LENGTHS)
    with upper.ready():
        ours = [logits(model, upper, ids, upper.lower(ids), prior) for ids in passages]
    with torch.no_grad(), adapted(model, prior):
        whole = [model.network(input_ids=torch.tensor([ids])).logits[0] for ids in passages]
        plain = torch.stack([found.abs().max() for found in whole])
    for found, expected in zip(ours, whole, strict=True):
        assert torch.allclose(found, expected, rtol=1e-4, atol=1e-5 * float(plain.max()))
    with torch.no_grad():
        unadapted = model.network(input_ids=torch.tensor([passages[0]])).logits[0]
    assert not torch.allclose(unadapted, whole[0], rtol=1e-3)  # the prior does something


@pytest.mark.parametrize("name", FAMILIES)
def test_the_lower_half_runs_once_and_the_upper_half_runs_none_of_it(
    family: Callable[[str], Model], name: str, monkeypatch: Any
) -> None:
    from regrad_cli.learn.model import decoder_layers

    model = family(name)
    layers = decoder_layers(model.network)[1]
    first = first_adapted_layer(model.network)
    calls = dict.fromkeys(range(len(layers)), 0)
    upper = UpperHalf(model, 2.0)
    handles = []
    for place, layer in enumerate(layers):
        for child in layer.children():  # what a bypassed layer does not run

            def count(*_: Any, place: int = place) -> None:
                calls[place] += 1

            handles.append(child.register_forward_hook(count))
            break
    prior = filled_prior(model)
    (ids,) = random_passages(model, (6,))
    try:
        with upper.ready():
            lower = upper.lower(ids)
            assert [calls[place] for place in calls] == [1] * first + [0] * (len(layers) - first)
            logits(model, upper, ids, lower, prior)
            logits(model, upper, ids, lower, prior)
            assert [calls[place] for place in calls] == [1] * first + [2] * (len(layers) - first)
    finally:
        for handle in handles:
            handle.remove()


def test_rows_filled_up_at_their_end_are_what_they_are_alone(model: Model, prior: Prior) -> None:
    upper = UpperHalf(model, prior.scale)
    passages = random_passages(model, LENGTHS)
    with upper.ready(), torch.no_grad():
        lower = torch.nn.utils.rnn.pad_sequence([upper.lower(ids) for ids in passages], batch_first=True)
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(each) for each in passages], batch_first=True)
        together = upper.outputs(ids, lower, prior.tensors)
        for row, passage in enumerate(passages):
            alone = upper.outputs(torch.tensor([passage]), upper.lower(passage)[None], prior.tensors)[0]
            assert torch.allclose(together[row, : len(passage)], alone, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", FAMILIES)
def test_texts_that_begin_alike_give_in_one_row_what_each_gives_by_itself(
    family: Callable[[str], Model], name: str
) -> None:
    model = family(name)
    prior = filled_prior(model)
    upper = UpperHalf(model, prior.scale)
    begin, *ends = random_passages(model, (9, 4, 1, 6))
    texts = [(*begin, *end) for end in ends]
    rows = [Row(tuple(texts), in_common(texts)), Row((texts[1],))]
    if name == "gemma2":  # its layers see in turns everything and what is near
        assert not model.reads_forked_rows
        return
    assert model.reads_forked_rows
    with upper.ready(), torch.no_grad():
        ids = torch.nn.utils.rnn.pad_sequence([torch.tensor(row.ids) for row in rows], batch_first=True)
        each = [upper.lower(text) for text in texts]
        lower = torch.nn.utils.rnn.pad_sequence([rows[0].joined(each), each[1]], batch_first=True)
        read_as = layout(rows, ids.shape[1], ids.device, lower.dtype)
        together = upper.outputs(ids, lower, prior.tensors, read_as)
        for number, text in enumerate(texts):
            alone = upper.outputs(torch.tensor([text]), upper.lower(text)[None], prior.tensors)[0]
            first, end = rows[0].at(number, len(begin)), rows[0].at(number, len(text))
            assert torch.allclose(together[0, first:end], alone[len(begin) :], rtol=1e-4, atol=1e-5)
            if number == 1:
                assert torch.allclose(together[1, : len(text)], alone, rtol=1e-4, atol=1e-5)


def test_a_model_that_does_not_keep_to_positions_reads_no_forked_row(family: Callable[[str], Model]) -> None:
    model = family("llama")
    deaf = Model(model.network, model.tokenizer, model.device, model.dtype, model.projections)
    usual = model.network.base_model.forward
    model.network.base_model.forward = lambda position_ids=None, **named: usual(**named)
    try:
        assert not deaf.reads_forked_rows
    finally:
        del model.network.base_model.forward


def test_no_token_of_a_shared_row_nor_its_filling_lies_past_the_longest_text() -> None:
    texts = [(*range(20), 30 + number) for number in range(8)]
    rows = [Row(tuple(texts), 20), Row((texts[0],))]
    positions = layout(rows, 28, torch.device("cpu"), torch.float32)["position_ids"]
    assert positions.shape == (2, 28) and int(positions.max()) == 20


@pytest.mark.parametrize("said", [{"attention_layers": ["global", "local"]}, {"window_size": 256}])
def test_a_model_whose_layers_see_what_is_near_reads_no_forked_row(
    family: Callable[[str], Model], said: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family("llama")
    for name, value in said.items():
        monkeypatch.setattr(model.network.config, name, value, raising=False)
    same = Model(model.network, model.tokenizer, model.device, model.dtype, model.projections)
    assert not same.reads_forked_rows


def test_each_row_may_have_tensors_of_its_own(model: Model, prior: Prior) -> None:
    other = filled_prior(model, seed=8)
    upper = UpperHalf(model, prior.scale)
    (ids,) = random_passages(model, (9,))
    both = {name: torch.stack([prior.tensors[name], other.tensors[name]]) for name in prior.tensors}
    with upper.ready(), torch.no_grad():
        lower = upper.lower(ids)
        together = upper.outputs(torch.tensor([ids, ids]), torch.stack([lower, lower]), both)
        for row, one in enumerate((prior, other)):
            alone = upper.outputs(torch.tensor([ids]), lower[None], one.tensors)[0]
            assert torch.allclose(together[row], alone, rtol=1e-4, atol=1e-5)


class Left(Exception):
    pass


@pytest.mark.parametrize("name", FAMILIES)
def test_the_model_is_its_own_again_however_the_block_is_left(family: Callable[[str], Model], name: str) -> None:
    model = family(name)
    (ids,) = random_passages(model, (7,))
    before = model.network.config._attn_implementation
    with torch.no_grad():
        usual = model.network(input_ids=torch.tensor([ids])).logits
    upper = UpperHalf(model, 2.0)
    with pytest.raises(Left), upper.ready():
        upper.lower(ids)
        raise Left
    with torch.no_grad():
        assert torch.equal(model.network(input_ids=torch.tensor([ids])).logits, usual)
    assert model.network.config._attn_implementation == before
    assert not any("forward" in vars(module) for module in model.network.modules())
    assert not any(module._forward_hooks or module._forward_pre_hooks for module in model.network.modules())


# ── what is kept ────────────────────────────────────────────────────────────────────────────────────────────────────


def numbered(ids: Any) -> torch.Tensor:
    """(L, 4), a different one for different tokens."""
    return torch.tensor(list(ids), dtype=torch.float32)[:, None].expand(-1, 4).to(torch.bfloat16).clone()


def counting(calls: list[tuple[int, ...]]) -> Callable[[Any], torch.Tensor]:
    def compute(ids: Any) -> torch.Tensor:
        calls.append(tuple(ids))
        return numbered(ids)

    return compute


@pytest.mark.parametrize("memory", [1 << 20, 100, 0], ids=["in memory", "some on disk", "all on disk"])
def test_what_was_computed_once_comes_back_bit_for_bit(memory: int) -> None:
    calls: list[tuple[int, ...]] = []
    cache = LowerCache(counting(calls), memory_bytes=memory)
    texts = [tuple(range(start, start + start % 7 + 1)) for start in range(40)]
    for _ in range(3):
        for text in texts:
            found = cache(list(text))
            assert torch.equal(found, numbered(text)) and found.dtype == torch.bfloat16
    assert calls == texts
    assert sum(t.numel() * 2 for t in cache._memory.values()) <= memory
    assert len(cache._memory) + len(cache._places) == len(texts)
    if memory < 1 << 20:
        assert cache._places


def test_from_several_threads_everything_comes_back_right_and_is_kept_once() -> None:
    calls: list[tuple[int, ...]] = []
    memory = 400
    cache = LowerCache(counting(calls), memory_bytes=memory)
    texts = [tuple(range(start, start + start % 5 + 1)) for start in range(60)]
    barrier = threading.Barrier(4)

    def work(turn: int) -> bool:
        barrier.wait()
        return all(torch.equal(cache(text), numbered(text)) for text in texts[turn:] + texts[:turn] for _ in range(3))

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, (0, 0, 20, 40)))
    kept = sum(tensor.numel() * 2 for tensor in cache._memory.values())
    assert cache._left == memory - kept >= 0
    assert not set(cache._memory) & set(cache._places)
    assert cache._end == sum(8 * len(text) for text in cache._places)
    before = len(calls)
    assert work_alone(cache, texts) and len(calls) == before


def work_alone(cache: LowerCache, texts: list[tuple[int, ...]]) -> bool:
    return all(torch.equal(cache(text), numbered(text)) for text in texts)


@pytest.mark.parametrize("kind", ["at once", "after a few", "in the middle of one"])
def test_a_full_disk_costs_time_and_nothing_else(monkeypatch: Any, kind: str) -> None:
    class Full:
        def __init__(self, file: Any) -> None:
            self.file, self.left = file, {"at once": 0, "after a few": 48, "in the middle of one": 52}[kind]

        def write(self, data: bytes) -> int:
            if self.left < len(data):
                if kind == "in the middle of one" and self.left:
                    return self.file.write(data[: self.left])
                raise OSError(28, "No space left on device")
            self.left -= len(data)
            return self.file.write(data)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.file, name)

    real = lowercache.tempfile.TemporaryFile
    monkeypatch.setattr(lowercache.tempfile, "TemporaryFile", lambda **named: Full(real(**named)))
    calls: list[tuple[int, ...]] = []
    cache = LowerCache(counting(calls), memory_bytes=0)
    texts = [(start, start + 1, start + 2) for start in range(6)]
    for _ in range(2):
        assert work_alone(cache, texts)
    on_disk = 0 if kind == "at once" else 2
    assert len(cache._places) == on_disk and len(calls) == 6 + 6 - on_disk


# ── several episodes at a time ──────────────────────────────────────────────────────────────────────────────────────


def episodes(model: Model, count: int) -> list[Episode]:
    found = []
    for number in range(count):
        first, second, asked = random_passages(model, (6 + number % 3, 9, 8), seed=number)
        question = Prompted(tuple(asked), 5, (0.7, 0.3))
        found.append(Episode(f"e{number}", (tuple(first), tuple(second)), (question,)))
    return found


@pytest.mark.parametrize("memory", [1 << 30, 0], ids=["in memory", "on disk"])
def test_threads_and_where_it_is_kept_change_no_bit_of_a_meta_gradient(
    model: Model, prior: Prior, memory: int, monkeypatch: Any
) -> None:
    """Ten episodes in four threads, twice over (the second time from what was kept), against one after another."""
    many = episodes(model, 10)
    steps = {name: 0.1 + place / 10 for place, name in enumerate(prior.tensors)}
    learner = MetaLearner(model, prior.scale)
    with learner.ready():
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        alone = [learner.meta_gradient(prior.tensors, steps, [episode]) for episode in many]
        plain = [sum(losses) / len(losses) for losses in learner.losses(prior.tensors, steps, many)]
        torch.set_num_threads(4)
        try:
            with Workers(learner) as workers:
                learner.lower_of = LowerCache(learner.upper.lower, memory_bytes=memory)
                for _ in range(2):
                    found = workers.gradients(prior.tensors, steps, many)
                    assert [episode.name for episode, _ in found] == [episode.name for episode in many]
                    for (_, ours), expected in zip(found, alone, strict=True):
                        assert torch.equal(ours.losses, expected.losses) and ours.log_steps == expected.log_steps
                        assert all(torch.equal(ours.tensors[name], expected.tensors[name]) for name in prior.tensors)
                    assert workers.losses(prior.tensors, steps, many) == plain
        finally:
            torch.set_num_threads(threads)


def test_in_the_block_the_callers_thread_computes_alone_and_afterwards_as_before(model: Model) -> None:
    learner = MetaLearner(model, 2.0)
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with Workers(learner) as workers:
            assert torch.get_num_threads() == 1
            assert list(workers.map(lambda _: torch.get_num_threads(), range(6))) == [1] * 6
        assert torch.get_num_threads() == 3
    finally:
        torch.set_num_threads(before)


def test_elsewhere_than_on_a_cpu_all_go_together_and_one_by_one_where_one_is_not_finite(
    model: Model, prior: Prior
) -> None:
    many = episodes(model, 3)
    steps = dict.fromkeys(prior.tensors, 0.3)
    learner = MetaLearner(model, prior.scale)
    with learner.ready(), Workers(learner) as workers:
        each = workers.gradients(prior.tensors, steps, many)
        workers._pool.shutdown()  # type: ignore[union-attr]
        workers._pool = None
        ((named, together),) = workers.gradients(prior.tensors, steps, many)
        assert named is many[0] and len(together.losses) == 3
        expected, logs = mean_gradient([part for _, part in each])
        found, found_logs = mean_gradient([together])
        assert expected is not None and found is not None and logs is not None and found_logs is not None
        for name in expected:
            assert torch.allclose(found[name], expected[name], rtol=1e-4, atol=1e-7)
            assert found_logs[name] == pytest.approx(logs[name], rel=1e-3, abs=1e-7)
        nothing = Episode("bad", (), (Prompted(many[0].questions[0].ids, 8),))  # no token of an answer
        parts = workers.gradients(prior.tensors, steps, [many[0], nothing, many[2]])
        assert [(episode.name, part.finite) for episode, part in parts] == [("e0", True), ("bad", False), ("e2", True)]
        assert workers.gradients(prior.tensors, steps, []) == []


def test_the_mean_gradient_weighs_every_episode_alike() -> None:
    from regrad_cli.learn.meta import MetaGradient

    one = MetaGradient(torch.tensor([1.0]), {"a": torch.ones(2, 2)}, {"a": 3.0})
    two = MetaGradient(torch.tensor([1.0, 2.0]), {"a": torch.full((2, 2), 5.0)}, {"a": 0.0})
    tensors, logs = mean_gradient([one, two])
    assert tensors is not None and torch.equal(tensors["a"], torch.full((2, 2), 2.0))
    assert logs == {"a": 1.0} and mean_gradient([]) == (None, None)
