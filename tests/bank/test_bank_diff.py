"""What differs between two snapshots: documents, text, gradients, settings; and that it costs what changed."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st
from made_banks import PRIOR, copy_of, make_bank, rows, settings

from regrad_cli.bank import (
    DamagedFile,
    Difference,
    changed_texts,
    create_bank,
    differences,
    log,
    move_bank,
    open_bank,
    pack_bank,
    remove_documents,
    write_bank,
)
from regrad_cli.bank.matching import others, paired
from regrad_cli.bank.shards import ShardReader
from regrad_cli.bank.snapshot import Snapshot
from regrad_cli.bank.store import Folder
from regrad_cli.records import CodecSettings, document_id, row_key, sha256_hex

OTHER = b"another prior"


def likeness(codes, scales, new_codes, new_scales):
    """Instead of decoding: the share of equal bytes, and a ratio that the codes decide."""
    width = min(codes.shape[1], new_codes.shape[1])
    return (codes[:, :width] == new_codes[:, :width]).mean(axis=1), 1 + new_codes[:, 0] / 255


def told(old: Snapshot, new: Snapshot, **options: object) -> Difference:
    *steps, found = differences(old, new, likeness, **options)  # type: ignore[arg-type]
    for stage in {stage for stage, _, _ in steps}:
        ways = [(done, total) for name, done, total in steps if name == stage]
        assert ways == sorted(ways)
        assert ways[-1][0] == ways[-1][1]
    return found


def compared(
    old: Path, new: Path, before: int | None = None, after: int | None = None, **options: object
) -> Difference:
    with open_bank(old, before) as first, open_bank(new, after) as second:
        return told(first, second, **options)


def sources(documents: list) -> list[str]:
    return [document.source for document in documents]


def change(bank: Path, *, add: list[tuple] = (), drop: list[str] = (), operation: str = "ingest") -> int:  # type: ignore[assignment]
    """One commit: rows as `made_banks.rows` gives them, and documents that go. Returns its number."""
    with write_bank(bank) as writer:
        for source in drop:
            writer.remove([ref for ref, _, _ in writer.snapshot.passages(document_id(source))])
        for each in add:
            writer.add(*each)
        writer.commit(operation)
        return writer.finish()


def replaced(bank: Path, source: str, ordinal: int, text: str) -> int:
    """A document's passage gets another text, the others stay: what ingesting a changed file does."""
    passages, _, *arrays = rows(source, ordinal + 1, text=text)
    new = [replace(passages[ordinal], text=text)]
    keys = [row_key(new[0], settings().model, settings().tokenizer, settings().prior)]
    with write_bank(bank) as writer:
        found = [ref for ref, passage, _ in writer.snapshot.passages(document_id(source)) if passage.ordinal == ordinal]
        writer.remove(found)
        writer.add(new, keys, *(array[ordinal : ordinal + 1] for array in arrays))
        writer.commit("ingest")
        return writer.finish()


@contextmanager
def opened_files(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[str]]:
    names: list[str] = []
    original = Folder.open

    def opening(self, name, size_bytes=None):
        names.append(name)
        return original(self, name, size_bytes)

    with monkeypatch.context() as patch:
        patch.setattr(Folder, "open", opening)
        yield names


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    return make_bank(tmp_path / "bank", [("a.md", 3), ("b.md", 2)], [("c.md", 4)], [("d.md", 1)])


def test_a_snapshot_and_itself_or_a_copy_or_its_packed_form_do_not_differ(bank: Path, tmp_path: Path) -> None:
    copy, packed = copy_of(bank, tmp_path / "copy"), tmp_path / "bank.gbank"
    pack_bank(bank, packed)
    for other in (bank, copy, packed):
        found = compared(bank, other)
        assert found.identical
        assert found == Difference()


def test_the_same_documents_in_other_shards_and_another_order_do_not_differ(bank: Path, tmp_path: Path) -> None:
    other = make_bank(tmp_path / "other", [("d.md", 1), ("c.md", 4), ("b.md", 2)], [("a.md", 3), ("e.md", 9)])
    remove_documents(other, ["e.md"])
    assert compared(bank, other).identical
    assert compared(other, bank).identical


