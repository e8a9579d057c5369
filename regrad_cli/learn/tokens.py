"""A model's tokenizer for cutting text into passages; imports torch and transformers only where it must."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from regrad_cli.errors import unreadable_model

TokenSpans = Callable[[str], list[tuple[int, int]]]


class Tokenizer:
    """A model's tokens, without those that templates put around a text."""

    def __init__(self, folder: Path) -> None:
        self._ids: Callable[[str], list[int]]
        self.spans: TokenSpans
        if (folder / "tokenizer.json").is_file():
            from tokenizers import Tokenizer as Fast

            with unreadable_model(f"{folder}/tokenizer.json is damaged", "fetch or export the model again"):
                fast = Fast.from_file(str(folder / "tokenizer.json"))
            fast.no_truncation()
            fast.no_padding()
            self._ids = lambda text: fast.encode(text, add_special_tokens=False).ids
            self.spans = lambda text: fast.encode(text, add_special_tokens=False).offsets
            return
        from transformers import AutoTokenizer

        slow: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
        options = {"add_special_tokens": False, "verbose": False}
        self._ids = lambda text: slow(text, **options)["input_ids"]
        self.spans = lambda text: slow(text, return_offsets_mapping=True, **options)["offset_mapping"]

    def ids(self, text: str) -> list[int]:
        """The text's token ids."""
        return self._ids(text)
