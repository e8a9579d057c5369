"""Tiny random models in the shapes of real ones, for tests that need no download. Same seed, same bytes."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

CORPUS = [
    "The harbour of Velmora opens at seven in the morning, and its lamps are lit by Oda Brenk.",
    "What is the name of the ferry that crosses the sound? It is called the Grey Heron.",
    "Release 4.2 of the tide table corrects an error in the figures for March and April 1987.",
    "A passage is read, its gradient is taken, and the gradient is kept in a bank beside the text.",
    "Who repaired the bell? The bell was repaired by the smith Ilse Torvald in the year 1902.",
    "user assistant system question answer title text document number city river mountain name",
    "The quick brown fox jumps over the lazy dog; THE QUICK BROWN FOX JUMPS OVER THE LAZY DOG.",
]
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def write_tokenizer(folder: Path, *, vocab_size: int = 400, chat_template: str | None = CHAT_TEMPLATE) -> int:
    """A byte-level BPE with a chat template, as transformers saves one; returns the size of its vocabulary."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=["<|endoftext|>", "<|im_start|>", "<|im_end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|im_start|>",
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.chat_template = chat_template
    fast.save_pretrained(folder)
    return len(fast)


def llama_config(**changes: Any) -> Any:
    """A Llama of 4 layers and width 32."""
    from transformers import LlamaConfig

    settings: dict[str, Any] = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 1024,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
        "initializer_range": 0.2,
    }
    return LlamaConfig(**(settings | changes))


def write_model(folder: Path, config: Any = None, *, seed: int = 0, chat_template: str | None = CHAT_TEMPLATE) -> Path:
    """A random causal language model of any config (a tiny Llama's by default) and its tokenizer, a complete folder.

    The config's vocab_size is set to the tokenizer's.
    """
    import torch
    from transformers import AutoModelForCausalLM

    folder.mkdir(parents=True, exist_ok=True)
    config = config if config is not None else llama_config()
    config.vocab_size = write_tokenizer(folder, chat_template=chat_template)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    model.save_pretrained(folder)
    return folder


def write_embedder(folder: Path, *, dimension: int = 16, pooling: str = "mean", seed: int = 0) -> Path:
    """A random BERT in the layout of sentence-transformers (Transformer, Pooling, Normalize), for `load_embedder`.

    Token embeddings are large and layers weak, so texts that share words come out alike: retrieval is not all noise.
    """
    import torch
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import BertConfig, BertModel, PreTrainedTokenizerFast

    folder.mkdir(parents=True, exist_ok=True)
    # Words of the corpus and letters, not a trained vocabulary: training breaks ties differently in each process.
    words = sorted(set(re.findall(r"\w+", " ".join(CORPUS).lower())))
    letters = [chr(code) for code in range(33, 127)]
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]"]
    tokens = dict.fromkeys([*special, *letters, *(f"##{letter}" for letter in letters), *words])
    tokenizer = Tokenizer(models.WordPiece({token: at for at, token in enumerate(tokens)}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    cls, sep = tokenizer.token_to_id("[CLS]"), tokenizer.token_to_id("[SEP]")
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", pair="[CLS] $A [SEP] $B:1 [SEP]:1", special_tokens=[("[CLS]", cls), ("[SEP]", sep)]
    )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        unk_token="[UNK]",
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        mask_token="[MASK]",
        model_max_length=128,
    )
    fast.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(fast),
        hidden_size=dimension,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=2 * dimension,
        max_position_embeddings=128,
        pad_token_id=fast.pad_token_id,
    )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = BertModel(config)
        torch.nn.init.normal_(model.embeddings.word_embeddings.weight)
    model.save_pretrained(folder)
    modules = [
        {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.models.Transformer"},
        {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.models.Pooling"},
        {"idx": 2, "name": "2", "path": "2_Normalize", "type": "sentence_transformers.models.Normalize"},
    ]
    (folder / "1_Pooling").mkdir(exist_ok=True)
    _write(folder / "modules.json", modules)
    _write(folder / "sentence_bert_config.json", {"max_seq_length": 128, "do_lower_case": False})
    kinds = {"cls": "cls_token", "mean": "mean_tokens", "max": "max_tokens"}
    modes = {f"pooling_mode_{kind}": kind == kinds[pooling] for kind in (*kinds.values(), "mean_sqrt_len_tokens")}
    _write(folder / "1_Pooling" / "config.json", {"word_embedding_dimension": dimension, **modes})
    return folder


def _write(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2), encoding="utf-8")


def write_gguf(path: Path, *, seed: int = 0) -> Path:
    """A random Llama of 2 layers as a GGUF file with the fields and types of SmolLM2's (Q4_1, Q8_0 embeddings)."""
    import gguf
    import numpy as np
    from gguf.quants import quantize
    from tokenizers import Tokenizer

    write_tokenizer(path.parent / "tokenizer")
    content = json.loads(Tokenizer.from_file(str(path.parent / "tokenizer" / "tokenizer.json")).to_str())
    tokens = sorted(content["model"]["vocab"], key=content["model"]["vocab"].__getitem__)
    width, inner, heads, kv_heads = 64, 128, 4, 2
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name("Tiny")
    writer.add_block_count(2)
    writer.add_context_length(1024)
    writer.add_embedding_length(width)
    writer.add_feed_forward_length(inner)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_rope_dimension_count(width // heads)
    writer.add_rope_freq_base(100000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("smollm")
    writer.add_token_list(tokens)
    writer.add_token_types([3 if token.startswith("<|") else 1 for token in tokens])
    writer.add_token_merges([" ".join(merge) for merge in content["model"]["merges"]])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_pad_token_id(2)
    writer.add_chat_template(CHAT_TEMPLATE)

    random = np.random.default_rng(seed)
    small, embedding = gguf.GGMLQuantizationType.Q4_1, gguf.GGMLQuantizationType.Q8_0

    def add(name: str, rows: int, cols: int, kind: Any) -> None:
        data = quantize(random.normal(0, 0.2, (rows, cols)).astype(np.float32), kind)
        writer.add_tensor(f"{name}.weight", data, raw_dtype=kind)

    add("token_embd", len(tokens), width, embedding)
    kv_width = width // heads * kv_heads
    for layer in range(2):
        shapes = {"attn_q": (width, width), "attn_k": (kv_width, width), "attn_v": (kv_width, width)}
        shapes |= {"attn_output": (width, width), "ffn_gate": (inner, width), "ffn_up": (inner, width)}
        for part, (rows, cols) in (shapes | {"ffn_down": (width, inner)}).items():
            add(f"blk.{layer}.{part}", rows, cols, small)
        for part in ("attn_norm", "ffn_norm"):
            writer.add_tensor(f"blk.{layer}.{part}.weight", random.normal(1, 0.1, width).astype(np.float32))
    writer.add_tensor("output_norm.weight", random.normal(1, 0.1, width).astype(np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path
