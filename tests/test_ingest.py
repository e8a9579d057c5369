"""Ingest on tiny models: what is computed, copied, replaced, pruned and left alone. Each test has a bank of its own."""

from __future__ import annotations

import io
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import use_cases
from use_cases import counted, files, ingest, number, rows, rows_of, skipped, sources, story, write

from regrad_cli.bank import open_bank, remove_documents
from regrad_cli.batch import Batch
from regrad_cli.errors import Locked, UsageProblem
from regrad_cli.records import DocumentDone, DocumentGone, Notice, document_id


@pytest.fixture(scope="module")
def empty(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    path = tmp_path_factory.mktemp("empty") / ".gbank"
    return use_cases.make_bank(path, tiny_model_folder, tiny_embedder_folder)


@pytest.fixture
def bank(empty: Path, tmp_path: Path) -> Path:
    """A bank without documents, in a folder of its own."""
    return Path(shutil.copytree(empty, tmp_path / "own" / ".gbank"))


@pytest.fixture
def docs(bank: Path) -> Path:
    """Three documents of three passages beside the bank."""
    return write(bank.parent / "docs", {f"{name}.md": story(name) for name in ("Brannoch", "Velmora", "Skerry")})


def jsonl(*records: tuple[str, str]) -> str:
    return "".join(json.dumps({"id": key, "title": key, "text": text}) + "\n" for key, text in records)


# ── what is computed ────────────────────────────────────────────────────────────────────────────────────────────────


def test_ingest_adds_every_passage_and_its_summary_agrees_with_the_bank(bank: Path, docs: Path) -> None:
    events = list(use_cases.events_of(bank, docs))
    summary = events[-1]
    with open_bank(bank) as opened:
        stats = opened.stats()
    assert (summary.documents, summary.passages, summary.added) == (3, 9, 9)
    assert (stats["documents"], stats["passages"], stats["dead"]) == (3, 9, 0)
    assert summary.snapshot == stats["snapshot"]
    assert {event.source: event.added for event in events if isinstance(event, DocumentDone)} == {
        "docs/Brannoch.md": 3,
        "docs/Velmora.md": 3,
        "docs/Skerry.md": 3,
    }
    steps = use_cases.progress(events)
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert (steps[-1].done, steps[-1].total) == (9, 9)


def test_ingesting_again_makes_no_snapshot_and_computes_nothing(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    before = files(bank)
    with counted() as calls:
        summary = ingest(bank, docs)
    assert calls == []
    assert files(bank) == before
    assert (summary.added, summary.unchanged, summary.replaced, summary.removed) == (0, 9, 0, 0)


@pytest.mark.parametrize("finished", [1, 2, 3])
def test_documents_that_did_not_change_are_told_a_few_at_a_time(
    bank: Path, docs: Path, monkeypatch: pytest.MonkeyPatch, finished: int
) -> None:
    ingest(bank, docs)
    before = files(bank)
    batches = []
    packed = Batch.packed
    monkeypatch.setattr("regrad_cli.ingest.FINISHED", finished)
    monkeypatch.setattr(Batch, "packed", lambda batch: (batches.append(len(batch.finished)), packed(batch))[1])
    done = [event for event in use_cases.events_of(bank, docs) if isinstance(event, DocumentDone)]
    assert sorted(event.source for event in done) == ["docs/Brannoch.md", "docs/Skerry.md", "docs/Velmora.md"]
    assert max(batches) == finished and sum(batches) == 3
    assert files(bank) == before


def test_a_changed_file_replaces_only_its_own_changed_passages(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    before = rows(bank)
    text = (docs / "Velmora.md").read_text()
    (docs / "Velmora.md").write_text(text.replace("keeper 1", "warden 1"))
    with counted() as calls:
        summary = ingest(bank, docs)
    assert calls == [1]
    assert (summary.added, summary.unchanged, summary.replaced) == (1, 8, 1)
    after = rows(bank)
    changed = {place for place in before if before[place] != after[place]}
    assert changed == {(document_id("docs/Velmora.md"), 1)}
    assert "warden 1" in after[document_id("docs/Velmora.md"), 1][4]


def test_moved_passages_are_copied_not_computed(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    before = rows_of(bank, "docs/Velmora.md")
    title, rest = (docs / "Velmora.md").read_text().split("\n", 1)
    first = "## New\n\nA new first part stands here, and it is long enough to be one of its own, or so one hopes."
    (docs / "Velmora.md").write_text(f"{title}\n\n{first}\n{rest}")
    with counted() as calls:
        ingest(bank, docs)
    after = rows_of(bank, "docs/Velmora.md")
    kept = {row[4:] for row in before.values()} & {row[4:] for row in after.values()}
    assert len(kept) >= 2, "the later parts moved and stayed what they were"
    assert sum(calls) == len(after) - len(kept)
    assert sorted(ordinal for _, ordinal in after) == list(range(len(after)))


def test_a_renamed_file_is_copied_not_computed(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    before = [row[1:] for row in rows_of(bank, "docs/Velmora.md").values()]
    (docs / "Velmora.md").rename(docs / "harbour.md")
    with counted() as calls:
        summary = ingest(bank, docs, prune=True)
    assert calls == []
    assert (summary.added, summary.removed) == (3, 1)
    assert [row[1:] for row in rows_of(bank, "docs/harbour.md").values()] == before
    assert rows_of(bank, "docs/Velmora.md") == {}


def test_two_documents_with_the_same_passages_own_a_row_each_and_each_passage_is_computed_once(bank: Path) -> None:
    docs = write(bank.parent / "docs", {"a.md": story("Velmora"), "b.md": story("Velmora")})
    with counted() as calls:
        summary = ingest(bank, docs)
    assert (summary.added, sum(calls)) == (6, 3)
    first, second = rows_of(bank, "docs/a.md"), rows_of(bank, "docs/b.md")
    assert [row[1:] for row in first.values()] == [row[1:] for row in second.values()]
    remove_documents(bank, ["docs/a.md"])
    assert rows_of(bank, "docs/b.md") == second
    with counted() as calls:
        ingest(bank, docs)
    assert calls == [], "what another document still has is copied"
    assert rows_of(bank, "docs/a.md") == first


def test_a_changed_file_that_changes_back_gets_its_rows_back(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    before, text = rows(bank), (docs / "Velmora.md").read_text()
    write(docs, {"Velmora.md": story("Velmora", parts=2, about="nothing is lit")})
    ingest(bank, docs)
    assert rows(bank) != before
    write(docs, {"Velmora.md": text})
    ingest(bank, docs)
    assert rows(bank) == before


def test_a_bank_without_text_is_brought_up_to_date_all_the_same(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    bank = use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder, keep_text=False)
    docs = write(tmp_path / "docs", {"a.md": story("Velmora"), "b.md": story("Skerry")})
    ingest(bank, docs)
    (docs / "a.md").write_text(story("Velmora").replace("keeper 1", "warden 1"))
    with counted() as calls:
        summary = ingest(bank, docs)
    assert (calls, summary.added, summary.unchanged) == ([1], 1, 5)
    assert all(row[4] is None for row in rows(bank).values())
    assert not any(b"warden" in content for content in files(bank).values())


def test_a_dry_run_changes_nothing_and_foretells_the_ingest(bank: Path, docs: Path) -> None:
    before = files(bank)
    foretold = ingest(bank, docs, dry_run=True)
    assert files(bank) == before
    done = ingest(bank, docs)
    assert (foretold.dry_run, done.dry_run) == (True, False)
    assert (foretold.documents, foretold.passages, foretold.added) == (done.documents, done.passages, done.added)
    assert foretold.estimated_seconds > 0
    with open_bank(bank) as opened:
        sizes = opened.stats()["bytes"]
    written = sizes["gradients"] + sizes["embeddings"] + sizes["text"]
    assert written / 3 < foretold.estimated_bytes < 3 * written
    assert ingest(bank, docs, dry_run=True).added == 0


def test_where_it_computes_is_said_once_and_only_if_it_computes(bank: Path, docs: Path) -> None:
    def said() -> list[str]:
        events = use_cases.events_of(bank, docs, commit_rows=2)
        return [event.message for event in events if isinstance(event, Notice) and "computing" in event.message]

    assert said() == ["computing on cpu, float32"]
    assert said() == []
    shutil.copyfile(docs / "Velmora.md", docs / "A copy.md")  # first in order: copied, nothing is computed for it
    write(docs, {"new.md": story("new")})
    assert said() == ["computing on cpu, float32"]


def test_while_one_ingest_runs_another_is_refused_and_the_bank_can_be_read(bank: Path, docs: Path) -> None:
    events = use_cases.events_of(bank, docs, commit_rows=3)
    next(event for event in events if isinstance(event, DocumentDone))
    with pytest.raises(Locked):
        ingest(bank, docs)
    assert len(sources(bank)) in (1, 2)
    events.close()
    assert ingest(bank, docs).documents == 3


# ── what cannot be taken ────────────────────────────────────────────────────────────────────────────────────────────


def test_what_cannot_be_read_is_named_and_the_rest_is_done(bank: Path, docs: Path) -> None:
    write(docs, {"binary.bin": bytes(range(256)) * 9, "empty.txt": ""})
    summary = ingest(bank, docs, bank.parent / "none.md")
    assert set(skipped(summary)) == {"docs/binary.bin", "docs/empty.txt", "none.md"}
    assert summary.documents == 3


def test_a_document_of_one_token_is_named_and_skipped(bank: Path, docs: Path) -> None:
    summary = ingest(bank, docs, stdin=io.BytesIO(b"a"))
    ((source, reason),) = skipped(summary).items()
    assert source.startswith("stdin#") and "token" in reason
    assert summary.documents == 3
    assert len(sources(bank)) == 3


def test_passages_longer_than_the_models_positions_are_refused_at_init(
    tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    with pytest.raises(UsageProblem, match="1024"):
        use_cases.make_bank(tmp_path / ".gbank", tiny_model_folder, tiny_embedder_folder, chunk_tokens=2000)
    assert not (tmp_path / ".gbank").exists()


# ── pruning ─────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_deleted_file_stays_without_prune_and_goes_with_it(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    (docs / "Skerry.md").unlink()
    assert ingest(bank, docs).removed == 0
    assert len(sources(bank)) == 3
    with counted() as calls:
        assert ingest(bank, docs, prune=True).removed == 1
    assert calls == []
    assert sources(bank) == {"docs/Brannoch.md", "docs/Velmora.md"}


def test_prune_never_touches_documents_outside_the_given_paths(bank: Path, docs: Path, tmp_path: Path) -> None:
    other = write(bank.parent / "docs-2", {"a.md": story("a")})
    outside = write(tmp_path / "elsewhere", {"b.md": story("b"), "c.md": story("c")})
    ingest(bank, docs, other, outside)
    for folder in (docs, other, outside):
        shutil.rmtree(folder)
    write(docs, {"Velmora.md": story("Velmora")})
    assert ingest(bank, docs, prune=True).removed == 2
    assert sources(bank) == {
        "docs/Velmora.md",
        "docs-2/a.md",
        f"{outside.resolve()}/b.md",
        f"{outside.resolve()}/c.md",
    }
    write(outside, {"c.md": story("c")})
    assert ingest(bank, outside, prune=True).removed == 1
    assert len(sources(bank)) == 3


def test_prune_does_not_take_unreadable_files_for_gone(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    before = rows(bank)
    (docs / "Skerry.md").write_bytes(bytes(range(256)) * 9)
    (docs / "Velmora.md").unlink()
    (docs / "Velmora.md").symlink_to(docs / "nowhere.md")
    summary = ingest(bank, docs, prune=True)
    assert set(skipped(summary)) == {"docs/Skerry.md", "docs/Velmora.md"}
    assert rows(bank) == before


def test_prune_does_not_take_an_unreadable_folder_for_empty(
    bank: Path, docs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(bank, docs)
    real = os.scandir

    def scandir(path: Path) -> Any:  # root may read every folder, so the system's answer is made up
        if Path(path) == docs:
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    summary = ingest(bank, bank.parent, prune=True)
    assert (summary.removed, set(skipped(summary))) == (0, {"docs"})


def test_prune_does_not_take_a_path_that_is_not_there_for_an_empty_one(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    docs.rename(bank.parent / "unmounted")
    summary = ingest(bank, docs, prune=True)
    assert (summary.removed, set(skipped(summary))) == (0, {"docs"})
    assert len(sources(bank)) == 3


def test_prune_does_not_take_a_name_that_begins_like_a_path_for_a_record_of_it(bank: Path) -> None:
    texts = {name: story(name) for name in ("C/intro.md", "C#/intro.md", "notes.md", "notes.md#old.md")}
    langs = write(bank.parent / "langs", texts)
    ingest(bank, langs)
    (langs / "C#" / "intro.md").unlink()
    assert ingest(bank, langs / "C", langs / "notes.md", prune=True).removed == 0
    assert len(sources(bank)) == 4
    assert ingest(bank, langs, prune=True).removed == 1


def test_prune_keeps_what_was_named_once_and_is_left_out_now_as_long_as_its_file_is_there(bank: Path) -> None:
    texts = {".hid.md": story("a"), "caf\udce9.tmp": story("b"), "x.tmp": story("c"), ".gitignore": "*.tmp\n.*.jsonl\n"}
    texts[".data.jsonl"] = jsonl(("one", "The first record tells of the harbour."))
    folder = write(bank.parent / "ig", {**texts, "seen.md": story("d")})
    left_out = [folder / name for name in texts if name != ".gitignore"]
    ingest(bank, folder, *left_out)
    before = rows(bank)
    assert {"ig/.data.jsonl#one", "ig/caf\\xe9.tmp"} < sources(bank)
    assert (ingest(bank, folder, prune=True).removed, rows(bank)) == (0, before)
    for path in left_out:
        path.unlink()
    assert ingest(bank, folder, prune=True).removed == 4
    assert sources(bank) == {"ig/seen.md"}


def test_a_file_whose_place_a_folder_took_goes_with_prune(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    (docs / "Skerry.md").unlink()
    write(docs, {"Skerry.md/part.md": story("part")})
    assert ingest(bank, docs, prune=True).removed == 1
    assert sources(bank) == {"docs/Brannoch.md", "docs/Velmora.md", "docs/Skerry.md/part.md"}


def test_a_record_removed_from_a_jsonl_goes_with_prune(bank: Path) -> None:
    data = bank.parent / "data.jsonl"
    data.write_text(jsonl(("one", "The first record tells of the harbour."), ("two", "The second tells of the bell.")))
    ingest(bank, data)
    assert sources(bank) == {"data.jsonl#one", "data.jsonl#two"}
    data.write_text(jsonl(("two", "The second tells of the bell.")))
    assert ingest(bank, data).removed == 0
    assert ingest(bank, data, prune=True).removed == 1
    assert sources(bank) == {"data.jsonl#two"}


@pytest.mark.parametrize("way", ["unreadable", "not a record in it", "one line of it is broken"])
def test_prune_keeps_the_records_of_a_jsonl_that_cannot_be_read_whole(bank: Path, way: str) -> None:
    data = bank.parent / "data.jsonl"
    whole = jsonl(("one", "The first record tells of the harbour."), ("two", "The second tells of the bell."))
    data.write_text(whole)
    ingest(bank, data)
    before = rows(bank)
    if way == "unreadable":
        data.unlink()
        os.mkfifo(data)
    elif way == "one line of it is broken":
        data.write_text(whole[:20] + "\n" + whole.split("\n", 1)[1])
    else:
        data.write_text("nothing\n")
    summary = ingest(bank, data, prune=True)
    assert summary.skipped
    assert (summary.removed, rows(bank)) == (0, before)


@pytest.mark.parametrize("name", [None, "notes.md"])
@pytest.mark.parametrize("format", ["text", "jsonl"])
def test_prune_never_touches_documents_of_standard_input(bank: Path, docs: Path, format: str, name: str | None) -> None:
    given = story("Pipe") if format == "text" else jsonl(("one", story("Pipe")), ("two", story("Pump")))
    stream = {"stdin_format": format, "stdin_name": name}
    ingest(bank, docs, stdin=io.BytesIO(given.encode()), **stream)
    many = len(sources(bank))
    assert ingest(bank, bank.parent, prune=True).removed == 0
    assert len(sources(bank)) == many
    given = story("Pipe", 2) if format == "text" else jsonl(("one", story("Pipe")))
    assert ingest(bank, docs, stdin=io.BytesIO(given.encode()), prune=True, **stream).removed == 0


def test_a_named_stream_never_replaces_a_file_of_that_name(bank: Path) -> None:
    write(bank.parent, {"notes.md": story("File")})
    ingest(bank, bank.parent / "notes.md")
    ingest(bank, stdin=io.BytesIO(story("Pipe").encode()), stdin_name="notes.md")
    assert sources(bank) == {"notes.md", "stdin#notes.md"}
    ingest(bank, stdin=io.BytesIO(story("Pipe", 2).encode()), stdin_name="notes.md")
    assert len(rows_of(bank, "stdin#notes.md")) == 2
    assert len(rows_of(bank, "notes.md")) == 3


def test_a_file_named_like_standard_input_is_a_document_of_its_own_and_is_pruned(bank: Path) -> None:
    folder = write(bank.parent, {"stdin#x": story("File"), "stdin#y/z.md": story("In a folder"), "a.md": story("a")})
    (folder / "stdin#r.jsonl").write_text(jsonl(("one", "The first record tells of the harbour.")))
    ingest(bank, folder, stdin=io.BytesIO(story("Pipe", 2).encode()), stdin_name="x")
    named = {"./stdin#x", "./stdin#y/z.md", "./stdin#r.jsonl#one"}
    assert sources(bank) == named | {"a.md", "stdin#x"}
    assert len(rows_of(bank, "stdin#x")) == 2
    assert ingest(bank, folder, prune=True).removed == 0
    for file in ("stdin#x", "stdin#y/z.md", "stdin#r.jsonl"):
        (folder / file).unlink()
    assert ingest(bank, folder, prune=True).removed == 3
    assert sources(bank) == {"a.md", "stdin#x"}


@pytest.mark.parametrize("way", ["link to the folder", "folder above the bank", "relative", "the folder of the bank"])
def test_prune_knows_the_given_folder_however_it_is_named(
    bank: Path, docs: Path, way: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ingest(bank, docs)
    (docs / "Skerry.md").unlink()
    path = {"folder above the bank": bank.parent.parent, "the folder of the bank": bank.parent}.get(way, docs)
    if way == "link to the folder":
        path = bank.parent / "link"
        path.symlink_to(docs)
    elif way == "relative":
        monkeypatch.chdir(docs)
        path = Path()
    assert ingest(bank, path, prune=True).removed == 1
    assert sources(bank) == {"docs/Brannoch.md", "docs/Velmora.md"}


def test_prune_in_a_bank_that_is_reached_through_a_link(bank: Path, docs: Path, tmp_path: Path) -> None:
    ingest(bank, docs)
    link = tmp_path / "link"
    link.symlink_to(bank.parent)
    (docs / "Skerry.md").unlink()
    assert ingest(link / ".gbank", link, prune=True).removed == 1


def test_a_dry_run_with_prune_says_how_many_would_go(bank: Path, docs: Path) -> None:
    ingest(bank, docs)
    (docs / "Skerry.md").unlink()
    before = number(bank)
    assert ingest(bank, docs, prune=True, dry_run=True).removed == 1
    assert number(bank) == before


@pytest.mark.parametrize("dry_run", [True, False])
def test_what_is_pruned_is_named(bank: Path, docs: Path, dry_run: bool) -> None:
    ingest(bank, docs)
    (docs / "Skerry.md").unlink()
    events = list(use_cases.events_of(bank, docs, prune=True, dry_run=dry_run))
    gone = [event for event in events if isinstance(event, DocumentGone)]
    assert gone == [DocumentGone(document_id("docs/Skerry.md"), "docs/Skerry.md")]
