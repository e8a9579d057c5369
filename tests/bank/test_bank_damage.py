"""Promises 3, 4, 5, 16, 20: whatever is flipped, cut, missing or made up, nothing wrong is ever returned."""

from __future__ import annotations

import hashlib
import json
import os
import struct
import time
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import every_flip, flip
from hypothesis import given
from hypothesis import settings as run_with
from hypothesis import strategies as st
from made_banks import content, copy_of, make_bank, rows, settings, tree
from safetensors.numpy import load, save

from regrad_cli.bank import log, open_bank, remove_documents, verify, write_bank
from regrad_cli.bank.building import build_shard
from regrad_cli.bank.damage import DamagedFile, DamagedRow
from regrad_cli.bank.manifest import MANIFEST_LIMIT, SHARD_ROWS
from regrad_cli.bank.parsing import MAX_DIMENSION, parse
from regrad_cli.bank.shards import HEADER_LIMIT, expected_tensors, parse_header, passage_line, row_checksum
from regrad_cli.bank.store import Region
from regrad_cli.errors import Damaged, RegradError, UnknownFormat
from regrad_cli.records import RowRef, canonical_json, document_id, sha256_hex


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with a removed row each, so that every part of the format is in use."""
    bank = make_bank(tmp_path_factory.mktemp("whole") / "b", [("a.md", 4), ("b.md", 2)], [("c.md", 3), ("d.md", 2)])
    remove_documents(bank, ["b.md", "d.md"])
    return bank


def files_that_count(bank: Path) -> list[str]:
    """Every file that the newest snapshot is made of."""
    with open_bank(bank) as snapshot:
        return ["FORMAT", snapshot.manifest.name, *(name for name, _ in snapshot.manifest.files())]


def assert_nothing_wrong_is_returned(bank: Path, right: dict[str, tuple]) -> bool:
    """Uses all that a reader has; whatever does not raise must be right. True if something raised."""
    noticed = False
    try:
        snapshot = open_bank(bank)
    except (Damaged, UnknownFormat):
        return True
    with snapshot:
        question = right[next(iter(right))][4]
        vector = np.frombuffer(question, np.float16).astype(np.float32)[None]

        def search(**options: bool) -> Callable[[], None]:
            def run() -> None:
                found = snapshot.search(vector, 3, **options)[0]
                with_all = len(snapshot.damaged) == 0
                assert not with_all or [hit.passage.id for hit in found] == expected_hits
                for hit in found:
                    assert right[hit.passage.id][0] == hit.passage
                    want = np.frombuffer(right[hit.passage.id][4], np.float16).astype(np.float64)
                    assert hit.score == pytest.approx(float(want @ vector[0].astype(np.float64)), abs=1e-9)

            return run

        scores = {name: np.frombuffer(row[4], np.float16).astype(np.float64) @ vector[0] for name, row in right.items()}
        expected_hits = sorted(scores, key=lambda name: -scores[name])[:3]

        def passages() -> None:
            for _, passage, key in snapshot.passages():
                assert right[passage.id][:2] == (passage, key)

        def row(ref: RowRef) -> Callable[[], None]:
            def run() -> None:
                read = snapshot.row(ref)
                if read.passage.id in right:
                    assert (read.passage, read.key, read.codes, read.scales, read.embedding) == right[read.passage.id]

            return run

        places = [RowRef(s, r) for s, shard in enumerate(snapshot.manifest.shards) for r in range(shard.rows)]
        uses = [search(), search(warm=True), passages, lambda: list(snapshot.documents()) and None]
        uses += [lambda: snapshot.prior_bytes() and None, *map(row, places)]
        for use in uses:
            try:
                use()
            except Damaged as error:
                assert error.message and error.exit_code == 14
                noticed = True
        search(skip_damaged=True)()
        search(warm=True, skip_damaged=True)()
        for _, passage, key in snapshot.passages(skip_damaged=True):
            assert right[passage.id][:2] == (passage, key)
    return noticed


def test_promise_03_any_flipped_bit_is_noticed(whole: Path, tmp_path: Path) -> None:
    right = content(whole)
    bank = copy_of(whole, tmp_path / "b")
    for name in files_that_count(whole):
        data = (whole / name).read_bytes()
        for position, flipped in every_flip(data, 60):
            (bank / name).write_bytes(flipped)
            noticed = assert_nothing_wrong_is_returned(bank, right)
            found = [finding for finding in verify(bank) if finding.file == name]
            assert found or (noticed and name == "FORMAT"), f"byte {position} of {name}"
            # A row's checksum block and removed rows are read by nobody else than verify.
            assert noticed or name.startswith(("shards/", "docs/")), f"byte {position} of {name}"
        (bank / name).write_bytes(data)
    assert list(verify(bank)) == []


def test_promise_03_a_flipped_bit_in_a_row_is_noticed_when_it_is_read(whole: Path, tmp_path: Path) -> None:
    """Every byte that belongs to one live row, its checksum and its newline included."""
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(whole) as snapshot:
        shard = snapshot.manifest.shards[0]
        snapshot.row(RowRef(0, 1))
        places = snapshot.reader(0)._places
        assert places is not None
        ends = snapshot.reader(0).block("line_ends").tolist()
    spans = [
        (shard.name, place.start + place.row_bytes, place.row_bytes)
        for name, place in places.items()
        if name != "tokens"
    ]
    spans.append((shard.docs_name, ends[0], ends[1] - ends[0]))
    for name, start, length in spans:
        data = bytearray((whole / name).read_bytes())
        for position in range(start, start + length):
            data[position] ^= 1 << (position % 8)
            (bank / name).write_bytes(data)
            with open_bank(bank) as snapshot, pytest.raises(DamagedRow) as caught:
                snapshot.read_rows([RowRef(0, 0), RowRef(0, 1)])
            assert caught.value.finding.documents in ((document_id("a.md"),), ())
            data[position] ^= 1 << (position % 8)
        (bank / name).write_bytes(data)


def test_promise_03_a_flipped_bit_in_a_header_is_noticed_by_every_read(whole: Path, tmp_path: Path) -> None:
    """Its padding included, which says nothing."""
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        name = snapshot.manifest.shards[0].name
    data = bytearray((bank / name).read_bytes())
    for position in range(8 + int.from_bytes(data[:8], "little")):
        data[position] ^= 1 << (position % 8)
        (bank / name).write_bytes(data)
        with open_bank(bank) as snapshot:
            with pytest.raises(DamagedFile):
                snapshot.row(RowRef(0, 0))
            with pytest.raises(DamagedFile):
                snapshot.search(np.ones((1, 16), np.float32) / 4, 1)
        data[position] ^= 1 << (position % 8)


def test_promise_03_a_header_that_says_the_same_in_other_bytes_is_damaged(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        name = snapshot.manifest.shards[0].name
    data = (bank / name).read_bytes()
    length = int.from_bytes(data[:8], "little")
    body = json.loads(data[8 : 8 + length])
    other = json.dumps(dict(reversed(body.items())), separators=(",", ":")).encode().ljust(length)
    assert len(other) == length and json.loads(other) == body
    (bank / name).write_bytes(data[:8] + other + data[8 + length :])
    with open_bank(bank) as snapshot, pytest.raises(DamagedFile, match="damaged header"):
        snapshot.row(RowRef(0, 0))


def test_promise_03_a_manifest_that_says_the_same_in_other_bytes_is_damaged(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    newest = max((bank / "snapshots").glob("*.json"))
    data = newest.read_bytes()
    body = json.loads(data)
    spellings = [data + b"\n", data[:-1], b" " + data, data.replace(b":", b": ", 1)]
    spellings.append(canonical_json(dict(reversed(body.items()))).encode())
    spellings.append(json.dumps(dict(reversed(body.items())), separators=(",", ":")).encode() + b"\n")
    for other in spellings:
        assert other != data and json.loads(other) == body
        newest.write_bytes(other)
        with pytest.raises(DamagedFile, match="own checksum"):
            open_bank(bank)


def test_promise_04_any_truncation_is_an_error_and_no_crash(whole: Path, tmp_path: Path) -> None:
    right = content(whole)
    bank = copy_of(whole, tmp_path / "b")
    for name in files_that_count(whole):
        data = (whole / name).read_bytes()
        lengths = {0, 1, 7, 8, 9, len(data) // 3, len(data) // 2, len(data) - 2, len(data) - 1}
        for length in sorted(length for length in lengths if 0 <= length < len(data)):
            (bank / name).write_bytes(data[:length])
            assert assert_nothing_wrong_is_returned(bank, right), f"{length} bytes of {name}"
            assert any(finding.file == name for finding in verify(bank))
        (bank / name).write_bytes(data + b"\0")
        assert assert_nothing_wrong_is_returned(bank, right), f"a byte more in {name}"
        (bank / name).write_bytes(data)


def test_promise_05_a_missing_file_is_named(whole: Path, tmp_path: Path) -> None:
    right = content(whole)
    for number, name in enumerate(files_that_count(whole)):
        bank = copy_of(whole, tmp_path / str(number))
        (bank / name).unlink()
        if name.startswith("snapshots/"):  # to a reader the one before is the newest then; its copy tells the others
            assert [finding.what for finding in verify(bank)] == ["is missing, and its copy is there"]
            with pytest.raises(DamagedFile, match="is missing"), write_bank(bank):
                pass
            continue
        assert assert_nothing_wrong_is_returned(bank, right)
        with pytest.raises(DamagedFile) as caught:
            content(bank)
        assert name in caught.value.message and caught.value.exit_code == 14 and caught.value.hint
        assert any(finding.file == name and "missing" in finding.what for finding in verify(bank))


@pytest.mark.parametrize("kind", ["shards", "docs"])
def test_promise_05_the_rest_is_answered_and_said_to_be_partial(whole: Path, tmp_path: Path, kind: str) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        shard = snapshot.manifest.shards[0]  # holds a.md; c.md is in the other
        lost = shard.name if kind == "shards" else shard.docs_name
        vector = np.frombuffer(content(bank)[f"{document_id('a.md')}:0"][4], np.float16).astype(np.float32)[None]
    (bank / lost).unlink()
    for warm in (False, True):
        with open_bank(bank) as snapshot:
            with pytest.raises(Damaged) as caught:
                snapshot.search(vector, 2, warm=warm)
            assert lost in caught.value.message
            if kind == "docs":
                assert document_id("a.md") in caught.value.message
            hits = snapshot.search(vector, 2, warm=warm, skip_damaged=True)[0]
            assert [hit.passage.source for hit in hits] == ["c.md", "c.md"]
            assert any(lost in f"{finding.file} {finding.what}" for finding in snapshot.damaged)
    with open_bank(bank) as snapshot:
        assert [entry["source"] for entry in snapshot.documents(skip_damaged=True)] == ["c.md"]
        assert [finding.file for finding in snapshot.damaged] == [lost]
    (finding,) = [finding for finding in verify(bank) if finding.file == lost]
    assert finding.documents == (document_id("a.md"),)


def test_damaged_rows_do_not_push_good_ones_out(tmp_path: Path) -> None:
    """More damaged passages than a search keeps candidates for: the good ones are still found."""
    bank = make_bank(tmp_path / "b", [("bad.md", 200)], [("good.md", 3)])
    with open_bank(bank) as snapshot:
        shard = snapshot.manifest.shards[0]
    (bank / shard.docs_name).write_bytes(b"x" * shard.docs.bytes)
    with open_bank(bank) as snapshot:
        hits = snapshot.search(np.ones((1, 16), np.float32) / 4, 3, skip_damaged=True)[0]
    assert [hit.passage.source for hit in hits] == ["good.md"] * 3


def test_a_shard_that_is_left_out_leaves_no_trace_in_a_warm_session(tmp_path: Path) -> None:
    """Also where what is left is less similar than nothing at all."""
    bank = make_bank(tmp_path / "b", [("good.md", 3)], [("bad.md", 3)])
    vector = -rows("good.md", 3)[4][:1].astype(np.float32)
    with open_bank(bank) as snapshot:
        (bank / snapshot.manifest.shards[1].name).unlink()
    for warm in (False, True):
        with open_bank(bank) as snapshot:
            hits = snapshot.search(vector, 5, warm=warm, skip_damaged=True)[0]
            assert [hit.passage.source for hit in hits] == ["good.md"] * 3
            assert min(hit.score for hit in hits) < -0.9
            assert [finding.file for finding in snapshot.damaged] == [snapshot.manifest.shards[1].name]


def test_a_damaged_hit_names_its_document_and_source(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        snapshot.row(RowRef(0, 1))
        places = snapshot.reader(0)._places
        name = snapshot.manifest.shards[0].name
    assert places is not None
    data = bytearray((bank / name).read_bytes())
    data[places["codes"].start + 40 + 3] ^= 4  # row 1's codes
    (bank / name).write_bytes(data)
    vector = rows("a.md", 4)[4][1].astype(np.float32)[None]
    with open_bank(bank) as snapshot:
        with pytest.raises(DamagedRow, match=rf"document {document_id('a.md')} \(a\.md\)"):
            snapshot.search(vector, 1)
        assert snapshot.search(vector, 1, skip_damaged=True)[0][0].passage.ordinal != 1
        assert [finding.documents for finding in snapshot.damaged] == [(document_id("a.md"),)]
    (finding,) = verify(bank)
    assert finding.documents == (document_id("a.md"),) and "1 of 4 passages" in finding.what


def test_a_damaged_newest_snapshot_is_refused_with_the_way_out(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    numbers = [entry["snapshot"] for entry in log(bank)]
    (bank / "snapshots" / f"{numbers[0]:08d}.json").write_bytes(b"{}")
    with pytest.raises(DamagedFile) as caught:
        open_bank(bank)
    assert "--snapshot" in caught.value.hint
    with pytest.raises(DamagedFile), write_bank(bank):
        pass
    with open_bank(bank, numbers[1]) as snapshot:
        assert snapshot.number == numbers[1]
    listed = log(bank)
    assert listed[0] == {"snapshot": numbers[0], "damaged": "does not match its own checksum"}
    assert [entry["snapshot"] for entry in listed] == numbers


def test_a_bank_without_snapshots_is_damaged_not_new(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    for file in (bank / "snapshots").iterdir():
        file.unlink()
    with pytest.raises(DamagedFile, match="snapshots"):
        open_bank(bank)
    assert [finding.file for finding in verify(bank) if not finding.note] == ["snapshots"]


def test_a_snapshot_that_forged_its_parent_is_found(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        manifest = snapshot.manifest
    assert manifest.parent is not None
    forged = replace(manifest, parent=(manifest.parent[0], "0" * 64))
    forge(bank, forged.to_bytes()[0])
    assert ["parent" in finding.what for finding in verify(bank)] == [True]


def test_counts_that_do_not_fit_the_shards_are_found(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        manifest = snapshot.manifest
    for change in ({"documents": 7}, {"tokens": 1}):
        forged = replace(manifest, counts=replace(manifest.counts, **change))
        forge(bank, forged.to_bytes()[0])
        assert ["counts" in finding.what for finding in verify(bank)] == [True]


# ── promise 20: newer formats ────────────────────────────────────────────────────────────────────────────────────────


def rewritten(bank: Path, change: Callable[[dict[str, Any]], None]) -> None:
    """The newest manifest changed, with its own hash made right again."""
    body = json.loads(max((bank / "snapshots").glob("*.json")).read_bytes())
    body.pop("sha256")
    change(body)
    forge(bank, (canonical_json(body | {"sha256": sha256_hex(canonical_json(body))}) + "\n").encode())


def forge(bank: Path, manifest: bytes) -> None:
    """Puts these bytes in the place of the newest manifest, and of its copy."""
    newest = max((bank / "snapshots").glob("*.json"))
    for file in (newest, newest.with_suffix(".copy")):
        file.write_bytes(manifest)


def test_promise_20_a_newer_format_is_refused(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    (bank / "FORMAT").write_bytes(b"gbank 2\n")
    with pytest.raises(UnknownFormat, match="format 2"):
        open_bank(bank)
    (bank / "FORMAT").write_bytes(b"gbank 1\n")
    rewritten(bank, lambda body: body.update(format=2))
    with pytest.raises(UnknownFormat, match="format 2"):
        open_bank(bank)


def test_promise_20_an_unknown_reader_flag_is_refused_to_all_a_writer_flag_to_writers(
    whole: Path, tmp_path: Path
) -> None:
    bank = copy_of(whole, tmp_path / "w")
    rewritten(bank, lambda body: body.update(writer_flags=["counts-words"]))
    assert content(bank) == content(whole)
    before = tree(bank)
    with pytest.raises(UnknownFormat, match="counts-words"), write_bank(bank):
        pass
    assert tree(bank) == before
    bank = copy_of(whole, tmp_path / "r")
    rewritten(bank, lambda body: body.update(reader_flags=["folded-codes"]))
    for use in (open_bank, write_bank):
        with pytest.raises(UnknownFormat, match="folded-codes"), use(bank):
            pass


def test_a_damaged_prior_or_manifest_names_only_what_helps(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "p")
    (prior,) = (bank / "priors").iterdir()
    data = prior.read_bytes()
    for left in (data[:9], data[:-1] + b"?", None):
        prior.unlink() if left is None else prior.write_bytes(left)
        with open_bank(bank) as snapshot, pytest.raises(DamagedFile) as caught:
            snapshot.prior_bytes()
        assert "repair" in caught.value.hint and "--prior FILE" in caught.value.hint
        assert "--skip-damaged" not in caught.value.hint and "--snapshot" not in caught.value.hint
    bank = copy_of(whole, tmp_path / "m")
    first, *_, newest = sorted((bank / "snapshots").glob("*.json"))
    for manifest, is_older in ((newest, True), (first, False)):
        flip(manifest, 40)
        with pytest.raises(DamagedFile) as caught:
            open_bank(bank, int(manifest.stem))
        assert "repair" in caught.value.hint and "--skip-damaged" not in caught.value.hint
        assert ("--snapshot N" in caught.value.hint) is is_older


# ── promise 16: hostile files ────────────────────────────────────────────────────────────────────────────────────────


def bounded(work: Callable[[], object]) -> BaseException | None:
    """Runs `work` within a second and 40 MB, and returns what it raised."""
    tracemalloc.start()
    started = time.perf_counter()
    try:
        work()
        raised = None
    except RegradError as error:
        raised = error
    finally:
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    assert peak < 40 << 20, peak
    assert time.perf_counter() - started < 5
    return raised


HOSTILE_LENGTHS = [0, 1, 7, 8, HEADER_LIMIT, HEADER_LIMIT + 1, 100 << 20, 1 << 31, 1 << 62, (1 << 64) - 1]


def test_promise_16_a_header_that_lies_about_its_length_costs_nothing(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        name = snapshot.manifest.shards[0].name
    data = (bank / name).read_bytes()
    for length in HOSTILE_LENGTHS:
        (bank / name).write_bytes(struct.pack("<Q", length) + data[8:])
        with open_bank(bank) as snapshot:
            assert isinstance(bounded(lambda snapshot=snapshot: snapshot.row(RowRef(0, 0))), DamagedFile)


def header_of(**changes: Any) -> tuple[bytes, int]:
    """A shard's header with some entries changed, and the size of its file."""
    data = b"".join(build_shard(settings(), *rows("a.md", 3))[0])
    length = int.from_bytes(data[:8], "little")
    body = json.loads(data[8 : 8 + length])
    for tensor, change in changes.items():
        if change is None:
            del body[tensor]
        else:
            body[tensor] = body.get(tensor, {}) | change if isinstance(change, dict) else change
    text = json.dumps(body).encode()
    return struct.pack("<Q", len(text)) + text, len(text) + 8 + len(data) - 8 - length