def test_documents_added_and_removed_are_told_with_their_passages(bank: Path) -> None:
    before = log(bank)[0]["snapshot"]
    change(bank, add=[rows("new.md", 5)], drop=["b.md"])
    found = compared(bank, bank, before)
    assert [(document.source, document.passages, document.title) for document in found.added] == [
        ("new.md", 5, "Title of new.md")
    ]
    assert [(document.id, document.passages) for document in found.removed] == [(document_id("b.md"), 2)]
    assert (found.changed, found.recomputed, found.settings, found.other) == ([], [], {}, 0)
    assert found.passages == {"added": 5, "removed": 2, "recomputed": 0}
    back = compared(bank, bank, None, before)
    assert (sources(back.added), sources(back.removed)) == (["b.md"], ["new.md"])


def test_a_changed_passage_names_its_place_and_both_texts(bank: Path) -> None:
    before = log(bank)[0]["snapshot"]
    replaced(bank, "c.md", 2, "entirely new")
    with open_bank(bank, before) as old, open_bank(bank) as new:
        found = told(old, new)
        (document,) = found.changed
        assert (document.source, document.passages) == ("c.md", 1)
        (place,) = document.changes
        assert place.ordinal == 2
        first, second = changed_texts(old, new, place)
        assert (first.text, second.text) == (" 2 é", "entirely new")  # type: ignore[union-attr]
    assert (found.added, found.removed) == ([], [])


def test_a_document_that_grew_or_shrank_is_changed_and_not_added(bank: Path) -> None:
    """What is added lies in new shards, the rest of the document in one that both have and that is not looked into."""
    before = log(bank)[0]["snapshot"]
    more = rows("c.md", 6)
    after = change(bank, add=[tuple(part[4:] for part in more)])
    found = compared(bank, bank, before, after)
    assert (sources(found.changed), sources(found.added)) == (["c.md"], [])
    assert [(place.ordinal, place.before) for place in found.changed[0].changes] == [(4, None), (5, None)]
    found = compared(bank, bank, after, before)
    assert (sources(found.changed), sources(found.removed)) == (["c.md"], [])


