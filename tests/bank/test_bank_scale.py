"""What keeps a large bank's operations from growing with it: figures of it are in benchmarks/RESULTS.md."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from made_banks import content, make_bank, rows

from regrad_cli.bank import layout, open_bank, opening, pack_bank, plan_compaction, unpack_bank, write_bank
from regrad_cli.bank import manifest as manifests
from regrad_cli.bank.compact import compact_bank
from regrad_cli.bank.shards import ShardReader
from regrad_cli.records import canonical_json, document_id


def test_an_unpacked_banks_graph_is_built_again_when_the_next_ingest_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REGRAD_INDEX_FROM", "3")
    bank = make_bank(tmp_path / "b", [("a.md", 5), ("b.md", 4)])
    pack_bank(bank, tmp_path / "b.gbank")
    unpack_bank(tmp_path / "b.gbank", tmp_path / "u")
    assert not list((tmp_path / "u" / "index").iterdir())
    with write_bank(tmp_path / "u") as writer:
        before = writer.finish()  # nothing came in, as where an ingest finds nothing new
    with open_bank(tmp_path / "u") as snapshot:
        entry = snapshot.manifest.index
        assert entry is not None and (snapshot.path / "index" / f"{entry.sha256}.hnsw").stat().st_size == entry.bytes
        assert snapshot.number == before
    assert content(tmp_path / "u") == content(bank)
    with write_bank(tmp_path / "u") as writer:
        assert writer.finish() == before  # and not a second time


def test_a_commit_spells_out_only_what_is_new(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(tmp_path / "b", *([(f"{number}.md", 2)] for number in range(6)))
    spelled: list[str] = []

    def noted(value: object) -> str:
        if isinstance(value, dict) and "blocks" in value:
            spelled.append(value["sha256"])
        return canonical_json(value)

    monkeypatch.setattr(manifests, "canonical_json", noted)
    with write_bank(bank) as writer:
        for number in range(3):
            writer.add(*rows(f"new{number}.md", 1))
            writer.commit("ingest")
    assert len(spelled) == len(set(spelled)) == 9


def test_a_writer_reads_none_of_its_own_snapshots_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    with write_bank(bank) as writer:
        monkeypatch.setattr(opening, "parse", None)
        for number in range(5):
            writer.add(*rows(f"new{number}.md", 1))
            writer.commit("ingest")
        writer.finish()
        monkeypatch.undo()
        assert layout.snapshot_numbers(bank) == [1, 2, 7]


def test_a_spelled_manifest_is_its_value_in_canonical_json(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)], [("ü\n.md", 3)])
    with open_bank(bank) as snapshot:
        whole = snapshot.manifest
    shards = (replace(whole.shards[0], removed=((0, 1),)), whole.shards[1])
    move = manifests.Move(whole.settings, whole.prior, shards)
    for made in (whole, replace(whole, shards=shards, oldest=1, move=move, writer_flags=("move",))):
        data, named = made.to_bytes()
        body = json.loads(data)
        assert data == (canonical_json(body) + "\n").encode()
        assert (
            body["sha256"]
            == named.sha256
            == manifests.sha256_hex(canonical_json({name: value for name, value in body.items() if name != "sha256"}))
        )


@pytest.mark.parametrize("cost", [200, 1 << 30])
def test_few_passages_are_read_by_their_rows_and_many_with_their_file(
    cost: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrad_cli.bank.shards.ROW_COST_BYTES", cost)
    bank = make_bank(tmp_path / "b", [("a.md", 40), ("b.md", 40)])
    whole: list[str] = []
    monkeypatch.setattr(ShardReader, "_docs", lambda self, known=ShardReader._docs: whole.append("") or known(self))
    with open_bank(bank) as snapshot:
        wanted = [ref for ref, _, _ in snapshot.passages()]
        of = {ref: passage for ref, passage, _ in snapshot.passages()}
        whole.clear()
        assert dict(snapshot.texts(wanted[3:6])) == {ref: of[ref] for ref in wanted[3:6]}
        assert len(whole) == (cost > 200)
        assert dict(snapshot.texts(wanted)) == of
        assert len(whole) == 1 + (cost > 200)


def test_of_a_compact_bank_a_document_is_looked_for_in_its_own_shard_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("regrad_cli.bank.planning.rows_a_shard", lambda settings: 4)
    bank = make_bank(tmp_path / "b", [(f"{number}.md", 2) for number in range(16)])
    with compact_bank(bank) as writer:
        plan = plan_compaction(writer.snapshot)
        list(writer.compact(plan))
    looked: list[str] = []
    monkeypatch.setattr(
        ShardReader, "documents", lambda self, known=ShardReader.documents: looked.append("") or known(self)
    )
    with open_bank(bank) as snapshot:
        assert len(snapshot.manifest.shards) > 5
        for number in range(16):
            name, of = f"{number}.md", document_id(f"{number}.md")
            assert snapshot.find_document(name) == of
            assert snapshot.find_document(of) == of and snapshot.find_document(of[:9].upper()) == of
        assert len(looked) <= 16 * 5  # each time its own; looked for as a source as well, perhaps another
