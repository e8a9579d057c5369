"""Formats → title and text: tables, columns, entities, encodings, records, and everything that cannot be read."""

from __future__ import annotations

import io
import json
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from regrad_cli import readers
from regrad_cli.characters import Unreadable, clean, decode, readable_name
from regrad_cli.markdown import first_heading, heading, plain_heading
from regrad_cli.readers import BadRecord, Fields, Record

FIXTURES = Path(__file__).parent / "fixtures" / "documents"


def fixture(name: str) -> bytes:
    return (FIXTURES / name).read_bytes()


def jsonl(data: bytes, fields: Fields | None = None, max_bytes: int = 10_000) -> list[Record | BadRecord]:
    return list(readers.read_jsonl(io.BytesIO(data), fields or Fields(), max_bytes))


# ── HTML ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_html_table_rows_are_lines_and_a_cell_that_spans_rows_keeps_its_column() -> None:
    text = readers.read_html(fixture("page.html"))[1]
    assert "| Brannoch | mercury vapour, installed 1958 | 19 nm |" in text  # a thin space is a space
    assert "| Low Head | carbide | 11 nm |\n|  | spare oil lamp | 7 nm |" in text


def test_html_entities_are_characters_and_markup_is_gone() -> None:
    title, text = readers.read_html(fixture("page.html"))
    assert title == "Stations & keepers — Northern district"
    assert "Ines\xa0Calloway; its café costs £4.50 <coins only>." in text
    assert "Wmax is 5×103 lumens" in text


def test_html_keeps_headings_lists_and_preformatted_lines() -> None:
    text = readers.read_html(fixture("page.html"))[1]
    assert "# Northern district\n" in text and "## Stations\n" in text
    assert "- Light the lamp at dusk.\n" in text and "* never in pencil." in text
    assert "06:00  lamp off\n18:30  lamp on\n" in text


@pytest.mark.parametrize("word", ["secret", "color: red", "a comment", "Nothing to see", "Home", "<b>"])
def test_html_scripts_styles_comments_navigation_and_hidden_parts_are_left_out(word: str) -> None:
    assert word not in readers.read_html(fixture("page.html"))[1]


def test_html_without_title_takes_its_first_heading() -> None:
    assert readers.read_html(b"<h1><a href='/x'>The <b>gale</b></a></h1><p>It blew.</p>")[0] == "The gale"


def test_html_in_a_declared_encoding_is_read_in_it() -> None:
    page = "<meta charset='windows-1251'><title>Маяк</title><p>Да.</p>".encode("cp1251")
    assert readers.read_html(page) == ("Маяк", "Да.\n")
    assert decode("Да".encode("iso-8859-5"), "iso-8859-5") == "Да"
    assert readers.read_html('<meta charset="nonsense"><p>café'.encode())[1] == "café\n"


def test_html_nested_too_deeply_says_so_instead_of_losing_its_text() -> None:
    with pytest.raises(Unreadable, match="nested"):
        readers.read_html(b"<div>" * 5000 + b"lost?" + b"</div>" * 5000)


# ── PDF ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_pdf_columns_are_read_one_after_the_other_with_their_lines_joined() -> None:
    title, text = readers.read_pdf(fixture("columns.pdf"))
    assert title == "Brannoch Light: a report"
    assert "logs the lamp at dusk. In 1931 the oil lamp gave way to a carbide burner, and" in text
    assert text.index("window fell in") < text.index("Supplies come by boat")
    assert "Perpetua and carries four hundred litres of water." in text


def test_pdf_table_rows_stay_lines_in_the_order_of_their_cells() -> None:
    title, text = readers.read_pdf(fixture("table.pdf"))
    assert "\nBrannoch mercury 19 I. Calloway\nSkerry Vhor LED 24 T. Adeyemi\n" in text
    assert "the café at Low Head is “closed”." in text
    assert title == ""  # its metadata say "(anonymous)": the file's name serves


