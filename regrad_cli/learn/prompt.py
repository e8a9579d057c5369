"""The prompt of a question, the same in every mode, and an answer's tokens as they come. Knows no passages' origin."""

from __future__ import annotations

import inspect
from collections.abc import Generator, Iterator, Sequence
from typing import Any

import torch

from regrad_cli.errors import NonFinite
from regrad_cli.learn.model import Model, last

INSTRUCTION = "Answer the question in a few words."
PADDED = {"cpu": 16}  # tokens
BEGINNING = 4  # tokens by which it is told which of several answers is the likeliest
COPIES, REPEATED = 3, 16  # of a block of tokens, and tokens in all, before an answer is taken to only repeat itself


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


def greedy(model: Model, prompt: Sequence[int], max_tokens: int) -> Generator[int, None, int | None]:
    """The most likely next token, again and again, until the answer ends or only repeats itself (`said_once`); the
    ending token is not yielded but returned, None where there was none.

    The same tokens as transformers' `generate(do_sample=False)`, one at a time and in the caller's thread, so that
    they can be streamed and interrupted; what may turn out to be a repetition comes once it is known not to be.
    Between two tokens the caller's own gradient mode is in force.
    """
    return (yield from answer_of(model, (token for (token,) in next_tokens(model, [prompt], max_tokens))))


def answer_of(model: Model, tokens: Iterator[int]) -> Generator[int, None, int | None]:
    """What of these tokens is the answer, as `greedy` yields and returns it."""
    ends = set(model.end_ids)
    ids: list[int] = []
    passed = 0
    for token in tokens:
        if token in ends:
            yield from ids[passed:]
            return token
        ids.append(token)
        if (once := said_once(ids)) is not None:
            yield from ids[passed:once]
            return None
        while passed < len(ids) and not _repeats(ids, passed):
            yield ids[passed]
            passed += 1
    yield from ids[passed:]
    return None


def said_once(ids: Sequence[int]) -> int | None:
    """How many of an answer's tokens come before it only repeats itself: before the second copy of the block that it
    ends in, where that stands there at least `COPIES` times and over `REPEATED` tokens. None where none does.

    Greedy decoding does not leave such a loop again (Holtzman et al., arXiv 1904.09751): it would go on to the limit.
    """
    for period in range(1, len(ids) // COPIES + 1):
        same = 0  # tokens at the end that are those of a period before
        while same < len(ids) - period and ids[-1 - same] == ids[-1 - same - period]:
            same += 1
        if same + period >= max(REPEATED, COPIES * period):
            return len(ids) - same
    return None


def _repeats(ids: Sequence[int], first: int) -> bool:
    """Whether all tokens from the first-th on are those of some period before, so that a repetition may have begun."""
    return any(
        all(ids[place] == ids[place - period] for place in range(first, len(ids))) for period in range(1, first + 1)
    )


def padded_width(model: Model, tokens: int) -> int:
    """What a prompt of so many tokens is filled up to."""
    quantum = PADDED.get(model.device.type, 1)
    return -(-tokens // quantum) * quantum


class Beginnings:
    """log p, in nats, of how each of B answers begins: of its first `BEGINNING` tokens, the ending one among them."""

    def __init__(self, model: Model, rows: int) -> None:
        self.log_probabilities = [0.0] * rows
        self._ends = set(model.end_ids)
        self._going = set(range(rows))
        self._seen = 0

    def add(self, logits: torch.Tensor, tokens: Sequence[int]) -> None:
        """logits (≥ B, V) of the next tokens (B,); the softmax is taken in float32."""
        if self._seen == BEGINNING:
            return
        self._seen += 1
        logits = logits[: len(tokens)].float()
        peaks = logits.max(dim=-1).values - logits.logsumexp(dim=-1)
        for row, peak in enumerate(peaks.tolist()):
            if row in self._going:
                self.log_probabilities[row] += peak
        self._going -= {row for row, token in enumerate(tokens) if token in self._ends}


@torch.inference_mode()
def next_tokens(
    model: Model, prompts: Sequence[Sequence[int]], max_tokens: int, beginnings: Beginnings | None = None
) -> Iterator[list[int]]:
    """The most likely next token after each of B prompts and what followed it, (B,), `max_tokens` times; answers that
    have ended are not told from others.

    beginnings  is told of every step

    Prompts are padded on the left to a multiple of `PADDED` tokens, also a prompt by itself, so that in a batch a row's
    padding is longer by a multiple of it: in bf16 on a CPU its attention then adds up in the same order and gives the
    same bits (measured 2026-11, AVX512-BF16, up to 512 tokens; other paddings change up to 4 % of its values).
    """
    width = padded_width(model, max(map(len, prompts)))
    step = torch.zeros((len(prompts), width), dtype=torch.long)  # (B, L)
    mask = torch.zeros_like(step)
    for row, prompt in enumerate(prompts):
        step[row, width - len(prompt) :] = torch.tensor(prompt)
        mask[row, width - len(prompt) :] = 1
    step, mask = step.to(model.device), mask.to(model.device)
    positions = (mask.cumsum(dim=1) - 1).clamp(min=0)
    takes_positions = "position_ids" in inspect.signature(model.network.forward).parameters
    cache = None
    for _ in range(max_tokens):
        placed = {"position_ids": positions} if takes_positions else {}
        output = model.network(
            input_ids=step,
            attention_mask=mask,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=last(step),
            **placed,
        )
        if cache is None and bool(output.logits[:, -1].isnan().any()):
            raise NonFinite(
                "the model answers with what is no number: with the gradients, its weights are too large",
                "use a smaller --gamma",
            )
        step = output.logits[:, -1:].argmax(dim=-1)  # (B, 1)
        tokens: list[int] = step[: len(prompts), 0].tolist()
        if beginnings is not None:
            beginnings.add(output.logits[:, -1], tokens)
        yield tokens
        first, cache = cache is None, output.past_key_values
        if first and len(prompts) == 1 and _single_rows_differ(model) and _repeatable(cache):
            cache.batch_repeat_interleave(2)
            step, mask, positions = (each.repeat(2, 1) for each in (step, mask, positions))
        mask = torch.cat([mask, mask.new_ones((len(mask), 1))], dim=1)
        positions = positions[:, -1:] + 1


def _single_rows_differ(model: Model) -> bool:
    return model.device.type == "cpu" and model.dtype == torch.bfloat16


def _repeatable(cache: Any) -> bool:
    """Whether all of a model's layers keep what can be had twice; recurrent ones do not, nor those that are both."""
    layers = getattr(cache, "layers", [None])
    return all(hasattr(each, "batch_repeat_interleave") and not hasattr(each, "recurrent_states") for each in layers)


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
