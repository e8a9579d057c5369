"""`bank verify`: the copies of manifests, a sample that says what it looked at, and no more read than that."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest
from faults import flip
from made_banks import content, copy_of, make_bank, rows
from test_bank_damage import forge
from test_bank_move import move

from regrad_cli.bank import (
    Checked,
    Sample,
    files,
    open_bank,
    pack_bank,
    remove_documents,
    repair_bank,
    verify,
    write_bank,
)
from regrad_cli.bank.damage import DamagedFile, Finding
from regrad_cli.records import document_id

DOCUMENTS = 40


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """120 rows in 3 shards, some removed; an older snapshot; a move under way."""
    commits = [[(f"{number}.md", 3) for number in range(start, start + 10)] for start in range(0, DOCUMENTS, 10)]
    bank = make_bank(tmp_path_factory.mktemp("whole") / "b", *commits)
    remove_documents(bank, ["0.md"])
    move(bank, step=30, stop=1)
    return bank


@pytest.fixture
def bank(whole: Path, tmp_path: Path) -> Path:
    return copy_of(whole, tmp_path / "b")


def sampled(bank: Path, percent: float, seed: int = 0) -> tuple[list[Finding], Checked]:
    checked = Checked()
    return list(verify(bank, sample=Sample(percent, seed), checked=checked)), checked


def test_verify_says_what_it_looked_at(whole: Path) -> None:
    checked = Checked()
    assert list(verify(whole, checked=checked)) == []
    snapshots = len(list((whole / "snapshots").glob("*.json")))
    assert checked == Checked(100.0, None, snapshots, rows=150, rows_total=150, blocks=20, blocks_total=20)
    for percent, drawn, blocks in ((1.0, 2, 1), (10.0, 15, 2), (33.3, 50, 7), (100.0, 150, 20)):
        assert sampled(whole, percent) == ([], Checked(percent, 0, snapshots, drawn, 150, blocks, 20))


def test_a_bank_without_rows_is_checked_too(tmp_path: Path) -> None:
    assert sampled(make_bank(tmp_path / "b"), 5.0) == ([], Checked(5.0, 0, 1, 0, 0, 0, 0))


def damaged_rows(bank: Path, count: int) -> None:
    """Damages the codes of so many rows of the bank's own, each of another document."""
    with open_bank(bank) as snapshot:
        for number in random.Random(1).sample(range(1, DOCUMENTS), count):
            ref, _, _ = next(iter(snapshot.passages(document_id(f"{number}.md"))))
            reader = snapshot.reader(ref.shard)
            reader.row(ref.row)
            assert reader._places is not None
            place = reader._places["codes"]
            flip(bank / reader.entry.name, place.start + ref.row * place.row_bytes)


def test_a_sample_of_p_per_cent_sees_p_per_cent_of_the_damage(bank: Path) -> None:
    damaged_rows(bank, 20)
    seen = 0
    for seed in range(40):
        findings, _ = sampled(bank, 25.0, seed)
        seen += len({document for finding in findings for document in finding.documents})
        assert not any(finding.note for finding in findings)
    assert 0.2 < seen / (40 * 20) < 0.3
    everything = {document for finding in sampled(bank, 100.0)[0] for document in finding.documents}
    assert len(everything) == 20


def test_the_same_seed_looks_at_the_same_rows_and_another_at_others(bank: Path) -> None:
    damaged_rows(bank, 20)
    found = [sampled(bank, 25.0, seed)[0] for seed in (3, 3, 4)]
    assert found[0] == found[1] != found[2]
    assert all("of" in finding.what and "looked at" in finding.what for finding in found[0])


