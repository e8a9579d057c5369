"""A bank in one file: the same bytes for the same snapshot, read as it is, and no byte of it believed unproved
(promises 1 to 5, 7, 15, 16 and 20 for the packed form).
"""

from __future__ import annotations

import errno
import io
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import tarfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from faults import Child, Fault, Watched, die, no_links, run_and_kill
from hypothesis import HealthCheck, given
from hypothesis import settings as run_with
from hypothesis import strategies as st
from made_banks import PRIOR, content, copy_of, make_bank, rows, settings, tree
from test_bank_damage import assert_nothing_wrong_is_returned, bounded
from test_bank_move import NEXT, move

from regrad_cli.bank import (
    Snapshot,
    create_bank,
    files,
    log,
    open_bank,
    pack_bank,
    remove_documents,
    unpack_bank,
    verify,
    write_bank,
)
from regrad_cli.bank.damage import DamagedFile, Finding
from regrad_cli.bank.layout import BANK_FOLDER, locate_bank
from regrad_cli.bank.manifest import MANIFEST_LIMIT
from regrad_cli.bank.packed import BLOCK, END, SIZE_LIMIT, Packed, header, members, padding
from regrad_cli.errors import Damaged, NoBank, RegradError, StorageFailed, UnknownFormat, UsageProblem
from regrad_cli.records import RowRef, canonical_json, sha256_hex

Entries = list[tuple[str, bytes]]


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two shards with a removed row each, so that every part of the format is in use."""
    bank = make_bank(tmp_path_factory.mktemp("whole") / "b", [("a.md", 4), ("b.md", 2)], [("c.md", 3), ("d.md", 2)])
    remove_documents(bank, ["b.md", "d.md"])
    return bank


@pytest.fixture(scope="module")
def packed(whole: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("packed") / "x.gbank"
    pack_bank(whole, file)
    return file


def archive(entries: Entries) -> bytes:
    """The bytes of a packed bank with these files."""
    return b"".join(header(name, len(data)) + data + padding(len(data)) for name, data in entries) + END


def entries_of(file: Path) -> Entries:
    with tarfile.open(file) as tar:
        return [(member.name, tar.extractfile(member).read()) for member in tar]  # type: ignore[union-attr]


def with_manifest(file: Path, change: Callable[[dict], None]) -> bytes:
    """The packed bank with its manifest changed, and that one's own hash made right again."""
    entries = entries_of(file)
    body = json.loads(entries[1][1])
    body.pop("sha256")
    change(body)
    data = (canonical_json(body | {"sha256": sha256_hex(canonical_json(body))}) + "\n").encode()
    return archive([entries[0], (f"snapshots/{body['number']:08d}.json", data), *entries[2:]])


def put(file: Path, data: bytes) -> Path:
    file.write_bytes(data)
    return file


def left_over(folder: Path) -> list[str]:
    return sorted(entry.name for entry in folder.iterdir())


# ── the same bytes ───────────────────────────────────────────────────────────────────────────────────────────────────


def test_the_same_snapshot_gives_the_same_bytes_wherever_and_whenever(
    whole: Path, packed: Path, tmp_path: Path
) -> None:
    before = os.umask(0o077)
    try:
        elsewhere = copy_of(whole, tmp_path / "another place")
        (elsewhere / "tmp" / "left").write_bytes(b"x")
        for file in elsewhere.rglob("*"):
            os.utime(file, (1, 1))
        told = pack_bank(elsewhere, tmp_path / "y.gbank")
    finally:
        os.umask(before)
    data = (tmp_path / "y.gbank").read_bytes()
    assert data == packed.read_bytes()
    assert told == {
        "path": str(tmp_path / "y.gbank"), "bytes": len(data), "sha256": sha256_hex(data), "snapshot": 4,
        "documents": 2, "passages": 7, "dead": 4,
    }  # fmt: skip
    assert (tmp_path / "y.gbank").stat().st_mode & 0o777 == 0o600


def test_packed_unpacked_and_packed_again_is_the_same(whole: Path, packed: Path, tmp_path: Path) -> None:
    told = unpack_bank(packed, tmp_path / "b")
    assert {**told, "bytes": 0} == {
        "path": str(tmp_path / "b"), "bytes": 0, "snapshot": 4, "documents": 2, "passages": 7,
    }  # fmt: skip
    pack_bank(tmp_path / "b", tmp_path / "y.gbank")
    pack_bank(packed, tmp_path / "z.gbank")
    assert packed.read_bytes() == (tmp_path / "y.gbank").read_bytes() == (tmp_path / "z.gbank").read_bytes()


DOCUMENTS = st.dictionaries(st.text("abcä🐝/. \n", min_size=1, max_size=6), st.integers(1, 3), max_size=3)


