"""What a bank holds already is told without its texts, but for those of the document that is asked for."""

from __future__ import annotations

import shutil
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest
import use_cases
from use_cases import counted, ingest, rows, story, write

from regrad_cli.bank import Snapshot, open_bank, remove_documents
from regrad_cli.errors import Damaged
from regrad_cli.holdings import Holdings
from regrad_cli.records import document_id


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    """A bank of five documents, one of them removed, in several shards; two have the same passages."""
    path = tmp_path_factory.mktemp("made") / ".gbank"
    bank = use_cases.make_bank(path, tiny_model_folder, tiny_embedder_folder)
    texts = {name: story(name) for name in ("Brannoch", "Velmora", "Skerry", "Gale")}
    docs = write(bank.parent / "docs", {f"{name}.md": text for name, text in texts.items()})
    ingest(bank, docs, commit_rows=4)
    write(docs, {"Again.md": texts["Gale"]})
    ingest(bank, docs, commit_rows=4)
    remove_documents(bank, ["docs/Skerry.md"])
    return bank


@pytest.fixture
def bank(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.parent, tmp_path / "own")) / ".gbank"


def test_it_tells_what_reading_all_texts_tells(made: Path) -> None:
    with open_bank(made) as opened:
        expected: dict[str, dict[Any, Any]] = defaultdict(dict)
        keys = defaultdict(set)
        for ref, passage, key in opened.passages():
            expected[passage.document][passage.ordinal, passage.offset, key] = ref
            keys[key].add(ref)
        held = Holdings(opened)
        assert len(expected) == 4 and max(map(len, keys.values())) == 2
        for document, own in expected.items():
            assert held.of_document(document) == own
            assert set(held.refs(document)) == set(own.values())
        for key, refs in keys.items():
            assert held.row_of(key) in refs
            assert held.row_of(key[:8] + bytes(24)) is None  # the beginning alone is no key
        assert held.row_of(bytes(32)) is None
        for gone in ("docs/Skerry.md", "docs/Nobody.md"):
            assert held.of_document(document_id(gone)) == {} and held.refs(document_id(gone)) == []


def test_of_an_empty_bank_nothing_is_held(tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path) -> None:
    with open_bank(use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder)) as opened:
        held = Holdings(opened)
        assert held.row_of(bytes(32)) is None and held.of_document("0" * 16) == {} and held.refs("0" * 16) == []


def test_a_new_file_is_added_without_reading_the_others(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = rows(bank)
    new = write(bank.parent / "docs", {"New.md": story("Kolm")}) / "New.md"
    with monkeypatch.context() as patched:
        patched.setattr(Snapshot, "passages", lambda *_, **__: pytest.fail("all texts were read"))
        patched.setattr(Snapshot, "texts", lambda *_, **__: pytest.fail("a text was read"))
        assert ingest(bank, new).added == 3
    assert {place: row for place, row in rows(bank).items() if place in before} == before


def test_where_the_text_of_another_document_is_damaged_a_new_one_still_comes_in(bank: Path) -> None:
    for file in (bank / "docs").iterdir():
        if b"Brannoch" in file.read_bytes():
            file.chmod(0o644)
            file.write_bytes(file.read_bytes().replace(b"Brannoch", b"Brannock"))
    new = write(bank.parent / "docs", {"New.md": story("Kolm")}) / "New.md"
    with counted() as calls:
        assert ingest(bank, new).added == 3
    assert calls
    with pytest.raises(Damaged):
        ingest(bank, bank.parent / "docs" / "Brannoch.md")
