"""What is done to a bank while faults come, and what it must hold then. Knows the bank's writers and commands and the
tests' made-up rows; not which fault comes, nor when.
"""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from random import Random

from faults import Told
from made_banks import PRIOR, rows, settings
from test_bank_move import NEXT, gradients, move, under

from regrad_cli.bank import create_bank, write_bank
from regrad_cli.cli.app import run
from regrad_cli.errors import EXIT_DONE, EXIT_INTERRUPTED, EXIT_PARTIAL, RegradError
from regrad_cli.records import BankSettings, document_id, row_key
from regrad_cli.render import Terminal

SOURCES = ("a.md", "b.md", "notes/c.md", "d ü.md", "e 🦉.html", "-f", "g\n.md", "h" * 200, "i\x1b[2J", "j.pdf#3")
Content = dict[str, tuple]


@dataclass(frozen=True, slots=True)
class Held:
    """What a bank holds: passages and text of each source, and the prior they are under."""

    documents: Mapping[str, tuple[int, str]]
    prior: bytes = PRIOR

    def content(self) -> Content:
        """What a reader must get from it, as made_banks.content tells it."""
        found: Content = {}
        for source, (count, text) in self.documents.items():
            found |= _content(source, count, text, self.prior)
        return found


def settings_under(prior: bytes) -> BankSettings:
    return settings() if prior == PRIOR else under(prior)


def rows_under(source: str, count: int, text: str, prior: bytes) -> tuple:
    """The arguments of Writer.add: a function of these alone."""
    made_for = settings_under(prior)
    passages, _, _, _, embeddings = rows(source, count, text=text)
    keys = [row_key(passage, made_for.model, made_for.tokenizer, made_for.prior) for passage in passages]
    return passages, keys, *gradients(keys, made_for), embeddings


@lru_cache(maxsize=4096)
def _content(source: str, count: int, text: str, prior: bytes) -> Content:
    passages, keys, codes, scales, embeddings = rows_under(source, count, text, prior)
    return {
        passage.id: (passage, keys[row], codes[row].tobytes(), scales[row].tobytes(), embeddings[row].tobytes())
        for row, passage in enumerate(passages)
    }


@dataclass(frozen=True, slots=True)
class Work:
    """Something that is done to a bank.

    run     does it, in a process of its own; tells the number of each state it has reached
    states  what the bank may hold: before, and after each commit
    """

    name: str
    run: Callable[[Told], int | None]
    states: tuple[Held, ...]


class Failed(RegradError):
    """A command that was not done."""

    def __init__(self, code: int, said: str) -> None:
        super().__init__(said)
        self.exit_code = code


def regrad(*words: str) -> int:
    """Runs a command as the command line does. raises Failed with what it said, unless it was done or interrupted"""
    err = io.StringIO()
    code = run([*words, "--json"], Terminal(io.StringIO(), io.StringIO(), err, {}))
    if code not in (EXIT_DONE, EXIT_PARTIAL, EXIT_INTERRUPTED):
        raise Failed(code, err.getvalue())
    return code


def unexpected(said: str) -> bool:
    """Whether what a process said is no sentence with a way out."""
    return "Traceback" in said or '"kind": "unexpected"' in said or '"kind": "os_error"' in said


# ── works ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def init(bank: Path) -> Work:
    held = Held({})
    return Work("init", lambda told: create_bank(bank, settings(), PRIOR), (held, held))


def ingest(bank: Path, held: Held, chance: Random) -> Work:
    """One to three commits, each of one or two documents that are new or take the place of what they were."""
    commits = []
    for _ in range(chance.randint(1, 3)):
        sources = chance.sample(SOURCES, chance.randint(1, 2))
        commits.append({source: (chance.randint(1, 4), f"{chance.randrange(1000)}") for source in sources})
    states = [held]
    for commit in commits:
        states.append(replace(held, documents={**states[-1].documents, **commit}))

    def work(told: Told) -> None:
        with write_bank(bank) as writer:
            for number, commit in enumerate(commits, start=1):
                for source, (count, text) in commit.items():
                    writer.remove(ref for ref, _, _ in writer.snapshot.passages(document_id(source)))
                    writer.add(*rows_under(source, count, text, held.prior))
                writer.commit("ingest")
                told(number)
            writer.finish()

    return Work("ingest", work, tuple(states))


def remove(bank: Path, held: Held, chance: Random) -> Work:
    gone = chance.sample(sorted(held.documents), chance.randint(1, min(2, len(held.documents))))
    left = replace(held, documents={source: what for source, what in held.documents.items() if source not in gone})
    words = ("bank", "rm", *map(document_id, gone), "--yes", "--bank", str(bank))
    return Work("bank rm", lambda told: regrad(*words), (held, left))


def compact(bank: Path, held: Held, chance: Random) -> Work:
    words = ("compact", "--yes", "--bank", str(bank), "--keep", str(chance.choice([0, 0, 1])))
    return Work("compact", lambda told: regrad(*words), (held, held))


def to_other_prior(bank: Path, held: Held, chance: Random) -> Work:
    prior = NEXT if held.prior == PRIOR else PRIOR
    step = chance.randint(2, 5)

    def work(told: Told) -> None:
        move(bank, prior, step=step, target=settings_under(prior), told=lambda number: told(number - 1))

    return Work("ingest --stale", work, (held, replace(held, prior=prior)))


def pack(bank: Path, out: Path, held: Held) -> Work:
    words = ("bank", "pack", str(out), "--force", "--bank", str(bank))
    return Work("bank pack", lambda told: regrad(*words), (held, held))


def unpack(packed: Path, folder: Path, held: Held) -> Work:
    return Work("bank unpack", lambda told: regrad("bank", "unpack", str(packed), str(folder)), (held, held))


def repair(bank: Path) -> Callable[[Told], int]:
    return lambda told: regrad("bank", "repair", "--yes", "--bank", str(bank))