@run_with(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(commits=st.lists(DOCUMENTS, max_size=3), gone=st.integers(0, 3))
def test_any_bank_comes_back_as_it_was(tmp_path_factory: pytest.TempPathFactory, commits: list, gone: int) -> None:
    root = tmp_path_factory.mktemp("any")
    bank = make_bank(root / "b", *[list(documents.items()) for documents in commits])
    with open_bank(bank) as snapshot:
        sources = list(dict.fromkeys(entry["id"] for entry in snapshot.documents()))[:gone]
    if sources:
        remove_documents(bank, sources)
    pack_bank(bank, root / "x.gbank")
    assert content(root / "x.gbank") == content(bank)
    unpack_bank(root / "x.gbank", root / "u")
    pack_bank(root / "u", root / "y.gbank")
    assert content(root / "u") == content(bank)
    assert (root / "y.gbank").read_bytes() == (root / "x.gbank").read_bytes()
    assert [*verify(root / "x.gbank"), *verify(root / "u")] == []


def test_it_is_a_tar_archive_of_nothing_but_names_and_bytes(whole: Path, packed: Path) -> None:
    with open_bank(whole) as snapshot:
        names = ["FORMAT", snapshot.manifest.name, *(name for name, _ in snapshot.manifest.files())]
    with tarfile.open(packed) as tar:
        found = tar.getmembers()
        for member in found:
            assert member.isreg() and member.offset_data % 64 == 0
            assert (member.mode, member.mtime, member.uid, member.gid) == (0o644, 0, 0, 0)
            assert (member.uname, member.gname, member.pax_headers) == ("", "", {})
            assert tar.extractfile(member).read() == (whole / member.name).read_bytes()  # type: ignore[union-attr]
    assert [member.name for member in found] == names


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
def test_what_tar_takes_out_is_a_live_bank(whole: Path, packed: Path, tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    listed = subprocess.run(["tar", "tf", packed], capture_output=True, text=True, check=True)
    assert listed.stderr == "" and listed.stdout.splitlines() == [name for name, _ in entries_of(packed)]
    subprocess.run(["tar", "xf", packed, "-C", tmp_path / "b"], check=True)
    assert content(tmp_path / "b") == content(whole)
    with write_bank(tmp_path / "b") as writer:
        writer.add(*rows("new.md", 2))
        writer.commit("ingest")
        writer.finish()
    assert {row[0].source for row in content(tmp_path / "b").values()} == {"a.md", "c.md", "new.md"}
    assert list(verify(tmp_path / "b")) == []


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
def test_headers_are_those_that_tar_writes(packed: Path, tmp_path: Path) -> None:
    with tarfile.open(packed) as tar:
        tar.extractall(tmp_path, filter="data")
    names = [name for name, _ in entries_of(packed)]
    plain = ["--format=ustar", "--mtime=@0", "--owner=0", "--group=0", "--numeric-owner", "--mode=0644", "-b1"]
    run = subprocess.run(["tar", *plain, "-cf", "made.tar", *names], cwd=tmp_path, capture_output=True, check=False)
    if run.returncode:
        pytest.skip("no GNU tar")
    assert (tmp_path / "made.tar").read_bytes() == packed.read_bytes()


def test_an_unpacked_bank_is_written_to_as_if_it_had_never_been_packed(
    whole: Path, packed: Path, tmp_path: Path
) -> None:
    unpack_bank(packed, tmp_path / "u")
    stayed = copy_of(whole, tmp_path / "stayed")
    create_bank(tmp_path / "new", settings(), PRIOR)
    assert left_over(tmp_path / "u") == left_over(tmp_path / "new")
    for bank in (tmp_path / "u", stayed):
        with write_bank(bank) as writer:
            writer.add(*rows("new.md", 2))
            writer.commit("ingest")
            writer.finish()
    assert content(tmp_path / "u") == content(stayed)
    assert list(verify(tmp_path / "u")) == []
    assert log(tmp_path / "u")[1]["snapshot"] == 4
    manifest, copy = (tmp_path / "u" / "snapshots" / f"00000004.{kind}" for kind in ("json", "copy"))
    assert manifest.read_bytes() == copy.read_bytes()


def test_files_get_the_mode_of_the_umask(packed: Path, tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        unpack_bank(packed, tmp_path / "u")
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "u").rglob("*") if file.is_file()} == {0o640}
    assert {file.stat().st_mode & 0o777 for file in (tmp_path / "u").rglob("*") if file.is_dir()} == {0o750}


def test_an_older_snapshot_is_packed_as_it_was(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    pack_bank(bank, tmp_path / "x.gbank", 3)
    assert content(tmp_path / "x.gbank") == content(bank, 3) != content(bank)
    assert [entry["snapshot"] for entry in log(tmp_path / "x.gbank")] == [3]
    with pytest.raises(UsageProblem, match="no snapshot 9"):
        pack_bank(bank, tmp_path / "y.gbank", 9)
    assert not (tmp_path / "y.gbank").exists()


def test_a_move_that_is_under_way_is_packed_with_the_rows_it_has_and_goes_on(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    move(bank, stop=1)
    pack_bank(bank, tmp_path / "x.gbank")
    assert content(tmp_path / "x.gbank") == content(whole)
    for way in (bank, tmp_path / "x.gbank"):
        with open_bank(way) as snapshot:
            moved = snapshot.moved()
            assert moved is not None and moved.prior_bytes() == NEXT
            found = {passage.id: moved.row(ref).codes for ref, passage, _ in moved.passages()}
            assert len(found) > 0
    assert list(verify(tmp_path / "x.gbank")) == []
    unpack_bank(tmp_path / "x.gbank", tmp_path / "u")
    move(tmp_path / "u")
    move(bank)
    assert content(tmp_path / "u") == content(bank)


def test_the_graph_is_not_packed_and_answers_are_exact(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAD_INDEX_FROM", "3")
    bank = copy_of(whole, tmp_path / "b")
    with write_bank(bank) as writer:
        writer.add(*rows("new.md", 2))
        writer.commit("ingest")
        writer.finish()
    with open_bank(bank) as snapshot:
        assert snapshot.manifest.index is not None and snapshot.stats()["bytes"]["index"] > 0
    pack_bank(bank, tmp_path / "x.gbank")
    assert not [name for name, _ in entries_of(tmp_path / "x.gbank") if name.startswith("index")]
    assert content(tmp_path / "x.gbank") == content(bank)
    with open_bank(tmp_path / "x.gbank") as snapshot:
        assert snapshot.stats()["bytes"]["index"] == 0
    unpack_bank(tmp_path / "x.gbank", tmp_path / "u")
    assert content(tmp_path / "u") == content(bank)
    assert [finding.note for finding in verify(tmp_path / "u")] == [True]
    pack_bank(tmp_path / "u", tmp_path / "y.gbank")
    assert (tmp_path / "y.gbank").read_bytes() == (tmp_path / "x.gbank").read_bytes()


def test_a_stream_can_be_packed_to_and_unpacked_from(whole: Path, packed: Path, tmp_path: Path) -> None:
    stream = io.BytesIO()
    assert pack_bank(whole, stream)["path"] is None
    assert stream.getvalue() == packed.read_bytes()
    stream.seek(0)
    unpack_bank(stream, tmp_path / "u")
    assert content(tmp_path / "u") == content(whole)


# ── opening and reading ──────────────────────────────────────────────────────────────────────────────────────────────


def test_opening_reads_three_blocks_and_the_manifest(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    sizes = []
    for number, count in enumerate((1, 500)):
        bank = make_bank(tmp_path / str(number), [("a.md", count)])
        pack_bank(bank, tmp_path / f"{number}.gbank")
        read = []
        monkeypatch.setattr(
            os,
            "preadv",
            lambda fd, into, at, read=read, call=os.preadv: read.append((at, len(into[0]))) or call(fd, into, at),
        )
        with open_bank(tmp_path / f"{number}.gbank") as snapshot:
            assert snapshot.stats()["passages"] == count
        monkeypatch.undo()
        manifest = len(entries_of(tmp_path / f"{number}.gbank")[1][1])
        assert read == [(0, 3 * BLOCK), (3 * BLOCK, manifest)]
        sizes.append(manifest)
    assert abs(sizes[1] - sizes[0]) < 40  # digits of counts


def test_stats_and_log_of_a_packed_bank_import_no_numpy(packed: Path) -> None:
    code = (
        "import sys, pathlib; from regrad_cli.bank import open_bank, log, locate_bank;"
        "path = locate_bank(sys.argv[1], pathlib.Path());"
        "assert open_bank(path).stats()['form'] == 'packed' and log(path);"
        "sys.exit(bool({'numpy', 'tarfile'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code, packed], check=False).returncode == 0


def test_a_packed_bank_that_is_replaced_while_it_is_read_stays_itself(
    whole: Path, packed: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(packed, tmp_path / "x.gbank"))
    other = make_bank(tmp_path / "other", [("other.md", 9)])
    before = content(file)
    with open_bank(file) as snapshot:
        first = snapshot.row(RowRef(0, 0))
        pack_bank(other, file, force=True)
        assert {passage.id for _, passage, _ in snapshot.passages()} == set(before)
        assert snapshot.row(RowRef(0, 0)) == first
        question = np.ones((1, 16), np.float32) / 4
        assert {hit.passage.id for hit in snapshot.search(question, 9, warm=True)[0]} == set(before)
        assert snapshot.prior_bytes() == PRIOR
    assert {row[0].source for row in content(file).values()} == {"other.md"}


def test_a_closed_packed_bank_reads_from_no_other_file(packed: Path) -> None:
    with open_bank(packed) as snapshot:
        snapshot.row(RowRef(0, 0))
    taken = os.open(packed, os.O_RDONLY)  # may get the number of the descriptor that was closed
    try:
        with pytest.raises(DamagedFile):
            snapshot.row(RowRef(0, 0))
        snapshot.close()
        os.fstat(taken)
    finally:
        os.close(taken)
    before = len(list(Path("/proc/self/fd").iterdir()))
    for _ in range(5):
        with open_bank(packed), pytest.raises(UsageProblem):
            open_bank(packed, 9)
        with pytest.raises(UsageProblem), write_bank(packed):
            pass
    assert len(list(Path("/proc/self/fd").iterdir())) == before


def test_a_packed_bank_is_read_by_many_threads(packed: Path) -> None:
    right = content(packed)
    wrong: list[object] = []
    with open_bank(packed) as snapshot:
        refs = [(ref, passage.id) for ref, passage, _ in snapshot.passages()]

        def read(seed: int) -> None:
            chance = random.Random(seed)
            for _ in range(100):
                ref, name = chance.choice(refs)
                if snapshot.row(ref).codes != right[name][2]:
                    wrong.append(name)

        threads = [threading.Thread(target=read, args=(seed,)) for seed in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert wrong == []


def test_a_packed_bank_holds_one_snapshot(packed: Path) -> None:
    with open_bank(packed, 4) as snapshot:
        assert snapshot.number == 4
    with pytest.raises(UsageProblem, match="no snapshot 3") as caught:
        open_bank(packed, 3)
    assert "4" in caught.value.hint


def test_a_packed_bank_is_not_written_to(packed: Path, tmp_path: Path) -> None:
    before = packed.read_bytes()
    for write in (
        lambda: write_bank(packed).__enter__(),
        lambda: remove_documents(packed, ["a.md"]),
        lambda: move(packed),
    ):
        with pytest.raises(UsageProblem, match="is packed and cannot be written to") as caught:
            write()
        assert "regrad bank unpack" in caught.value.hint
    with pytest.raises(UsageProblem):
        create_bank(packed, settings(), PRIOR)
    assert packed.read_bytes() == before and left_over(packed.parent) == ["x.gbank"]
    with pytest.raises(NoBank), write_bank(put(tmp_path / "x.pdf", b"%PDF-1.4")):
        pass


# ── promises 3, 4, 5: damage ─────────────────────────────────────────────────────────────────────────────────────────


def regions(file: Path) -> dict[str, range]:
    """Where what lies in a packed bank: every header, file and filling, and the end."""
    found: dict[str, range] = {}
    at = 0
    for name, data in entries_of(file):
        for part, length in (("header", BLOCK), ("file", len(data)), ("filling", len(padding(len(data))))):
            if length:
                found[f"{part} of {name}"] = range(at, at + length)
            at += length
    found["end"] = range(at, at + len(END))
    return found


def test_promise_03_any_flipped_bit_of_a_packed_bank_is_noticed(packed: Path, tmp_path: Path) -> None:
    """By `verify` wherever it lies, and nothing wrong is returned by whatever reads it."""
    right = content(packed)
    data = packed.read_bytes()
    chance = random.Random(20261122)
    tried = 0
    for region, places in regions(packed).items():
        chosen = {places[0], places[-1], *(chance.choice(places) for _ in range(20))}
        for position in sorted(chosen):
            flipped = bytearray(data)
            flipped[position] ^= 1 << chance.randrange(8)
            file = put(tmp_path / "x.gbank", bytes(flipped))
            noticed = assert_nothing_wrong_is_returned(file, right)
            try:
                findings = [finding for finding in verify(file) if not finding.note]
            except UnknownFormat:
                findings = [Finding("FORMAT", "has a digit that was flipped into a newer one")]
            assert findings, f"byte {position}, in {region}"
            at_opening = region.split("/")[0] in ("header of FORMAT", "file of FORMAT", "filling of FORMAT")
            at_opening |= "snapshots" in region and "filling" not in region
            assert noticed or not at_opening, f"byte {position}, in {region}"
            if "header" in region:
                assert noticed, f"byte {position}, in {region}"
            with pytest.raises((Damaged, UnknownFormat)):
                unpack_bank(file, tmp_path / "u")
            assert left_over(tmp_path) == ["x.gbank"]
            tried += 1
    assert tried > 300


def test_promise_03_a_damaged_bank_is_not_packed(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        names = [snapshot.manifest.name, *(name for name, _ in snapshot.manifest.files())]
    for name in names:
        data = (bank / name).read_bytes()
        for wrong in (
            data[:-1],
            data + b"\0",
            bytes([data[0] ^ 1]) + data[1:],
            data[:-1] + bytes([data[-1] ^ 1]),
            None,
        ):
            (bank / name).unlink()
            if wrong is not None:
                (bank / name).write_bytes(wrong)
            if wrong is None and name.startswith("snapshots"):
                continue
            for out in (tmp_path / "x.gbank", io.BytesIO()):
                with pytest.raises(DamagedFile) as caught:
                    pack_bank(bank, out)
                assert name in caught.value.message and caught.value.hint
        (bank / name).write_bytes(data)
    assert left_over(tmp_path) == ["b"]


def test_promise_03_a_manifest_that_changed_since_it_was_opened_is_not_packed(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = copy_of(whole, tmp_path / "b")
    with open_bank(bank) as snapshot:
        manifest = snapshot.manifest
    right = (bank / manifest.name).read_bytes()
    for wrong in (right[:-2] + b"\0\n", replace(manifest, operation="another").to_bytes()[0]):
        (bank / manifest.name).write_bytes(right)

        def opened(path: Path, number: int | None, wrong: bytes = wrong) -> Snapshot:
            found = open_bank(path, number)
            (bank / manifest.name).write_bytes(wrong)
            return found

        monkeypatch.setattr("regrad_cli.bank.pack.open_bank", opened)
        with pytest.raises(DamagedFile, match=manifest.name):
            pack_bank(bank, tmp_path / "x.gbank")
    assert left_over(tmp_path) == ["b"]


def test_promise_04_a_packed_bank_cut_anywhere_is_an_error_and_no_crash(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    chance = random.Random(20261122)
    manifest_ends = regions(packed)["file of snapshots/00000004.json"][-1] + 1
    lengths = {0, 1, 511, 512, 513, 519, 520, 1024, 1536, 1537, len(data) - 1, len(data) - 511, len(data) - 512}
    lengths |= {chance.randrange(len(data)) for _ in range(100)}
    lengths |= {edge for places in regions(packed).values() for edge in (places[0], places[-1])}
    for length in sorted(lengths):
        file = put(tmp_path / "x.gbank", data[:length])
        uses: tuple[Callable[[], object], ...] = (
            lambda file=file: open_bank(file),
            lambda file=file: log(file),
            lambda file=file: unpack_bank(file, tmp_path / "u"),
            lambda file=file: unpack_bank(io.BytesIO(file.read_bytes()), tmp_path / "u"),
            lambda file=file: pack_bank(file, tmp_path / "y.gbank"),
        )
        for use in uses:
            with pytest.raises(DamagedFile) as caught:
                use()
            assert caught.value.message and caught.value.hint, length
        with pytest.raises(DamagedFile, match="ends after" if length < manifest_ends else "bytes, not"):
            open_bank(file)
        assert [finding.file for finding in verify(file)] == ["x.gbank"]
        assert left_over(tmp_path) == ["x.gbank"]
    for more in (b"\0", bytes(512), bytes(10240)):
        with pytest.raises(DamagedFile, match="bytes, not"):
            open_bank(put(tmp_path / "x.gbank", data + more))
        with pytest.raises(DamagedFile, match="does not end"):
            unpack_bank(io.BytesIO(data + more), tmp_path / "u")


@pytest.mark.skipif(shutil.which("tar") is None, reason="no tar here")
def test_what_is_left_of_a_cut_file_answers_as_the_error_says(whole: Path, packed: Path, tmp_path: Path) -> None:
    (start, *_) = [places for name, places in regions(packed).items() if "shards" in name and "file" in name][1]
    file = put(tmp_path / "x.gbank", packed.read_bytes()[: start + 100])
    with pytest.raises(DamagedFile) as caught:
        open_bank(file)
    assert "tar xf FILE -C FOLDER" in caught.value.hint and "--skip-damaged" in caught.value.hint
    (tmp_path / "b").mkdir()
    subprocess.run(["tar", "xf", file, "-C", tmp_path / "b"], capture_output=True, check=False)
    with open_bank(tmp_path / "b") as snapshot:
        assert [entry["source"] for entry in snapshot.documents(skip_damaged=True)] == ["a.md"]


def test_promise_05_what_is_readable_of_a_packed_bank_is_answered_and_said_to_be_partial(
    packed: Path, tmp_path: Path
) -> None:
    data = bytearray(packed.read_bytes())
    with open_bank(packed) as snapshot:
        lost = snapshot.manifest.shards[0].name
        vector = np.frombuffer(snapshot.row(RowRef(0, 0)).embedding, np.float16).astype(np.float32)[None]
    for region in ("header", "file"):
        data[regions(packed)[f"{region} of {lost}"][-1]] ^= 1
    file = put(tmp_path / "x.gbank", bytes(data))
    for warm in (False, True):
        with open_bank(file) as snapshot:
            with pytest.raises(Damaged, match=lost[:20]):
                snapshot.search(vector, 2, warm=warm)
            hits = snapshot.search(vector, 2, warm=warm, skip_damaged=True)[0]
            assert [hit.passage.source for hit in hits] == ["c.md", "c.md"]
            assert {finding.file for finding in snapshot.damaged} == {lost}
    assert [finding.file for finding in verify(file)] == [lost]


# ── promises 15, 16, 20: what others make up ─────────────────────────────────────────────────────────────────────────


def tar_header(name: str, size: int = 0, **changes: object) -> bytes:
    info = tarfile.TarInfo(name)
    info.size, info.mtime, info.mode = size, 0, 0o644
    for field, value in changes.items():
        setattr(info, field, value)
    return info.tobuf(tarfile.PAX_FORMAT)


def crafted(file: Path) -> Iterator[tuple[str, bytes]]:
    """Archives that look like packed banks and would write elsewhere, or something else."""
    entries = entries_of(file)
    parts = [header(name, len(data)) + data + padding(len(data)) for name, data in entries]

    def whole(*inserted: bytes, at: int = len(parts), without: int = 0) -> bytes:
        return b"".join([*parts[:at], *inserted, *parts[at + without :], END])

    def member(name: str, data: bytes = b"owned", **changes: object) -> bytes:
        return tar_header(name, len(data), **changes) + data + padding(len(data))

    last, last_data = entries[-1]
    for name in ("../owned", "/tmp/p-owned", "shards/../../owned", "owned", "shards/owned", "snapshots/00000009.json"):
        yield f"{name} at the end", whole(member(name))
        yield f"{name} in the middle", whole(member(name), at=3)
        yield f"{name} instead of a file", whole(member(name, last_data), at=len(parts) - 1, without=1)
        yield f"{name} first", whole(member(name), at=0)
    for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE):
        link = tar_header(last, 0, type=kind, linkname="../../owned")
        yield f"a link of type {kind!r} instead", whole(link, at=len(parts) - 1, without=1)
        yield f"a link of type {kind!r} before", whole(link, at=len(parts) - 1)
        yield f"a folder that is a link {kind!r}", whole(tar_header("shards", 0, type=kind, linkname=".."), at=2)
    for kind in (tarfile.DIRTYPE, tarfile.FIFOTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.CONTTYPE, b"L", b"S"):
        changed = tar_header(last, len(last_data), type=kind) + last_data + padding(len(last_data))
        yield f"of type {kind!r}", whole(changed, at=len(parts) - 1, without=1)
    yield "a file twice", whole(parts[-1])
    yield "the manifest twice", whole(parts[1], at=2)
    yield "a file missing", whole(at=len(parts) - 1, without=1)
    yield "two files swapped", b"".join([*parts[:3], parts[4], parts[3], *parts[5:], END])
    yield "FORMAT missing", whole(at=0, without=1)
    yield "the manifest missing", whole(at=1, without=1)
    yield "pax headers", whole(tar_header(last, len(last_data), pax_headers={"path": "../owned"}), at=len(parts) - 1)
    yield (
        "owner and time",
        whole(
            tar_header(last, len(last_data), mtime=1, uid=7, uname="x") + last_data + padding(len(last_data)),
            at=len(parts) - 1,
            without=1,
        ),
    )
    for size in (0, 1, len(last_data) - 1, len(last_data) + 1, SIZE_LIMIT - 1):
        yield (
            f"size {size}",
            whole(header(last, size) + last_data + padding(len(last_data)), at=len(parts) - 1, without=1),
        )
        sized = header(entries[1][0], size) + parts[1][BLOCK:]
        yield f"manifest of size {size}", whole(sized, at=1, without=1)
    for digits in (b"77777777777\0", b"\x80" + bytes(10) + b"\x10", b"\xff" * 12, b"-0000000010\0", b"99999999999\0"):
        for place in (1, len(parts) - 1):
            block = bytearray(parts[place])
            block[124:136] = digits
            yield f"size {digits!r} of member {place}", whole(bytes(block), at=place, without=1)


def test_promise_15_a_crafted_packed_bank_writes_nothing_anywhere(packed: Path, tmp_path: Path) -> None:
    room = tmp_path / "room"
    room.mkdir()
    tried = 0
    for what, data in crafted(packed):
        file = put(room / "x.gbank", data)
        for use in (
            lambda file=file: unpack_bank(file, room / "u"),
            lambda data=data: unpack_bank(io.BytesIO(data), room / "u"),
        ):
            with pytest.raises((Damaged, NoBank)):
                use()
            assert left_over(room) == ["x.gbank"], what
        assert left_over(tmp_path) == ["room"] and not Path("/tmp/p-owned").exists(), what
        try:
            assert [finding for finding in verify(file) if not finding.note], what
        except NoBank:
            assert "FORMAT missing" in what or "first" in what
        tried += 1
    assert tried > 50


def test_promise_15_hostile_names_are_no_way_out_of_the_manifest(packed: Path, tmp_path: Path) -> None:
    """Names of files are hashes in the manifest; whatever else stands there is no manifest."""
    for name in ("../" * 8 + "etc", "/" * 64, "a" * 63 + "/", "A" * 64, "0" * 63 + "\n"):

        def change(body: dict, name: str = name) -> None:
            body["shards"][0]["docs"]["sha256"] = name

        for use in (open_bank, lambda file: unpack_bank(file, tmp_path / "u")):
            with pytest.raises(DamagedFile, match="not a manifest"):
                use(put(tmp_path / "x.gbank", with_manifest(packed, change)))
    assert left_over(tmp_path) == ["x.gbank"]


def test_promise_15_a_link_in_the_way_is_not_followed(packed: Path, tmp_path: Path) -> None:
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    (elsewhere / "lock").write_bytes(b"")
    (elsewhere / "kept").write_bytes(b"kept")
    room = tmp_path / "room"
    room.mkdir()
    run_and_kill(lambda told: unpack_bank(packed, room / "u") and None, 20, True)
    (scratch,) = left_over(room)
    (room / (scratch[:-16] + "0" * 16)).symlink_to(elsewhere)
    os.mkfifo(room / (scratch[:-16] + "1" * 16))
    unpack_bank(packed, room / "u")
    assert scratch not in left_over(room)
    assert left_over(elsewhere) == ["kept", "lock"]


@pytest.mark.parametrize("size", [0, 1, 1 << 20, (1 << 33) - 1, 1 << 33, 1 << 40])
def test_promise_16_a_manifest_that_lies_about_sizes_costs_nothing(packed: Path, tmp_path: Path, size: int) -> None:
    def shard(body: dict) -> None:
        body["shards"][0]["bytes"] = size

    def docs(body: dict) -> None:
        body["shards"][1]["docs"]["bytes"] = size

    def prior(body: dict) -> None:
        body["prior"]["bytes"] = size

    def the_same_file_twice(body: dict) -> None:
        body["shards"][1]["docs"] = body["shards"][0]["docs"] | {"bytes": size}

    for change in (shard, docs, prior, the_same_file_twice):
        data = with_manifest(packed, change)
        file = put(tmp_path / "x.gbank", data)
        raised = bounded(lambda file=file: content(file))
        assert isinstance(raised, DamagedFile)
        assert bounded(lambda file=file: next(verify(file))) is None
        raised = bounded(lambda data=data: unpack_bank(io.BytesIO(data), tmp_path / "u"))
        assert isinstance(raised, DamagedFile) and left_over(tmp_path) == ["x.gbank"]


def test_promise_16_a_hostile_start_costs_nothing(packed: Path, tmp_path: Path) -> None:
    start = packed.read_bytes()[: 2 * BLOCK]
    sizes = (0, 1, MANIFEST_LIMIT, MANIFEST_LIMIT + 1, SIZE_LIMIT - 1)
    starts = [start + header("snapshots/00000004.json", size) for size in sizes]
    starts += [
        start + header(f"snapshots/{number}.json", 10) for number in ("1" * 12, "0" * 60, "00000000", "-0000001")
    ]
    starts += [start + bytes(BLOCK), start + b"\xff" * BLOCK, start + start[:BLOCK]]
    for beginning in starts:
        for data in (beginning, beginning + bytes(5000), beginning + b"[" * 100_000 + bytes(480)):
            file = put(tmp_path / "x.gbank", data)
            assert isinstance(bounded(lambda file=file: open_bank(file)), DamagedFile)
            raised = bounded(lambda data=data: unpack_bank(io.BytesIO(data), tmp_path / "u"))
            assert isinstance(raised, DamagedFile)
    assert left_over(tmp_path) == ["x.gbank"]


@pytest.mark.parametrize("size", [MANIFEST_LIMIT + 1, SIZE_LIMIT - 1])
def test_promise_16_a_manifest_too_large_is_not_read_from_a_pipe(packed: Path, tmp_path: Path, size: int) -> None:
    """Which may have no end."""

    class Endless(io.BytesIO):
        def read(self, count: int | None = -1) -> bytes:
            assert count is not None and count >= 0
            found = super().read(count)
            assert found or not count, "it read on after the manifest's header"
            return found

    start = packed.read_bytes()[: 2 * BLOCK] + header("snapshots/00000004.json", size)
    with pytest.raises(DamagedFile, match="before its manifest"):
        unpack_bank(Endless(start), tmp_path / "u")


@run_with(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    before=st.sampled_from([0, 512, 520, 1024, 1536]),
    junk=st.binary(max_size=3000),
    after=st.booleans(),
)
def test_promise_16_any_bytes_are_refused_or_a_bank(
    packed: Path, tmp_path: Path, before: int, junk: bytes, after: bool
) -> None:
    data = packed.read_bytes()
    made = data[:before] + junk + (data[before + len(junk) :] if after else b"")
    file = put(tmp_path / "x.gbank", made)
    try:
        with open_bank(file) as snapshot:
            assert snapshot.number == 4
        assert made == data or any(verify(file))
    except (Damaged, NoBank, UnknownFormat) as error:
        assert error.message and error.hint


def test_promise_20_a_newer_packed_bank_is_refused(packed: Path, tmp_path: Path) -> None:
    data = packed.read_bytes()
    for text in (b"gbank 2\n", b"gbank 10\n"):
        newer = header("FORMAT", len(text)) + text.ljust(BLOCK, b"\0") + b"whatever comes then" * 100
        for file in (put(tmp_path / "x.gbank", newer), put(tmp_path / "x.gbank", data.replace(b"gbank 1\n", text, 1))):
            uses = (open_bank, log, lambda file: unpack_bank(file, tmp_path / "u"), lambda file: list(verify(file)))
            for use in uses:
                with pytest.raises(UnknownFormat, match="is of format") as caught:
                    use(file)
                assert "newer regrad" in caught.value.hint
    file = put(tmp_path / "x.gbank", with_manifest(packed, lambda body: body.update(reader_flags=["folded-codes"])))
    for use in (open_bank, lambda file: list(verify(file))):
        with pytest.raises(UnknownFormat, match="folded-codes"):
            use(file)
    file = put(tmp_path / "x.gbank", with_manifest(packed, lambda body: body.update(writer_flags=["counts-words"])))
    assert content(file) == content(packed)


def test_what_is_no_bank_is_told_so(tmp_path: Path) -> None:
    for data in (b"%PDF-1.4\n", b"x", bytes(4000), b"PK\x03\x04" + bytes(2000), tar_header("a.txt", 5) + b"hello"):
        file = put(tmp_path / "x.pdf", data)
        for use in (open_bank, log, lambda file: list(verify(file)), lambda file: unpack_bank(file, tmp_path / "u")):
            with pytest.raises(NoBank, match="not a bank"):
                use(file)
    with pytest.raises(DamagedFile, match="ends after 0 bytes"):
        open_bank(put(tmp_path / "x.gbank", b""))
    with pytest.raises(NoBank, match="is not there"):
        unpack_bank(tmp_path / "none.gbank", tmp_path / "u")
    with pytest.raises(NoBank, match="is a folder"):
        unpack_bank(tmp_path, tmp_path / "u")
    assert not (tmp_path / "u").exists()


def test_what_can_be_seen_at_once_is_said_before_anything_is_written(
    packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = put(tmp_path / "x.gbank", packed.read_bytes()[:-1])
    calls: list[str] = []
    monkeypatch.setattr(files, "SYSTEM", Watched(lambda step, path: calls.append(step)))
    with pytest.raises(DamagedFile, match="bytes, not"):
        unpack_bank(file, tmp_path / "u")
    assert calls == []


def test_a_file_that_no_header_has_room_for_is_refused(packed: Path) -> None:
    with open_bank(packed) as snapshot:
        manifest = snapshot.manifest
    assert len(members(manifest)) == 5
    with pytest.raises(DamagedFile, match="cannot be"):
        members(replace(manifest, prior=replace(manifest.prior, bytes=SIZE_LIMIT)))
    assert len(header("x", SIZE_LIMIT - 1)) == BLOCK
    assert max(map(len, members(manifest))) < 100


# ── where it is written ──────────────────────────────────────────────────────────────────────────────────────────────


def test_pack_replaces_a_packed_bank_only_when_told_and_nothing_else_ever(
    whole: Path, packed: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(packed, tmp_path / "x.gbank"))
    with pytest.raises(UsageProblem, match="there already"):
        pack_bank(whole, file)
    other = make_bank(tmp_path / "other", [("other.md", 1)])
    assert file.read_bytes() == packed.read_bytes()
    pack_bank(other, file, force=True)
    assert {row[0].source for row in content(file).values()} == {"other.md"}
    pack_bank(whole, put(tmp_path / "cut.gbank", packed.read_bytes()[:700]), force=True)
    pack_bank(whole, put(tmp_path / "empty.gbank", b""), force=True)
    pack_bank(packed, tmp_path / "cut.gbank", force=True)
    assert (tmp_path / "cut.gbank").read_bytes() == (tmp_path / "empty.gbank").read_bytes() == packed.read_bytes()
    thesis = put(tmp_path / "thesis.pdf", b"%PDF-1.4")
    for target, said in (
        (thesis, "no packed bank"),
        (tmp_path, "is a folder"),
        (tmp_path / "none" / "x.gbank", "no folder"),
        (other / "x.gbank", "own folder"),
        (other / "tmp" / "x.gbank", "own folder"),
        (other, "own folder"),
        (Path(os.devnull), "no plain file"),
    ):
        with pytest.raises(UsageProblem, match=said) as caught:
            pack_bank(other, target, force=True)
        assert caught.value.hint
    assert thesis.read_bytes() == b"%PDF-1.4"
    (tmp_path / "link.gbank").symlink_to(file)
    pack_bank(whole, tmp_path / "link.gbank", force=True)
    assert (tmp_path / "link.gbank").is_symlink() and file.read_bytes() == packed.read_bytes()


def test_pack_to_a_name_that_was_taken_meanwhile_leaves_what_is_there(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def before(step: str, path: str) -> None:
        if step == "link":
            (tmp_path / "x.gbank").write_bytes(b"FORMAT\0")

    monkeypatch.setattr(files, "SYSTEM", Watched(before))
    with pytest.raises(UsageProblem, match="there already"):
        pack_bank(whole, tmp_path / "x.gbank")
    assert (tmp_path / "x.gbank").read_bytes() == b"FORMAT\0" and left_over(tmp_path) == ["x.gbank"]


def test_unpack_takes_a_free_place_only(packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(tmp_path / "bank")
    put(tmp_path / "file", b"x")
    (tmp_path / "full").mkdir()
    put(tmp_path / "full" / "mine.txt", b"x")
    for target, said in (
        (bank, "a bank at"),
        (tmp_path / "file", "is a file"),
        (tmp_path / "full", "holds other things"),
        (tmp_path / "none" / "b", "no folder"),
    ):
        before = tree(tmp_path)
        with pytest.raises(UsageProblem, match=said) as caught:
            unpack_bank(packed, target)
        assert caught.value.hint and tree(tmp_path) == before
    (tmp_path / "empty").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "empty")
    unpack_bank(packed, tmp_path / "link")
    assert (tmp_path / "link").is_symlink() and content(tmp_path / "empty") == content(packed)
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    with pytest.raises(UsageProblem, match="the folder you are in"):
        unpack_bank(packed, Path())
    unpack_bank(packed, Path(".gbank"))
    assert left_over(tmp_path / "here") == [".gbank"] and list(verify(tmp_path / "here" / ".gbank")) == []


@pytest.mark.parametrize("name", ["🐝 ä\nb", "x" * 255, "\udcff"])
def test_odd_names_are_names(whole: Path, tmp_path: Path, name: str) -> None:
    pack_bank(whole, tmp_path / name)
    assert content(tmp_path / name) == content(whole)
    file = (tmp_path / name).rename(tmp_path / "x.gbank")
    unpack_bank(file, tmp_path / name)
    assert content(tmp_path / name) == content(whole)


# ── promises 1, 2, 7: whatever stops it ──────────────────────────────────────────────────────────────────────────────


def packing(bank: Path, out: Path, force: bool) -> Callable[[Callable[[int], None]], None]:
    return lambda told: pack_bank(bank, out, force=force) and None


@pytest.mark.parametrize("way", ["new", "replaced", "no-links"])
def test_promise_01_killed_at_every_step_of_pack(whole: Path, packed: Path, tmp_path: Path, way: str) -> None:
    other = make_bank(tmp_path / "other", [("other.md", 1)])
    old = tmp_path / "old.gbank"
    pack_bank(other, old)
    seen: set[str] = set()
    for at in range(1, 200):
        room = tmp_path / str(at)
        room.mkdir()
        out = room / "x.gbank"
        if way == "replaced":
            shutil.copy(old, out)
        step, _ = run_and_kill(packing(whole, out, way == "replaced"), at, way != "no-links")
        seen.add(step)
        expected = [packed.read_bytes(), *([old.read_bytes()] if way == "replaced" else [])]
        if out.exists() or way == "replaced":
            assert out.read_bytes() in expected, f"killed before call {at} ({step})"
        if not step:
            assert left_over(room) == ["x.gbank"]
            break
        if not out.exists():  # as whoever packed will try again
            assert run_and_kill(packing(whole, out, False), 0, way != "no-links")[0] == ""
        pack_bank(whole, out, force=True)
        assert out.read_bytes() == packed.read_bytes()
        assert left_over(room) == ["x.gbank"], f"killed before call {at} ({step})"
    assert {"mkdir", "open", "write", "fsync", "fsync folder"} <= seen
    assert "" in seen and ("link" if way == "new" else "rename") in seen


def test_promise_01_killed_at_every_step_of_unpack(whole: Path, packed: Path, tmp_path: Path) -> None:
    right = content(whole)
    seen: set[str] = set()
    for at in range(1, 500):
        room = tmp_path / str(at)
        room.mkdir()
        step, _ = run_and_kill(lambda told, room=room: unpack_bank(packed, room / "u") and None, at, True)
        seen.add(step)
        if (room / "u").exists():
            assert content(room / "u") == right and list(verify(room / "u")) == []
        if not step:
            break
        if not (room / "u").exists():
            unpack_bank(packed, room / "u")
        assert content(room / "u") == right
        assert left_over(room) == ["u"], f"killed before call {at} ({step})"
    assert seen == {"mkdir", "open", "write", "fsync", "fsync folder", "rename", ""}


def test_promise_06_killed_while_it_clears_what_another_left_unpack_leaves_nothing_for_good(
    whole: Path, packed: Path, tmp_path: Path
) -> None:
    def unpack(told: Callable[[int], None]) -> None:
        unpack_bank(packed, tmp_path / "u")

    def unpack_killed_at_a_folder(told: Callable[[int], None]) -> None:
        rmtree, left = shutil.rmtree, [2]

        def counted(path: Path, **options: Any) -> None:
            left[0] -= 1
            if not left[0]:
                die()
            rmtree(path, **options)

        shutil.rmtree = counted
        unpack_bank(packed, tmp_path / "u")

    assert run_and_kill(unpack, 60, True)[0] and len(left_over(tmp_path)) == 1
    assert Child(unpack_killed_at_a_folder).wait().killed and len(left_over(tmp_path)) == 1
    unpack_bank(packed, tmp_path / "u")
    assert left_over(tmp_path) == ["u"] and content(tmp_path / "u") == content(whole)


def test_a_file_beside_the_target_is_nobodys_claim(
    whole: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "x.claim").write_text("a file of one's own")
    monkeypatch.setattr(files, "SYSTEM", Watched(no_links))
    pack_bank(whole, tmp_path / "x.gbank")
    assert left_over(tmp_path) == ["x.claim", "x.gbank"]


def test_promise_02_a_packed_and_an_unpacked_bank_are_durable_before_they_have_their_names(
    whole: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[tuple[str, str]] = []
    monkeypatch.setattr(files, "SYSTEM", Watched(lambda step, path: calls.append((step, path))))
    pack_bank(whole, tmp_path / "x.gbank")
    (temporary,) = {path for step, path in calls if step == "write"}
    steps = [step for step, path in calls if temporary in path]
    assert steps == ["open", *["write"] * steps.count("write"), "fsync", "link", "unlink"]
    named = next(at for at, (step, _) in enumerate(calls) if step == "link")
    assert ("fsync folder", str(tmp_path)) in calls[named:]
    calls.clear()
    unpack_bank(packed, tmp_path / "u")
    placed = next(at for at, (step, path) in enumerate(calls) if path.endswith(f" {tmp_path / 'u'}"))
    scratch = calls[placed][1].split(" ")[0]
    assert ("fsync folder", str(tmp_path)) in calls[placed:]
    for at, (step, path) in enumerate(calls):
        if step == "write":
            synced = calls.index(("fsync", path))
            assert synced > at
        if step == "rename" and at != placed:
            folder = str(Path(path.split(" ")[1]).parent)
            assert ("fsync folder", folder) in calls[at:placed], path
    assert ("fsync folder", scratch) in calls[:placed]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "io"])
def test_promise_07_an_error_at_every_step_of_pack_leaves_what_was_there_and_nothing_else(
    whole: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    for force in (False, True):
        for at in range(1, 200):
            room = tmp_path / f"{force}{at}"
            room.mkdir()
            out = room / "x.gbank"
            if force:
                out.write_bytes(b"")
            fault = Fault(at, lambda: OSError(error, os.strerror(error)))
            monkeypatch.setattr(files, "SYSTEM", Watched(fault))
            try:
                pack_bank(whole, out, force=force)
                failed = False
            except StorageFailed as problem:
                failed = True
                assert str(out) in problem.message and problem.hint
            monkeypatch.setattr(files, "SYSTEM", files.System())
            assert failed or fault.hit in ("", "unlink", "fsync folder")
            if out.exists():
                assert out.read_bytes() in (packed.read_bytes(), *([b""] if force else []))
            if failed and fault.hit not in ("fsync folder",):
                assert left_over(room) == (["x.gbank"] if force else []), fault.hit
            if not fault.hit:
                break
            assert set(left_over(room)) <= {"x.gbank"}


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EIO], ids=["full", "io"])
def test_promise_07_an_error_at_every_step_of_unpack_leaves_nothing(
    whole: Path, packed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: int
) -> None:
    right = content(whole)
    for at in range(1, 500):
        room = tmp_path / str(at)
        room.mkdir()
        fault = Fault(at, lambda: OSError(error, os.strerror(error)))
        monkeypatch.setattr(files, "SYSTEM", Watched(fault))
        try:
            unpack_bank(packed, room / "u")
            failed = False
        except StorageFailed as problem:
            failed = True
            assert str(room / "u") in problem.message
        monkeypatch.setattr(files, "SYSTEM", files.System())
        if not failed:
            assert content(room / "u") == right
        assert left_over(room) in ([], ["u"])
        assert left_over(room) == ["u"] or failed
        if left_over(room) == ["u"] and failed:  # only the last step of all, after the rename
            assert fault.hit == "fsync folder" and content(room / "u") == right
        if not fault.hit:
            return
    raise AssertionError("unpack never ended")


def test_promise_07_a_file_that_may_not_grow(whole: Path, packed: Path, tmp_path: Path) -> None:
    code = (
        "import resource, signal, sys, pathlib; from regrad_cli.bank import pack_bank, unpack_bank;"
        "from regrad_cli.errors import StorageFailed;"
        "signal.signal(signal.SIGXFSZ, signal.SIG_IGN);"
        "resource.setrlimit(resource.RLIMIT_FSIZE, (1200, 1200));\n"
        "for work in (pack_bank, unpack_bank):\n"
        "    try: work(pathlib.Path(sys.argv[1]), pathlib.Path(sys.argv[2])); sys.exit(1)\n"
        "    except StorageFailed as error: assert 'ulimit' in error.hint, error.hint\n"
        "    sys.argv[1] = sys.argv[3]\n"
    )
    room = tmp_path / "room"
    room.mkdir()
    ran = subprocess.run([sys.executable, "-c", code, whole, room / "x", packed], check=False)
    assert ran.returncode == 0 and left_over(room) == []


def test_ctrl_c_leaves_nothing(whole: Path, packed: Path, tmp_path: Path) -> None:
    def interrupt(done: int, total: int) -> None:
        raise KeyboardInterrupt

    for work, source in ((pack_bank, whole), (unpack_bank, packed)):
        with pytest.raises(KeyboardInterrupt):
            work(source, tmp_path / "x", report=interrupt)
        assert left_over(tmp_path) == []


LOOP = """
import sys, pathlib
from regrad_cli.bank import pack_bank, unpack_bank
bank, out, folder = map(pathlib.Path, sys.argv[1:])
print("ready", flush=True)
while True:
    pack_bank(bank, out, force=True)
    unpack_bank(out, folder)
    folder.rename(folder.with_name("done"))
    import shutil; shutil.rmtree(folder.with_name("done"))
"""


def test_promise_01_real_processes_killed_at_random_moments_leave_old_or_new(whole: Path, tmp_path: Path) -> None:
    seed = int(time.time())
    chance = random.Random(seed)
    out, folder = tmp_path / "x.gbank", tmp_path / "u"
    right = content(whole)
    for _ in range(6):
        process = subprocess.Popen(
            [sys.executable, "-c", LOOP, whole, out, folder], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        assert process.stdout is not None
        process.stdout.readline()
        time.sleep(chance.uniform(0, 0.2))
        process.send_signal(signal.SIGKILL)
        process.wait()
        if out.exists():
            assert content(out) == right, f"seed {seed}"
        if folder.exists():
            assert content(folder) == right, f"seed {seed}"
            shutil.rmtree(folder)
        pack_bank(whole, out, force=True)
        unpack_bank(out, folder)
        shutil.rmtree(folder)
        shutil.rmtree(tmp_path / "done", ignore_errors=True)
        assert left_over(tmp_path) == ["x.gbank"], f"seed {seed}"


def test_a_pack_that_is_at_work_is_not_taken_for_a_dead_one(whole: Path, packed: Path, tmp_path: Path) -> None:
    inner: list[bool] = []

    def again(done: int, total: int) -> None:
        if not inner:
            inner.append(True)
            pack_bank(whole, tmp_path / "x.gbank", force=True)

    pack_bank(whole, tmp_path / "x.gbank", force=True, report=again)
    assert inner and (tmp_path / "x.gbank").read_bytes() == packed.read_bytes()
    assert left_over(tmp_path) == ["x.gbank"]


def test_a_snapshot_that_is_packed_is_not_dropped_meanwhile(whole: Path, tmp_path: Path) -> None:
    bank = copy_of(whole, tmp_path / "b")
    before = content(bank)

    def write(done: int, total: int) -> None:
        with write_bank(bank) as writer:
            for source in ("x.md", "y.md", "z.md"):
                writer.add(*rows(source, 1))
                writer.commit("ingest")
            writer.finish()

    pack_bank(bank, tmp_path / "x.gbank", report=write)
    assert content(tmp_path / "x.gbank") == before


# ── time and memory ──────────────────────────────────────────────────────────────────────────────────────────────────


def test_memory_does_not_grow_with_the_bank(tmp_path: Path) -> None:
    bank = tmp_path / "b"
    create_bank(bank, settings(code_bytes=1 << 20), PRIOR)
    with write_bank(bank) as writer:
        writer.add(*rows("a.md", 48, made_for=settings(code_bytes=1 << 20)))
        writer.commit("ingest")
        writer.finish()
    works: tuple[Callable[[], object], ...] = (
        lambda: pack_bank(bank, tmp_path / "x.gbank"),
        lambda: unpack_bank(tmp_path / "x.gbank", tmp_path / "u"),
        lambda: open_bank(tmp_path / "x.gbank").close(),
    )
    import tracemalloc

    for work, limit in zip(works, (6, 6, 1), strict=True):
        tracemalloc.start()
        work()
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert peak < limit << 20, peak


def test_progress_tells_bytes_and_ends_at_all_of_them(whole: Path, packed: Path, tmp_path: Path) -> None:
    for work, source in ((pack_bank, whole), (unpack_bank, packed), (verify, packed)):
        told: list[tuple[int, int]] = []
        note = lambda done, total, told=told: told.append((done, total))  # noqa: E731
        list(verify(source, note)) if work is verify else work(source, tmp_path / work.__name__, report=note)
        assert told == sorted(told) and told[-1][0] == told[-1][1] == sum(
            map(len, (d for _, d in entries_of(packed)[2:]))
        )


def test_a_packed_bank_one_may_not_read_is_told_so(packed: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(packed, tmp_path / "x.gbank"))
    file.chmod(0)
    (tmp_path / "closed" / BANK_FOLDER).mkdir(parents=True, mode=0o700)
    (tmp_path / "closed" / BANK_FOLDER).chmod(0)
    user = os.geteuid()
    if user == 0:  # root may read everything
        os.seteuid(65534)
    try:
        with pytest.raises(StorageFailed):
            open_bank(file)
        closed = tmp_path / "closed" / BANK_FOLDER
        with pytest.raises(StorageFailed, match="look for a bank"):
            locate_bank(None, closed.parent)
        for named in (closed, closed.parent, str(closed)):  # one that is named is no more passed over
            with pytest.raises(StorageFailed, match="Permission denied") as caught:
                locate_bank(named, tmp_path)
            assert "who owns" in caught.value.hint
    finally:
        os.seteuid(user)


def test_a_pipe_with_a_name_is_unpacked_like_a_file(packed: Path, tmp_path: Path) -> None:
    """`bank unpack <(ssh there cat x.gbank) DIR`, in a shell"""
    os.mkfifo(tmp_path / "pipe")
    with subprocess.Popen(["cat", packed], stdout=subprocess.PIPE) as writer:
        assert writer.stdout is not None
        unpack_bank(Path(f"/dev/fd/{writer.stdout.fileno()}"), tmp_path / "shells")
    with subprocess.Popen(["sh", "-c", 'cat "$0" > "$1"', packed, tmp_path / "pipe"]):
        unpack_bank(tmp_path / "pipe", tmp_path / "named")
    assert tree(tmp_path / "shells") == tree(tmp_path / "named")
    assert content(tmp_path / "named") == content(packed)


def test_errors_of_a_packed_bank_are_all_typed(packed: Path, tmp_path: Path) -> None:
    """A pipe in place of the file does not block."""
    os.mkfifo(tmp_path / "x.gbank")
    with pytest.raises(RegradError):
        open_bank(tmp_path / "x.gbank")
    with pytest.raises(DamagedFile, match="not a file"):
        Packed(tmp_path / "x.gbank")
