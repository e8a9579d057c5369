"""Paths and streams → documents → passages: what is read, what is skipped and why, and how texts are cut."""

from __future__ import annotations

import io
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from regrad_cli import documents
from regrad_cli.documents import Document, Skipped, read_documents, read_stream, split
from regrad_cli.records import Passage, sha256_hex

FIXTURES = Path(__file__).parent / "fixtures" / "documents"
Found = list[Document | Skipped]


def read(*paths: Path, base: Path, **options: Any) -> Found:
    return list(read_documents(paths, base=base, **options))


def texts(found: Found) -> dict[str, str]:
    return {one.source: one.text for one in found if isinstance(one, Document)}


def reasons(found: Found) -> dict[str, str]:
    return {one.source: one.reason for one in found if isinstance(one, Skipped)}


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content.encode() if isinstance(content, str) else content)
    return root


# ── folders and sources ─────────────────────────────────────────────────────────────────────────────────────────────


def test_a_folder_is_read_in_sorted_order_without_hidden_files(tmp_path: Path) -> None:
    write(tmp_path, {"b.txt": "B", "a/z.md": "Z", "a/b.txt": "AB", ".hidden/x.txt": "X", ".h.txt": "H", "C.txt": "C"})
    assert list(texts(read(tmp_path, base=tmp_path))) == ["C.txt", "a/b.txt", "a/z.md", "b.txt"]
    assert texts(read(tmp_path / ".hidden", tmp_path / ".h.txt", base=tmp_path)) == {
        ".hidden/x.txt": "X",
        ".h.txt": "H",
    }


def test_sources_are_relative_to_the_base_and_absolute_outside_it(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path, {"in/a.txt": "A", "out/b.txt": "B"})
    monkeypatch.chdir(tmp_path / "out")
    found = read(Path("../in/./a.txt"), Path("b.txt"), base=tmp_path / "in")
    assert list(texts(found)) == ["a.txt", (tmp_path / "out" / "b.txt").as_posix()]


def test_a_file_is_read_once_however_it_is_named(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path, {"d/a.txt": "A"})
    (tmp_path / "link").symlink_to(tmp_path / "d")
    (tmp_path / "d" / "b.txt").symlink_to("a.txt")
    monkeypatch.chdir(tmp_path)
    names = [Path("d/a.txt"), tmp_path / "d", Path("d/../d/a.txt"), Path("link/a.txt"), Path("link")]
    assert texts(read(*names, base=tmp_path)) == {"d/a.txt": "A"}
    assert texts(read(Path("link/a.txt"), base=tmp_path)) == {"d/a.txt": "A"}


def test_link_loops_end_and_links_out_of_the_folder_are_named_not_followed(tmp_path: Path) -> None:
    write(tmp_path, {"d/e/a.txt": "A", "elsewhere/b.txt": "B"})
    for name, target in {"up": "..", "self": ".", "loop": "loop", "out": "../elsewhere", "dead": "nowhere"}.items():
        (tmp_path / "d" / name).symlink_to(target)
    found = read(tmp_path / "d", base=tmp_path)
    assert texts(found) == {"d/e/a.txt": "A"}
    assert set(reasons(found)) == {"d/loop", "d/out", "d/dead"}
    assert "name that folder" in reasons(found)["d/out"] and "nowhere" in reasons(found)["d/dead"]