def test_pdf_that_only_forbids_copying_is_read() -> None:
    assert readers.read_pdf(fixture("opens-without-password.pdf"))[1] == "Printing is forbidden, reading is not."


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (fixture("encrypted.pdf"), "opens without a password"),
        (fixture("scanned.pdf"), r"2 page\(s\) hold no text.*OCR"),
        (fixture("table.pdf")[:400], "damaged or cut short"),
        (b"%PDF-1.7 nothing more", "damaged or cut short"),
    ],
    ids=["encrypted", "scanned", "cut short", "header only"],
)
def test_pdf_that_cannot_be_read_says_what_to_do(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        readers.read_pdf(data)


def test_pdf_words_parted_at_a_line_end_are_whole_and_running_heads_come_once() -> None:
    pages = [f"Handbook page {n}\r\nThe keeper main\x02tains the light and\r\nthe lens of {n * 7}." for n in range(5)]
    text = readers.join_pages(pages)
    assert text.count("Handbook page") == 1
    for n in range(5):
        assert f"The keeper maintains the light and the lens of {n * 7}." in text


# ── Markdown and text ───────────────────────────────────────────────────────────────────────────────────────────────


def test_markdown_keeps_all_but_its_front_matter_whose_title_wins() -> None:
    title, text = readers.read_markdown(fixture("lamp.md"))
    assert title == "The lamp of Brannoch"
    assert fixture("lamp.md").decode().endswith(text) and text.startswith("# Lamp log\n")


@pytest.mark.parametrize(
    ("text", "title", "body"),
    [
        ("---\ntitle: Light: a history\n---\nText.", "Light: a history", "Text."),  # not quite YAML, and common
        ("+++\ntitle = 'Gale'\n+++\nText.", "Gale", "Text."),
        ("---\n# only a comment\n---\nText.", "", "---\n# only a comment\n---\nText."),
        ("---\n\nA paragraph between rules.\n\n---\nText.", "", "---\n\nA paragraph between rules.\n\n---\nText."),
        ("---\ntitle: [a, b]\n---\n## *Real* `title` #\n", "Real title", "## *Real* `title` #\n"),
        ("Intro\n\nThe gale\n========\n", "The gale", "Intro\n\nThe gale\n========\n"),
        ("```\n# code\n```\n# Heading", "Heading", "```\n# code\n```\n# Heading"),
        ("---\ntitle: open", "", "---\ntitle: open"),
    ],
)
def test_markdown_title_comes_from_front_matter_or_first_heading(text: str, title: str, body: str) -> None:
    found, rest = readers.read_markdown(text.encode())
    assert (found or first_heading(rest), rest) == (title or first_heading(body), body)


def test_markdown_headings_lose_their_marks() -> None:
    assert plain_heading("The [big **gale**](x.html) of `1974` &amp; after {#gale}") == "The big gale of 1974 & after"
    assert heading("##  Rules  ##") == (2, "Rules")
    assert heading("# C#") == (1, "C#")
    assert heading("#no space") is None and heading("####### seven") is None


def test_hostile_lines_take_linear_time() -> None:
    started = time.perf_counter()
    for line in (
        "# " + "a " * 200_000,
        "# " + "#" * 200_000,
        "# x" + " " * 200_000 + "y",
        "[" * 200_000,
        "# " + "[" * 9**6,
    ):
        first_heading(line)
    readers.read_html(b"<title" * 30_000)
    assert time.perf_counter() - started < 5


def test_text_titles_are_a_leading_heading_or_nothing() -> None:
    assert readers.read_text(b"# Gale\nIt blew.")[0] == "Gale"
    assert readers.read_text(b"It blew.\n# Gale")[0] == ""


@pytest.mark.parametrize(
    ("name", "title"),
    [
        ("release_notes-2024.txt", "Release notes 2024"),
        ("2024-05-01-gale_report.md", "2024-05-01 gale report"),
        ("README", "README"),
        ("v1.2.txt", "V1.2"),
        ("---.txt", "---.txt"),
    ],
)
def test_a_file_name_becomes_a_readable_title(name: str, title: str) -> None:
    assert readable_name(name) == title


# ── characters ──────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize(
    ("text", "encoding"),
    [
        ("Le café à l'été coûte cher. Élise préfère la forêt.", "cp1252"),
        ("Die Straße über den Fluß ist schön; Größe 5.", "latin-1"),
        ("The keeper’s “lamp” – lit.", "cp1252"),
        ("Маяк стоит на скале. Смотритель пишет в журнал.", "cp1251"),
        ("Маяк стоит на скале. Смотритель пишет в журнал.", "koi8-r"),
        ("灯台は岩の上に立っている。毎晩、灯台守は日誌を書く。", "shift_jis"),
        ("灯塔矗立在岩石上。每天晚上看守人写日志。", "gbk"),
        ("Zażółć gęślą jaźń, latarnik pisze dziennik.", "cp1250"),
        ("The keeper logs the lamp. 😀", "utf-8-sig"),
        ("The keeper logs the lamp. 😀", "utf-16"),
        ("The keeper logs the lamp. 😀", "utf-16-le"),
        ("The keeper logs the lamp. 😀", "utf-32"),
    ],
)
def test_text_of_many_encodings_is_read_as_it_was_written(text: str, encoding: str) -> None:
    assert decode(text.encode(encoding)) == text


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (bytes(range(256)) * 20, "binary"),
        (b"\x7fELF\x02\x01\x01" + bytes(200), "binary"),
        ("Naïve café, déjà vu, Zoë.".encode() + b"\xff" + b" and more", "broken bytes.*UTF-8"),
        (b"\xff\xfe\x00\xd8", "not valid UTF-16"),
    ],
    ids=["all bytes", "elf", "damaged UTF-8", "damaged UTF-16"],
)
def test_what_is_no_text_is_refused_with_a_reason(data: bytes, reason: str) -> None:
    with pytest.raises(Unreadable, match=reason):
        decode(data)


