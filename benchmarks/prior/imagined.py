"""Passages that the starter imagines about names in the train passages: new text, with facts that nobody knows.

Sampled in batches, then those that do not read like a passage are left out (a little less than half). Questions to
them are `asked.py`'s.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING, Any

from benchmarks.prior.shapes import MONTHS, NAME, is_name

if TYPE_CHECKING:
    from regrad_cli.learn.model import Model

Task = dict[str, Any]
ROWS = 64  # sampled together
TOKENS = 230
TEMPERATURE, SHARE, TOP = 0.8, 0.95, 128  # of sampling: the likeliest TOP tokens that have this share together
FIRST = 'Write the first paragraph of the Wikipedia article titled "{name}".'
TELL = "Tell me about {name} in one paragraph, with names, places, dates and numbers."
ABOUT = "Write a paragraph about the {aspect} of {name}, with names, places, dates and numbers."
ASPECTS = (
    "history", "early life", "geography", "economy", "career", "design", "construction", "discovery", "origins",
    "later years", "background", "development", "population", "production",
)  # fmt: skip
_TALK = re.compile(
    r"wikipedia|as an ai|language model|encyclopedia|paragraph|\[your|article|\bTitle:|\*\*|\||chatbot|https?:|<|>",
    re.IGNORECASE,
)


def generate(model: Model, tasks: Sequence[Task], aside: Collection[str], seed: int, count: int) -> Iterator[Task]:
    """Tasks without questions, of the good ones among `count` imagined passages.

    tasks   whose titles and names are written about
    aside   titles (lower case) that are not, since something is measured by their articles
    """
    rng = Random(seed)
    wanted: dict[int, list[tuple[str, list[int]]]] = {}
    for name in _names(tasks, aside, rng, count):
        prompt = _prompt(model, name, rng)
        wanted.setdefault(len(prompt), []).append((name, prompt))
    batches = [group[at : at + ROWS] for group in wanted.values() for at in range(0, len(group), ROWS)]
    rng.shuffle(batches)
    number = 0
    for place, batch in enumerate(batches):
        texts = sample(model, [prompt for _, prompt in batch], seed=seed * 100_003 + place)
        for (name, _), text in zip(batch, map(whole_sentences, texts), strict=True):
            if reads_well(text):
                yield {"id": f"imagined-{seed}-{number}", "title": name, "passages": [text], "questions": []}
                number += 1


def _names(tasks: Sequence[Task], aside: Collection[str], rng: Random, count: int) -> Iterator[str]:
    """Names that stand in the passages, every fourth time a title."""
    found = {name[1] for task in tasks for name in re.finditer(rf"(?<![\w.'’-])({NAME})", task["passages"][0])}
    kept = [name for name in sorted(found) if is_name(name) and name not in MONTHS and not name.isupper()]
    kept = [name for name in kept if (" " in name or len(name) > 7) and name.lower() not in aside]
    titles = [task["title"] for task in tasks if task["title"].lower() not in aside]
    rng.shuffle(kept)
    for place in range(count):
        yield titles[2 * place % len(titles)] if place % 4 == 0 else kept[place % len(kept)]


def _prompt(model: Model, name: str, rng: Random) -> list[int]:
    if rng.random() < 0.44:
        said = ABOUT.format(aspect=rng.choice(ASPECTS), name=name)
    else:
        said = (FIRST if rng.random() < 0.7 else TELL).format(name=name)
    turns = [{"role": "user", "content": said}]
    return model.token_ids(model.tokenizer.apply_chat_template(turns, add_generation_prompt=True, tokenize=False))


def sample(model: Model, prompts: Sequence[Sequence[int]], *, seed: int) -> list[str]:
    """What the model says to prompts of one length; a text ends where it begins to repeat itself."""
    import torch
    from transformers.cache_utils import DynamicCache

    generator = torch.Generator().manual_seed(seed)
    ends = set(model.end_ids)
    cache, step = DynamicCache(), torch.tensor(prompts)
    said: list[list[int]] = [[] for _ in prompts]
    going = list(range(len(prompts)))
    with torch.inference_mode():
        for _ in range(TOKENS):
            logits = model.network(step, past_key_values=cache, use_cache=True, logits_to_keep=1).logits[:, -1]
            likeliest, tokens = torch.softmax(logits.float() / TEMPERATURE, dim=-1).topk(TOP)
            likeliest = likeliest * (likeliest.cumsum(dim=-1) - likeliest < SHARE)
            step = tokens.gather(1, torch.multinomial(likeliest, 1, generator=generator))
            for row, token in zip(going, step[:, 0].tolist(), strict=True):
                said[row].append(token)
            kept = [place for place, row in enumerate(going) if not _ended(model, said[row], ends)]
            if not kept:
                break
            if len(kept) < len(going):
                cache.batch_select_indices(torch.tensor(kept))
                step, going = step[kept], [going[place] for place in kept]
    return [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in said]


def _ended(model: Model, ids: list[int], ends: set[int]) -> bool:
    if ids[-1] in ends or (len(ids) > 60 and "\n\n" in model.tokenizer.decode(ids[-3:])):
        return True
    last = ids[-8:]
    return len(ids) > 40 and len(ids) % 16 == 0 and any(ids[at : at + 8] == last for at in range(len(ids) - 16))


def whole_sentences(text: str) -> str:
    """The first paragraph, or all where that is short, up to its last sentence's end."""
    first = text.split("\n\n")[0]
    text = re.sub(r"\s+", " ", first if len(first) > 150 else text).strip('" ')
    ends = [match.end() for match in re.finditer(r"[.!?][\"”)]?(?= |$)", text)]
    return text[: ends[-1]] if ends else ""


def reads_well(text: str) -> bool:
    """Whether it has a passage's length, facts, hardly repeats itself and does not speak of being written."""
    words = text.split()
    if not 40 <= len(words) <= 200 or _TALK.search(text) or not text[0].isupper():
        return False
    fours = list(zip(words, words[1:], words[2:], words[3:], strict=False))
    openings = [sentence[:25] for sentence in re.split(r"(?<=[.!?]) ", text)]
    strange = sum(ord(character) > 0x24F for character in text)
    facts = re.findall(r"\b\d{2,4}\b", text) + re.findall(r"(?<=[a-z,] )[A-Z]\w+", text)
    return (
        _different(fours) >= 0.93
        and _different(openings) >= 0.8
        and strange <= len(text) * 0.02 + 8
        and len(facts) >= 4
    )


def _different(parts: Iterable[Any]) -> float:
    parts = list(parts)
    return len(set(parts)) / len(parts)
