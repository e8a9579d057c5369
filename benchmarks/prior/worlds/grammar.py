"""Reads the kinds of documents (kinds/*.txt) and turns one into a passage with questions; knows no particular kind.

The format, a line each: `kind`, `name` (the subject), `short`, `title`, `refs` (further ways to call the subject, by
`;`), `pron` (it | person), `let var = pattern`, `fill sentence`, and blocks `fact` or `fact x3` (up to three times)
that hold `var "Label" = pattern`, `+ sentence` and `?var question`. In a pattern `[a|b]` is a choice and `{slot}` a
variable or a draw from `names.Names`, as in `{year:1800:1900}`; `{S} {P} {O}` are the subject as subject, possessive
and object, `{N}` its full name.
"""

import random
import re
from dataclasses import dataclass, field
from pathlib import Path

from benchmarks.prior.worlds import names as n

_CHOICE = re.compile(r"\[([^\[\]]*)\]")
_SLOT = re.compile(r"\{([^{}]+)\}")
_VOWEL_SOUND = re.compile(r"\b([Aa]) (?=[aeioAEIO]|u(?!n[ai]|s[eu])|8|11\b|18\b|11,|18,)(?!one\b|one-|once|eu)")
_UNIT = re.compile(
    r"^([\d.,]*\d|" + "|".join(n.SMALL[2:]) + r")( million)?(?: (?:[a-z%°/-]+|MB)){1,2}(?: (?:a|of|an) \w+)?"
)


@dataclass
class Fact:
    """What a document may say in one go: its values, sentences that hold them, and questions by value."""

    times: int
    values: list[tuple[str, str, str]] = field(default_factory=list)  # (variable, label or "", pattern)
    says: list[str] = field(default_factory=list)
    asks: list[tuple[str, str]] = field(default_factory=list)  # (variable, question)


@dataclass
class Kind:
    """One kind of document."""

    label: str
    name: str = ""
    short: str = ""
    titles: list[str] = field(default_factory=list)
    refs: list[str] = field(default_factory=list)
    person: bool = False
    lets: list[tuple[str, str]] = field(default_factory=list)
    fills: list[str] = field(default_factory=list)
    facts: list[Fact] = field(default_factory=list)


def read_kinds(folder: Path) -> list[Kind]:
    """All kinds of the files in `folder`, in the order of the file names. Raises ValueError at a line it can't read."""
    kinds: list[Kind] = []
    for path in sorted(folder.glob("*.txt")):
        for number, raw in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
            line = raw.strip()
            if not line or line.startswith("#"):
                continue
            try:
                _read_line(line, kinds)
            except (ValueError, IndexError) as error:
                raise ValueError(f"{path.name}:{number}: cannot read {line!r}") from error
    return kinds


def _read_line(line: str, kinds: list[Kind]) -> None:
    head, _, rest = line.partition(" ")
    if head == "kind":
        kinds.append(Kind(rest))
        return
    kind = kinds[-1]
    if head in ("name", "short"):
        setattr(kind, head, rest)
    elif head == "title":
        kind.titles.append(rest)
    elif head == "refs":
        kind.refs = [ref.strip() for ref in rest.split(";")]
    elif head == "pron":
        kind.person = rest == "person"
    elif head == "let":
        variable, _, pattern = rest.partition(" = ")
        kind.lets.append((variable, pattern))
    elif head == "fill":
        kind.fills.append(rest)
    elif head == "fact":
        kind.facts.append(Fact(int(rest[1:]) if rest else 1))
    elif head == "+":
        kind.facts[-1].says.append(rest)
    elif head.startswith("?"):
        kind.facts[-1].asks.append((head[1:], rest))
    else:
        match = re.fullmatch(r'(\w+)(?: "([^"]+)")? = (.+)', line)
        if match is None:
            raise ValueError(line)
        kind.facts[-1].values.append((match[1], match[2] or "", match[3]))


