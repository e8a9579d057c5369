"""The pages say what is: every command, option, test, file and link that they name exists; what they list is complete;
and the bank's page is enough to read a bank by.
"""

from __future__ import annotations

import json
import re
import runpy
import shlex
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import typer

import regrad_cli
from regrad_cli.bank import create_bank, index, layout, manifest, open_bank, shards, write_bank, writer
from regrad_cli.cli.app import app
from regrad_cli.learn.codec import Codec, parse_codec
from regrad_cli.learn.rows import widths
from regrad_cli.records import BankSettings, Passage, TensorShape, document_id, sha256_hex

ROOT = Path(__file__).parent.parent
PACKAGE = Path(regrad_cli.__file__).parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
FORMAT = (ROOT / "docs" / "bank-format.md").read_text(encoding="utf-8")
COMMANDS = dict(runpy.run_path(str(ROOT / "docs" / "make_commands.py"))["walk"](typer.main.get_command(app), "regrad"))
PROMISES = runpy.run_path(str(ROOT / "docs" / "make_promises.py"))
PLACES = ("regrad_cli/", "tests/", "examples/", "benchmarks/", "reliability/", "docs/", ".ci/")

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def blocks(text: str) -> list[str]:
    """What stands between fences or is indented as code."""
    indented = re.findall(r"^ {4}(\S.*)$", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S), flags=re.M)
    return re.findall(r"^```\w*\n(.*?)^```", text, flags=re.M | re.S) + indented


def spans(text: str) -> list[str]:
    """What stands between backticks in a line; a table's \\| is a bar."""
    prose = re.sub(r"^```.*?^```", "", text, flags=re.M | re.S)
    return [span.replace("\\|", "|") for span in re.findall(r"`([^`\n]+)`", prose)]


def invocations(text: str) -> Iterator[list[str]]:
    """The words of every `regrad …` on a page, in a sentence, a block or a pipeline."""
    for code in [*blocks(text), *spans(text)]:
        for part in re.split(r"&&|\|\||[;|\n](?![^\[]*\])", code.replace("\\\n", " ")):
            part = part.strip().removeprefix("$ ")
            if re.match(r"regrad(\s|$)", part):
                try:
                    yield shlex.split(part)
                except ValueError:  # an apostrophe
                    yield part.split()


def options_of(command: Any) -> set[str]:
    names = {name for parameter in command.params for name in [*parameter.opts, *parameter.secondary_opts]}
    return {name for name in names if name.startswith("-")} | {"-h", "--help"}


def problem_with(words: list[str]) -> str | None:
    """What is wrong with a command as it is written on a page; words in capitals and … stand for something."""
    path, rest = "regrad", words[1:]
    while rest and getattr(COMMANDS[path], "commands", None):
        word = rest[0]
        if word.startswith("-") or re.fullmatch(r"\[?[A-Z]+\]?(\.\.\.)?|…", word):
            break
        if f"{path} {word}" not in COMMANDS:
            return f"there is no command `{path} {word}`"
        path, rest = f"{path} {word}", rest[1:]
    known = options_of(COMMANDS[path]) | options_of(COMMANDS["regrad"])
    for word in rest:
        if re.match(r"--?[a-z]", word) and word.split("=")[0] not in known:
            return f"`{path}` has no option {word}"
    return None


@pytest.mark.parametrize(
    ("written", "wrong"),
    [
        ("regrad ask --mode rag 'what -x is'", False),
        ("regrad bank ls --json", False),
        ("regrad COMMAND --help", False),
        ("regrad …", False),
        ("regrad bank frobnicate", True),
        ("regrad ask --moode rag", True),
        ("regrad frobnicate", True),
        ("regrad ask - --json --frobnicate=1", True),
    ],
)
def test_a_wrong_command_on_a_page_would_be_noticed(written: str, wrong: bool) -> None:
    assert bool(problem_with(shlex.split(written))) is wrong
    assert [problem_with(words) is not None for words in invocations(f"Try `{written}`.")] == [wrong]
    fenced = f"```bash\ncat questions.txt | {written} | jq .answer\n```"
    assert [problem_with(words) is not None for words in invocations(fenced)] == [wrong]


