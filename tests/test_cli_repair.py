"""`bank repair` and `bank verify --sample` as commands: what they say, ask and answer with, and that an ingest after a
repair computes what was lost and nothing else.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import use_cases
from faketerminal import HOSTILE_NAME, HOSTILE_TEXT, OBEYED, call, settings_of_bank
from test_answer import write_prior
from test_cli_real_bank import DIMENSION, PRIOR, add
from use_cases import counted, ingest, story, write

from regrad_cli.bank import create_bank, open_bank, verify, write_bank
from regrad_cli.bank.locks import hold_lock
from regrad_cli.records import document_id, sha256_hex

ROOT = Path(__file__).parent.parent
A = document_id("a.md")


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    """Two documents in two shards."""
    path = tmp_path / "x" / ".gbank"
    path.parent.mkdir()
    create_bank(path, settings_of_bank(prior=sha256_hex(PRIOR), embedding_dim=DIMENSION), PRIOR)
    add(path, "a.md", "Alpha", "The first.", "The second.")
    add(path, "notes/b.md", "Beta", "The third.")
    return path


def flip(file: Path, position: int) -> None:
    data = bytearray(file.read_bytes())
    data[position] ^= 1
    file.write_bytes(data)


def docs_of(bank: Path, source: str) -> Path:
    with open_bank(bank) as snapshot:
        ref = next(iter(snapshot.passages(document_id(source))))[0]
        return bank / snapshot.manifest.shards[ref.shard].docs_name


def lose_one(bank: Path) -> None:
    """Damages the line of one passage of a.md."""
    flip(docs_of(bank, "a.md"), 30)


def files(bank: Path) -> dict[str, bytes]:
    return {name: data for name, data in use_cases.files(bank).items() if name != "lock"}


def repair(bank: Path, *words: str, **how: Any) -> Any:
    return call("bank", "repair", *words, "--bank", bank, **how)


def test_a_sound_bank_is_told_so_and_is_0(bank: Path) -> None:
    before = files(bank)
    for words in ((), ("--yes",), ("--dry-run",)):
        result = repair(bank, *words)
        assert (result.code, result.err) == (0, "") and "is sound" in result.out and files(bank) == before
    document = repair(bank, "--json").document
    assert document["ok"] is True and document["damage"] == [] and document["passages"] == 3


def test_what_is_known_again_is_put_back_without_asking_and_is_0(bank: Path) -> None:
    before = files(bank)
    flip(max((bank / "snapshots").glob("*.json")), 30)
    (bank / "FORMAT").write_text("?")
    result = repair(bank)
    assert result.code == 0 and "from its copy" in result.out and "its one line" in result.out
    assert "2 files put into quarantine/" in result.err
    assert before.items() <= files(bank).items() and call("bank", "verify", "--bank", bank).code == 0


def test_passages_are_dropped_only_after_a_yes_and_each_document_is_named_with_3(bank: Path) -> None:
    lose_one(bank)
    before = files(bank)
    result = repair(bank)
    assert result.code == 2 and "--yes" in result.err and "a.md" in result.err and files(bank) == before
    result = repair(bank, tty=True, piped_in=False, stdin=b"n\n", NO_COLOR="1")
    assert result.code == 130 and files(bank) == before
    assert "Drop 1 passage that cannot be read any more, of a.md?" in result.err
    result = repair(bank, tty=True, piped_in=False, stdin=b"y\n", NO_COLOR="1")
    assert result.code == 3 and "a.md" in result.out and "regrad ingest" in result.err
    assert call("bank", "verify", "--bank", bank).code == 0
    assert call("bank", "stats", "--bank", bank, "--json").document["passages"] == 2


def test_dry_run_says_all_of_it_and_changes_nothing(bank: Path) -> None:
    lose_one(bank)
    (bank / "lock").write_bytes(b"whoever wrote last")
    before, with_lock = files(bank), use_cases.files(bank)
    result = repair(bank, "--dry-run")
    assert use_cases.files(bank) == with_lock
    assert result.code == 0 and "1 of 2 passages kept" in result.out and "would be the bank" in result.out
    foreseen = repair(bank, "--dry-run", "--json").document
    assert files(bank) == before and foreseen["dry_run"] is True
    done = repair(bank, "--yes", "--json")
    assert done.code == 3
    for name in ("damage", "put_back", "rewritten", "lost", "snapshot", "passages", "dropped_snapshots", "left"):
        assert done.document[name] == foreseen[name], name
    assert done.document["lost"] == [{"id": A, "source": "a.md", "passages": 1}]
    assert done.document["rewritten"][0]["kept"] == 1 and done.document["quarantined"]


def test_documents_that_nothing_names_are_not_counted_as_one(bank: Path) -> None:
    assert call("compact", "--bank", bank, "--yes").code == 0, "one shard for both"
    for folder in ("shards", "docs"):
        shutil.rmtree(bank / folder)
    result = repair(bank, "--yes")
    assert result.code == 3 and "3 passages of documents that nothing names any more could not be kept" in result.err


def test_a_dry_run_makes_no_lock_and_still_keeps_to_one_that_is_held(bank: Path) -> None:
    lose_one(bank)
    (bank / "lock").unlink()
    assert repair(bank, "--dry-run").code == 0 and not (bank / "lock").exists()
    with hold_lock(bank):
        assert repair(bank, "--dry-run").code == 11


def test_going_back_to_an_older_snapshot_is_asked_and_said(bank: Path) -> None:
    with write_bank(bank) as writer:
        writer.remove(ref for ref, _, _ in writer.snapshot.passages(A))
        number = writer.commit("rm")
    for kind in ("json", "copy"):
        flip(bank / "snapshots" / f"{number:08d}.{kind}", 500)
    result = repair(bank)
    assert result.code == 2 and f"Go back to snapshot {number - 1}" in result.err
    result = repair(bank, "--yes")
    assert result.code == 3 and "it says that it held 1 document, 1 passage" in result.out
    assert f"snapshot {number + 1} is the bank" in result.out and "ingest" in result.err


def test_a_prior_is_found_where_it_is_named_and_else_is_left_with_14_and_the_way_out(
    bank: Path, tmp_path: Path
) -> None:
    before = files(bank)
    next((bank / "priors").iterdir()).unlink()
    result = repair(bank)
    assert result.code == 14 and "could not be put right" in result.err and "regrad ingest --stale" in result.err
    failed = repair(bank, "--json")
    assert failed.document["ok"] is False and failed.error["kind"] == "damaged" and failed.error["hint"]
    (tmp_path / "other").write_bytes(b"another")
    assert repair(bank, "--prior", str(tmp_path / "other")).code == 14
    result = repair(bank, "--prior", str(tmp_path / "nothing"))
    assert result.code == 2 and "cannot be read" in result.err
    (tmp_path / "prior").write_bytes(PRIOR)
    assert repair(bank, "--prior", str(tmp_path / "prior")).code == 0
    assert files(bank) == before


def test_wherever_damage_is_met_the_way_out_is_a_repair(bank: Path) -> None:
    lose_one(bank)
    for words in (["ls"], ["show", "a.md"], ["verify"], ["rm", "a.md", "--yes"]):
        result = call("bank", *words, "--bank", bank)
        assert result.code == 14 and "regrad bank repair" in result.err, words
    flip(max((bank / "snapshots").glob("*.json")), 30)
    assert "regrad bank repair" in call("bank", "stats", "--bank", bank).err
    (bank / "FORMAT").unlink()
    assert "regrad bank repair" in call("bank", "stats", "--bank", bank).err
    assert repair(bank, "--yes").code == 3


def test_wrong_places_are_told_as_elsewhere(bank: Path, tmp_path: Path) -> None:
    assert repair(tmp_path / "nothing").code == 10
    (tmp_path / "empty").mkdir()
    assert repair(tmp_path / "empty").code == 10
    assert call("bank", "pack", tmp_path / "x.gbank", "--bank", bank).code == 0
    result = repair(tmp_path / "x.gbank")
    assert result.code == 2 and "packed" in result.err
    (tmp_path / "text").write_text("no bank")
    assert repair(tmp_path / "text").code == 10
    with write_bank(bank):
        ran = subprocess.run(
            [sys.executable, "-m", "regrad_cli", "bank", "repair", "--bank", bank, "--json"],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
    assert ran.returncode == 11 and json.loads(ran.stderr)["error"]["kind"] == "locked"


@pytest.mark.parametrize("tty", [True, False])
def test_promise_21_what_a_repair_names_cannot_forge_output(bank: Path, tty: bool) -> None:
    add(bank, HOSTILE_NAME, HOSTILE_TEXT, HOSTILE_TEXT, HOSTILE_TEXT)
    docs = docs_of(bank, HOSTILE_NAME)
    flip(docs, docs.stat().st_size - 9)
    for words in (["--dry-run"], ["--yes"]):
        result = repair(bank, *words, "-q", tty=tty, NO_COLOR="1")
        assert not any(character in result.out + result.err for character in OBEYED), words
        assert "\nerror: forged" not in result.out + result.err, words
    flip(docs_of(bank, HOSTILE_NAME), 50)
    result = repair(bank, stdin=b"n\n", piped_in=False, tty=True, NO_COLOR="1", TERM="dumb")
    assert result.code == 130 and not any(character in result.err for character in OBEYED)
    assert not any(character in repair(bank, "--yes", "--json").out for character in OBEYED)


def test_repair_and_verify_import_no_torch(bank: Path) -> None:
    lose_one(bank)
    code = (
        "import sys; from regrad_cli.cli import main; code = main(sys.argv[1:]);"
        "sys.exit(99 if {'torch', 'transformers', 'sentence_transformers'} & set(sys.modules) else code)"
    )
    for words, expected in ((["repair", "--yes"], 3), (["verify", "--sample", "50"], 0)):
        ran = subprocess.run(
            [sys.executable, "-c", code, "bank", *words, "--bank", bank],
            capture_output=True, text=True, cwd=ROOT, check=False,
        )  # fmt: skip
        assert ran.returncode == expected, ran.stderr


# ── verify ───────────────────────────────────────────────────────────────────────────────────────────────────────────


def test_a_sample_never_says_more_than_what_it_looked_at(bank: Path) -> None:
    out = call("bank", "verify", "--sample", "40", "--bank", bank).out
    assert "2 of 3 rows" in out and "a sample of 40 %" in out and "sound" not in out
    first, second = (call("bank", "verify", "--sample", "40", "--json", "--bank", bank).document for _ in range(2))
    assert first["checked"]["seed"] != second["checked"]["seed"] and first["ok"] is True
    for words in (["--seed", "7"], ["--seed", "7", "--quiet"]):
        assert "--seed 7" in call("bank", "verify", "--sample", "40", *words, "--bank", bank).out
    full = call("bank", "verify", "--full", "--bank", bank)
    assert full.out == call("bank", "verify", "--bank", bank).out and "is sound" in full.out


def test_a_damaged_sample_is_14_and_says_its_share_too(bank: Path) -> None:
    lose_one(bank)
    result = call("bank", "verify", "--sample", "100", "--seed", "1", "--bank", bank)
    assert result.code == 14 and "a sample of 100 %" in result.out and "looked at" in result.out


@pytest.mark.parametrize(
    "words", [["--sample", "0"], ["--sample", "-1"], ["--sample", "101"], ["--sample", "inf"], ["--sample", "nan"],
              ["--sample", "5", "--full"], ["--seed", "5"], ["--sample", "5", "--seed", "-1"]]
)  # fmt: skip
def test_a_share_that_is_none_is_a_usage_error(bank: Path, words: list[str]) -> None:
    result = call("bank", "verify", *words, "--bank", bank)
    assert result.code == 2 and "error" in result.err


# ── with a model ─────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    """A bank of four documents of three passages each, of a tiny model."""
    root = tmp_path_factory.mktemp("made")
    prior = write_prior(root / "prior.safetensors", tiny_model_folder)
    bank = use_cases.make_bank(root / ".gbank", tiny_model_folder, tiny_embedder_folder, prior=prior)
    docs = write(root / "docs", {f"{name}.md": story(name) for name in ("Brannoch", "Skerry", "Velmora", "Gale")})
    ingest(bank, docs, commit_rows=3)
    return root


def test_ingesting_again_computes_what_was_lost_and_nothing_else(made: Path, tmp_path: Path) -> None:
    root = Path(shutil.copytree(made, tmp_path / "root"))
    bank, before = root / ".gbank", use_cases.rows(root / ".gbank")
    flip(docs_of(bank, "docs/Skerry.md"), 40)
    flip(max((bank / "snapshots").glob("*.json")), 99)
    result = repair(bank, "--yes", "--json")
    assert result.code == 3
    lost = result.document["lost"]
    assert {each["source"] for each in lost} <= use_cases.sources(made / ".gbank")
    left = use_cases.rows(bank)
    missing = sum(each["passages"] for each in lost)
    assert missing == 1 and left.items() < before.items() and len(left) == len(before) - missing
    with counted() as calls:
        summary = ingest(bank, root / "docs")
    assert sum(calls) == missing == summary.added
    assert use_cases.rows(bank) == before and list(verify(bank)) == []


def test_the_prior_comes_back_from_a_file_that_says_the_same_in_other_bytes(made: Path, tmp_path: Path) -> None:
    """As a bank keeps it, whatever version of a library wrote the file."""
    root = Path(shutil.copytree(made, tmp_path / "root"))
    bank, file = root / ".gbank", root / "prior.safetensors"
    (kept,) = (bank / "priors").iterdir()
    data = kept.read_bytes()
    kept.unlink()
    own = file.read_bytes()
    length = 8 + int.from_bytes(own[:8], "little")
    padded = own[8:length] + b" " * 8
    file.write_bytes(len(padded).to_bytes(8, "little") + padded + own[length:])
    assert repair(bank, "--prior", str(file)).code == 0
    assert kept.read_bytes() == data


def test_where_the_prior_is_lost_the_bank_moves_to_another(made: Path, tmp_path: Path, tiny_model_folder: Path) -> None:
    root = Path(shutil.copytree(made, tmp_path / "root"))
    bank = root / ".gbank"
    for file in (bank / "priors").iterdir():
        file.unlink()
    assert repair(bank).code == 14
    other = write_prior(tmp_path / "other.safetensors", tiny_model_folder, seed=5)
    result = call("ingest", "--stale", "--prior", other, "--device", "cpu", "--dtype", "fp32", "--bank", bank)
    assert result.code == 0, result.err
    texts = [{place: row[4] for place, row in use_cases.rows(each).items()} for each in (bank, made / ".gbank")]
    assert texts[0] == texts[1]
