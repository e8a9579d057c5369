"""Answers in batches are the answers one by one; noise that stands in for gradients is exactly as strong."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from learn.conftest import FAMILIES, filled_prior, random_passages
from transformers.cache_utils import DynamicLayer

from regrad_cli.errors import NonFinite, PriorMismatch
from regrad_cli.learn import generate
from regrad_cli.learn import prompt as prompt_module
from regrad_cli.learn.adapt import Tensors, adapted
from regrad_cli.learn.codec import Codec, parse_codec
from regrad_cli.learn.controls import DRAWN, Noise, weights_hash
from regrad_cli.learn.generate import adapted_rows, batches, greedy_batch
from regrad_cli.learn.likelihood import answer_log_probability
from regrad_cli.learn.model import Model
from regrad_cli.learn.prior import Prior
from regrad_cli.learn.prompt import greedy

LENGTHS = (3, 17, 9, 31, 30)


def changes_of(prior: Prior, count: int, strength: float = 0.2) -> list[Tensors]:
    generator = torch.Generator().manual_seed(5)
    return [
        {name: torch.randn(tensor.shape, generator=generator) * strength for name, tensor in prior.tensors.items()}
        for _ in range(count)
    ]


def noisy_prior(model: Model) -> Prior:
    """Strong enough that answers differ with it."""
    prior = filled_prior(model)
    generator = torch.Generator().manual_seed(9)
    for tensor in prior.tensors.values():
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * 0.3)
    return prior


@pytest.mark.parametrize("name", FAMILIES)
def test_batched_greedy_equals_one_by_one(family: Callable[[str], Model], name: str) -> None:
    model = family(name)
    prompts = random_passages(model, LENGTHS)
    alone = [list(greedy(model, prompt, 12)) for prompt in prompts]
    assert greedy_batch(model, prompts, 12) == alone
    assert len(set(map(tuple, alone))) > 1


def test_what_is_no_number_is_no_answer(model: Model) -> None:
    prior = noisy_prior(model)
    (change,) = changes_of(prior, 1, strength=1e30)
    with pytest.raises(NonFinite), adapted(model, prior, change):
        list(greedy(model, [5, 6, 7], 3))


def test_a_row_that_has_ended_stays_ended(family: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch) -> None:
    model = family("llama")
    prompts = random_passages(model, LENGTHS)
    full = greedy_batch(model, prompts, 12)
    end = full[0][4]
    monkeypatch.setattr(model.network.generation_config, "eos_token_id", end)
    cut = [answer[: answer.index(end)] if end in answer else answer for answer in full]
    assert greedy_batch(model, prompts, 12) == cut == [list(greedy(model, prompt, 12)) for prompt in prompts]


def test_the_head_is_handed_rows_that_lie_together(family: Callable[[str], Model]) -> None:
    """With a slice's strides its product in bf16 takes up to two hundred times as long on a CPU."""
    model, strides = family("llama"), []

    def seen(_module: torch.nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        strides.append((inputs[0].stride(), torch.empty(inputs[0].shape).stride()))

    handle = model.network.get_output_embeddings().register_forward_pre_hook(seen)
    prompts = random_passages(model, LENGTHS)
    greedy_batch(model, prompts, 2)
    list(greedy(model, prompts[1], 2))
    answer_log_probability(model, prompts[1], prompts[0])
    handle.remove()
    assert len(strides) == 5 and all(ours == plain for ours, plain in strides)


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_with_weights_of_their_own_answer_as_adapted_does(family: Callable[[str], Model], name: str) -> None:
    model = family(name)
    prior = noisy_prior(model)
    prompts = random_passages(model, LENGTHS)
    changes: list[Tensors | None] = [*changes_of(prior, len(LENGTHS) - 1), None]
    expected = []
    for prompt, change in zip(prompts, changes, strict=True):
        with adapted(model, prior, change):
            expected.append(list(greedy(model, prompt, 12)))
    with adapted_rows(model, prior, changes):
        found = greedy_batch(model, prompts, 12)
    assert found == expected
    assert found != greedy_batch(model, prompts, 12), "the changes do nothing, so this test shows nothing"
    with adapted_rows(model, prior, changes[::-1]):
        assert greedy_batch(model, prompts, 12) != expected, "rows do not get their own change"


@pytest.mark.parametrize("name", FAMILIES)
def test_rows_logits_equal_adapteds(family: Callable[[str], Model], name: str) -> None:
    model = family(name)
    prior = noisy_prior(model)
    ids = torch.tensor(random_passages(model, (12, 12, 12)))
    changes = changes_of(prior, 3)
    with torch.no_grad():
        with adapted_rows(model, prior, changes):
            together = model.network(input_ids=ids).logits
        for row, change in enumerate(changes):
            with adapted(model, prior, change):
                alone = model.network(input_ids=ids[row : row + 1]).logits[0]
            torch.testing.assert_close(together[row], alone, rtol=1e-4, atol=1e-4)


def test_rows_leave_the_model_as_it_was_also_after_an_error(family: Callable[[str], Model]) -> None:
    model = family("llama")
    prior = noisy_prior(model)
    before = weights_hash(model)
    prompts = random_passages(model, LENGTHS)
    answers = greedy_batch(model, prompts, 6)
    with pytest.raises(KeyboardInterrupt), adapted_rows(model, prior, changes_of(prior, 5)):
        raise KeyboardInterrupt
    assert greedy_batch(model, prompts, 6) == answers
    assert weights_hash(model) == before


def test_rows_refuse_a_change_of_other_tensors(family: Callable[[str], Model]) -> None:
    model = family("llama")
    prior = noisy_prior(model)
    (change,) = changes_of(prior, 1)
    change.popitem()
    with pytest.raises(PriorMismatch), adapted_rows(model, prior, [None, change]):
        pass


def test_batches_hold_every_prompt_once_in_rows_of_like_length(
    family: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(generate.ROWS, "cpu", 4)
    monkeypatch.setitem(generate.TOKENS, "cpu", 60)
    lengths = [50, 3, 100, 7, 7, 3, 3, 20, 25, 3]
    found = batches(family("llama"), lengths, 8)
    assert sorted(place for batch in found for place in batch) == list(range(len(lengths)))
    assert all(len(batch) <= 4 for batch in found)
    assert all(len(batch) == 1 or len(batch) * max(lengths[p] for p in batch) <= 60 for batch in found)
    assert [lengths[place] for batch in found for place in batch] == sorted(lengths)


def test_a_rows_padding_in_a_batch_is_longer_by_whole_steps_only(family: Callable[[str], Model]) -> None:
    """So that in bf16 its attention adds up as it does alone."""
    model = family("llama")
    prompts = random_passages(model, LENGTHS)
    widths: list[int] = []

    def seen(_module: torch.nn.Module, _inputs: object, given: dict[str, torch.Tensor]) -> None:
        widths.append(given["attention_mask"].shape[1])

    handle = model.network.register_forward_pre_hook(seen, with_kwargs=True)
    for prompt in prompts:
        list(greedy(model, prompt, 1))
    greedy_batch(model, prompts, 1)
    handle.remove()
    *alone, together = widths
    assert alone == [16, 32, 16, 32, 32] and together == 32


@pytest.mark.parametrize("name", FAMILIES)
def test_in_bf16_a_prompt_by_itself_goes_on_in_two_rows_and_answers_the_same(
    family: Callable[[str], Model], name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    model, rows = family(name), []
    prompts = random_passages(model, LENGTHS)
    prior = noisy_prior(model)
    (change,) = changes_of(prior, 1)

    def seen(_module: torch.nn.Module, _inputs: object, given: dict[str, torch.Tensor]) -> None:
        rows.append(len(given["input_ids"]))

    def answers() -> list[list[int]]:
        rows.clear()
        found = [list(greedy(model, prompt, 5)) for prompt in prompts]
        with adapted_rows(model, prior, [change]):
            return [*found, *greedy_batch(model, prompts[:1], 5)]

    handle = model.network.register_forward_pre_hook(seen, with_kwargs=True)
    expected = answers()
    assert set(rows) == {1}
    monkeypatch.setattr(prompt_module, "_single_rows_differ", lambda _: True)
    assert answers() == expected and set(rows) == {1, 2} and rows[:2] == [1, 2]
    rows.clear()
    greedy_batch(model, prompts, 3)
    handle.remove()
    assert set(rows) == {len(prompts)}


@pytest.mark.parametrize("also_recurrent", [False, True])
def test_what_cannot_be_kept_twice_goes_on_in_one_row(
    family: Callable[[str], Model], monkeypatch: pytest.MonkeyPatch, also_recurrent: bool
) -> None:
    model = family("llama")
    (prompt,) = random_passages(model, (9,))
    expected = list(greedy(model, prompt, 5))
    monkeypatch.setattr(prompt_module, "_single_rows_differ", lambda _: True)
    if also_recurrent:  # what it keeps beside keys and values is not repeated with them
        monkeypatch.setattr(DynamicLayer, "recurrent_states", {}, raising=False)
    else:
        monkeypatch.delattr(DynamicLayer, "batch_repeat_interleave")
    rows: list[int] = []
    handle = model.network.register_forward_pre_hook(
        lambda _module, _inputs, given: rows.append(len(given["input_ids"])), with_kwargs=True
    )
    assert list(greedy(model, prompt, 5)) == expected
    handle.remove()
    assert set(rows) == {1}


def test_prompts_that_attention_adds_up_in_parts_are_only_with_those_of_their_width(
    family: Callable[[str], Model],
) -> None:
    lengths = [10, 440, 441, 450, 455, 480, 481, 490, 600]
    found = [[lengths[place] for place in batch] for batch in batches(family("llama"), lengths, 64)]
    assert found == [[10, 440, 441], [450, 455], [480], [481, 490], [600]]


@pytest.mark.parametrize("codec", [None, "r1-int4", "int8"])
def test_noise_is_as_strong_as_the_gradient_in_every_tensor(family: Callable[[str], Model], codec: str | None) -> None:
    prior = filled_prior(family("llama"))
    coded = None if codec is None else Codec(parse_codec(codec), prior.shapes)
    generator = torch.Generator().manual_seed(1)
    gradients = {
        name: torch.randn((2, *tensor.shape), generator=generator) * 10.0 ** (place % 5 - 6)
        for place, (name, tensor) in enumerate(prior.tensors.items())
    }
    zero = next(iter(gradients))
    gradients[zero][1] = 0
    drawn = Noise(coded, seed=7)
    noise = drawn.like(gradients, seed=3)
    for name, gradient in gradients.items():
        torch.testing.assert_close(noise[name].norm(dim=(-2, -1)), gradient.norm(dim=(-2, -1)), rtol=1e-4, atol=0)
        cosine = (noise[name] * gradient).sum() / gradient.square().sum()
        assert abs(cosine) < 0.5, "that is no noise"
    assert not noise[zero][1].any()
    again, other = Noise(coded, seed=7).like(gradients, seed=3), drawn.like(gradients, seed=4)
    assert all(torch.equal(noise[name], again[name]) for name in noise)
    assert not all(torch.equal(noise[name], other[name]) for name in noise)


def test_noise_goes_through_the_codec(family: Callable[[str], Model]) -> None:
    """Rank one in, rank one out: noise has no finer structure than the gradients it stands for."""
    prior = filled_prior(family("llama"))
    codec = Codec(parse_codec("r1-int4"), prior.shapes)
    gradients = {name: torch.ones((1, *tensor.shape)) for name, tensor in prior.tensors.items()}
    for coded, rank in ((codec, 1), (None, min(prior.shapes[0][1:]))):
        first = Noise(coded, seed=0).like(gradients, seed=0)[prior.shapes[0].name][0]
        assert torch.linalg.matrix_rank(first, rtol=1e-3) == rank


def test_many_gradients_get_noise_that_differs_from_one_to_the_next(family: Callable[[str], Model]) -> None:
    prior = filled_prior(family("llama"))
    gradients = {name: torch.ones((DRAWN, *tensor.shape)) for name, tensor in prior.tensors.items()}
    for stack in Noise(None, seed=0).like(gradients, seed=0).values():
        alike = torch.corrcoef(stack.flatten(1)) - torch.eye(DRAWN)
        assert alike.abs().max() < 0.5
    more = {name: torch.ones((2 * DRAWN + 1, *tensor.shape)) for name, tensor in prior.tensors.items()}
    assert all(len(stack) == 2 * DRAWN + 1 for stack in Noise(None, seed=0).like(more, seed=0).values())


def test_the_weights_hash_sees_one_changed_value(family: Callable[[str], Model]) -> None:
    model = family("llama")
    before = weights_hash(model)
    weight = next(iter(model.network.parameters())).data
    kept = weight[0, 0].clone()
    try:
        weight[0, 0] += 1e-3
        assert weights_hash(model) != before
    finally:
        weight[0, 0] = kept
    assert weights_hash(model) == before
