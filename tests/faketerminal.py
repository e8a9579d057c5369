"""A terminal for tests: streams in memory that can say they are terminals, and fakes of what is behind the commands."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

import regrad_cli
from regrad_cli.bank.damage import REPAIR
from regrad_cli.bank.verification import Checked, Sample
from regrad_cli.cli.app import run
from regrad_cli.errors import UsageProblem
from regrad_cli.records import (
    Answer,
    BankSettings,
    CodecSettings,
    DocumentDone,
    Hit,
    IngestSummary,
    Notice,
    Passage,
    Piece,
    Progress,
    Refused,
    RowRef,
    Skipped,
    Used,
    document_id,
)
from regrad_cli.render import Terminal

if TYPE_CHECKING:
    import pytest


class Out(io.StringIO):
    """An output stream that says whether it is a terminal."""

    encoding = "utf-8"

    def __init__(self, terminal: bool) -> None:
        super().__init__()
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


class In(io.TextIOWrapper):
    """An input stream of given bytes that says whether it is a terminal."""

    def __init__(self, data: bytes, terminal: bool) -> None:
        super().__init__(io.BytesIO(data), encoding="utf-8")
        self.terminal = terminal

    def isatty(self) -> bool:
        return self.terminal


@dataclass
class Result:
    """What a command left behind."""

    code: int
    out: str
    err: str

    @property
    def document(self) -> Any:
        return json.loads(self.out)

    @property
    def lines(self) -> list[Any]:
        return [json.loads(line) for line in self.out.splitlines()]

    @property
    def error(self) -> dict[str, Any]:
        return json.loads(self.err.splitlines()[-1])["error"]


def terminal(
    stdin: bytes = b"", *, tty: bool = False, piped_in: bool = True, environ: dict[str, str] | None = None
) -> Terminal:
    """`tty` makes stdout and stderr terminals; `piped_in=False` makes stdin one."""
    variables = {"TERM": "xterm", "COLUMNS": "100"} | (environ or {})
    return Terminal(In(stdin, not piped_in), Out(tty), Out(tty), variables)


def call(*words: str | Path, stdin: bytes = b"", tty: bool = False, piped_in: bool = True, **environ: str) -> Result:
    """Run one command line in this process."""
    streams = terminal(stdin, tty=tty, piped_in=piped_in, environ=environ)
    code = run([str(word) for word in words], streams)
    return Result(code, streams.stdout.getvalue(), streams.stderr.getvalue())  # type: ignore[attr-defined]


HOSTILE_TEXT = "a\x1b[31mred\x1b[0m \x9b2J \u202egnirts\u2066 [bold]markup[/bold] \x07 \ud800 \r over\ntwo\x00 end"
HOSTILE_NAME = "docs/\x1b]0;owned\x07\u202e\udcff[red]\nerror: forged.md"
OBEYED = [chr(code) for code in [*range(0x09), 0x0B, 0x0C, 0x0D, *range(0x0E, 0x20), *range(0x7F, 0xA0)]]
OBEYED += ["\u202e", "\u2066", "\u2028", "\ufeff", "\U000e0041", "\ud800", "\udcff"]


def settings_of_bank(**changes: Any) -> BankSettings:
    values: dict[str, Any] = {
        "model": "1" * 64,
        "model_name": "starter",
        "tokenizer": "2" * 64,
        "prior": "3" * 64,
        "prior_name": "seeded",
        "prior_trained": False,
        "tensors": (),
        "codec": CodecSettings(),
        "code_bytes": 10,
        "scale_count": 2,
        "embedder": "4" * 64,
        "embedder_name": "minilm",
        "embedding_dim": 384,
    }
    return BankSettings(**(values | changes))


def passage(source: str = "a.md", title: str = "Title", text: str | None = "Some text.", ordinal: int = 0) -> Passage:
    return Passage(document_id(source), source, title, ordinal, 0, 7, text)


LOG_ENTRY = {"snapshot": 4, "time": "2026-01-02T03:04:05Z", "operation": "ingest", "documents": 2, "passages": 3}
LOG_ENTRY |= {"dead": 0, "bytes": 12_345}


BESIDE = {"snapshots": 3, "bytes": 250, "quarantine": 0}


class FakeSnapshot:
    """A bank in memory with the reading interface of bank.Snapshot."""

    def __init__(self, passages: Sequence[Passage]) -> None:
        self.rows = list(passages)
        self.number = 4
        self.damaged: list[Any] = []
        self.settings = settings_of_bank()

    def __enter__(self) -> FakeSnapshot:
        return self

    def __exit__(self, *_: Any) -> None:
        pass

    def stats(self) -> dict[str, Any]:
        size = {"gradients": 900, "embeddings": 90, "text": 10, "index": 0, "total": 1000}
        return {
            "path": "/b/.gbank",
            "form": "live",
            "snapshot": self.number,
            "documents": len({row.document for row in self.rows}),
            "passages": len(self.rows),
            "stale": 0,
            "dead": 2,
            "bytes": size,
            "bytes_per_passage": 500.0,
            "model": "starter",
            "prior": "seeded",
            "codec": "r1-int4",
            "embedder": "minilm",
        }

    def documents(self, *, skip_damaged: bool = False) -> Iterator[dict[str, Any]]:
        for id in dict.fromkeys(row.document for row in self.rows):
            rows = [row for row in self.rows if row.document == id]
            yield {"id": id, "source": rows[0].source, "title": rows[0].title, "passages": len(rows), "tokens": 7}

    def passages(
        self, document: str | None = None, *, skip_damaged: bool = False
    ) -> Iterator[tuple[RowRef, Passage, bytes]]:
        for number, row in enumerate(self.rows):
            if document in (None, row.document):
                yield RowRef(0, number), row, bytes(32)

    def find_document(self, wanted: str) -> str:
        for row in self.rows:
            if wanted in (row.document, row.source) or (len(wanted) >= 4 and row.document.startswith(wanted)):
                return row.document
        raise UsageProblem(f"no document is called {wanted}")


def answer_of(question: str, text: str, mode: str = "regrad", passages: tuple[Used, ...] = ()) -> Answer:
    seconds = dict.fromkeys(("load", "retrieve", "adapt", "generate", "restore", "total"), 0.1)
    tokens = {"prompt": 9, "answer": 3}
    return Answer(question, text, mode, bool(passages), passages, tokens, seconds, "starter", "seeded", "/b/.gbank")


class Fakes:
    """Everything behind the commands, with what it is to give and a record of what it was asked."""

    def __init__(self) -> None:
        self.snapshot = FakeSnapshot([passage(), passage(ordinal=1, text="More."), passage("b.md", "Second", "Else.")])
        self.bank_path: Path | Exception = Path("/b/.gbank")
        self.asked: list[tuple[str, Any]] = []
        self.pieces = ["Forty", "-two"]
        self.used = (Used("i:0", "a.md", "Title", 0.9, 1.0, "Some text."),)
        self.raises: BaseException | None = None
        self.loads = 0
        self.loaded_with: dict[str, Any] = {}
        self.hits = [Hit(RowRef(0, 0), 0.75, passage())]
        self.ingest_events: list[Any] = []
        self.ingest_options: Any = None
        self.initialised_with: dict[str, Any] = {}
        self.removed: list[str] = []
        self.findings: list[Any] = []

    def install(self, patch: pytest.MonkeyPatch) -> Fakes:
        bank = _module("bank")
        bank.locate_bank = self._locate  # type: ignore[attr-defined]
        bank.open_bank = lambda path, snapshot=None: self.snapshot  # type: ignore[attr-defined]
        bank.check_format = lambda path: None  # type: ignore[attr-defined]
        bank.beside = lambda opened: dict(BESIDE)  # type: ignore[attr-defined]
        bank.remove_documents = self._remove  # type: ignore[attr-defined]
        bank.log = lambda path: [dict(LOG_ENTRY)]  # type: ignore[attr-defined]
        bank.verify = lambda path, report=None, **_: iter(self.findings)  # type: ignore[attr-defined]
        bank.Checked, bank.Sample = Checked, Sample  # type: ignore[attr-defined]
        bank.way_out = lambda path: REPAIR  # type: ignore[attr-defined]
        finding = _module("finding")
        finding.query = lambda bank, question, **options: self._query(question, options)  # type: ignore[attr-defined]
        finding.Finder = self._finder  # type: ignore[attr-defined]
        answer = _module("answer")
        answer.Answerer = self._answerer  # type: ignore[attr-defined]
        answer.AskOptions = _options("AskOptions")  # type: ignore[attr-defined]
        ingest = _module("ingest")
        ingest.IngestOptions = _options("IngestOptions")  # type: ignore[attr-defined]
        ingest.ingest = self._ingest  # type: ignore[attr-defined]
        ingest.initialise = self._initialise  # type: ignore[attr-defined]
        for module in (bank, finding, answer, ingest):
            name = module.__name__.rpartition(".")[2]
            patch.setitem(sys.modules, module.__name__, module)
            patch.setattr(regrad_cli, name, module, raising=False)
        return self

    def _locate(self, explicit: Any, start: Path) -> Path:
        self.asked.append(("bank", explicit))
        if isinstance(self.bank_path, Exception):
            raise self.bank_path
        return self.bank_path

    def _remove(self, path: Path, names: Sequence[str], **_: Any) -> dict[str, Any]:
        ids = list(dict.fromkeys(map(self.snapshot.find_document, names)))
        self.removed += ids
        names_of = ("id", "source", "title", "passages")
        gone = [{n: d[n] for n in names_of} for d in self.snapshot.documents() if d["id"] in ids]
        return {"documents": gone, "passages": sum(each["passages"] for each in gone), "snapshot": 5}

    def _query(self, question: str, options: dict[str, Any]) -> list[Hit]:
        self.asked.append((question, options))
        return self.hits

    @contextmanager
    def _finder(self, bank: Path, **options: Any) -> Iterator[Any]:
        self.loads += 1
        finder = ModuleType("finder")
        finder.query = lambda question, **more: self._query(question, more)  # type: ignore[attr-defined]
        yield finder

    @contextmanager
    def _answerer(self, bank: Path | None, **options: Any) -> Iterator[Any]:
        self.loads += 1
        self.loaded_with = {"bank": bank, **options}
        answerer = ModuleType("answerer")
        answerer.ask = self._ask  # type: ignore[attr-defined]
        answerer.ask_many = self._ask_many  # type: ignore[attr-defined]
        answerer.load = lambda: (event for event in ())  # type: ignore[attr-defined]
        yield answerer

    def _ask(self, question: str, options: Any) -> Iterator[Any]:
        self.asked.append((question, options))
        yield Notice("prior: untrained")
        for piece in self.pieces:
            yield Piece(piece)
        if self.raises is not None:
            raise self.raises
        yield answer_of(question, "".join(self.pieces), options.mode, self.used)

    def _ask_many(self, questions: Sequence[str], options: Any) -> Iterator[Any]:
        for question in questions:
            try:
                yield from (event for event in self._ask(question, options) if not isinstance(event, Piece))
            except UsageProblem as refusal:
                yield Refused(question, refusal.message)

    def _ingest(self, bank: Path, options: Any) -> Iterator[Any]:
        self.ingest_options = options
        yield Progress("gradients", 1, 2)
        for event in self.ingest_events:
            if isinstance(event, BaseException):
                raise event
            yield event

    def _initialise(self, path: Path, **options: Any) -> Iterator[Any]:
        self.initialised_with = {"path": path, **options}
        yield Notice("fetching the starter")
        yield settings_of_bank()


def summary(*skipped: Skipped, **changes: Any) -> IngestSummary:
    return IngestSummary(documents=2, passages=5, added=5, skipped=skipped, seconds=1.5, snapshot=4, **changes)


def done(source: str = "a.md", title: str = "Title") -> DocumentDone:
    return DocumentDone(document_id(source), source, title, 3, 3, 0, 0)


def _module(name: str) -> Any:
    return ModuleType(f"regrad_cli.{name}")


def _options(name: str) -> Any:
    class Options:
        def __init__(self, **values: Any) -> None:
            self.__dict__.update(values)

    Options.__name__ = name
    return Options
