"""Vectors equal sentence-transformers', keep their bits whatever stands beside them, and need no heavy import."""

from __future__ import annotations

import json
import math
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tiny

from regrad_cli import bert, embed, models
from regrad_cli.errors import ModelUnavailable, NonFinite

TEXTS = [
    "",
    "a",
    "What is the name of the ferry that crosses the sound?",
    "  leading\n\n space\tand UPPER case ",
    "Ünïcödé, 東京, emoji 😀 and a zero\u200bwidth space; \x00 control",
    "[CLS] forged [SEP] marks [MASK]",
    "The harbour of Velmora opens at seven. " * 60,
    *(f"passage number {number} " * (number % 23 + 1) for number in range(24)),
]


def reference(folder: Path, texts: list[str]) -> np.ndarray:
    """sentence-transformers' own vectors, one text at a time."""
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(folder), device="cpu", local_files_only=True)
    return model.encode(texts, batch_size=1, normalize_embeddings=True, show_progress_bar=False)


def assert_like_sentence_transformers(folder: Path) -> None:
    expected = reference(folder, TEXTS)
    embedder = embed.load_embedder(folder, dtype="float32")
    assert isinstance(embedder, embed.LightEmbedder)
    queries = np.stack([embedder.encode_query(text) for text in TEXTS])
    documents = embedder.encode(TEXTS)
    assert embedder.dimension == expected.shape[1]
    for found in (queries, documents):
        assert (found.shape, found.dtype) == (expected.shape, np.float32)
        assert np.abs(found - expected).max() < 1e-5
        assert np.abs(np.linalg.norm(found, axis=1) - 1).max() < 1e-5


def assert_own_bits(folder: Path, dtype: str, buckets: tuple[int, ...]) -> None:
    """One text at every row of a batch, among empty rows and among others: one set of bits a bucket."""
    embedder: Any = embed.load_embedder(folder, dtype=dtype)
    random = np.random.default_rng(0)
    words = tiny.CORPUS[0].split()
    for bucket in buckets:
        probe = " ".join(random.choice(words, 500))
        embedder._tokenizer.enable_truncation(bucket - 3)
        seen = {embedder.encode([probe]).tobytes()}
        for row in range(embed.ROWS):
            others = [" ".join(random.choice(words, 500)) for _ in range(embed.ROWS - 1)]
            seen.add(embedder.encode([*others[:row], probe, *others[row:]])[row].tobytes())
        assert len(seen) == 1, f"{len(seen)} different vectors at {bucket} tokens"


def test_light_vectors_are_sentence_transformers_own(tiny_embedder_folder: Path) -> None:
    assert_like_sentence_transformers(tiny_embedder_folder)


def test_first_token_pooling_too(tmp_path: Path) -> None:
    assert_like_sentence_transformers(tiny.write_embedder(tmp_path / "cls", pooling="cls"))


