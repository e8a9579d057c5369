"""Targets: what is ingested and asked. Files of every kind, .gitignore, lists of files, questions, tasks, settings."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from faketerminal import call

from regrad_cli.characters import TITLE_CHARS, Unreadable
from regrad_cli.documents import read_documents, read_stream, split
from regrad_cli.errors import RegradError, UsageProblem
from regrad_cli.folders import files_of
from regrad_cli.questions import read_questions
from regrad_cli.readers import READERS, BadRecord, Fields, Record, kind_of, read_csv, read_jsonl
from regrad_cli.records import Document, Skipped
from regrad_cli.settings import Settings, read_config
from regrad_cli.tasks import read_tasks

from .mutations import in_lines
from .targets import Target

FIXTURES = Path(__file__).parents[1] / "fixtures" / "documents"
MARKDOWN = (
    b"---\ntitle: The harbour\ntags: [a, b]\n---\n# One\n\nText *here*, `code`.\n\n| a | b |\n|---|---|\n| 1 | 2 |"
)
MORE_MARKDOWN = (
    b"+++\ntitle = 'x'\n+++\nSetext\n======\n\n```\n# no heading\n```\n\n- item\n- [link](x)\n\n## Two {#id} ##\n"
)
PAGE = (
    b"<!doctype html><html><head><meta charset=utf-8><title>A &amp; B</title></head><body><h1>One</h1><p>Text"
    b"<table><tr><td rowspan=2>1</td><td>2</td></tr></table><pre>a\n b</pre><ul><li>x</ul></body></html>"
)
RECORDS = b'{"id": "1", "title": "T", "text": "One."}\n{"text": ["a", "b"]}\nnot json\n{"title": 3, "text": "x"}\n'
TABLE = b'id,title,text\n1,T,"a ""quoted"" cell\nof two lines"\n2,,x\n3\n'
IGNORE = b"*.log\n!keep.log\n/build/\na/**/b\n[a-z]?x\n\\#x\n# note\n**/*.tmp\n"
TASK = b'{"id": "t1", "title": "T", "passages": ["One."], "questions": [{"question": "Q?", "answers": ["A", "B"]}]}\n'
CONFIG = b'device = "cpu"\nk = 3\ngamma = 1.5\nkeep-text = true\nmin_score = "auto"\n'


def _clean(title: str, text: str) -> None:
    assert len(title) <= TITLE_CHARS and "\n" not in title, title
    for part in (title, text):
        part.encode()  # no half of a character
        assert "\0" not in part and "\r" not in part


def words(text: str) -> list[tuple[int, int]]:
    """Stands for a tokenizer: a token a word, or four characters of one."""
    return [
        (start, min(start + 4, match.end())) for match in re.finditer(r"\S+", text) for start in range(*match.span(), 4)
    ]


def _cut(document: Document) -> None:
    """All of the text is in its passages, and nothing else."""
    at, limit = 0, 64
    for passage in split(document, words, max_tokens=limit, overlap=8):
        assert passage.text is not None and passage.text == document.text[passage.offset :][: len(passage.text)]
        assert not document.text[at : passage.offset].strip()
        at = max(at, passage.offset + len(passage.text))
    assert not document.text[at:].strip()


def reader(kind: str) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        kind_of(f"x.{kind}", data[:1024])
        try:
            title, text = READERS[kind](data)
        except Unreadable as error:
            assert error.reason
            return
        _clean(title, text)
        _cut(Document("x", title, text))

    return run


def _records(read: Callable[[bytes], Iterator[Record | BadRecord]]) -> Callable[[bytes], None]:
    def run(data: bytes) -> None:
        try:
            for record in read(data):
                if isinstance(record, Record):
                    _clean(record.title, record.text)
                    assert record.text.strip()
                else:
                    assert record.reason
        except Unreadable as error:
            assert error.reason

    return run


def targets(scratch: Path) -> list[Target]:
    def fixture(*endings: str) -> Callable[[], list[bytes]]:
        return lambda: [
            path.read_bytes()
            for path in sorted(FIXTURES.rglob("*"))
            if path.is_file() and path.name.endswith(endings) and path.stat().st_size < 40_000
        ][:6]

    def folder(data: bytes) -> None:
        """A file of every name that says a kind, in a folder whose .gitignore says nothing."""
        root = scratch / "folder"
        root.mkdir(parents=True, exist_ok=True)
        names = [f"x.{ending}" for ending in ("txt", "md", "html", "csv", "jsonl", "docx", "weird")]
        for name in names:
            (root / name).write_bytes(data)
        for found in read_documents([root], base=root, max_bytes=1 << 20):
            if isinstance(found, Document):
                _clean(found.title, found.text)
                assert found.text.strip() and found.source.startswith("x.")
            else:
                assert isinstance(found, Skipped) and found.reason
                assert "could not be read (" not in found.reason, found.reason
        for format in ("text", "jsonl"):
            for name in (None, "notes"):
                for found in read_stream(io.BytesIO(data), format=format, name=name, max_bytes=1 << 20):
                    assert found.source.startswith("stdin")

    def gitignore(data: bytes) -> None:
        root = scratch / "ignored"
        for name in ("a" * 250, "a/b/c/d/e/f/x.tmp", "build/x.log", "keep.log", "#x", "é.md", ("ab" * 40) + ".txt"):
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).touch()
        (root / ".git").mkdir(exist_ok=True)
        (root / ".gitignore").write_bytes(data)
        for path, reason in files_of(root):
            assert path.is_relative_to(root) and not reason

    def listed(data: bytes) -> None:
        """`ingest --files-from`: names, or what are none."""
        from regrad_cli.cli.work import _listed_files

        file = scratch / "listed"
        file.write_bytes(data)
        for path in _listed_files(None, str(file)):  # type: ignore[arg-type]
            for found in read_documents([path], base=scratch, max_bytes=1 << 16):
                assert found.source

    def questions(data: bytes) -> None:
        for line in read_questions(io.BytesIO(data)):
            assert line.problem or line.question.strip()
            line.question.encode("utf-8", "surrogatepass")

    def tasks(data: bytes) -> None:
        file = scratch / "tasks.jsonl"
        file.write_bytes(data)
        try:
            found, skipped = read_tasks([file])
        except UsageProblem as error:
            assert error.message
            return
        for task in found:
            assert task.passages and task.questions
            for text in (task.id, task.title, *task.training_texts, *(q.question for q in task.questions)):
                text.encode()
        assert all(each.reason for each in skipped)

    def config(data: bytes) -> None:
        file = scratch / "config.toml"
        file.write_bytes(data)
        try:
            settings = Settings({}, read_config(file), file)
            for name in settings.config:
                settings.value(name)
        except RegradError as error:
            assert error.message and error.exit_code == 2

    def words_of_a_command(data: bytes) -> None:
        """What stands behind a command: a name, a number, a version of a bank."""
        given = [part.decode("utf-8", "surrogateescape") for part in data.split(b"\0")[:3]]
        for line in (["bank", "show"], ["diff"], ["bank", "stats", "--bank"], ["bank", "unpack"], ["bank", "log"]):
            shown = call(*line, *given, REGRAD_BANK=str(scratch / "no bank"))
            assert "Traceback" not in shown.err and "please report it" not in shown.err, shown.err
            assert shown.code in (0, 2, 10, 14) or (shown.code == 70 and "hint: " in shown.err), (line, given, shown)

    def jsonl(data: bytes) -> Iterator[Record | BadRecord]:
        return read_jsonl(io.BytesIO(data), Fields(), 1 << 16)

    return [
        Target(
            "text",
            "a text file",
            reader("text"),
            lambda: [b"One.\n\nTwo.\r\n", "caf\u00e9 \u20ac".encode("cp1252"), "\ufeffx".encode("utf-16")],
        ),
        Target("markdown", "a Markdown file", reader("markdown"), lambda: [MARKDOWN, MORE_MARKDOWN]),
        Target("html", "an HTML page", reader("html"), lambda: [PAGE, *fixture(".html")()]),
        Target("pdf", "a PDF", reader("pdf"), fixture(".pdf")),
        Target("jsonl", "JSON lines of documents", _records(jsonl), lambda: [RECORDS], in_lines),
        Target(
            "csv",
            "a table of documents",
            _records(lambda data: read_csv(data, Fields())),
            lambda: [TABLE, TABLE.replace(b",", b";")],
        ),
        Target(
            "folder",
            "a file of any kind, or standard input, to `ingest`",
            folder,
            lambda: [MARKDOWN, PAGE, RECORDS, TABLE],
        ),
        Target("gitignore", "a .gitignore in a folder that is ingested", gitignore, lambda: [IGNORE]),
        Target("files-from", "a list of files", listed, lambda: [b"a.md\nb.md\n", b"a\0b"]),
        Target(
            "questions",
            "lines of `ask -` and `query -`",
            questions,
            lambda: [b'What?\n{"question": "Who?"}\n\xef\xbb\xbf\n'],
            in_lines,
        ),
        Target("tasks", "question-answering tasks", tasks, lambda: [TASK, TASK + TASK.replace(b"t1", b"t2")], in_lines),
        Target("config", "the config file", config, lambda: [CONFIG]),
        Target(
            "words",
            "words of a command line",
            words_of_a_command,
            lambda: [b"a.md", b"x@3\0y@-1", json.dumps("é").encode()],
        ),
    ]
