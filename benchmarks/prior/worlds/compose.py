"""Composes one task of a kind: picks facts, lays them out as prose, list, sheet or notes, and asks some of them."""

import random
import re
from pathlib import Path
from typing import Any

from benchmarks.prior.worlds.grammar import Fact, Kind, Page, aliases, read_kinds, sentence

KINDS_FOLDER = Path(__file__).parent / "kinds"
_OPENERS = (
    "In fact, ",
    "As it happens, ",
    "For the record, ",
    "By the way, ",
    "Besides, ",
    "In addition, ",
    "Note that ",
)
_ASIDES = (
    "Do you happen to know: {}?", "Quick question: {}?", "Please tell me, {}?", "Remind me, {}?",
    "I forgot: {}?", "A colleague asks: {}?", "One more thing, {}?",
)  # fmt: skip
_TOPICS = ("{0}: {2}?", "About {1}: {2}?", "I have a question about {1}: {2}?", "{0} - {2}?")
_BEFORE_NO_IT = frozenset(
    re.findall(r"\w+", "in of at for on to under the series album game novel band painting film ship")
)
_NAMES_SUBJECT = re.compile(r"\{[SPON]\}")


def read_all_kinds() -> list[Kind]:
    """The kinds of the package's own folder."""
    return read_kinds(KINDS_FOLDER)


def compose(kind: Kind, rng: random.Random, avoid: set[str]) -> dict[str, Any]:
    """A task without its id; drawn again until no word of `avoid` (lower case) is in it and 3 questions are."""
    for _ in range(200):
        task = _draft(kind, rng)
        if len(task["questions"]) >= 3 and avoid.isdisjoint(words_of(task)):
            return task
    raise RuntimeError(f"kind {kind.label!r}: no task without the names to avoid in 200 drafts")


def words_of(task: dict[str, Any]) -> set[str]:
    """Every word of a task's title, passages and questions, in lower case."""
    texts = [task["title"], *task["passages"]]
    texts += [text for question in task["questions"] for text in (question["question"], *question["answers"])]
    return set(re.findall(r"[^\W\d_]+", " ".join(texts).lower()))


def _draft(kind: Kind, rng: random.Random) -> dict[str, Any]:
    page = Page(kind, rng)
    title = page.expand(rng.choice(kind.titles))
    title = title[:1].upper() + title[1:]
    blocks = [fact for fact in kind.facts for _ in range(rng.randint(1, fact.times))]
    rng.shuffle(blocks)
    _start_with_subject(kind, blocks, rng)
    style = rng.choices(("prose", "list", "sheet", "notes"), (66, 12, 10, 12))[0]
    goal = rng.randint(42, 122)  # words
    lines: list[str] = []
    rows: list[str] = []
    candidates: list[tuple[str, list[str]]] = []
    while blocks and sum(len(line.split()) for line in lines + rows) < goal:
        fact = blocks.pop()
        local = _values(page, fact)
        if style == "sheet" and fact.values[0][1] and rng.random() < 0.7:
            told = {variable for variable, label, _ in fact.values if label}
            rows += [f"{label}: {_upper(local[variable])}" for variable, label, _ in fact.values if label]
        else:
            naming = [say for say in fact.says if _NAMES_SUBJECT.search(say)] if not lines else []
            say = rng.choice(naming or fact.says)
            lines.append(page.expand(say, local))
            told = set(re.findall(r"\{(\w+)\}", say))
        candidates += _questions(page, fact, local, told)
        if style in ("prose", "notes") and rng.random() < 0.05:
            lines += _sibling(page, fact, candidates)
        if kind.fills and rng.random() < 0.17:
            lines.append(page.expand(rng.choice(kind.fills)))
    lines = list(dict.fromkeys(lines))
    text = _lay_out(page, style, lines, rows)
    if page.full.lower() not in text.lower() and not (kind.person and page.full.split()[-1] in text):
        text = f"{page.full[:1].upper()}{page.full[1:]}{rng.choice((': ', chr(10) * 2, '. '))}{text}"
    rng.shuffle(candidates)
    asked: dict[str, list[str]] = {}
    lower = text.lower()
    for question, answers in candidates[: rng.randint(3, 6)]:
        found = [_as_written(text, answer) for answer in answers if answer.lower() in lower]
        if found and question not in asked:
            asked[question] = list(dict.fromkeys(found))
    questions = [{"question": question, "answers": answers} for question, answers in asked.items()]
    return {"title": title, "passages": [text], "questions": questions}


def _start_with_subject(kind: Kind, blocks: list[Fact], rng: random.Random) -> None:
    """Put a fact that names the subject at the end, where it is taken first; half the time the one that defines it."""
    naming = [fact for fact in blocks if any(_NAMES_SUBJECT.search(say) for say in fact.says)]
    if naming:
        first = kind.facts[0] if kind.facts[0] in naming and rng.random() < 0.5 else rng.choice(naming)
        blocks.remove(first)
        blocks.append(first)


def _values(page: Page, fact: Fact) -> dict[str, str]:
    """The fact's values, drawn in their order."""
    local: dict[str, str] = {}
    for variable, _, pattern in fact.values:
        local[variable] = page.expand(pattern, local)
    return local


_CONTRASTS = ("By contrast, ", "For comparison: ", "On the other hand, ", "Do not confuse this with another case: ")