def test_a_sample_reads_its_share_and_no_more(whole: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of shards and docs, in bytes; a header and its length come with each shard."""
    real, read = os.preadv, 0

    def preadv(fd: int, buffers: list, offset: int) -> int:
        nonlocal read
        count = real(fd, buffers, offset)
        if Path(f"/proc/self/fd/{fd}").readlink().parent.name in ("shards", "docs"):
            read += count
        return count

    monkeypatch.setattr(os, "preadv", preadv)
    list(verify(whole))
    full, read = read, 0
    sampled(whole, 10.0)
    assert read < 0.1 * full + 5 * 1000


@pytest.mark.parametrize("percent", [0.001, 50.0])
def test_any_sample_sees_what_is_missing_or_has_another_size_and_every_manifest_and_prior(
    whole: Path, tmp_path: Path, percent: float
) -> None:
    with open_bank(whole) as snapshot:
        names = [name for name, _ in snapshot.manifest.files()]
    names += [str(file.relative_to(whole)) for file in (whole / "snapshots").glob("*.json")]
    for number, name in enumerate(names):
        bank = copy_of(whole, tmp_path / str(number))
        (bank / name).write_bytes((bank / name).read_bytes()[:-1])
        assert name in [finding.file for finding in sampled(bank, percent)[0]]
        (bank / name).unlink()
        assert name in [finding.file for finding in sampled(bank, percent)[0]] or name.startswith("snapshots/")
        if name.startswith(("snapshots/", "priors/")):
            (bank / name).write_bytes((whole / name).read_bytes())
            flip(bank / name, 40)
            assert name in [finding.file for finding in sampled(bank, percent)[0]]


def test_a_sample_of_blocks_sees_a_damaged_block(bank: Path) -> None:
    """Tokens are in no row's checksum."""
    with open_bank(bank) as snapshot:
        reader = snapshot.reader(0)
        reader.row(0)
        assert reader._places is not None
        flip(bank / reader.entry.name, reader._places["tokens"].start)
    seen = sum(bool(sampled(bank, 20.0, seed)[0]) for seed in range(40))
    assert 0 < seen < 25 and sampled(bank, 100.0)[0]


def test_a_packed_bank_is_sampled_as_well(bank: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged"
    pack_bank(bank, tmp_path / "x.gbank")
    assert sampled(tmp_path / "x.gbank", 10.0) == ([], Checked(10.0, 0, 1, 15, 150, 2, 20))
    flip(tmp_path / "x.gbank", (tmp_path / "x.gbank").stat().st_size // 2)
    assert list(verify(tmp_path / "x.gbank")) and not damaged.exists()


def test_progress_of_a_sample_ends_at_all_of_it(whole: Path) -> None:
    told: list[tuple[int, int]] = []
    list(verify(whole, lambda done, total: told.append((done, total)), sample=Sample(3.0, 1)))
    assert told == sorted(told) and told[-1][0] == told[-1][1] > 0


# ── copies of manifests ──────────────────────────────────────────────────────────────────────────────────────────────


def test_every_snapshot_has_a_copy_of_the_same_bytes_and_it_goes_with_it(whole: Path, tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 1)], [("b.md", 1)], [("c.md", 1)])
    for path in (whole, bank):
        manifests = {file.stem: file.read_bytes() for file in (path / "snapshots").glob("*.json")}
        assert manifests == {file.stem: file.read_bytes() for file in (path / "snapshots").glob("*.copy")}


def test_no_reader_looks_at_a_copy(whole: Path, bank: Path) -> None:
    before = content(whole)
    for file in (bank / "snapshots").glob("*.copy"):
        file.unlink()
    assert content(bank) == before and list(verify(bank)) == []


def test_promise_03_a_flipped_bit_in_a_copy_is_noticed(bank: Path) -> None:
    for file in sorted((bank / "snapshots").glob("*.copy")):
        data = file.read_bytes()
        for position in (0, 100, len(data) - 1):
            flip(file, position)
            assert [finding.file for finding in verify(bank)] == [f"snapshots/{file.name}"]
            file.write_bytes(data)
    manifest = max((bank / "snapshots").glob("*.json"))
    copy = manifest.with_suffix(".copy").read_bytes()
    forge(bank, manifest.read_bytes())
    assert list(verify(bank)) == []
    manifest.with_suffix(".copy").write_bytes(copy.replace(b'"operation":"moving"', b'"operation":"nothing"'))
    assert [finding.note for finding in verify(bank)] == [False]


def test_a_copy_that_is_another_right_manifest_is_damage(bank: Path, tmp_path: Path) -> None:
    """Of another bank, say: right in itself, and not this one's."""
    manifest = max((bank / "snapshots").glob("*.json"))
    own = manifest.read_bytes()
    other = make_bank(tmp_path / "other", *[[(f"{n}.md", 1)] for n in range(3)])
    body = max((other / "snapshots").glob("*.json"))
    while body.stem != manifest.stem:
        with write_bank(other) as writer:
            writer.add(*rows(f"{body.stem}.md", 1))
            writer.commit("ingest")
        body = max((other / "snapshots").glob("*.json"))
    manifest.with_suffix(".copy").write_bytes(body.read_bytes())
    assert ["not the same" in finding.what for finding in verify(bank)] == [True]
    assert manifest.read_bytes() == own


def test_a_failed_commit_leaves_no_copy(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or the next writer would take it for the copy of a snapshot that was lost."""

    class Broken(files.System):
        @staticmethod
        def link(source: Path, target: Path) -> None:  # type: ignore[override]
            raise OSError(5, "Input/output error")

    with write_bank(bank) as writer:
        before = {file.name for file in (bank / "snapshots").iterdir()}
        writer.add(*rows("new.md", 1))
        monkeypatch.setattr(files, "SYSTEM", Broken())
        with pytest.raises(Exception, match="Input/output"):
            writer.commit("ingest")
        monkeypatch.setattr(files, "SYSTEM", files.System())
        assert {file.name for file in (bank / "snapshots").iterdir()} == before
        writer.commit("ingest")
    assert list(verify(bank)) == []


def test_promise_06_a_copy_that_a_crash_left_is_a_leftover_and_one_whose_manifest_was_lost_is_not(bank: Path) -> None:
    newest = max((bank / "snapshots").glob("*.json"))
    data = newest.read_bytes()
    newest.unlink()
    (bank / "tmp" / "twin").write_bytes(data)
    assert all(finding.note for finding in verify(bank))
    (bank / "tmp" / "twin").write_bytes(data[:-1] + b"x")
    findings = [finding for finding in verify(bank) if not finding.note]
    assert [finding.file for finding in findings] == [f"snapshots/{newest.name}"]
    assert not any("belongs to no snapshot" in finding.what for finding in verify(bank)), "a repair needs what it names"
    files_before = sorted(bank.rglob("*"))
    with pytest.raises(DamagedFile) as caught, write_bank(bank):
        pass
    assert "regrad bank repair" in caught.value.hint and sorted(bank.rglob("*")) == files_before
    (bank / "tmp" / "twin").write_bytes(data)
    with write_bank(bank):
        pass
    assert not newest.with_suffix(".copy").exists() and list(verify(bank)) == []


def test_a_newer_format_before_snapshots_of_ours_is_damage_that_a_repair_puts_right(bank: Path) -> None:
    (bank / "FORMAT").write_bytes(b"gbank 2\n")
    assert [finding.file for finding in verify(bank) if not finding.note] == ["FORMAT"]
    with repair_bank(bank) as work:
        work.carry_out()
    assert list(verify(bank)) == []
