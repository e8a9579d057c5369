"""Adaptation, the prior and answers: the rule of the paper, drift of exactly zero, greedy decoding as transformers'."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from learn.conftest import FAMILIES, filled_prior, random_passages
from threadpoolctl import ThreadpoolController

from regrad_cli.errors import Damaged, ModelUnavailable, PriorMismatch, UsageProblem
from regrad_cli.learn.adapt import adapted, combine
from regrad_cli.learn.gradients import passage_gradients
from regrad_cli.learn.model import NUMPY_BLAS, Model, choose_device, choose_dtype, load_model
from regrad_cli.learn.prior import Prior, seeded_prior
from regrad_cli.learn.prompt import greedy, pieces, prompt_ids
from regrad_cli.learn.steps import with_found_step_size
from regrad_cli.learn.tokens import Tokenizer


def logits(model: Model, ids: list[int]) -> torch.Tensor:
    with torch.no_grad():
        return model.network(input_ids=torch.tensor([ids])).logits


def loss(model: Model, ids: list[int]) -> float:
    batch = torch.tensor([ids])
    with torch.no_grad():
        return float(model.network(input_ids=batch, labels=batch).loss)


def test_combine_is_the_papers_rule() -> None:
    gradients = {"a": torch.arange(12.0).view(2, 2, 3), "b": torch.ones(2, 1, 1)}
    change = combine(gradients, [0.25, 0.5], {"a": 2.0, "b": 3.0}, gamma=0.5)
    assert torch.allclose(change["a"], -0.5 * 2.0 * (0.25 * gradients["a"][0] + 0.5 * gradients["a"][1]))
    assert torch.allclose(change["b"], torch.tensor([[-0.5 * 3.0 * 0.75]]))


def test_combine_refuses_other_tensors_and_counts() -> None:
    with pytest.raises(PriorMismatch):
        combine({"a": torch.zeros(1, 2, 2)}, [1.0], {"b": 1.0})
    with pytest.raises(PriorMismatch):
        combine({"a": torch.zeros(2, 2, 2)}, [1.0], {"a": 1.0})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_small_step_along_a_passages_gradient_lowers_its_own_loss(family: Callable[[str], Model], name: str) -> None:
    model = family(name)
    prior = filled_prior(model)
    (ids,) = random_passages(model, (40,))
    (part,) = passage_gradients(model, prior, [ids])
    norm = sum(float(tensor.square().sum()) for tensor in part.tensors.values())
    step = 1e-3
    with adapted(model, prior):
        before = loss(model, ids)
    change = combine(part.tensors, [1.0], dict.fromkeys(prior.tensors, step))
    with adapted(model, prior, change):
        after = loss(model, ids)
    assert before - after == pytest.approx(step * norm, rel=0.1, abs=2e-6)


def test_gamma_zero_answers_like_the_prior_alone(model: Model, prior: Prior) -> None:
    (ids,) = random_passages(model, (20,))
    (part,) = passage_gradients(model, prior, [ids])
    with adapted(model, prior):
        alone = logits(model, ids)
    with adapted(model, prior, combine(part.tensors, [1.0], prior.step_sizes, gamma=0.0)):
        assert torch.equal(logits(model, ids), alone)


def test_an_untrained_prior_alone_is_the_base_model(model: Model) -> None:
    (ids,) = random_passages(model, (20,))
    with adapted(model, seeded_prior(model, "f" * 64)):
        inside = logits(model, ids)
    assert torch.equal(inside, logits(model, ids))


@pytest.mark.parametrize("ending", [None, ValueError, KeyboardInterrupt, GeneratorExit])
def test_promise_19_model_and_prior_are_bit_identical_however_the_block_ends(
    model: Model, prior: Prior, ending: type[BaseException] | None
) -> None:
    (ids,) = random_passages(model, (20,))
    outside = logits(model, ids)
    weights = {name: tensor.clone() for name, tensor in model.network.state_dict().items()}
    prior_bytes = prior.to_bytes()
    change = {name: torch.ones_like(tensor) for name, tensor in prior.tensors.items()}
    try:
        with adapted(model, prior, change):
            assert not torch.equal(logits(model, ids), outside)
            if ending:
                raise ending
    except BaseException as error:
        assert type(error) is ending
    assert torch.equal(logits(model, ids), outside)
    assert all(torch.equal(weights[name], tensor) for name, tensor in model.network.state_dict().items())
    assert prior.to_bytes() == prior_bytes


def test_a_hook_that_ctrl_c_left_behind_does_nothing(
    model: Model, prior: Prior, monkeypatch: pytest.MonkeyPatch
) -> None:
    (ids,) = random_passages(model, (20,))
    outside = logits(model, ids)
    with monkeypatch.context() as patch:
        patch.setattr(torch.utils.hooks.RemovableHandle, "remove", lambda handle: None)
        with adapted(model, prior):
            assert not torch.equal(logits(model, ids), outside)
    try:
        assert any(projection.module._forward_hooks for projection in model.projections)
        assert torch.equal(logits(model, ids), outside)
    finally:
        for projection in model.projections:
            projection.module._forward_hooks.clear()


def test_an_answer_left_in_the_middle_leaves_nothing_behind(model: Model, prior: Prior) -> None:
    (ids,) = random_passages(model, (20,))
    outside = logits(model, ids)

    def answer():
        with adapted(model, prior):
            yield from greedy(model, ids, 10)

    tokens = answer()
    next(tokens)
    tokens.close()
    assert torch.equal(logits(model, ids), outside)


@pytest.mark.parametrize("name", FAMILIES)
def test_greedy_gives_the_tokens_that_generate_gives(family: Callable[[str], Model], name: str) -> None:
    model = family(name)
    ids = prompt_ids(model, "Who repaired the bell?")
    with torch.no_grad():
        whole = model.network.generate(torch.tensor([ids]), do_sample=False, max_new_tokens=12)[0, len(ids) :].tolist()
    ends = [place for place, token in enumerate(whole) if token in model.end_ids]
    assert list(greedy(model, ids, 12)) == whole[: ends[0] if ends else None]


def test_pieces_joined_are_the_decoded_answer_whatever_the_characters(model: Model) -> None:
    text = "Zoë’s naïve café — 東京 🌊 ok"
    ids = model.token_ids(text)
    assert len(ids) > len(text)  # bytes: characters span several tokens
    parts = list(pieces(model, iter(ids)))
    assert "".join(parts) == text
    assert all("�" not in part for part in parts) and len(parts) > 10


def test_a_prior_comes_back_from_its_bytes(prior: Prior) -> None:
    data = prior.to_bytes()
    again = Prior.from_bytes(data)
    assert again.to_bytes() == data and again.fingerprint == prior.fingerprint
    assert list(again.tensors) == list(prior.tensors) and again.card == prior.card
    assert again.log_step_sizes == prior.log_step_sizes


def test_a_rounded_prior_takes_fewer_bytes_and_comes_back_as_it_is(prior: Prior) -> None:
    rounded = prior.rounded()
    data = rounded.to_bytes()
    again = Prior.from_bytes(data)
    assert again.to_bytes() == data and again.rounded().to_bytes() == data
    for name, tensor in prior.tensors.items():
        assert torch.equal(again.tensors[name], rounded.tensors[name])
        peaks = tensor.abs().amax(dim=int(tensor.shape[0] < tensor.shape[1]), keepdim=True)
        assert bool(((again.tensors[name] - tensor).abs() <= peaks / 127).all())
    values = sum(tensor.numel() for tensor in prior.tensors.values())
    assert len(data) < len(prior.to_bytes()) - 2 * values  # the headers and scales of these tiny tensors weigh much


@pytest.mark.parametrize("scale", [0.0, 1e-30, 0.5, 127.0, 127.5, 1.0, 3e4])
def test_rounding_holds_at_zero_and_at_powers_of_two(prior: Prior, scale: float) -> None:
    tensors = {name: torch.sign(tensor) * scale for name, tensor in prior.tensors.items()}
    rounded = Prior(tensors, prior.log_step_sizes, prior.card).rounded()
    assert Prior.from_bytes(rounded.to_bytes()).to_bytes() == rounded.to_bytes()
    for name, tensor in tensors.items():
        assert torch.allclose(rounded.tensors[name], tensor, rtol=1 / 127, atol=0)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_bytes_that_are_no_prior_are_damage(prior: Prior, cut: int) -> None:
    with pytest.raises(Damaged):
        Prior.from_bytes(prior.to_bytes()[:cut])


@pytest.mark.parametrize(
    "changes",
    [
        {"gamma": "1"}, {"gamma": float("inf")}, {"gamma": None}, {"gamma": True}, {"k": 0}, {"k": 10**9}, {"k": 2.5},
        {"strength_among_passages": "1"}, {"strength_among_passages": float("nan")},
        {"weights": "loudest"}, {"weights": ["mean"]}, {"weights": "softmax"}, {"name": 5}, {"trained": "yes"},
        {"weights": "softmax", "temperature": 0}, {"weights": "softmax", "temperature": "cold"}, {"name": "\ud800"},
        {"segment_tokens": 0}, {"segment_tokens": 2.5}, {"segment_tokens": 1 << 40}, {"normalized": 1},
        {"changed": []}, {"changed": ["x"]}, {"changed": 5}, {"changed": [["x"]]}, {"changed": "model"},
        {"order": []}, {"order": [["x"]]}, {"format": "regrad prior 9"},
    ],
    ids=str,
)  # fmt: skip
def test_promise_16_a_prior_whose_card_says_what_cannot_be_is_damage(prior: Prior, changes: dict[str, object]) -> None:
    length = int.from_bytes(prior.to_bytes()[:8], "little")
    header = json.loads(prior.to_bytes()[8 : 8 + length])
    header["__metadata__"]["card"] = json.dumps(json.loads(header["__metadata__"]["card"]) | changes)
    text = json.dumps(header).encode()
    with pytest.raises(Damaged, match="is not a prior"):
        Prior.from_bytes(len(text).to_bytes(8, "little") + text + prior.to_bytes()[8 + length :])


@pytest.mark.parametrize("what", ["steep", "flat", "half", "scale", "more"])
def test_promise_16_a_prior_of_tensors_that_cannot_be_is_damage(prior: Prior, what: str) -> None:
    """A scale of another shape would make a matrix of any size out of two vectors."""
    from safetensors.torch import load, save

    data = (prior.rounded() if what == "scale" else prior).to_bytes()
    tensors, name = load(data), next(iter(prior.tensors))
    if what == "steep":
        tensors["log_step_sizes"][0] = 1e4
    elif what == "flat":
        tensors[name] = tensors[name].flatten()
    elif what == "half":
        tensors[name] = tensors[name].half()
    elif what == "more":
        tensors["one more"] = torch.zeros(1, 1)
    else:
        tensors[name], tensors[f"{name}.scale"] = torch.ones(9, 1, dtype=torch.int8), torch.ones(1, 9)
    card = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])["__metadata__"]
    with pytest.raises(Damaged, match="is not a prior"):
        Prior.from_bytes(save(tensors, metadata=card))


def test_a_prior_that_is_not_finite_is_damage(prior: Prior) -> None:
    name = next(iter(prior.tensors))
    bad = {**prior.tensors, name: torch.full_like(prior.tensors[name], float("nan"))}
    with pytest.raises(Damaged, match="finite"):
        Prior.from_bytes(Prior(bad, prior.log_step_sizes, prior.card).to_bytes())


def test_a_seed_is_a_prior(model: Model) -> None:
    assert seeded_prior(model, "f", seed=1).to_bytes() == seeded_prior(model, "f", seed=1).to_bytes()
    assert seeded_prior(model, "f", seed=1).to_bytes() != seeded_prior(model, "f", seed=2).to_bytes()


def test_the_step_size_found_is_a_power_of_two_that_lowers_the_loss(model: Model) -> None:
    prior = with_found_step_size(model, seeded_prior(model, "f" * 64))
    (step,) = set(prior.step_sizes.values())
    assert torch.frexp(torch.tensor(step, dtype=torch.float32))[0] == 0.5
    (ids,) = [model.token_ids("The mill at the mouth of the river was built in 1734.")]
    (part,) = passage_gradients(model, prior, [ids])
    with adapted(model, prior, combine(part.tensors, [1.0], prior.step_sizes)):
        assert loss(model, ids) < part.losses[0]


def test_the_tokenizer_of_passages_is_the_models_own(model: Model, tiny_model_folder: Path) -> None:
    text = "Release 4.2 — Zoë repaired the bell."
    tokenizer = Tokenizer(tiny_model_folder)
    assert tokenizer.ids(text) == load_model(tiny_model_folder, device="cpu", dtype="fp32").token_ids(text)
    assert tokenizer.spans(text)[0][0] == 0 and tokenizer.spans(text)[-1][1] == len(text)


def test_a_device_that_is_not_there_is_an_error_never_the_cpu() -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ModelUnavailable) as caught:
            choose_device("cuda")
        assert caught.value.exit_code == 13
    with pytest.raises(UsageProblem):
        choose_device("toaster")
    with pytest.raises(UsageProblem):
        choose_dtype("fp12", torch.device("cpu"))
    assert choose_device("cpu").type == "cpu"


def test_beside_a_loaded_model_numpys_products_keep_to_one_thread(tiny_model_folder: Path) -> None:
    def numpys() -> ThreadpoolController:
        return ThreadpoolController().select(prefix=NUMPY_BLAS)

    with numpys().limit(limits=2):
        if not numpys().info() and sys.platform != "linux":
            pytest.skip("this numpy has another BLAS")
        assert numpys().info()
        load_model(tiny_model_folder, device="cpu", dtype="fp32")
        assert {library["num_threads"] for library in numpys().info()} == {1}


def test_a_folder_that_holds_no_model_is_unavailable(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "no such thing"}')
    with pytest.raises(ModelUnavailable):
        load_model(tmp_path)