HOSTILE_ENTRIES: list[dict[str, Any]] = [
    {"codes": None},
    {"more": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]}},
    {"codes": []},
    {"codes": {"dtype": "F64"}},
    {"codes": {"dtype": "U8", "shape": [3, 41]}},
    {"codes": {"shape": [1 << 40, 1 << 40]}},
    {"codes": {"shape": [-3, -40]}},
    {"codes": {"data_offsets": [0, 120]}},
    {"codes": {"data_offsets": [-120, 0]}},
    {"codes": {"data_offsets": [1 << 62, (1 << 62) + 120]}},
    {"codes": {"data_offsets": [120, 0]}},
    {"codes": {"data_offsets": [0]}},
    {"codes": {"data_offsets": "0 120"}},
    {"codes": {"data_offsets": [False, 120]}},
]


@pytest.mark.parametrize("changes", HOSTILE_ENTRIES, ids=str)
def test_promise_16_a_hostile_header_is_refused(changes: dict[str, Any]) -> None:
    header, size = header_of(**changes)
    raised = bounded(lambda: parse_header(header, size, expected_tensors(settings(), 3), "shard"))
    assert isinstance(raised, DamagedFile)


def test_promise_16_an_honest_header_is_read_and_may_not_end_early_or_late() -> None:
    header, size = header_of()
    places = parse_header(header, size, expected_tensors(settings(), 3), "shard")
    assert places["codes"].size_bytes == 120
    for wrong in (size - 1, size + 1):
        with pytest.raises(DamagedFile):
            parse_header(header, wrong, expected_tensors(settings(), 3), "shard")