def _sibling(page: Page, fact: Fact, candidates: list[tuple[str, list[str]]]) -> list[str]:
    """The same fact about another subject of the kind, to be told apart; [] where it can't be said."""
    lets = {variable for variable, _ in page.kind.lets}
    slots = {slot for _, _, pattern in fact.values for slot in re.findall(r"[{:](\w+)", pattern)}
    fitting = [say for say in fact.says if say.startswith("{S}") and not set(re.findall(r"[{:](\w+)", say)) & lets]
    if not fitting or slots & lets or fact.times > 1:
        return []
    kept = page.full, page.short
    page.rename(page.expand(page.kind.name), "")
    page.named = False
    local, say = _values(page, fact), page.rng.choice(fitting)
    line = page.rng.choice(_CONTRASTS) + page.expand(say, local)
    candidates += _questions(page, fact, local, set(re.findall(r"\{(\w+)\}", say)))
    page.rename(kept[0], kept[1])
    page.named = False  # the next sentence names its subject in full
    return [line]


def _questions(page: Page, fact: Fact, local: dict[str, str], told: set[str]) -> list[tuple[str, list[str]]]:
    """One question a value that was told, among those that mention no value left untold."""
    patterns = {variable: pattern for variable, _, pattern in fact.values}
    found = []
    for variable, pattern in patterns.items():
        fitting = [
            ask
            for about, ask in fact.asks
            if about == variable and not (set(re.findall(r"\{(\w+)\}", ask)) & set(patterns)) - told
        ]
        if variable in told and fitting:
            named, page.named = page.named, False  # a question names its subject in full
            question = _word(page.expand(page.rng.choice(fitting), local), page)
            page.named = named
            source = (
                pattern if not re.fullmatch(r"\{\w+\}", pattern) else dict(page.kind.lets).get(pattern[1:-1], pattern)
            )
            found.append((question, aliases(local[variable], source)))
    return found


def _word(question: str, page: Page) -> str:
    """The question in one of the manners in which people type."""
    rng = page.rng
    manner = rng.choices(("full", "search", "plain", "aside", "topic"), (48, 34, 7, 5, 6))[0]
    topic = re.search(rf"(\w+) {re.escape(page.full)}(?= |$)", question)
    if manner == "search":
        return question.lower()
    if manner == "plain":
        return question
    if manner == "aside":
        return rng.choice(_ASIDES).format(question)
    if manner == "topic" and topic and topic[1] not in _BEFORE_NO_IT and not page.kind.person:
        asked = f"{question[: topic.end(1)]} it{question[topic.end() :]}"
        return rng.choice(_TOPICS).format(_upper(page.full), page.full, asked)
    return question[:1].upper() + question[1:] + "?"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]


def _as_written(text: str, answer: str) -> str:
    """The answer in the passage's own capitals."""
    if answer in text:
        return answer
    at = text.lower().index(answer.lower())
    return text[at : at + len(answer)]


def _lay_out(page: Page, style: str, lines: list[str], rows: list[str]) -> str:
    rng = page.rng
    if style == "list":
        marker = rng.choice(("- ", "* ", "• "))
        head = rng.choice((f"## {_upper(page.full)}\n\n", f"{_upper(page.full)}:\n", f"**{_upper(page.full)}**\n\n"))
        return head + "\n".join(marker + sentence(line) for line in lines)
    if style == "notes":
        parts = [sentence(line) for line in lines]
        cut = rng.randint(1, max(1, len(parts) - 1))
        head = rng.choice((f"# {_upper(page.full)}\n\n", f"{_upper(page.full)}\n\n"))
        return head + "\n\n".join(" ".join(part) for part in (parts[:cut], parts[cut:]) if part)
    prose = _prose(lines, rng)
    if not rows:
        return prose
    if rng.random() < 0.4:
        head = f"| {_upper(page.full)} | |\n| --- | --- |\n"
        sheet = head + "\n".join(f"| {row.replace(': ', ' | ', 1)} |" for row in rows)
    else:
        sheet = "\n".join((_upper(page.full), *rows))
    return f"{sheet}\n\n{prose}" if rng.random() < 0.6 else f"{prose}\n\n{sheet}"


def _prose(lines: list[str], rng: random.Random) -> str:
    """The lines as sentences, some of them joined or opened by a connective."""
    out: list[str] = []
    at = 0
    while at < len(lines):
        line = lines[at]
        following = lines[at + 1] if at + 1 < len(lines) else ""
        short = following and len(line.split()) + len(following.split()) < 26 and not line.endswith((".", "?"))
        plain = re.match(r"(it|he|she|its|his|her) ", following or "")
        if short and plain and ":" not in line + following and ";" not in line + following and rng.random() < 0.3:
            line = line + rng.choice(("; ", ", and ", ", and ")) + following
            at += 1
        elif out and re.match(r"(it|he|she|its|his|her|the) ", line) and rng.random() < 0.09:
            line = rng.choice(_OPENERS) + line
        out.append(sentence(line))
        at += 1
    if len(out) > 5 and rng.random() < 0.3:
        cut = rng.randint(2, len(out) - 2)
        return " ".join(out[:cut]) + "\n\n" + " ".join(out[cut:])
    return " ".join(out)