@given(st.text())
def test_clean_text_can_be_stored_and_keeps_every_other_character(text: str) -> None:
    cleaned = clean(text)
    cleaned.encode()
    assert "\0" not in cleaned and "\r" not in cleaned
    assert clean(cleaned.replace("\ufeff", "")) == cleaned.replace("\ufeff", "")


def test_control_characters_other_than_nul_are_kept_as_data() -> None:
    assert decode(b"a\0b \x1b[31mred\x1b[0m \x07 and some more text") == "ab \x1b[31mred\x1b[0m \x07 and some more text"


@given(st.binary(max_size=400))
def test_any_bytes_are_text_or_refused(data: bytes) -> None:
    for reader in (readers.read_text, readers.read_markdown, readers.read_html, readers.read_pdf):
        try:
            title, text = reader(data)
        except Unreadable as error:
            assert error.reason
        else:
            (title + text).encode()
    list(readers.read_jsonl(io.BytesIO(data), Fields(), 100))


# ── JSONL ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_jsonl_records_come_with_ids_and_lines_and_bad_lines_are_named() -> None:
    records = jsonl(fixture("keepers.jsonl"))
    assert records[0] == Record(1, "calloway", "Ines Calloway", "Ines Calloway keeps Brannoch Light.")
    assert records[1] == Record(2, None, "Tunde Adeyemi", "Tunde Adeyemi keeps Skerry Vhor.")
    assert isinstance(records[2], BadRecord) and records[2].line == 4 and "not valid JSON" in records[2].reason
    assert records[3] == Record(5, "7", "", "Low Head has no keeper.\n\nIt lost its keeper in 1987.")
    assert isinstance(records[4], BadRecord) and "object" in records[4].reason
    assert records[5] == Record(7, "nul", "", "A NUL and a lone \ufffd surrogate, and an escape \x1b[31m.")


def test_jsonl_fields_are_named_by_the_caller() -> None:
    line = b'{"key": "k", "head": "H", "body": "B"}\n'
    assert jsonl(line, Fields("head", "body", "key")) == [Record(1, "k", "H", "B")]
    (missing,) = jsonl(line)
    assert isinstance(missing, BadRecord) and "'text' is missing (it has: key, head, body)" in missing.reason
    (unnamed,) = jsonl(b'{"text": "x"}', Fields(id="key"))
    assert isinstance(unnamed, BadRecord) and "'key'" in unnamed.reason


@pytest.mark.parametrize(
    "line", [b"[" * 14_000, b'{"text": ' + b"9" * 6000 + b"}", b'{"text": "\xff"}', b'{"text": " "}', b"x" * 20_000]
)
def test_jsonl_hostile_line_is_one_bad_record_and_the_next_is_read(line: bytes) -> None:
    bad, good = jsonl(line + b'\n{"text": "fine"}\n', max_bytes=15_000)
    assert isinstance(bad, BadRecord) and bad.line == 1 and bad.reason
    assert good == Record(2, None, "", "fine")


def test_a_file_that_is_no_jsonl_is_one_complaint_not_a_flood() -> None:
    (only,) = jsonl(json.dumps({"a": list(range(5000))}, indent=1).encode())
    assert isinstance(only, BadRecord) and only.line is None


# ── CSV ─────────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_csv_with_semicolons_quotes_and_lines_inside_cells_is_read() -> None:
    records = list(readers.read_csv(fixture("boats.csv"), Fields()))
    assert records == [
        Record(2, "k1", "Boat", 'Perpetua carries "four hundred" litres;\nof water.'),
        Record(5, "k2", "", "The skipper is Ines Calloway."),
        BadRecord(6, "its 'text' is empty"),
        Record(7, "k1", "Boat again", "The boat is painted green."),
    ]


def test_csv_without_the_column_names_those_it_has() -> None:
    with pytest.raises(Unreadable, match=r"no column 'text' \(it has: name, body\).*name the column"):
        list(readers.read_csv(b"name,body\na,b\n", Fields()))
    assert list(readers.read_csv(b"Name\tBODY\na\tb\n", Fields("name", "body"))) == [Record(2, None, "a", "b")]


def test_csv_rows_with_too_few_cells_and_long_cells_do_not_end_the_file() -> None:
    data = b"title,text\nonly\nlong," + b"x" * 200_000 + b"\nok,fine\n"
    short, long, last = readers.read_csv(data, Fields())
    assert isinstance(short, BadRecord) and short.line == 2
    assert isinstance(long, Record) and len(long.text) == 200_000
    assert last == Record(4, None, "ok", "fine")


@pytest.mark.parametrize(
    ("name", "start", "kind"),
    [
        ("a.MD", b"x", "markdown"),
        ("a.txt", b"%PDF-1.4", "pdf"),
        ("page", b"<!DOCTYPE html><p>", "html"),
        ("a.tsv", b"x", "csv"),
        ("a.py", b"import x", "text"),
        ("README", b"Hello", "text"),
    ],
)
def test_the_kind_of_a_file_is_told_by_its_name_or_its_first_bytes(name: str, start: bytes, kind: str) -> None:
    assert readers.kind_of(name, start) == kind