def test_promise_16_a_tensor_that_lies_about_its_end_is_refused() -> None:
    header, _ = header_of()
    start, end = json.loads(header[8:])["codes"]["data_offsets"]
    for wrong in (end - 1, end + 1, start, 1 << 62):
        header, size = header_of(codes={"data_offsets": [start, wrong]})
        with pytest.raises(DamagedFile, match="codes lies at"):
            parse_header(header, size, expected_tensors(settings(), 3), "shard")


@run_with(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.text('[{"\\:,0-9}]', max_size=200).map(str.encode))
def test_promise_16_any_bytes_as_header_or_manifest_are_damage(data: bytes) -> None:
    with pytest.raises(DamagedFile):
        parse_header(struct.pack("<Q", len(data)) + data, 10_000, expected_tensors(settings(), 3), "shard")
    with pytest.raises(RegradError):
        parse(data, "snapshots/00000001.json")


def test_promise_16_deeply_nested_and_huge_json_is_damage(tmp_path: Path, whole: Path) -> None:
    for data in (b"[" * 200_000, b'{"a":' * 200_000, b"[" + b"1" * 100_000 + b"]", b"[1e999]", b"[NaN]", b'"\xff"'):
        assert isinstance(bounded(lambda data=data: parse(data, "snapshots/00000001.json")), DamagedFile)
        header = struct.pack("<Q", len(data)) + data
        with pytest.raises(DamagedFile):
            parse_header(header, 10_000, expected_tensors(settings(), 3), "shard")
    bank = copy_of(whole, tmp_path / "b")
    file = max((bank / "snapshots").iterdir())
    with file.open("wb") as stream:
        stream.truncate(MANIFEST_LIMIT + 1)
    assert isinstance(bounded(lambda: open_bank(bank)), DamagedFile)


