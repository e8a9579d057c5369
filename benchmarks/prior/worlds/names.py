"""Draws invented names and plain values (people, places, firms, products, dates, amounts); knows no document kind."""

import random
from collections.abc import Callable
from pathlib import Path


def _read_words() -> dict[str, list[str]]:
    lines = (Path(__file__).parent / "words.txt").read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" = ", 1) for line in lines if line and not line.startswith("#"))
    return {name: entries.split("|") for name, entries in pairs}


WORDS = _read_words()
CULTURES = tuple(dict.fromkeys(name.split(".")[0] for name in WORDS if "." in name))
MONTHS, DAYS, SMALL = WORDS["month"], WORDS["day"], WORDS["small"]


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]


class Names:
    """Draws names and values from one `random.Random`; the same name does not come twice from one instance."""

    def __init__(self, rng: random.Random):
        self.rng = rng
        self.used: set[str] = set()
        self.gender = "it"  # of the person drawn last
        self.home = rng.choice(CULTURES)
        self.currency = rng.choice(WORDS["currency"])

    def fresh(self, make: Callable[[], str]) -> str:
        """What `make` draws, drawn again while it has come before; after 60 draws it may repeat."""
        for _ in range(60):
            name = make()
            if name not in self.used:
                break
        self.used.add(name)
        return name

    def _culture(self) -> str:
        return self.home if self.rng.random() < 0.6 else self.rng.choice(CULTURES)

    def _join(self, culture: str, tail: str) -> str:
        return "".join(self.rng.choice(WORDS[f"{culture}.{part}"]) for part in ("head", "mid", tail))

    def surname(self) -> str:
        return self.fresh(lambda: self._join(self._culture(), "person"))

    def person(self) -> str:
        """A given name and a surname, both new to the document; sets `gender`."""
        culture = self._culture()
        self.gender = self.rng.choice(("she", "he"))
        given = self.fresh(lambda: self.rng.choice(WORDS[f"{culture}.{self.gender}"]))
        middle = f" {self.rng.choice('ABCDEFGHJKLMPRSTW')}." if self.rng.random() < 0.06 else ""
        return f"{given}{middle} {self.fresh(lambda: self._join(culture, 'person'))}"

    def given(self) -> str:
        return self.fresh(lambda: self.rng.choice(WORDS[f"{self._culture()}.{self.rng.choice(('she', 'he'))}"]))

    def woman(self) -> str:
        """A given name of a woman; sets `gender`."""
        self.gender = "she"
        return self.fresh(lambda: self.rng.choice(WORDS[f"{self._culture()}.she"]))

    def man(self) -> str:
        """A given name of a man; sets `gender`."""
        self.gender = "he"
        return self.fresh(lambda: self.rng.choice(WORDS[f"{self._culture()}.he"]))

    def place(self) -> str:
        return self.fresh(lambda: self._join(self._culture(), "place"))

    def mark(self) -> str:
        """A made-up brand word of two or three syllables."""
        return self.fresh(lambda: _cap("".join(self.rng.sample(WORDS["mark"], self.rng.choice((2, 2, 3))))))

    def firm(self) -> str:
        pick = self.rng.choice
        return self.fresh(lambda: f"{pick((self.mark, self.surname, self.place))()} {pick(WORDS['firm'])}")

    def product(self) -> str:
        pick, number = self.rng.choice, self.rng.randint
        shapes: tuple[Callable[[], str], ...] = (
            lambda: f"{self.mark()} {number(2, 9) * pick((1, 10, 100))}",
            lambda: f"{self.mark()} {pick('ABCDEGHKLMRSTVX')}{number(1, 99)}",
            lambda: f"{self.surname()} {pick(('Mark', 'Model', 'Series', 'Type'))} {pick('2345678ABCD')}",
            lambda: f"{self.mark()} {pick(('Pro', 'Mini', 'Max', 'Duo', 'Plus', 'Lite', 'Air', 'One'))}",
            lambda: f"{pick('ABCDEFGHKLMNPRSTVWXZ')}{pick('ACDEGKLMNRSTX')}-{number(12, 990)}",
            lambda: f"{_cap(pick(WORDS['noun']))} {number(2, 9) * pick((1, 10, 100))}",
        )
        return self.fresh(lambda: pick(shapes)())

    def code(self) -> str:
        pick, number = self.rng.choice, self.rng.randint
        letters = "".join(self.rng.sample("ABCDEFGHKLMNPRSTVWXZ", pick((1, 2, 2, 3))))
        return self.fresh(lambda: f"{letters}{pick('-- /')}{number(10, pick((99, 999, 9999)))}".replace(" ", ""))

    def work(self) -> str:
        """The title of a song, a book or a painting."""
        pick = self.rng.choice
        shapes: tuple[Callable[[], str], ...] = (
            lambda: f"The {_cap(pick(WORDS['adjective']))} {_cap(pick(WORDS['noun']))}",
            lambda: f"{_cap(pick(WORDS['adjective']))} {_cap(pick(WORDS['noun']))}s",
            lambda: f"The {_cap(pick(WORDS['noun']))} of {self.place()}",
            lambda: f"A {_cap(pick(WORDS['noun']))} for {self.given()}",
            lambda: f"{_cap(pick(WORDS['noun']))} and {_cap(pick(WORDS['noun']))}",
            lambda: f"{pick(('Letters', 'Songs', 'Tales', 'Postcards'))} from {self.place()}",
            lambda: f"{pick(('Under', 'Beyond', 'Behind', 'After'))} the {_cap(pick(WORDS['noun']))}",
            lambda: f"{_cap(pick(WORDS['adjective']))} {_cap(pick(WORDS['noun']))} Number {_cap(pick(SMALL[2:10]))}",
        )
        return self.fresh(lambda: pick(shapes)())

    def number(self, low: int, high: int) -> str:
        """A whole number; a small one is mostly spelled out, a large one has its comma."""
        value = self.rng.randint(low, high)
        if value < len(SMALL) and self.rng.random() < 0.7:
            return SMALL[value]
        return f"{value:,}" if value >= 10000 or self.rng.random() < 0.8 else str(value)

    def n(self, low: int, high: int) -> str:
        """A whole number in figures."""
        return str(self.rng.randint(low, high))

    def letter(self) -> str:
        return self.fresh(lambda: self.rng.choice("ABCDEFGHKLMNPRSTW"))

    def word(self) -> str:
        """A small-letter word of an invented language."""
        return self.mark().lower()

    def const(self) -> str:
        return self.mark().upper()

    def mail(self) -> str:
        box = self.rng.choice(WORDS["mailbox"])
        return f"{box}@{self.mark().lower()}.example"

    def round(self, low: int, high: int) -> str:
        """A number rounded to about two digits."""
        value = self.rng.randint(low, high)
        step = 10 ** max(0, len(str(value)) - 2)
        return f"{value // step * step:,}"

    def decimal(self, low: int, high: int) -> str:
        return f"{self.rng.randint(low * 10, high * 10) / 10:.1f}".removesuffix(".0")

    def year(self, low: int, high: int) -> str:
        return self.fresh(lambda: str(self.rng.randint(low, high)))

    def date(self, low: int, high: int) -> str:
        day, month, year = self.rng.randint(1, 28), self.rng.choice(MONTHS), self.rng.randint(low, high)
        return self.fresh(
            lambda: self.rng.choice((f"{day} {month} {year}", f"{month} {day}, {year}", f"{day} {month} {year}"))
        )

    def day_month(self) -> str:
        return f"{self.rng.randint(1, 28)} {self.rng.choice(MONTHS)}"

    def time(self, low: int = 6, high: int = 22) -> str:
        hour, minute = self.rng.randint(low, high), self.rng.choice((0, 0, 15, 30, 45, self.rng.randint(1, 59)))
        if self.rng.random() < 0.3:
            return f"{(hour - 1) % 12 + 1}:{minute:02d} {'am' if hour < 12 else 'pm'}"
        return f"{hour:02d}:{minute:02d}"

    def money(self, low: int, high: int) -> str:
        value = self.rng.randint(low, high)
        if value > 500:
            step = 10 ** (len(str(value)) - 2)
            value = value // step * step
        return f"{value:,} {self.currency}"