class Page:
    """One document in the making: its subject, its values, and how the subject was last called."""

    def __init__(self, kind: Kind, rng: random.Random):
        self.kind, self.rng, self.names = kind, rng, n.Names(rng)
        self.values: dict[str, str] = {}
        self.gender = "it"
        self.named = self.mentioned = False
        self.full = self.expand(kind.name)
        if kind.person:
            self.gender = self.names.gender
        self.rename(self.full, "")
        for variable, pattern in kind.lets:
            self.values[variable] = self.expand(pattern)
        self.short = self.expand(kind.short) if kind.short else ""

    def rename(self, full: str, short: str) -> None:
        """Make another name the subject."""
        self.full, self.short = full, short
        self.values["N"], self.values["bare"] = full, re.sub("^[Tt]he ", "", full)

    def expand(self, pattern: str, local: dict[str, str] | None = None) -> str:
        """The pattern with its choices made and its slots filled."""
        while match := _CHOICE.search(pattern):
            pattern = pattern[: match.start()] + self.rng.choice(match[1].split("|")) + pattern[match.end() :]
        self.mentioned = False
        text = _SLOT.sub(lambda m: self._slot(m[1], local or {}), pattern)
        return _VOWEL_SOUND.sub(r"\1n ", text)

    def _slot(self, slot: str, local: dict[str, str]) -> str:
        if slot in ("S", "P", "O"):
            return self._subject(slot)
        if slot in local:
            return local[slot]
        if slot in self.values:
            return self.values[slot]
        if slot[1:] and slot[0].isupper():  # {Noun}: as {noun}, in the capitals of a name
            return self._slot(slot.lower(), local).title()
        kind, *rest = slot.split(":")
        if kind == "last":  # the last word of a value: a person's surname
            return (local | self.values)[rest[0]].split()[-1]
        if kind == "after":  # {after:year:3:20}: a later year
            later = int((local | self.values)[rest[0]]) + self.rng.randint(int(rest[1]), int(rest[2]))
            return str(min(later, 2025))
        draw = getattr(self.names, kind, None)
        if draw is None and kind in n.WORDS:
            return self.names.fresh(lambda: self.rng.choice(n.WORDS[kind]))
        if isinstance(draw, str):
            return draw
        if draw is None:
            raise ValueError(f"kind {self.kind.label!r} has no slot {slot!r}")
        return str(draw(*map(int, rest)))

    def _subject(self, case: str) -> str:
        """The subject by its name the first time, then by name, short name, reference or pronoun."""
        own = {"it": ("it", "its", "it"), "she": ("she", "her", "her"), "he": ("he", "his", "him")}[self.gender]
        first, self.named = not self.named, True
        roll = self.rng.random()
        again, self.mentioned = self.mentioned, True
        if again:
            return own["SPO".index(case)]
        if first or roll < 0.2:
            call = self.full
        elif roll < 0.45 and self.short:
            call = self.short
        elif roll < 0.7 and self.kind.refs:
            call = self.rng.choice(self.kind.refs)
        elif roll < 0.9:
            return own["SPO".index(case)]
        else:
            call = self.short or self.full
        return call + ("'" if call.endswith("s") else "'s") if case == "P" else call


def sentence(text: str) -> str:
    """The text with a capital first letter and a full stop."""
    text = text[:1].upper() + text[1:]
    return text if text[-1] in ".!?:" else text + "."


_LEAD = re.compile(r"(?:the|an?|by|every|within|in|on|under|below|behind|beside) (?=.)", re.IGNORECASE)
_NUMBERED = re.compile(r"(?:extension|room|bus|platform|section|port|number|version) (\S+)", re.IGNORECASE)


def aliases(value: str, pattern: str) -> list[str]:
    """The value and shorter forms of it that count as the same answer."""
    if value.startswith('"'):
        return [value.strip('"')]
    found = [value]
    if pattern.endswith("{person}"):
        if pattern != "{person}":  # with a title: General, Professor
            found.append(value.split(" ", 1)[1])
        found.append(value.split()[-1])
    amount = re.match(r"\{(?:n|number|decimal|round|money)\b", pattern)
    if amount and (match := _UNIT.fullmatch(value)) and not re.search(" (?:to|in|by|at) ", value):
        found.append(match[1] + (match[2] or ""))
    if match := _NUMBERED.fullmatch(value):
        found.append(match[1])
    if match := _LEAD.match(value):
        found.append(value[match.end() :])
    return found