@pages
def test_every_command_on_a_page_exists_with_its_options(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    assert [problem for words in invocations(text) if (problem := problem_with(words))] == []


@pages
def test_every_option_that_a_page_names_exists(page: Path) -> None:
    known = set().union(*map(options_of, COMMANDS.values()))
    named = {
        word.rstrip(",")
        for span in spans(page.read_text(encoding="utf-8"))
        if span.startswith("-")
        for word in span.split()
        if re.match(r"--?[a-z]", word)
    }
    assert named - known == set()


@pages
def test_every_file_that_a_page_names_exists(page: Path) -> None:
    """Paths below the repository's folders, and Python files by path or by name alone; sources in JSON are a bank's."""
    text = re.sub(r"^```json\n.*?^```", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    missing = []
    for span in [*spans(text), *blocks(text)]:
        for name in re.findall(r"(?<![\w/.<-])\.?[\w-]+(?:[/.][\w.-]+)*/?(?![\w<…*])", span):
            named = name.rstrip(".")
            if not (named.endswith(".py") or named.startswith(PLACES)) or named in PLACES:
                continue
            found = (ROOT / named).exists() or (PACKAGE / named).exists()
            if not found and "/" not in named:
                found = any((*PACKAGE.rglob(named), *(ROOT / "tests").rglob(named)))
            if not found:
                missing.append(named)
    assert missing == []


def anchor(heading: str) -> str:
    """A heading's name in a link, as GitHub makes it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize(
    "page", [*PAGES, ROOT / "CHANGELOG.md", ROOT / "examples" / "README.md"], ids=lambda page: page.name
)
def test_every_link_on_a_page_leads_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```|`[^`\n]+`", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?://", target):
            continue
        name, _, place = target.partition("#")
        linked = page.parent / name if name else page
        if not linked.exists():
            broken.append(target)
        elif place:
            headings = re.findall(r"^#+ (.*)$", linked.read_text(encoding="utf-8"), flags=re.M)
            if place not in map(anchor, headings):
                broken.append(target)
    assert broken == []


# ── promises ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_test_that_the_promises_name_exists() -> None:
    known = PROMISES["tests"]()
    named = {span for span in spans(PROMISES["PAGE"].read_text(encoding="utf-8")) if re.fullmatch(r"test_\w+", span)}
    assert len(named) > 50
    assert named - set(known) == set()


def test_the_promises_page_is_current() -> None:
    assert PROMISES["PAGE"].read_text(encoding="utf-8") == PROMISES["page"](), "run python docs/make_promises.py"


def test_every_promise_that_a_test_is_named_after_is_on_the_page_and_held_by_one() -> None:
    named = set().union(*map(PROMISES["numbers"], PROMISES["tests"]()))
    assert named == {promise.number for promise in PROMISES["PROMISES"]}


# ── design ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_every_module_is_in_the_design_and_no_other() -> None:
    text = (ROOT / "docs" / "design.md").read_text(encoding="utf-8")
    modules = {path.relative_to(PACKAGE).as_posix() for path in PACKAGE.rglob("*.py") if path.name != "__init__.py"}
    rows = set(re.findall(r"^\| `([\w/]+\.py)` \|", text, flags=re.M))
    assert rows == modules - {"__main__.py"}


# ── the bank's format ────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_format_page_has_every_field_tensor_and_folder() -> None:
    body = json.loads(_manifest().to_bytes()[0])
    names = {*body, *BankSettings.__dataclass_fields__, *manifest.ShardEntry.__dataclass_fields__}
    names |= {*manifest.BLOCKS, *(field.name for field in fields(manifest.IndexEntry))}
    names |= {*shards.expected_tensors(body_settings(), 1), *(field.name for field in fields(Passage))}
    written = set(re.findall(r"\w+", " ".join([*spans(FORMAT), *blocks(FORMAT)])))
    assert names - written == set()
    assert all(f"  {folder}/" in FORMAT for folder in layout.FOLDERS)


def test_the_format_pages_example_has_the_fields_of_a_manifest() -> None:
    example = json.loads(re.search(r"```json\n(\{\n.*?\n\})\n```", FORMAT, re.S)[1])  # type: ignore[index]
    real = json.loads(_manifest().to_bytes()[0])
    assert example.keys() == real.keys()
    assert example["settings"].keys() == real["settings"].keys()
    assert example["counts"].keys() == real["counts"].keys()
    shard = {field.name for field in fields(manifest.ShardEntry)}
    assert example["shards"][0].keys() == shard
    assert example["shards"][0]["blocks"].keys() == set(manifest.BLOCKS)
    line = re.search(r'```json\n(\{"document.*?\})\n```', FORMAT)[1]  # type: ignore[index]
    passage = shards.parse_line(line.encode())
    assert passage.document == document_id(passage.source) == example["shards"][0]["first"]
    assert shards.passage_line(passage).decode() == line + "\n"


def test_the_format_pages_figures_are_the_codes() -> None:
    def has(text: str) -> bool:
        return text in FORMAT

    assert has(f"at most {manifest.MANIFEST_LIMIT >> 20} MiB")
    assert has(f"at most {shards.HEADER_LIMIT >> 10} KiB")
    assert has(f"at most {shards.LINE_LIMIT >> 20} MiB")
    assert has(f"{manifest.SHARD_ROWS:,} rows and {writer.SHARD_BYTES >> 20} MiB")
    assert has(f"from {index.INDEX_FROM_ROWS:,} live rows on")
    assert (index.EXTEND_SHARE, index.REBUILD_SHARE) == (0.1, 0.3)
    assert shards._ROW == b"gbank row 1\0" and layout.FORMAT_TEXT == b"gbank 1\n"


def test_the_format_pages_sums_are_those_of_the_starter() -> None:
    tensors = []  # of all that θ has; gradients change those of the uppermost ten layers
    for layer in range(15, 30):
        for name, inputs, outputs in (("gate", 576, 1536), ("up", 576, 1536), ("down", 1536, 576)):
            tensors += [TensorShape(f"{layer}.{name}.A", 32, inputs), TensorShape(f"{layer}.{name}.B", outputs, 32)]
    changed = tensors[30:]
    codec = Codec(parse_codec("r4-int1"), changed)
    gradient = codec.code_bytes + 2 * codec.scale_count
    plain = 4 * sum(tensor.rows * tensor.cols for tensor in tensors)
    assert (len(changed), codec.code_bytes, codec.scale_count) == (60, 33_660, 60)
    code_bytes, scale_count = widths(codec.settings, changed, 4, 384)
    row = code_bytes + 2 * scale_count + 2 * 384 + 32 + 32 + 8 + 8 + 4
    whole = (f"{row:,} bytes", f"codes {code_bytes:,}", f"scales {2 * scale_count:,}", f"{plain / row:.1f} times")
    for figure in (f"{gradient:,} bytes a gradient", f"{plain / gradient:.1f} times", f"{plain:,}", *whole):
        assert figure in FORMAT, figure
    assert f"{gradient:,}" in (ROOT / "docs" / "design.md").read_text(encoding="utf-8")


READER: dict[str, Any] = {}
exec(re.search(r"<!-- reader -->\n```python\n(.*?)```", FORMAT, re.S)[1], READER)  # type: ignore[index]
PRIOR = b"any bytes"


def body_settings(codec: str = "r1-int4") -> BankSettings:
    tensors = (TensorShape("a", 4, 70), TensorShape("b", 65, 4), TensorShape("c", 5, 5))
    made = Codec(parse_codec(codec), tensors)
    return BankSettings(
        model=sha256_hex("model"), model_name="tiny", tokenizer=sha256_hex("tokenizer"), prior=sha256_hex(PRIOR),
        prior_name="none", prior_trained=False, tensors=tensors, codec=made.settings, code_bytes=made.code_bytes,
        scale_count=made.scale_count, embedder=sha256_hex("embedder"), embedder_name="minilm", embedding_dim=8,
    )  # fmt: skip


def _manifest() -> manifest.Manifest:
    return manifest.Manifest(
        bank="0" * 32, number=1, parent=None, time="", tool="", operation="init", run="", settings=body_settings(),
        prior=manifest.FileEntry(sha256_hex(PRIOR), len(PRIOR)), shards=(), index=None, counts=manifest.Counts(),
    )  # fmt: skip


@pytest.fixture(params=["r1-int4", "r3-int8", "int4", "int8", "r2-int2", "int2", "r3-int1"])
def bank(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Two shards with removed rows, random gradients, and text that JSON has to escape."""
    import torch

    made_for = body_settings(request.param)
    codec = Codec(made_for.codec, made_for.tensors)
    path = tmp_path / ".gbank"
    create_bank(path, made_for, PRIOR)
    with write_bank(path) as writing:
        for number, source in enumerate(("one.md", 'two "é" \\ \x1f \x7f \u2028.md')):
            generator = torch.Generator().manual_seed(number)
            gradients = {
                name: torch.randn((3, rows, cols), generator=generator) * 10.0 ** (-8 * number)
                for name, rows, cols in made_for.tensors
            }
            gradients["c"][1] = 0
            codes, scales = codec.encode(gradients)
            passages = [
                Passage(document_id(source), source, "A title", row, 9 * row, 5 + row, f"line\n\t{row} \U0001f30a")
                for row in range(3)
            ]
            embeddings = np.full((3, 8), 8**-0.5, np.float16)
            writing.add(passages, [bytes([number, row] * 16) for row in range(3)], codes, scales, embeddings)
            writing.commit("ingest")
        writing.remove(ref for ref, passage, _ in writing.snapshot.passages() if passage.ordinal == 2)
        writing.commit("rm")
        writing.finish()
    return path


def test_a_reader_written_from_the_page_reads_a_bank(bank: Path) -> None:
    with open_bank(bank) as snapshot:
        codec = Codec(snapshot.settings.codec, snapshot.settings.tensors)
        refs = [ref for ref, _, _ in snapshot.passages()]
        rows = snapshot.read_rows(refs)
    decoded = codec.decode(rows.codes, rows.scales)
    found = list(READER["rows"](bank))
    assert [Passage(**passage) for passage, _ in found] == list(rows.passages)
    assert len(found) == 4
    for row, (_, segments) in enumerate(found):
        ((begin, vector, tensors),) = segments
        assert (begin, vector) == (0, None)
        assert tensors.keys() == decoded.keys()
        for name, matrix in tensors.items():
            expected = decoded[name][row].double().numpy()
            np.testing.assert_allclose(np.array(matrix), expected, rtol=0, atol=1e-6 * np.abs(expected).max())


def test_a_reader_written_from_the_page_notices_any_flipped_bit_in_what_it_reads(bank: Path) -> None:
    right = [passage for passage, _ in READER["rows"](bank)]
    newest = max((bank / "snapshots").iterdir())
    for path in [newest, *(bank / "shards").iterdir(), *(bank / "docs").iterdir()]:
        data = path.read_bytes()
        for place in range(0, len(data), max(1, len(data) // 40)):
            path.write_bytes(data[:place] + bytes([data[place] ^ 4]) + data[place + 1 :])
            try:
                read = [passage for passage, _ in READER["rows"](bank)]
            except (AssertionError, ValueError, KeyError, TypeError, AttributeError):
                continue
            finally:
                path.write_bytes(data)
            assert read == right, f"byte {place} of {path.name}"  # a removed row, or a block that it does not read