def hostile_manifests() -> list[tuple[str, Callable[[dict[str, Any]], None]]]:
    def at(*path: Any, value: Any) -> tuple[str, Callable[[dict[str, Any]], None]]:
        def change(body: dict[str, Any]) -> None:
            for key in path[:-1]:
                body = body[key]
            body[path[-1]] = value

        return f"{path} = {value!r:.30}", change

    return [
        at("number", value=9),
        at("number", value="3"),
        at("number", value=True),
        at("shards", value={}),
        at("shards", value=[None]),
        at("shards", 0, "sha256", value="../../../../etc/passwd"),
        at("shards", 0, "sha256", value="A" * 64),
        at("shards", 0, "docs", "sha256", value="../" * 21 + "x"),
        at("shards", 0, "rows", value=-1),
        at("shards", 0, "rows", value=0),
        at("shards", 0, "rows", value=1 << 40),
        at("shards", 0, "rows", value=2.5),
        at("shards", 0, "bytes", value=-1),
        at("shards", 0, "removed", value=[[0, 1 << 60]]),
        at("shards", 0, "removed", value=[[3, 1]]),
        at("shards", 0, "removed", value=[[0, 1], [0, 1]]),
        at("shards", 0, "removed", value=[[0, 1], [1, 2]]),
        at("shards", 0, "removed", value=[[0]]),
        at("shards", 0, "blocks", value={}),
        at("shards", 0, "first", value="../x"),
        at("counts", "passages", value=1 << 60),
        at("counts", "passages", value=0),
        at("counts", "more", value=0),
        at("settings", value=None),
        at("settings", "embedding_dim", value=0),
        at("settings", "embedding_dim", value=1 << 50),
        at("settings", "embedding_dim", value=MAX_DIMENSION + 1),
        at("settings", "code_bytes", value=0),
        at("settings", "code_bytes", value=-5),
        at("settings", "scale_count", value="many"),
        at("settings", "tensors", value=[["x"]]),
        at("settings", "tensors", value=[["x", -1, 2]]),
        at("settings", "codec", value={"kind": "lowrank", "exec": "x"}),
        at("settings", "keep_text", value="yes"),
        at("settings", "unheard_of", value=1),
        at("settings", "prior", value="0" * 64),
        at("prior", value=None),
        at("index", value={"sha256": "0" * 64, "bytes": 1, "shards": 99, "rows": 1, "dimension": 1}),
        at("parent", value=[1, 2]),
        at("reader_flags", value="none"),
        at("reader_flags", value=[1]),
        at("bank", value=5),
    ]