@pytest.mark.parametrize("limit", [64, 65, 5])
def test_texts_are_cut_where_sentence_transformers_cuts_them(
    limit: int, tiny_embedder_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "short"
    shutil.copytree(tiny_embedder_folder, folder)
    (folder / "sentence_bert_config.json").write_text(json.dumps({"max_seq_length": limit, "do_lower_case": False}))
    assert_like_sentence_transformers(folder)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_texts_vector_has_the_same_bits_whatever_its_neighbours(dtype: str, tiny_embedder_folder: Path) -> None:
    assert_own_bits(tiny_embedder_folder, dtype, (16, 48, 128))


def test_a_batchs_shape_depends_on_a_texts_own_length_alone(tiny_embedder_folder: Path) -> None:
    embedder: Any = embed.load_embedder(tiny_embedder_folder)
    shapes: list[tuple[int, ...]] = []
    embedder._loaded().register_forward_pre_hook(
        lambda module, args, inputs: shapes.append(tuple(inputs["input_ids"].shape)), with_kwargs=True
    )
    for count in (1, 3, embed.ROWS, embed.ROWS + 1):
        embedder.encode(["the ferry " * 30, *["short"] * count])
    assert set(shapes) == {(embed.ROWS, embed.BUCKET), (embed.ROWS, 4 * embed.BUCKET)}


def test_encoding_in_any_order_or_split_gives_the_same_bits(tiny_embedder_folder: Path) -> None:
    embedder = embed.load_embedder(tiny_embedder_folder)
    together = embedder.encode(TEXTS)
    order = np.random.default_rng(1).permutation(len(TEXTS))
    assert embedder.encode([TEXTS[i] for i in order]).tobytes() == together[order].tobytes()
    alone = np.concatenate([embedder.encode([text]) for text in TEXTS])
    assert alone.tobytes() == together.tobytes()


def test_bfloat16_stays_close_to_float32(tiny_embedder_folder: Path) -> None:
    exact = embed.load_embedder(tiny_embedder_folder, dtype="float32").encode(TEXTS)
    close = embed.load_embedder(tiny_embedder_folder, dtype="bfloat16").encode(TEXTS)
    assert close.tobytes() != exact.tobytes()
    assert (close * exact).sum(axis=1).min() > 0.999


def test_no_texts_give_no_vectors(tiny_embedder_folder: Path) -> None:
    assert embed.load_embedder(tiny_embedder_folder).encode([]).shape == (0, 16)


def test_an_embedder_of_another_kind_goes_through_sentence_transformers(
    tiny_embedder_folder: Path, tmp_path: Path
) -> None:
    folder = tiny.write_embedder(tmp_path / "max", pooling="max")
    embedder = embed.load_embedder(folder)
    assert isinstance(embedder, embed.SentenceEmbedder)
    expected = reference(folder, TEXTS)
    assert np.abs(embedder.encode(TEXTS) - expected).max() < 1e-5
    assert np.abs(embedder.encode_query(TEXTS[2]) - expected[2]).max() < 1e-5
    assert embedder.dimension == 16
    assert embedder.encode([]).shape == (0, 16)
    assert embedder.encode([TEXTS[2]]).tobytes() == embedder.encode(TEXTS)[2].tobytes()


def test_an_embedders_prompts_are_used(tiny_embedder_folder: Path, tmp_path: Path) -> None:
    folder = tmp_path / "prompts"
    shutil.copytree(tiny_embedder_folder, folder)
    prompts = {"query": "What is the ", "document": ""}
    (folder / "config_sentence_transformers.json").write_text(json.dumps({"prompts": prompts}))
    embedder = embed.load_embedder(folder)
    plain = embed.load_embedder(tiny_embedder_folder)
    assert np.abs(embedder.encode_query("ferry") - plain.encode_query("What is the ferry")).max() < 1e-5


def test_a_query_imports_neither_torch_nor_transformers(tiny_embedder_folder: Path) -> None:
    code = "import sys; from pathlib import Path; from regrad_cli.embed import load_embedder\n"
    code += f"load_embedder(Path({str(tiny_embedder_folder)!r})).encode_query('a question')\n"
    code += "print([m for m in ('torch', 'transformers', 'sentence_transformers') if m in sys.modules])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_documents_import_no_sentence_transformers_and_nothing_is_said(tiny_embedder_folder: Path) -> None:
    code = "import sys; from pathlib import Path; from regrad_cli.embed import load_embedder\n"
    code += f"load_embedder(Path({str(tiny_embedder_folder)!r})).encode(['a document'])\n"
    code += "print('sentence_transformers' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert (done.stdout, done.stderr) == ("False\n", "")


def test_weights_numpy_cannot_read_go_through_torch(tiny_embedder_folder: Path, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "bfloat16"
    shutil.copytree(tiny_embedder_folder, folder)
    weights = {name: tensor.to(torch.bfloat16) for name, tensor in load_file(folder / "model.safetensors").items()}
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    found = embed.load_embedder(folder).encode_query(TEXTS[2])
    assert found @ embed.load_embedder(tiny_embedder_folder).encode_query(TEXTS[2]) > 0.999


@pytest.mark.parametrize("file", ["model.safetensors", "tokenizer.json", "modules.json", "1_Pooling/config.json"])
@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b"\xff" * 50])
def test_a_damaged_embedder_is_an_error_with_a_way_out(
    file: str, content: bytes, tiny_embedder_folder: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(tiny_embedder_folder, folder)
    (folder / file).write_bytes(content)
    with pytest.raises(ModelUnavailable) as caught:
        embed.load_embedder(folder).encode_query("a question")
    assert caught.value.hint


def test_weights_that_lack_a_tensor_are_an_error(tiny_embedder_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "lacking"
    shutil.copytree(tiny_embedder_folder, folder)
    weights = load_file(folder / "model.safetensors")
    del weights["encoder.layer.1.output.dense.bias"]
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(ModelUnavailable, match="lacks"):
        embed.load_embedder(folder).encode_query("a question")


def test_a_vector_that_is_not_finite_is_refused(tiny_embedder_folder: Path, tmp_path: Path) -> None:
    from safetensors.numpy import load_file, save_file

    folder = tmp_path / "nan"
    shutil.copytree(tiny_embedder_folder, folder)
    weights = load_file(folder / "model.safetensors")
    weights["embeddings.LayerNorm.bias"][:] = np.nan
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    embedder = embed.load_embedder(folder)
    with pytest.raises(NonFinite):
        embedder.encode_query("a question")
    with pytest.raises(NonFinite):
        embedder.encode(["a document"])


def test_gelu_is_exact_to_float32() -> None:
    x = np.linspace(-8, 8, 4001, dtype=np.float32)
    exact = np.array([v / 2 * (1 + math.erf(v / math.sqrt(2))) for v in x.astype(float)])
    assert np.abs(bert.gelu(x) - exact).max() < 2e-6


@pytest.mark.starter
def test_the_real_embedders_vectors_are_sentence_transformers_own_and_need_no_network(
    embedder_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("a network call was made")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)
    assert_like_sentence_transformers(embedder_folder)


@pytest.mark.starter
@pytest.mark.parametrize("dtype", ["float32", "auto"])
def test_a_real_vector_has_the_same_bits_at_every_row_among_any_neighbours(dtype: str, embedder_folder: Path) -> None:
    assert_own_bits(embedder_folder, dtype, (16, 48, 96, 224))


@pytest.mark.parametrize(
    ("file", "changes"),
    [
        ("config.json", {"num_hidden_layers": None}),
        ("config.json", {"num_hidden_layers": 1 << 60}),
        ("config.json", {"num_attention_heads": 3}),
        ("config.json", {"num_attention_heads": 0}),
        ("config.json", {"layer_norm_eps": "small"}),
        ("config.json", {"hidden_size": 1 << 40}),
        ("config.json", {"max_position_embeddings": -1}),
        ("tokenizer.json", {"model": {}}),
    ],
    ids=str,
)
def test_promise_16_an_embedder_whose_settings_cannot_be_is_refused(
    tiny_embedder_folder: Path, tmp_path: Path, file: str, changes: dict[str, Any]
) -> None:
    folder = Path(shutil.copytree(tiny_embedder_folder, tmp_path / "embedder"))
    value = json.loads((folder / file).read_bytes())
    (folder / file).write_text(json.dumps(value | changes), encoding="utf-8")
    with pytest.raises(ModelUnavailable):
        embed.load_embedder(folder).encode_query("Seven keys.")


@pytest.mark.parametrize("path", ["a\0b", "n" * 300, "\ud800", 5])
def test_promise_16_an_embedder_whose_modules_have_names_that_cannot_be_is_refused(
    tiny_embedder_folder: Path, tmp_path: Path, path: object
) -> None:
    folder = Path(shutil.copytree(tiny_embedder_folder, tmp_path / "embedder"))
    modules = json.loads((folder / "modules.json").read_bytes())
    modules[0]["path"] = path
    (folder / "modules.json").write_text(json.dumps(modules), encoding="utf-8")
    with pytest.raises(ModelUnavailable, match="is damaged"):
        models.resolve_embedder(str(folder))
