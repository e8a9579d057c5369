"""What a bank is made of: figures that agree with the files, told without opening a shard and without numpy."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from made_banks import make_bank, settings

from regrad_cli.bank import beside, log, move_bank, open_bank, pack_bank, remove_documents
from regrad_cli.bank.shards import ShardReader
from regrad_cli.maintain import CompactOptions, compact
from regrad_cli.records import sha256_hex


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    path = make_bank(tmp_path / "bank", [("a.md", 6), ("b.md", 2)], [("c.md", 4)])
    remove_documents(path, ["b.md"])
    return path


def compacted(path: Path) -> None:
    list(compact(path, CompactOptions(device="cpu")))


def test_what_removed_rows_take_is_what_compacting_frees(bank: Path) -> None:
    with open_bank(bank) as opened:
        before = opened.stats()
    compacted(bank)
    with open_bank(bank) as opened:
        after = opened.stats()
    removed = before["removed_bytes"]
    assert removed["total"] == removed["gradients"] + removed["embeddings"] + removed["text"]
    assert removed["embeddings"] == before["bytes"]["embeddings"] - after["bytes"]["embeddings"]
    assert removed["text"] == pytest.approx(before["bytes"]["text"] - after["bytes"]["text"], rel=0.05)
    assert after["removed_bytes"] == {"gradients": 0, "embeddings": 0, "text": 0, "total": 0}


def test_what_lies_beside_a_snapshot_is_every_file_that_it_does_not_name(bank: Path) -> None:
    """Removing rows shares all files with the snapshot before; a leftover and quarantined bytes are beside all."""
    with open_bank(bank) as opened:
        assert beside(opened) == {"snapshots": len(log(bank)) - 1, "bytes": 0, "quarantine": 0}
    (bank / "shards" / ("0" * 64 + ".safetensors")).write_bytes(bytes(1000))
    (bank / "quarantine" / "something").write_bytes(bytes(7))
    with open_bank(bank) as opened:
        assert beside(opened) == {"snapshots": len(log(bank)) - 1, "bytes": 1000, "quarantine": 7}
    first = log(bank)[-1]["snapshot"]
    with open_bank(bank, first) as opened:
        named = opened.manifest.prior.bytes
        whole = sum(file.stat().st_size for name in ("shards", "docs", "priors") for file in (bank / name).iterdir())
        assert beside(opened)["bytes"] == whole - named


def test_after_compact_nothing_is_beside_a_bank_nor_ever_beside_a_packed_one(bank: Path, tmp_path: Path) -> None:
    compacted(bank)
    pack_bank(bank, tmp_path / "packed.gbank")
    for path in (bank, tmp_path / "packed.gbank"):
        with open_bank(path) as opened:
            assert beside(opened) == {"snapshots": 0, "bytes": 0, "quarantine": 0}


def test_a_move_that_is_under_way_is_part_of_the_bank_and_not_beside_it(bank: Path) -> None:
    with move_bank(bank) as writer:
        writer.begin(settings(prior=sha256_hex(b"other")), b"other")
    with open_bank(bank) as opened:
        assert opened.stats()["bytes"]["moved"] == 5
        assert beside(opened)["bytes"] == 0


def test_figures_open_no_shard(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ShardReader, "__init__", lambda *_: pytest.fail("a shard was looked at"))
    with open_bank(bank) as opened:
        assert opened.stats()["passages"] == 10
        beside(opened)


def test_bank_stats_starts_without_numpy(bank: Path) -> None:
    code = f"from regrad_cli.cli import main; main(['bank', 'stats', '--bank', {str(bank)!r}])\n"
    code += "import sys; assert not {'numpy', 'torch', 'safetensors', 'hnswlib'} & set(sys.modules)"
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr
    assert "10 passages" in ran.stdout