@pytest.mark.parametrize(
    ("name", "change"), hostile_manifests(), ids=lambda value: value if isinstance(value, str) else ""
)
def test_promise_16_a_hostile_manifest_with_a_right_checksum_is_damage(
    whole: Path, tmp_path: Path, name: str, change: Callable[[dict[str, Any]], None]
) -> None:
    bank = copy_of(whole, tmp_path / "b")
    rewritten(bank, change)
    raised = bounded(lambda: open_bank(bank))
    assert isinstance(raised, DamagedFile), name


def test_promise_16_a_shard_of_more_rows_than_one_has_is_damage(whole: Path, tmp_path: Path) -> None:
    """Also where the counts agree with it."""
    bank = copy_of(whole, tmp_path / "b")

    def larger(body: dict[str, Any]) -> None:
        more = SHARD_ROWS + 1 - body["shards"][0]["rows"]
        body["shards"][0]["rows"] += more
        body["counts"]["passages"] += more

    rewritten(bank, larger)
    with pytest.raises(DamagedFile, match="rows"):
        open_bank(bank)


def test_promise_16_a_shard_named_twice_is_damage(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")

    def twice(body: dict[str, Any]) -> None:
        body["shards"].append(body["shards"][0])
        body["counts"]["passages"] += body["shards"][0]["rows"] - 2
        body["counts"]["dead"] += 2

    rewritten(bank, twice)
    with pytest.raises(DamagedFile, match="named twice"):
        open_bank(bank)


def crafted(path: Path, lines: list[bytes], ends: list[int]) -> Path:
    """A bank of one shard whose every hash is right, with docs and line ends of somebody's choice."""
    _, keys, codes, scales, embeddings = rows("a.md", len(ends))
    bank = make_bank(path, [("a.md", len(ends))])
    with open_bank(bank) as snapshot:
        manifest = snapshot.manifest
    entry, docs = manifest.shards[0], b"".join(lines)
    tensors = load((bank / entry.name).read_bytes())
    tensors["line_ends"] = np.array(ends, np.int64)
    checks = [
        row_checksum(keys[row], codes[row].tobytes(), scales[row].tobytes(), embeddings[row].tobytes(), lines[row])
        for row in range(len(ends))
    ]
    tensors["checksums"] = np.frombuffer(b"".join(checks), np.uint8).reshape(-1, 32)
    data = save(tensors)
    forged = replace(
        entry,
        sha256=hashlib.sha256(data).hexdigest(),
        bytes=len(data),
        blocks=entry.blocks | {"line_ends": hashlib.sha256(tensors["line_ends"].tobytes()).hexdigest()},
        docs=replace(entry.docs, sha256=hashlib.sha256(docs).hexdigest(), bytes=len(docs)),
    )
    (bank / forged.name).write_bytes(data)
    (bank / forged.docs_name).write_bytes(docs)
    (bank / manifest.name).write_bytes(replace(manifest, shards=(forged,)).to_bytes()[0])
    return bank


def test_promise_16_docs_that_agree_with_their_checksums_but_are_no_passages(tmp_path: Path) -> None:
    good = passage_line(rows("a.md", 1)[0][0])
    assert content(crafted(tmp_path / "good", [good], [len(good)]))
    other = good.replace(document_id("a.md").encode(), document_id("b.md").encode())
    wrong = [b"[]\n", b"{}\n", b"x\n", b'{"a":' * 5000, good.replace(b'"ordinal":0', b'"ordinal":null'), other]
    for number, line in enumerate(wrong):
        bank = crafted(tmp_path / str(number), [line], [len(line)])
        with open_bank(bank) as snapshot:
            uses = [lambda: snapshot.row(RowRef(0, 0)), lambda: snapshot.search(np.ones((1, 16), np.float32) / 4, 1)]
            for use in uses if line == other else [*uses, lambda: list(snapshot.passages())]:
                with pytest.raises(DamagedFile):
                    use()
        assert [finding for finding in verify(bank) if not finding.note]


def test_promise_16_line_ends_that_lie_are_refused(tmp_path: Path) -> None:
    lines = [passage_line(passage) for passage in rows("a.md", 2)[0]]
    first, both = len(lines[0]), len(lines[0]) + len(lines[1])
    outside, parts, more = "leave the docs file", "is not a passage", "more lines"
    lies = [
        ([first, first], outside),
        ([first, both + 1], outside),
        ([-5, both], outside),
        ([first, 1 << 62], outside),
        ([both, first], outside),
        ([1, both], parts),
        ([1, 2], more),
        ([first, both - 1], more),
    ]
    for number, (ends, what) in enumerate(lies):
        with open_bank(crafted(tmp_path / str(number), lines, ends)) as snapshot:
            with pytest.raises(DamagedFile, match=what):
                list(snapshot.passages())
            with pytest.raises(DamagedRow):
                snapshot.read_rows([RowRef(0, 0), RowRef(0, 1)])
    longer = crafted(tmp_path / "longer", [*lines, b"more\n"], [first, both])
    with open_bank(longer) as snapshot, pytest.raises(DamagedFile, match="more lines than its shard has rows"):
        list(snapshot.passages())


def test_a_region_reads_nothing_outside_itself(tmp_path: Path) -> None:
    """What a packed bank will rest on: many regions in one file."""
    (tmp_path / "file").write_bytes(b"0123456789")
    fd = os.open(tmp_path / "file", os.O_RDONLY)
    try:
        region = Region(fd, 2, 5, "part")
        assert region.read(0, 5) == b"23456" and region.read(4, 1) == b"6" and region.read(5, 0) == b""
        assert region.sha256() == sha256_hex(b"23456")
        for start, count in ((0, 6), (5, 1), (-1, 1), (-2, 2), (1 << 70, 1)):
            with pytest.raises(DamagedFile):
                region.read(start, count)
        with pytest.raises(DamagedFile, match="ends after 8 of 20"):
            Region(fd, 2, 20, "part").read(0, 20)
    finally:
        os.close(fd)


def test_a_file_of_another_size_is_told_so(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        shard = snapshot.manifest.shards[0]
        (bank / shard.docs_name).write_bytes((bank / shard.docs_name).read_bytes() + b"more")
        with pytest.raises(DamagedRow, match=rf"has {shard.docs.bytes + 4} bytes, not {shard.docs.bytes}"):
            snapshot.row(RowRef(0, 0))


def test_a_pipe_in_place_of_a_file_does_not_block(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        name = snapshot.manifest.shards[0].name
    (bank / name).unlink()
    os.mkfifo(bank / name)
    with open_bank(bank) as snapshot, pytest.raises(DamagedFile, match="is not a file"):
        snapshot.row(RowRef(0, 0))
    (bank / name).unlink()
    (bank / name).mkdir()
    with open_bank(bank) as snapshot, pytest.raises(DamagedFile, match="is not a file"):
        snapshot.row(RowRef(0, 0))
