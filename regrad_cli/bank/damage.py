"""What can be wrong with a bank's files, as a record and as an error. Knows no file format and opens nothing."""

from __future__ import annotations

from dataclasses import dataclass

from regrad_cli.errors import Damaged

REPAIR = "`regrad bank repair` puts right what can be proved (`--dry-run` says what that is)"
OLDER = "`--snapshot N` reads an older snapshot (`regrad bank log` lists them)"
WAY_OUT = f"{REPAIR}; until then `--skip-damaged` answers from the rest, and {OLDER}"
PRIOR_WAY_OUT = "`regrad bank repair` puts the prior back, if need be from the file it came from (`--prior FILE`)"


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that is not as it should be.

    file        the file's name inside the bank
    what        the fact, in words
    documents   ids of the documents whose rows it touches, where known
    note        True for what is harmless (a crash's leftovers, which the next writer clears)
    """

    file: str
    what: str
    documents: tuple[str, ...] = ()
    note: bool = False


class DamagedFile(Damaged):
    """A file of the bank is missing or not what its checksum says. `finding` says which, `documents` whose rows."""

    def __init__(self, file: str, what: str, documents: tuple[str, ...] = (), hint: str = WAY_OUT) -> None:
        super().__init__(f"{file}: {what}", hint)
        self.finding = Finding(file, what, documents)


class DamagedRow(DamagedFile):
    """One row is damaged; the message leads with its document."""

    def __init__(self, file: str, row: int, what: str, document: str | None, source: str | None) -> None:
        super().__init__(file, f"row {row}: {what}", (document,) if document else ())
        named = f"a passage of document {document}" if document else "a passage"
        named += f" ({source})" if source else ""
        self.args = (f"{named} is damaged: {what} (row {row} of {file})",)
        self.message = self.args[0]