def test_one_document_that_grew_and_one_that_shrank_are_both_changed(
    bank: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They leave the counts of documents as they were, and what both snapshots share need not be looked into."""
    before = log(bank)[0]["snapshot"]
    with write_bank(bank) as writer:
        found = [ref for ref, passage, _ in writer.snapshot.passages(document_id("a.md")) if passage.ordinal == 2]
        writer.remove(found)
        writer.add(*(part[4:] for part in rows("c.md", 6)))
        writer.commit("ingest")
        after = writer.finish()
    with open_bank(bank, before) as old, open_bank(bank, after) as new, opened_files(monkeypatch) as names:
        found = told(old, new)
        shared = {shard.name for shard in old.manifest.shards[1:]}
    assert (sources(found.changed), found.added, found.removed) == (["a.md", "c.md"], [], [])
    assert not shared & set(names)


def test_a_document_whose_first_passage_came_later_is_changed_and_not_added(tmp_path: Path) -> None:
    """Its gradient may not have been finite the first time. The counts of documents tell."""
    bank = make_bank(tmp_path / "bank", [("a.md", 3)])
    late = rows("late.md", 3)
    before = change(bank, add=[tuple(part[1:] for part in late)])
    after = change(bank, add=[tuple(part[:1] for part in late)])
    assert sources(compared(bank, bank, before, after).changed) == ["late.md"]
    assert sources(compared(bank, bank, after, before).changed) == ["late.md"]
    both = change(bank, add=[rows("new.md", 1)])
    found = compared(bank, bank, before, both)
    assert (sources(found.changed), sources(found.added)) == (["late.md"], ["new.md"])


def test_comparing_two_snapshots_opens_what_lies_between_them_and_no_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make_bank(tmp_path / "bank", *([(f"{number}.md", 2)] for number in range(30)))
    before = log(bank)[0]["snapshot"]
    change(bank, add=[rows("new.md", 2)], drop=["7.md"])
    with open_bank(bank, before) as old, open_bank(bank) as new, opened_files(monkeypatch) as names:
        found = told(old, new)
        assert (sources(found.added), sources(found.removed)) == (["new.md"], ["7.md"])
        shards = old.manifest.shards
        assert len(shards) == 30
        touched = [shards[7], new.manifest.shards[-1]]
        assert set(names) == {shard.name for shard in touched} | {shard.docs_name for shard in touched}


def test_recomputed_gradients_are_told_with_how_far_they_are_from_the_old(bank: Path) -> None:
    before = log(bank)[0]["snapshot"]
    passages, keys, codes, scales, embeddings = rows("c.md", 4)
    codes = codes.copy()
    codes[1, :10] ^= 0xFF
    codes[3, 5] ^= 1
    change(bank, add=[(passages, keys, codes, scales, embeddings)], drop=["c.md"])
    found = compared(bank, bank, before)
    (document,) = found.recomputed
    assert (document.source, document.passages) == ("c.md", 2)
    assert document.cosine.worst == pytest.approx(30 / 40)  # type: ignore[union-attr]
    assert document.cosine.mean == pytest.approx((30 + 39) / 80)  # type: ignore[union-attr]
    ratios = [1 + int(codes[row, 0]) / 255 for row in (1, 3)]
    assert document.norm_ratio.worst == pytest.approx(max(ratios))  # type: ignore[union-attr]
    assert document.norm_ratio.mean == pytest.approx(sum(ratios) / 2)  # type: ignore[union-attr]
    assert (found.added, found.removed, found.changed, found.other) == ([], [], [], 0)


def test_nothing_is_decoded_where_no_gradient_differs(bank: Path) -> None:
    before = log(bank)[0]["snapshot"]
    change(bank, add=[rows("new.md", 5)], drop=["b.md"])
    with open_bank(bank, before) as old, open_bank(bank) as new:
        *_, found = differences(old, new, lambda *_: pytest.fail("decoded"))
    assert not found.identical


def test_the_same_text_and_gradient_with_another_embedding_is_said_to_be_neither(bank: Path) -> None:
    before = log(bank)[0]["snapshot"]
    *first, embeddings = rows("c.md", 4)
    change(bank, add=[(*first, -embeddings)], drop=["c.md"])
    found = compared(bank, bank, before)
    assert (found.other, found.recomputed, found.identical) == (4, [], False)


def test_another_prior_is_a_setting_and_all_of_its_gradients_are_recomputed(bank: Path, tmp_path: Path) -> None:
    before = log(bank)[0]["snapshot"]
    made_for = settings(prior=sha256_hex(OTHER), prior_name="learned", prior_trained=True)
    with move_bank(bank) as writer:
        writer.begin(made_for, OTHER)
        half = compared(bank, bank, before)
        for source, count in (("a.md", 3), ("b.md", 2), ("c.md", 4), ("d.md", 1)):
            passages, keys, codes, scales, embeddings = rows(source, count, made_for=made_for)
            writer.add(passages, keys, codes ^ np.uint8(3), scales, embeddings)
        writer.commit()
        writer.switch()
        writer.finish()
    assert list(half.settings) == ["move"]
    found = compared(bank, bank, before)
    assert list(found.settings) == ["prior"]
    assert found.settings["prior"][1] == {"name": "learned", "fingerprint": sha256_hex(OTHER), "trained": True}
    assert [document.passages for document in found.recomputed] == [3, 2, 4, 1]
    assert (found.added, found.removed, found.changed) == ([], [], [])


def test_gradients_of_another_codec_are_compared_and_of_other_tensors_are_not(bank: Path, tmp_path: Path) -> None:
    documents = [("a.md", 3), ("b.md", 2), ("c.md", 4), ("d.md", 1)]
    coded = make_bank(tmp_path / "coded", documents, codec=CodecSettings(rank=2), code_bytes=80)
    found = compared(bank, coded)
    assert list(found.settings) == ["codec"]
    assert len(found.recomputed) == 4
    assert found.recomputed[0].cosine.mean is not None  # type: ignore[union-attr]
    wider = make_bank(tmp_path / "wider", [("a.md", 3)], tensors=(), model=sha256_hex("other"), code_bytes=7)
    found = compared(bank, wider)
    assert set(found.settings) == {"model", "tensors"}
    assert (found.comparable, sources(found.recomputed), sources(found.removed)) == (
        False,
        ["a.md"],
        ["b.md", "c.md", "d.md"],
    )
    assert found.recomputed[0].cosine.mean is None  # type: ignore[union-attr]


def without_text(path: Path, documents: list[tuple[str, int, str]], **changes: object) -> Path:
    made_for = settings(keep_text=False, **changes)
    create_bank(path, made_for, PRIOR)
    with write_bank(path) as writer:
        for source, count, text in documents:
            passages, keys, *arrays = rows(source, count, text=text, made_for=made_for)
            writer.add([replace(passage, text=None) for passage in passages], keys, *arrays)
        writer.commit("ingest")
        writer.finish()
    return path


def test_without_text_rows_are_compared_by_their_keys(tmp_path: Path) -> None:
    first = without_text(tmp_path / "first", [("a.md", 2, "x"), ("b.md", 2, "x")])
    second = without_text(tmp_path / "second", [("a.md", 2, "x"), ("b.md", 2, "other")])
    found = compared(first, second)
    assert (sources(found.changed), found.unknown, found.other) == (["b.md"], [], 0)
    kept = make_bank(tmp_path / "kept")
    change(kept, add=[rows("a.md", 2, text="x"), rows("b.md", 2, text="x")])
    found = compared(kept, second)
    assert list(found.settings) == ["keep_text"]
    assert sources(found.changed) == ["b.md"]


def test_text_against_keys_of_another_model_is_told_by_the_keys_it_would_have(tmp_path: Path) -> None:
    kept = make_bank(tmp_path / "kept")
    change(kept, add=[rows("a.md", 2, text="x"), rows("b.md", 2, text="x")])
    other = without_text(tmp_path / "other", [("a.md", 2, "x"), ("b.md", 2, "y")], tokenizer=sha256_hex("other"))
    for found in (compared(kept, other), compared(other, kept)):
        assert set(found.settings) == {"keep_text", "tokenizer"}
        assert (sources(found.changed), found.unknown) == (["b.md"], [])


def test_without_text_and_under_another_model_it_is_said_that_nobody_can_tell(tmp_path: Path) -> None:
    first = without_text(tmp_path / "first", [("a.md", 2, "x"), ("b.md", 2, "x")])
    second = without_text(tmp_path / "second", [("a.md", 2, "x"), ("c.md", 1, "x")], model=sha256_hex("other"))
    found = compared(first, second)
    assert [sources(each) for each in (found.unknown, found.removed, found.added)] == [["a.md"], ["b.md"], ["c.md"]]
    assert (found.changed, found.recomputed, found.identical) == ([], [], False)


def damage(bank: Path, name: str, at: int) -> None:
    file = bank / name
    data = bytearray(file.read_bytes())
    data[at] ^= 1
    file.chmod(0o600)
    file.write_bytes(bytes(data))


def test_damage_in_what_is_compared_is_named_and_damage_elsewhere_costs_nothing(bank: Path, tmp_path: Path) -> None:
    before = log(bank)[0]["snapshot"]
    change(bank, add=[rows("new.md", 5)])
    with open_bank(bank) as opened:
        shards = opened.manifest.shards
    damage(bank, shards[0].docs_name, 5)
    assert sources(compared(bank, bank, before).added) == ["new.md"]
    damage(bank, shards[-1].docs_name, 5)
    with pytest.raises(DamagedFile, match=shards[-1].docs.sha256):
        compared(bank, bank, before)


@pytest.mark.parametrize("kind", ["docs", "codes", "checksums", "documents", "missing"])
def test_damage_is_never_told_as_a_difference_unless_it_is_to_be_skipped(bank: Path, tmp_path: Path, kind: str) -> None:
    """Whatever is broken in one of two shards that have to be read, it is an error, or what is told is right."""
    other = make_bank(tmp_path / "other", [("a.md", 3), ("b.md", 2)])
    passages, keys, codes, scales, embeddings = rows("c.md", 4)
    change(other, add=[(passages, keys, codes ^ np.uint8(1), scales, embeddings), rows("z.md", 1)])
    with open_bank(other) as opened:
        shard = opened.manifest.shards[1]
        with opened.store.open(shard.name) as region:
            layout = ShardReader(opened.store, shard, opened.settings)._layout(region)
    if kind == "missing":
        (other / shard.name).unlink()
    elif kind == "docs":
        damage(other, shard.docs_name, 200)
    else:
        damage(other, shard.name, layout[kind].start + 3)
    with pytest.raises(DamagedFile):
        compared(bank, other)
    found = compared(bank, other, skip_damaged=True)
    assert found.left_out
    assert (found.changed, sources(found.removed), sources(found.recomputed)) == ([], ["d.md"], [])
    if kind == "missing":  # and its text too: nobody knows whose rows they were
        (other / shard.docs_name).unlink()
        assert sources(compared(bank, other, skip_damaged=True).removed) == ["c.md", "d.md"]


def test_a_line_of_another_document_than_its_row_is_damage(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Right checksums all over, and yet not what a writer makes."""
    bank, other = make_bank(tmp_path / "bank", [("a.md", 1)]), make_bank(tmp_path / "other", [("b.md", 1)])
    numbers = {document_id("b.md"): np.array([7], np.uint64)}
    original = ShardReader.documents
    monkeypatch.setattr(ShardReader, "documents", lambda self: numbers.get(self.entry.first, original(self)))
    with pytest.raises(DamagedFile, match="another document"):
        compared(bank, other)
    found = compared(bank, other, skip_damaged=True)
    assert (sources(found.removed), found.added, len(found.left_out)) == (["a.md"], [], 1)


KEYS = st.lists(st.integers(0, 4), max_size=12)


@given(old=KEYS, new=KEYS)
def test_equal_keys_are_paired_one_for_one(old: list[int], new: list[int]) -> None:
    left, right = (np.array([[each, 7] for each in keys], np.uint64).reshape(-1, 2) for keys in (old, new))
    first, second = paired(left, right)
    assert [old[place] for place in first] == [new[place] for place in second]
    assert len(set(first.tolist())) == len(first)
    assert len(set(second.tolist())) == len(second)
    assert sorted(first.tolist() + others(len(old), first).tolist()) == list(range(len(old)))
    left_over = {old[place] for place in others(len(old), first)} & {new[place] for place in others(len(new), second)}
    assert left_over == set()


HISTORY = st.lists(
    st.tuples(st.sampled_from("abcde"), st.integers(0, 3), st.sampled_from(["", "x", "y"])), min_size=1, max_size=8
)


@hypothesis_settings(max_examples=40, deadline=None)
@given(history=HISTORY, cut=st.integers(0, 8))
def test_whatever_happened_between_two_snapshots_is_told(
    tmp_path_factory: pytest.TempPathFactory, history: list[tuple[str, int, str]], cut: int
) -> None:
    """Documents of one text each, so that each passage of a changed one differs."""
    bank = make_bank(tmp_path_factory.mktemp("banks") / "bank")
    held: dict[str, tuple[int, str]] = {}
    states = [(log(bank)[0]["snapshot"], dict(held))]
    for source, count, text in history:
        with write_bank(bank) as writer:
            writer.remove([ref for ref, _, _ in writer.snapshot.passages(document_id(source))])
            held.pop(source, None)
            if count:
                writer.add(*rows(source, count, text=text))
                held[source] = count, text
            writer.commit("ingest")
            states.append((writer.finish(), dict(held)))
    (before, old), (after, new) = states[min(cut, len(states) - 1)], states[-1]
    found = compared(bank, bank, before, after)
    assert sources(found.added) == sorted(new.keys() - old.keys())
    assert sources(found.removed) == sorted(old.keys() - new.keys())
    assert sources(found.changed) == sorted(name for name in old.keys() & new.keys() if old[name] != new[name])
    assert found.identical == (old == new)
