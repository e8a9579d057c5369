"""The prompt of a question, the same in every mode, and an answer's tokens as they come. Knows no passages' origin."""

from __future__ import annotations

from collections.abc import Generator, Iterator, Sequence

import torch

from regrad_cli.learn.model import Model, last

INSTRUCTION = "Answer the question in a few words."


def question_text(question: str, passages: Sequence[str] = ()) -> str:
    """What the user's turn says: the passages if any, the instruction, the question."""
    parts = [*passages, f"{INSTRUCTION}\nQuestion: {question.strip()}"]
    return "\n\n".join(parts)


def prompt_ids(model: Model, question: str, passages: Sequence[str] = ()) -> list[int]:
    """The prompt's tokens, in the model's own chat template, or as `Question: … Answer:` where it has none."""
    text = question_text(question, passages)
    if getattr(model.tokenizer, "chat_template", None):
        turns = [{"role": "user", "content": text}]
        rendered = model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False)
        return model.token_ids(rendered)
    return model.token_ids(f"{text}\nAnswer:")


@torch.inference_mode()
def greedy(model: Model, prompt: Sequence[int], max_tokens: int) -> Generator[int, None, int | None]:
    """The most likely next token, again and again, until the answer ends; the ending token is not yielded but returned,
    None where there was none.

    The same tokens as transformers' `generate(do_sample=False)`, one at a time and in the caller's thread, so that
    they can be streamed and interrupted. Between two tokens the caller's own gradient mode is in force.
    """
    ends = set(model.end_ids)
    step = torch.tensor([list(prompt)], device=model.device)
    cache = None
    for _ in range(max_tokens):
        output = model.network(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=last(step))
        cache = output.past_key_values
        step = output.logits[:, -1:].argmax(dim=-1)  # (1, 1)
        token = int(step)
        if token in ends:
            return token
        yield token
    return None


class Kept:
    """Tokens passed on as they come, and kept: in `ids`, and the one that ended the answer, if any, in `end`."""

    def __init__(self, tokens: Iterator[int]) -> None:
        self._tokens = tokens
        self.ids: list[int] = []
        self.end: list[int] = []

    def __iter__(self) -> Iterator[int]:
        while True:
            try:
                token = next(self._tokens)
            except StopIteration as stop:
                self.end = [] if stop.value is None else [stop.value]
                return
            self.ids.append(token)
            yield token


def pieces(model: Model, tokens: Iterator[int]) -> Iterator[str]:
    """Tokens as text, each piece as soon as its characters are whole. Joined, the pieces are the decoded answer."""
    ids: list[int] = []
    shown = ""
    for token in tokens:
        ids.append(token)
        text = model.tokenizer.decode(ids, skip_special_tokens=True)
        if text.endswith("�") or not text.startswith(shown):
            continue  # a character is not whole yet
        if len(text) > len(shown):
            yield text[len(shown) :]
            shown = text
    text = model.tokenizer.decode(ids, skip_special_tokens=True)
    if len(text) > len(shown):
        yield text[len(shown) :]