def test_a_very_deep_folder_is_no_recursion_error(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    depth = 300
    for _ in range(depth):
        Path("d").mkdir()
        os.chdir("d")
    Path("a.txt").write_text("A")
    os.chdir(tmp_path)
    limit = sys.getrecursionlimit()
    sys.setrecursionlimit(250)
    try:
        assert list(texts(read(tmp_path / "d", base=tmp_path)).values()) == ["A"]
    finally:
        sys.setrecursionlimit(limit)


def test_a_name_that_is_no_utf8_has_a_source_that_can_be_stored(tmp_path: Path) -> None:
    raw = os.fsencode(tmp_path) + b"/caf\xe9.txt"
    try:
        Path(os.fsdecode(raw)).write_text("A")
    except OSError:
        pytest.skip("this file system takes only UTF-8 names")
    (document,) = read(tmp_path, base=tmp_path)
    assert isinstance(document, Document)
    assert document.source == "caf\\xe9.txt" and (document.source + document.title).encode()


GIT_CASES = {
    ".gitignore": "*.log\n/build/\n!keep.log\nsub/*.tmp\n\\#odd\n!\n[z-a]\n"
    "not a [pattern\n**/deep/x.txt\ndocs/*\n!docs/good/\ntrail \n",
    "a.txt": "a", "a.log": "a", "keep.log": "a", "build/a.txt": "a", "sub/build/a.txt": "a", "sub/a.tmp": "a",
    "sub/more/a.tmp": "a", "#odd": "a", "p/q/deep/x.txt": "a", "docs/bad/a.txt": "a", "docs/good/a.txt": "a",
    "docs/good/a.log": "a", "docs/top.txt": "a", "trail": "a",
    "sub/.gitignore": "!a.log\n*.txt\n/only.md\n",
    "sub/a.log": "a", "sub/a.txt": "a", "sub/only.md": "a", "sub/more/only.md": "a", "sub/more/b.txt": "a",
    "neg/.gitignore": "*\n!yes.txt\n", "neg/yes.txt": "a", "neg/no.txt": "a", "neg/in/yes.txt": "a",
}  # fmt: skip


def test_gitignore_files_are_honoured_as_git_honours_them(tmp_path: Path) -> None:
    write(tmp_path, GIT_CASES)
    expected = {
        "a.txt", "docs/good/a.txt", "keep.log", "neg/yes.txt", "sub/a.log", "sub/more/a.tmp", "sub/more/only.md",
    }  # fmt: skip
    if shutil.which("git"):
        git = ["git", "-c", "core.excludesFile=", "-C", str(tmp_path)]
        subprocess.run([*git, "init", "-q"], check=True)
        listed = subprocess.run(
            [*git, "ls-files", "-o", "--exclude-standard"], check=True, capture_output=True, text=True
        ).stdout.split("\n")
        assert {name for name in listed if name and ".gitignore" not in name} == expected
    assert set(texts(read(tmp_path, base=tmp_path))) == expected


@pytest.mark.parametrize("line", ["a*" * 40 + "b", "**/" + "a/**/" * 40 + "b", "*" * 3000 + "b", "?" * 30_000])
def test_promise_16_a_gitignore_takes_time_in_proportion_to_the_names(tmp_path: Path, line: str) -> None:
    """Python's own patterns take longer than anybody waits over the first one."""
    deep = "a/" * 60
    write(tmp_path, {".git/HEAD": "x", ".gitignore": f"*.log\n{line}\n!keep.log\n", deep + "x.txt": "A"})
    write(tmp_path, {"a" * 250: "A", "b.log": "L", "keep.log": "L"})
    started = time.process_time()
    assert set(texts(read(tmp_path, base=tmp_path))) == {"a" * 250, "keep.log", deep + "x.txt"}
    assert time.process_time() - started < 3


def test_a_gitignore_of_more_patterns_than_are_compiled_at_once_holds_as_a_whole(tmp_path: Path) -> None:
    many = "".join(f"*a{number}*b*c{number}*\n" for number in range(4000))
    names = ["xa7ybzc7", "xa3999ybzc3999", "xa7yb", "keep.log", "b.log"]
    write(tmp_path, {".git/HEAD": "x", ".gitignore": f"*.log\n{many}!keep.log\n"} | dict.fromkeys(names, "A"))
    assert set(texts(read(tmp_path, base=tmp_path))) == {"xa7yb", "keep.log"}


def test_a_gitignore_and_names_of_other_encodings_than_utf8_go_together(tmp_path: Path) -> None:
    write(tmp_path, {".git/HEAD": "x", ".gitignore": b"caf\xe9*\n", "cafe": "A"})
    (tmp_path / os.fsdecode(b"caf\xe9.txt")).write_text("B", encoding="utf-8")
    assert set(texts(read(tmp_path, base=tmp_path))) == {"cafe"}


def test_gitignore_of_the_repository_holds_below_it_but_not_for_what_was_named(tmp_path: Path) -> None:
    write(tmp_path, {".git/HEAD": "x", ".gitignore": "*.log\nbuild/\n", "d/a.txt": "A", "d/a.log": "L"})
    write(tmp_path, {"build/b.txt": "B", "build/b.log": "BL"})
    assert set(texts(read(tmp_path / "d", base=tmp_path))) == {"d/a.txt"}
    assert set(texts(read(tmp_path / "d" / "a.log", base=tmp_path))) == {"d/a.log"}
    assert set(texts(read(tmp_path / "build", base=tmp_path))) == {"build/b.txt", "build/b.log"}


def test_a_bank_is_never_read(tmp_path: Path) -> None:
    bank = {"FORMAT": "gbank 1\n", "docs/x.jsonl": '{"text": "from the bank"}'}
    for folder in (".gbank", "named.gbank", "plain"):
        write(tmp_path / folder, bank)
    write(tmp_path, {"packed.gbank": "x", "a.txt": "A", "notes/FORMAT": "another format", "notes/b.txt": "B"})
    found = read(tmp_path, base=tmp_path)
    assert set(texts(found)) == {"a.txt", "notes/FORMAT", "notes/b.txt"} and not reasons(found)
    for named in (".gbank", "plain", "plain/docs", "plain/docs/x.jsonl", "packed.gbank", ".gbank/docs/x.jsonl"):
        found = read(tmp_path / named, base=tmp_path)
        assert not texts(found) and "bank" in reasons(found)[named]


# ── what cannot be read ─────────────────────────────────────────────────────────────────────────────────────────────


def test_every_unreadable_input_is_named_with_a_reason_and_the_rest_is_read(tmp_path: Path) -> None:
    write(
        tmp_path,
        {
            "a.txt": "first", "binary.bin": bytes(range(256)), "empty.txt": "", "blank.md": " \n\t\n",
            "huge.txt": "x" * 2001, "image.png": b"\x89PNG\r\n\x1a\n" + bytes(100), "no-column.csv": "name\nx\n",
            "word.docx": b"PK\x03\x04" + bytes(100), "page.html": "<p hidden>x</p>", "z.txt": "last",
            "lines.jsonl": '{"text": "one"}\nbroken\n{"text": "two"}\n', "none.jsonl": "\n\n", "bad.pdf": "%PDF-1.4",
            "damaged.txt": "Zoë, naïve".encode() + b"\xff!",
        },
    )  # fmt: skip
    for name in ("encrypted.pdf", "scanned.pdf"):
        shutil.copy(FIXTURES / name, tmp_path)
    os.mkfifo(tmp_path / "pipe")
    found = read(tmp_path, tmp_path / "missing.txt", Path(os.devnull), base=tmp_path, max_bytes=2000)
    assert texts(found) == {"a.txt": "first", "lines.jsonl#1": "one", "lines.jsonl#3": "two", "z.txt": "last"}
    expected = {
        "bad.pdf": "damaged", "binary.bin": "binary", "blank.md": "empty", "damaged.txt": "broken bytes",
        "empty.txt": "the file is empty", "encrypted.pdf": "password", "huge.txt": "over the limit",
        "image.png": "an image", "lines.jsonl#2": "not valid JSON", "missing.txt": "no such file",
        "no-column.csv": "no column 'text' (it has: name)", "none.jsonl": "no records", "page.html": "no text",
        "pipe": "standard input", "scanned.pdf": "OCR", "word.docx": "save it as PDF", os.devnull: "a device",
    }  # fmt: skip
    assert set(reasons(found)) == set(expected)
    for source, part in expected.items():
        assert part in reasons(found)[source], source


def test_what_may_not_be_opened_is_skipped(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path, {"a.txt": "A", "locked.txt": "B", "closed/c.txt": "C", "z.txt": "Z"})
    real_open, real_scandir = os.open, os.scandir

    def refuse(real: Callable[..., Any], name: str) -> Callable[..., Any]:  # root may open anything: chmod is no test
        def call(path: Any, *rest: Any, **more: Any) -> Any:
            if os.fspath(path).endswith(name):
                raise PermissionError(13, "Permission denied", path)
            return real(path, *rest, **more)

        return call

    monkeypatch.setattr(os, "open", refuse(real_open, "locked.txt"))
    monkeypatch.setattr(os, "scandir", refuse(real_scandir, "closed"))
    found = read(tmp_path, base=tmp_path)
    assert texts(found) == {"a.txt": "A", "z.txt": "Z"}
    assert reasons(found) == {"closed": "permission denied", "locked.txt": "permission denied"}


def test_files_and_folders_that_vanish_while_walking_are_skipped(tmp_path: Path) -> None:
    write(tmp_path, {"a.txt": "A", "b.txt": "B", "c/c.txt": "C", "d.txt": "D"})
    walk = read_documents([tmp_path], base=tmp_path)
    found: Found = [next(walk)]
    (tmp_path / "b.txt").unlink()
    shutil.rmtree(tmp_path / "c")
    found += walk
    assert texts(found) == {"a.txt": "A", "d.txt": "D"}
    assert reasons(found).keys() == {"b.txt", "c"} and all("gone" in reason for reason in reasons(found).values())


def test_a_reader_that_fails_unexpectedly_costs_one_file(tmp_path: Path, monkeypatch: Any) -> None:
    write(tmp_path, {"a.md": "A", "b.txt": "B"})
    monkeypatch.setitem(documents.READERS, "markdown", lambda data: 1 / 0)
    found = read(tmp_path, base=tmp_path)
    assert texts(found) == {"b.txt": "B"} and "ZeroDivisionError" in reasons(found)["a.md"]


# ── records, titles, standard input ─────────────────────────────────────────────────────────────────────────────────


def test_records_are_documents_of_their_own_and_repeated_ids_stay_apart() -> None:
    found = read(FIXTURES / "keepers.jsonl", FIXTURES / "boats.csv", base=FIXTURES)
    assert list(texts(found)) == [
        "keepers.jsonl#calloway", "keepers.jsonl#2", "keepers.jsonl#7", "keepers.jsonl#nul",
        "boats.csv#k1", "boats.csv#k2", "boats.csv#k1:7",
    ]  # fmt: skip
    assert set(reasons(found)) == {"keepers.jsonl#4", "keepers.jsonl#6", "boats.csv#6"}
    titles = {one.source: one.title for one in found if isinstance(one, Document)}
    assert titles["boats.csv#k1"] == "Boat" and titles["boats.csv#k2"] == "Boats"


def test_titles_come_from_the_document_or_its_file_name() -> None:
    titles = {one.source: one.title for one in read(FIXTURES, base=FIXTURES) if isinstance(one, Document)}
    assert titles["columns.pdf"] == "Brannoch Light: a report" and titles["table.pdf"] == "Table"
    assert titles["lamp.md"] == "The lamp of Brannoch" and titles["page.html"].startswith("Stations & keepers")
    assert titles["opens-without-password.pdf"] == "Opens without password"


def test_standard_input_is_one_document_named_by_its_text_or_by_the_caller() -> None:
    digits = sha256_hex("It blew.\n")[:16]
    assert list(read_stream(io.BytesIO(b"It blew.\r\n"))) == [Document(f"stdin#{digits}", "", "It blew.\n")]
    assert list(read_stream(io.BytesIO(b"# Gale\n"), name="notes.md")) == [
        Document("stdin#notes.md", "Gale", "# Gale\n")
    ]
    assert list(read_stream(io.BytesIO(b"It"), name="a_gale.txt")) == [Document("stdin#a_gale.txt", "A gale", "It")]
    for data in (b"", b" \n", bytes(1000), b"x" * 101):
        (skipped,) = read_stream(io.BytesIO(data), max_bytes=100)
        assert isinstance(skipped, Skipped) and skipped.source == "stdin" and skipped.reason
        (skipped,) = read_stream(io.BytesIO(data), max_bytes=100, name="notes.md")
        assert skipped.source == "stdin#notes.md"


def test_standard_input_records_keep_their_source_when_lines_move() -> None:
    lines = [b'{"text": "one"}\n', b'{"id": "t", "title": "T", "text": "two"}\n', b"nonsense\n"]
    first = list(read_stream(io.BytesIO(b"".join(lines)), format="jsonl"))
    second = list(read_stream(io.BytesIO(b"".join(reversed(lines))), format="jsonl"))
    assert texts(first) == texts(second) == {"stdin#t": "two", f"stdin#{sha256_hex('one')[:16]}": "one"}
    assert list(reasons(first)) == ["stdin#3"]
    named = list(read_stream(io.BytesIO(b"".join(lines)), format="jsonl", name="feed"))
    assert list(texts(named)) == ["stdin#feed#1", "stdin#feed#t"]


def test_standard_input_records_are_given_while_the_pipe_is_open() -> None:
    out, into = os.pipe()
    with os.fdopen(out, "rb") as stream, os.fdopen(into, "wb", buffering=0) as pipe:
        pipe.write(b'{"text": "one"}\n')
        found = read_stream(stream, format="jsonl")
        first = next(found)
        assert isinstance(first, Document) and first.text == "one"
        pipe.close()
        assert list(found) == []


def test_reading_imports_no_reader_before_its_first_file() -> None:
    code = (
        "import sys, regrad_cli.documents; "
        "print([m for m in ('pypdfium2', 'html_to_markdown', 'chardet', 'yaml', 'pathspec', 'sentencex', 'torch') "
        "if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


# ── cutting ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def word_spans(text: str) -> list[tuple[int, int]]:
    """A tokenizer that knows words, of at most eight characters, and signs."""
    return [match.span() for match in re.finditer(r"\w{1,8}|[^\w\s]", text)]


def byte_spans(text: str) -> list[tuple[int, int]]:
    """The worst tokenizer: a token a byte, spaces too, several with one span."""
    return [(at, at + 1) for at, character in enumerate(text) for _ in character.encode("utf-8", "surrogatepass")]


def context_spans(text: str) -> list[tuple[int, int]]:
    """One whose count depends on what stands before: a text's first word is cut into letters."""
    words = [match.span() for match in re.finditer(r"\S+", text)]
    return [(at, at + 1) for at in range(*words[0])] + words[1:] if words else []


def passages_of(text: str, spans: Any = word_spans, title: str = "Gale", **options: Any) -> list[Passage]:
    passages = list(split(Document("gale.md", title, text), spans, **options))
    check(text, passages, spans, options.get("max_tokens", 192))
    return passages


def check(text: str, passages: list[Passage], spans: Any, max_tokens: int) -> None:
    seen = bytearray(len(text))
    for number, passage in enumerate(passages):
        assert passage.text is not None and passage.text.strip() == passage.text != ""
        assert text[passage.offset : passage.offset + len(passage.text)] == passage.text
        assert passage.tokens == len(spans(passage.training_text)) <= max_tokens
        assert passage.ordinal == number
        seen[passage.offset : passage.offset + len(passage.text)] = b"\1" * len(passage.text)
    assert all(flag or character.isspace() for flag, character in zip(seen, text, strict=True))


MARKUP = st.sampled_from(
    [
        "# Head\n",
        "## Sub *x*\n",
        "\n\n",
        "```\n",
        "- item. ",
        "| a | b |\n",
        "|---|---|\n",
        "Title\n=====\n",
        ". ",
        "\n",
    ]
)
TEXTS = st.lists(
    st.text(max_size=30) | MARKUP | st.sampled_from(["word ", "灯台は岩。", "😀", "e\u0301", "x" * 90]), max_size=40
)


@settings(max_examples=150, deadline=None)
@given(TEXTS.map("".join), st.text(max_size=60), st.sampled_from([word_spans, byte_spans, context_spans]), st.data())
def test_passages_are_slices_within_the_limit_that_leave_out_no_character(
    text: str, title: str, spans: Any, data: st.DataObject
) -> None:
    max_tokens = data.draw(st.integers(24, 120))
    overlap = data.draw(st.integers(0, max_tokens // 2 - 1))
    once = passages_of(text, spans, title, max_tokens=max_tokens, overlap=overlap)
    assert once == passages_of(text, spans, title, max_tokens=max_tokens, overlap=overlap)


SENTENCES = [f"The keeper of station {n} logs the lamp, the wind and the hour of the day." for n in range(60)]


def test_sentences_stay_whole_and_short_ones_are_repeated() -> None:
    passages = passages_of(" ".join(SENTENCES), max_tokens=64, overlap=20)
    for passage in passages:
        assert re.fullmatch(r"(The keeper of station \d+ [^.]*\.\s*)+", passage.text or "")
    for before, after in pairwise(passages):
        assert (before.text or "").endswith((after.text or "").split(". ")[0] + ".")
    apart = passages_of(" ".join(SENTENCES), max_tokens=64, overlap=0)
    assert sum(len(p.text or "") for p in apart) <= len(" ".join(SENTENCES))


def test_abbreviations_and_numbers_end_no_sentence() -> None:
    text = "Dr. Calloway paid $4.50 for v1.2.3 of the chart. " * 12
    assert all(
        (passage.text or "").startswith("Dr. Calloway") for passage in passages_of(text, max_tokens=48, overlap=0)
    )


def test_a_heading_is_a_border_and_titles_name_the_headings_above() -> None:
    body = " ".join(SENTENCES[:12])
    text = f"# Gale\n\n{body}\n\n## Storms\n\n### *Winter*\n\n{body}\n\n## Calms\n\nNone."
    passages = passages_of(text, max_tokens=64, overlap=20)
    assert passages[0].title == "Gale" and (passages[0].text or "").startswith("# Gale\n\nThe keeper")
    (storms,) = [p for p in passages if "## Storms" in (p.text or "")]
    assert (storms.text or "").startswith("## Storms\n\n### *Winter*\n\nThe keeper") and storms.title == "Gale"
    later = [p.title for p in passages if storms.ordinal < p.ordinal < passages[-1].ordinal]
    assert set(later) == {"Gale › Storms › Winter"}
    assert passages[-1].text == "## Calms\n\nNone." and passages[-1].title == "Gale"


def test_overlap_never_goes_over_a_heading() -> None:
    text = "\n\n".join(f"## Part {n}\n\n" + " ".join(SENTENCES[n * 5 : n * 5 + 5]) for n in range(8))
    for passage in passages_of(text, max_tokens=48, overlap=20):
        assert (passage.text or "").rfind("## ") in (-1, 0)


def test_short_neighbouring_sections_share_a_passage() -> None:
    text = "# Gale\n" + "\n".join(f"## Q{n}\nShort answer {n}." for n in range(8))
    assert len(passages_of(text, max_tokens=192)) < 4


def test_table_rows_and_list_items_are_not_cut_where_avoidable() -> None:
    rows = [f"| Station {n}. North | mercury lamp. Old | {n} nm |" for n in range(40)]
    items = [f"- Rule {n}: light the lamp. Log the hour of it." for n in range(40)]
    text = "| Name | Lamp | Range |\n| --- | --- | --- |\n" + "\n".join(rows) + "\n\n" + "\n".join(items)
    lines = set(text.split("\n"))
    for passage in passages_of(text, max_tokens=80):
        assert set((passage.text or "").split("\n")) <= lines
        assert not (passage.text or "").startswith("| ---")


def test_paragraphs_win_over_sentences_and_the_end_is_no_crumb() -> None:
    paragraphs = [" ".join(SENTENCES[n : n + 4]) for n in range(0, 60, 4)]
    for passage in passages_of("\n\n".join(paragraphs), max_tokens=100, overlap=0):
        assert passage.text in paragraphs
    sizes = [passage.tokens for passage in passages_of(" ".join(SENTENCES[:13]), max_tokens=192, overlap=0)]
    assert len(sizes) == 2 and min(sizes) > 60


@pytest.mark.parametrize("spans", [word_spans, byte_spans])
@pytest.mark.parametrize(
    "text",
    [
        "x" * 10_000,
        "灯台は岩の上に立っている" * 500,
        "😀" * 800,
        "e\u0301" * 900,
        "a" + " " * 50_000 + "b",
        "\u0301" * 700,
    ],
    ids=["long word", "Japanese", "emoji", "accents", "spaces", "accents alone"],
)
def test_text_without_borders_is_cut_all_the_same(text: str, spans: Any) -> None:
    passages = passages_of(text, spans)
    if text.startswith("e\u0301"):
        assert all((passage.text or "").startswith("e") for passage in passages)


def test_a_very_long_title_leaves_three_quarters_for_the_text() -> None:
    passages = passages_of(" ".join(SENTENCES), title="very long title " * 500, max_tokens=64)
    for passage in passages:
        assert len(word_spans(passage.title)) <= 16 and passage.title.endswith(("very", "long", "title"))


def test_a_count_that_grows_at_a_border_is_found_out() -> None:
    """The document's own token count says that these passages fit; only counting each passage anew tells the truth."""
    text = " ".join(f"incomprehensibilities{n} end{n}." for n in range(200))
    assert len(passages_of(text, context_spans, title="", max_tokens=32, overlap=0)) > 10


def test_without_sentences_a_line_wins_over_a_word_and_a_word_over_a_letter() -> None:
    lines = [f"station {n} mercury lamp {n} nautical miles of range" for n in range(60)]
    for passage in passages_of("\n".join(lines), max_tokens=67):
        assert set((passage.text or "").split("\n")) <= set(lines)
    words = [f"station{n}" for n in range(900)]
    for passage in passages_of(" ".join(words), max_tokens=64):
        assert set((passage.text or "").split(" ")) <= set(words)


def test_a_heading_and_a_tables_head_stay_with_what_follows() -> None:
    long = "word " * 300
    assert len(passages_of(f"# Gale\n\n{long}")[0].text or "") > 100
    table = "| Name | Range |\n| --- | --- |\n" + "\n".join(f"| Station {n} | {'far ' * 18}|" for n in range(9))
    first = passages_of(f"{SENTENCES[0]}\n\n{table}", max_tokens=48)
    assert not any((passage.text or "").endswith(("| --- | --- |", "| Range |")) for passage in first)


def test_sentences_are_sought_in_pieces_of_bounded_length(monkeypatch: Any) -> None:
    import sentencex

    lengths: list[int] = []
    real = sentencex.get_sentence_boundaries
    monkeypatch.setattr(
        sentencex, "get_sentence_boundaries", lambda language, text: lengths.append(len(text)) or real(language, text)
    )
    passages_of('("[' * 20_000)
    assert lengths and max(lengths) <= 10_000  # it is quadratic in unclosed quotes


def test_code_fences_hold_no_headings_and_setext_headings_count() -> None:
    text = "Storms\n======\n\n```sh\n# not a heading\nrun\n```\n\nCalms\n------\nNone.\n"
    outline = documents.split.__globals__["read_outline"](text)
    assert [section.inside for section in outline.sections] == [("Storms",), ("Storms", "Calms")]


def test_an_empty_document_has_no_passages_and_wrong_limits_are_refused() -> None:
    assert passages_of(" \n\t ") == []
    for options in ({"max_tokens": 8}, {"overlap": -1}):
        with pytest.raises(ValueError, match="passages need"):
            passages_of("x", **options)


def test_splitting_takes_time_in_proportion_to_the_text() -> None:
    def seconds(text: str) -> float:
        started = time.process_time()  # of this process alone: the machine may be busy
        passages = list(split(Document("s", "Gale", text), word_spans))
        assert passages
        return time.process_time() - started

    for unit in (" ".join(SENTENCES) + "\n\n", "x" * 5000, '("[' * 1700, "# a\n", "- [ \n", "\n" * 4000 + "y", "```\n"):
        small = unit * max(1, 40_000 // len(unit))
        once, eight = min(seconds(small), seconds(small)), seconds(small * 8)
        assert eight < 8 * once * 3 + 0.2, unit[:10]


@pytest.mark.starter
def test_the_starters_tokenizer_cuts_real_text_within_its_limit(starter_folder: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(starter_folder)

    def spans(text: str) -> list[tuple[int, int]]:
        return list(tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"])

    found = [one for one in read(FIXTURES, base=FIXTURES) if isinstance(one, Document)]
    found.append(
        Document("mixed", "灯台 😀 title", ("The café at Low Head — “closed”. 灯台は岩の上。😀😀 " * 80) + "x" * 3000)
    )
    for document in found:
        for max_tokens in (32, 192):
            passages = list(split(document, spans, max_tokens=max_tokens, overlap=12))
            check(document.text, passages, spans, max_tokens)
            assert passages
