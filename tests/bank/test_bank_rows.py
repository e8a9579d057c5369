"""What goes into a bank comes out of it: rows, documents, counts, idempotence."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given
from hypothesis import settings as run_with
from hypothesis import strategies as st
from made_banks import PRIOR, all_refs, content, make_bank, rows, settings, tree

from regrad_cli.bank import create_bank, locate_bank, log, open_bank, remove_documents, verify, write_bank
from regrad_cli.bank.locks import hold_lock
from regrad_cli.bank.manifest import Counts
from regrad_cli.bank.shards import ShardReader, parse_line, passage_line
from regrad_cli.errors import NoBank, NonFinite, StorageFailed, UsageProblem
from regrad_cli.records import Passage, RowRef, document_id


def expected(*documents: tuple[str, int]) -> dict[str, tuple]:
    found = {}
    for source, count in documents:
        passages, keys, codes, scales, embeddings = rows(source, count)
        for row, passage in enumerate(passages):
            arrays = (codes[row].tobytes(), scales[row].tobytes(), embeddings[row].tobytes())
            found[passage.id] = (passage, keys[row], *arrays)
    return found


def test_rows_come_back_as_they_went_in(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 5), ("b.md", 1)], [("c.md", 3)])
    assert content(bank) == expected(("a.md", 5), ("b.md", 1), ("c.md", 3))
    assert list(verify(bank)) == []


def test_rows_do_not_depend_on_how_they_were_committed(tmp_path: Path) -> None:
    apart = make_bank(tmp_path / "apart", [("a.md", 5)], [("b.md", 2)], [("c.md", 3)])
    together = make_bank(tmp_path / "together", [("c.md", 3), ("a.md", 5), ("b.md", 2)])
    assert content(apart) == content(together)


def test_the_same_commits_give_the_same_shards_and_docs(tmp_path: Path) -> None:
    def written(path: Path) -> dict[str, bytes]:
        return {name: data for name, data in tree(path).items() if name.startswith(("shards/", "docs/", "priors/"))}

    one = make_bank(tmp_path / "one", [("a.md", 5)], [("b.md", 2)])
    two = make_bank(tmp_path / "two", [("a.md", 5)], [("b.md", 2)])
    assert written(one) == written(two)


def test_a_removal_counts_right_and_looks_only_where_its_documents_may_lie(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 5)], [("b.md", 4)], [("c.md", 2)], [("a.md", 6), ("c.md", 3)])
    with open_bank(bank) as snapshot:
        shards = snapshot.manifest.shards
        assert len(shards) == 4 and snapshot.manifest.counts.documents == 3

    def may_hold(*names: str) -> set[str]:
        ids = [document_id(name) for name in names]
        return {shard.sha256 for shard in shards if any(shard.first <= each <= shard.last for each in ids)}

    read: set[str] = set()
    block = ShardReader.block

    def noted(self: ShardReader, tensor: str) -> object:
        if tensor == "documents":
            read.add(self.entry.sha256)
        return block(self, tensor)

    monkeypatch.setattr(ShardReader, "block", noted)
    remove_documents(bank, ["b.md"])
    assert read == may_hold("b.md") != may_hold("a.md", "b.md", "c.md")
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.counts.documents == 2
    read.clear()
    remove_documents(bank, ["a.md"])
    assert read == may_hold("a.md")
    with open_bank(bank) as snapshot:
        counts = snapshot.manifest.counts
    assert (counts.documents, counts.passages, counts.dead) == (1, 5, 15) and list(verify(bank)) == []
    remove_documents(bank, ["c.md"])
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.counts == Counts(dead=20)
    assert list(verify(bank)) == []


def test_arrays_are_read_in_the_order_asked_for(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 5)], [("b.md", 4)])
    with open_bank(bank) as snapshot:
        read = snapshot.read_rows([RowRef(1, 3), RowRef(0, 0), RowRef(1, 0)])
        _, keys_a, codes_a, _, _ = rows("a.md", 5)
        passages_b, keys_b, codes_b, scales_b, embeddings_b = rows("b.md", 4)
        assert read.codes.dtype == np.uint8 and read.scales.dtype == read.embeddings.dtype == np.float16
        np.testing.assert_array_equal(read.codes, [codes_b[3], codes_a[0], codes_b[0]])
        np.testing.assert_array_equal(read.scales[0], scales_b[3])
        np.testing.assert_array_equal(read.embeddings[2], embeddings_b[0])
        assert read.keys == (keys_b[3], keys_a[0], keys_b[0])
        assert read.passages[0] == passages_b[3]
        assert snapshot.read_rows([]).codes.shape == (0, 40)


def test_a_shard_is_a_safetensors_file_that_the_library_reads(tmp_path: Path) -> None:
    from safetensors.numpy import load_file

    bank = make_bank(tmp_path / "b", [("a.md", 5)])
    (shard,) = (bank / "shards").iterdir()
    tensors = load_file(shard)
    np.testing.assert_array_equal(tensors["codes"], rows("a.md", 5)[2])
    assert tensors["keys"].shape == (5, 32) and tensors["embeddings"].dtype == np.float16


def test_promise_12_a_commit_of_nothing_changes_nothing(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 5)])
    before = tree(bank)
    with write_bank(bank) as writer:
        assert writer.commit("ingest") == writer.finish() == 2
    assert tree(bank) == before


@run_with(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    steps=st.lists(
        st.tuples(st.sampled_from(["add", "remove", "replace", "again"]), st.sampled_from("abcde"), st.integers(1, 4)),
        max_size=8,
    )
)
def test_promise_12_any_history_ends_in_the_rows_it_should(
    tmp_path_factory: pytest.TempPathFactory, steps: list
) -> None:
    """Adding, replacing and removing in any order: content, counts and verification agree with a plain dict."""
    bank = make_bank(tmp_path_factory.mktemp("bank") / "b")
    model: dict[str, int] = {}
    for step, source, count in steps:
        with write_bank(bank) as writer:
            present = list(writer.snapshot.passages(document_id(source)))
            if step == "again" and source in model:
                count = model[source]
            writer.remove(ref for ref, _, _ in present)
            model.pop(source, None)
            if step != "remove":
                writer.add(*rows(source, count))
                model[source] = count
            writer.commit(step)
            writer.finish()
    assert content(bank) == expected(*model.items())
    with open_bank(bank) as snapshot:
        stats = snapshot.stats()
        assert stats["documents"] == len(model) and stats["passages"] == sum(model.values())
        assert stats["tokens"] == sum(7 * count + count * (count - 1) // 2 for count in model.values())
        assert {entry["id"]: entry["passages"] for entry in snapshot.documents()} == {
            document_id(source): count for source, count in model.items()
        }
    assert list(verify(bank)) == []


def test_what_was_removed_from_a_shard_stays_removed_when_more_of_it_goes(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2), ("b.md", 3), ("c.md", 1)])
    for left, gone in (([("b.md", 3), ("c.md", 1)], "a.md"), ([("b.md", 3)], "c.md"), ([], "b.md")):
        remove_documents(bank, [gone])
        assert content(bank) == expected(*left)
    assert list(verify(bank)) == []


def test_rows_removed_and_added_again_live_in_their_old_shard(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 5)])
    remove_documents(bank, ["a.md"])
    with write_bank(bank) as writer:
        writer.add(*rows("a.md", 5))
        writer.commit("ingest")
    assert content(bank) == expected(("a.md", 5))
    with open_bank(bank) as snapshot:
        assert len(snapshot.manifest.shards) == 1 and snapshot.stats()["dead"] == 0


def test_large_commits_are_cut_into_shards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("regrad_cli.bank.writer.SHARD_ROWS", 4)
    bank = make_bank(tmp_path / "b", [("a.md", 9)])
    with open_bank(bank) as snapshot:
        assert [shard.rows for shard in snapshot.manifest.shards] == [4, 4, 1]
    assert content(bank) == expected(("a.md", 9))


def test_without_text_no_text_is_written(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("secret.md", 3)], keep_text=False)
    assert all(" é".encode() not in data for data in tree(bank).values())
    with open_bank(bank) as snapshot:
        assert [passage.text for _, passage, _ in snapshot.passages()] == [None] * 3


@given(st.text(), st.text(), st.text(alphabet=st.characters(exclude_categories=[])))
def test_any_text_survives_its_line(source: str, title: str, text: str) -> None:
    passage = Passage(document_id("x"), source, title, 0, 0, 1, text)
    line = passage_line(passage)
    line.decode("utf-8")
    assert line.endswith(b"\n") and line.count(b"\n") == 1
    again = parse_line(line)
    # Two lone halves side by side become the character they stand for: there is no other spelling in JSON.
    assert passage_line(again) == passage_line(parse_line(passage_line(again)))
    joined = text.encode("utf-16", "surrogatepass").decode("utf-16", "surrogatepass")
    assert (again.source, again.title, again.text) == (source, title, joined)


def test_promise_22_what_is_not_finite_never_enters(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    for place in (3, 4):  # scales, embeddings
        for value in (np.nan, np.inf, -np.inf):
            arguments = list(rows("a.md", 3))
            arguments[place][1, 2] = value
            with write_bank(bank) as writer, pytest.raises(NonFinite, match=r"a\.md"):
                writer.add(*arguments)
    assert content(bank) == {}


def test_buffers_may_be_used_again_after_adding(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    with write_bank(bank) as writer:
        arguments = rows("a.md", 3)
        writer.add(*arguments)
        for array in arguments[2:]:
            array.fill(0)
        writer.commit("ingest")
    assert content(bank) == expected(("a.md", 3))


def test_rows_of_other_shapes_are_refused(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    good = rows("a.md", 3)
    bad = [
        (2, good[2][:, :-1]),
        (2, good[2].astype(np.int8)),
        (3, good[3].astype(np.float32)),
        (4, good[4][:2]),
        (1, good[1][:2]),
        (1, [b"short"] * 3),
    ]
    with write_bank(bank) as writer:
        for place, value in bad:
            arguments = list(good)
            arguments[place] = value
            with pytest.raises(ValueError):
                writer.add(*arguments)
        assert writer.staged == 0


def test_stats_have_the_documented_names_and_read_no_shard(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 5)])
    for file in [*(bank / "shards").iterdir(), *(bank / "docs").iterdir()]:
        file.unlink()
    with open_bank(bank) as snapshot:
        stats = snapshot.stats()
    assert {
        "path",
        "form",
        "snapshot",
        "documents",
        "passages",
        "stale",
        "dead",
        "bytes",
        "bytes_per_passage",
        "model",
        "prior",
        "codec",
        "embedder",
    } <= stats.keys()
    assert {"gradients", "embeddings", "text", "index", "total"} <= stats["bytes"].keys()
    assert (stats["documents"], stats["passages"], stats["bytes"]["embeddings"]) == (1, 5, 5 * 16 * 2)
    assert (stats["codec"], stats["form"]) == ("r1-int4", "live")


def test_bytes_in_stats_are_those_on_disk(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 5)], [("b.md", 3)])
    files = tree(bank)
    with open_bank(bank) as snapshot:
        stats = snapshot.stats()["bytes"]
    assert stats["gradients"] + stats["embeddings"] == sum(len(d) for n, d in files.items() if n.startswith("shards/"))
    assert stats["text"] == sum(len(data) for name, data in files.items() if name.startswith("docs/"))


def test_stats_start_without_numpy_and_torch(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 5)])
    code = (
        "import sys, pathlib; from regrad_cli.bank import open_bank\n"
        f"open_bank(pathlib.Path({str(bank)!r})).stats()\n"
        "print([name for name in ('numpy', 'torch', 'hnswlib', 'safetensors') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_documents_are_found_by_id_beginning_and_source(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)], [("notes/b.md", 2)])
    number = document_id("a.md")
    with open_bank(bank) as snapshot:
        assert snapshot.find_document("a.md") == snapshot.find_document(number) == snapshot.find_document(number[:6])
        assert snapshot.find_document("notes/b.md") == document_id("notes/b.md")
        for unknown in ("no.md", "0000000000000000", number[:3], "", "zzzz"):
            with pytest.raises(UsageProblem):
                snapshot.find_document(unknown)


@pytest.mark.parametrize(("name", "told"), [("{:.3}", True), ("A", True), ("", False), ("x7", False), ("0000", False)])
def test_too_little_of_an_id_is_told_as_that(tmp_path: Path, name: str, told: bool) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 1)])
    with open_bank(bank) as snapshot, pytest.raises(UsageProblem, match="there is no document") as refused:
        snapshot.find_document(name.format(document_id("a.md")))
    assert ("4 digits at least" in refused.value.hint) is told


@pytest.mark.parametrize("file", ["notes/a.jsonl", 'a "quoted" \\ file.csv', "stdin#faq", "dépôt.csv"])
def test_a_file_whose_records_are_documents_names_one_of_them(tmp_path: Path, file: str) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2), (f"{file}#1", 1)], [(f"{file}#q7", 2), (f"{file}x", 1)])
    with pytest.raises(UsageProblem, match="is one") as refused:
        remove_documents(bank, [file])
    assert repr(f"{file}#1") in refused.value.message and "bank ls" in refused.value.hint
    remove_documents(bank, [f"{file}#1"])
    with open_bank(bank) as snapshot:
        with pytest.raises(UsageProblem) as refused:
            snapshot.find_document(file)
        assert repr(f"{file}#q7") in refused.value.message
        for other in ("a.md#", file[1:], "\udcff", '"source":"a'):
            with pytest.raises(UsageProblem, match="there is no document"):
                snapshot.find_document(other)


def test_records_are_named_though_another_shard_is_damaged(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)], [("a.jsonl#1", 1)])
    with open_bank(bank) as snapshot:
        first = bank / snapshot.manifest.shards[0].docs_name
        first.write_bytes(first.read_bytes()[::-1])
        with pytest.raises(UsageProblem, match="is one"):
            snapshot.find_document("a.jsonl")


def test_an_ambiguous_beginning_is_refused(tmp_path: Path) -> None:
    sources = [f"{number}.md" for number in range(600)]
    begins: dict[str, list[str]] = {}
    for source in sources:
        begins.setdefault(document_id(source)[:4], []).append(source)
    (prefix, pair), *_ = [item for item in begins.items() if len(item[1]) > 1]
    bank = make_bank(tmp_path / "b", [(source, 1) for source in pair])
    with open_bank(bank) as snapshot, pytest.raises(UsageProblem, match="2 documents begin"):
        snapshot.find_document(prefix)


def test_removing_takes_a_document_and_no_other(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2), ("b.md", 3)], [("a2.md", 2)])
    done = remove_documents(bank, ["b.md", document_id("b.md")])
    assert done["passages"] == 3 and [entry["source"] for entry in done["documents"]] == ["b.md"]
    assert content(bank) == expected(("a.md", 2), ("a2.md", 2))
    with pytest.raises(UsageProblem):
        remove_documents(bank, ["a.md", "b.md"])
    assert content(bank) == expected(("a.md", 2), ("a2.md", 2))


def test_a_document_is_read_in_its_order_from_several_shards(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    whole = rows("a.md", 6)
    with write_bank(bank) as writer:
        for part in (slice(3, 6), slice(0, 3)):
            writer.add(*(column[part] for column in whole))
            writer.commit("ingest")
    with open_bank(bank) as snapshot:
        read = list(snapshot.passages(document_id("a.md")))
        assert [passage.ordinal for _, passage, _ in read] == list(range(6))
        assert [entry["title"] for entry in snapshot.documents()] == ["Title of a.md"]


def test_an_old_snapshot_shows_what_was_there_then(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    with write_bank(bank) as writer:
        writer.add(*rows("b.md", 2))
        writer.commit("ingest")
    remove_documents(bank, ["a.md"])
    assert content(bank, 2) == expected(("a.md", 2))
    assert content(bank, 3) == expected(("a.md", 2), ("b.md", 2))
    assert content(bank) == expected(("b.md", 2))
    assert [entry["snapshot"] for entry in log(bank)] == [4, 3, 2, 1]
    assert [entry["operation"] for entry in log(bank)] == ["rm", "ingest", "ingest", "init"]
    with pytest.raises(UsageProblem, match="there is no snapshot 9"):
        open_bank(bank, 9)


def test_an_ingest_leaves_one_snapshot(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", *[[(f"{number}.md", 1)] for number in range(7)])
    assert [entry["snapshot"] for entry in log(bank)] == [8, 1]


def test_a_long_ingest_keeps_two_of_its_own_snapshots_at_most(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    with write_bank(bank) as writer:
        for number in range(5):
            writer.add(*rows(f"{number}.md", 1))
            writer.commit("ingest")
            assert len(log(bank)) <= 3
        assert writer.finish() == 6


def test_a_bank_is_found_from_a_folder_below(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / ".gbank")
    below = tmp_path / "some" / "folder"
    below.mkdir(parents=True)
    assert locate_bank(None, below).samefile(bank)
    assert locate_bank(str(bank), Path("/")) == bank
    with pytest.raises(NoBank, match="not a bank"):
        locate_bank(tmp_path, below)
    with pytest.raises(NoBank, match="no bank at"):
        locate_bank(tmp_path / "nothing", below)
    with pytest.raises(NoBank):
        open_bank(tmp_path / "some")
    for no_name in ("x" * 300, "a\0b"):
        with pytest.raises(NoBank, match="no bank at"):
            locate_bank(no_name, below)


def test_a_link_that_leads_nowhere_and_a_name_that_cannot_be_are_no_place_for_a_bank(tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for place, fact in (("link", "a link that leads nowhere"), ("x" * 300, "so long a name")):
        with pytest.raises(UsageProblem, match=fact) as caught:
            create_bank(tmp_path / place, settings(), PRIOR)
        assert "name another place" in caught.value.hint
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


def test_a_folder_of_a_bank_that_may_not_be_listed_is_told_with_a_way_out(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make_bank(tmp_path / "b")

    def denied(folder: Path) -> Iterator[Path]:  # what a folder without r answers, but to root
        raise PermissionError(13, "Permission denied", str(folder))

    monkeypatch.setattr(Path, "iterdir", denied)
    for use in (open_bank, log, lambda path: list(verify(path))):
        with pytest.raises(StorageFailed, match="Permission denied") as caught:
            use(bank)
        assert "who owns" in caught.value.hint


def test_a_new_bank_hides_itself_from_git(tmp_path: Path) -> None:
    assert (make_bank(tmp_path / "b") / ".gitignore").read_text() == "*\n"


def test_init_harms_nothing_that_is_there(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    folder = tmp_path / "mine"
    (folder / "docs").mkdir(parents=True)
    (folder / "docs" / "letter.md").write_text("mine")
    file = tmp_path / "file"
    file.write_text("mine")
    looks_begun = tmp_path / "begun"
    (looks_begun / "tmp").mkdir(parents=True)
    (looks_begun / "lock").touch()
    (looks_begun / "docs").mkdir()
    (looks_begun / "docs" / "mine.jsonl").write_text("mine")
    for place in (bank, folder, file, looks_begun):
        before = tree(place) if place.is_dir() else place.read_bytes()
        with pytest.raises(UsageProblem):
            create_bank(place, settings(), PRIOR)
        assert (tree(place) if place.is_dir() else place.read_bytes()) == before
    assert not (folder / "lock").exists()


def test_init_takes_an_empty_folder_and_makes_parents(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for place in (tmp_path / "empty", tmp_path / "x" / "y" / ".gbank"):
        create_bank(place, settings(), PRIOR)
        assert content(place) == {}


def test_of_two_inits_at_once_one_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one has made its bank between the look at the place and the lock."""
    bank = tmp_path / "b"
    seen: list[dict[str, bytes]] = []

    def late(path: Path) -> AbstractContextManager[None]:
        monkeypatch.undo()
        create_bank(path, settings(), PRIOR)
        seen.append(tree(path))
        return hold_lock(path)

    monkeypatch.setattr("regrad_cli.bank.create.hold_lock", late)
    with pytest.raises(UsageProblem, match="there is a bank"):
        create_bank(bank, settings(), PRIOR)
    assert [tree(bank)] == seen


def test_a_prior_under_another_name_is_our_own_mistake(tmp_path: Path) -> None:
    with pytest.raises(ValueError):
        create_bank(tmp_path / "b", settings(), PRIOR + b"x")
    assert not (tmp_path / "b").exists()


def test_refs_outside_the_bank_are_refused(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    with open_bank(bank) as snapshot:
        for ref in (RowRef(0, 2), RowRef(0, -1), RowRef(1, 0), RowRef(-1, 0)):
            with pytest.raises(IndexError):
                snapshot.row(ref)
    with write_bank(bank) as writer, pytest.raises(ValueError):
        writer.remove([RowRef(0, 2)])
    assert len(all_refs(bank)) == 2
