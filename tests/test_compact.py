"""`regrad compact`: what the command asks, says and leaves, and gradients under another codec, on tiny models. (Every
system call is hit in tests/bank/test_bank_compact.py.)
"""

from __future__ import annotations

import json
import random
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import use_cases
from faketerminal import HOSTILE_NAME, OBEYED, call
from story_bank import story_bank
from test_promises_ingest import regrad, sound
from use_cases import ask, files, ingest, rows, sources, story, write

from regrad_cli.bank import Compacted, layout, log, open_bank, remove_documents, write_bank
from regrad_cli.cli import upkeep
from regrad_cli.errors import ModelUnavailable, UsageProblem
from regrad_cli.learn.codec import Codec
from regrad_cli.maintain import CompactOptions, compact
from regrad_cli.records import Notice, Progress, document_id
from regrad_cli.render import Terminal

QUESTION = "Who rings the bell in Brannoch?"
NAMES = {"path", "snapshot", "documents", "passages", "dead", "shards", "bytes", "dropped_snapshots", "kept_snapshots"}
NAMES |= {"held_snapshots", "quarantined", "codec", "changed", "dry_run", "seconds"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Path:
    """Three documents of three passages, one of them removed; not to be changed."""
    bank = story_bank(tmp_path_factory.mktemp("made"), tiny_model_folder, tiny_embedder_folder)
    remove_documents(bank, ["docs/Skerry.md"])
    return bank


@pytest.fixture
def bank(made: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(made.parent, tmp_path / "own")) / ".gbank"


def events_of(bank: Path, **options: Any) -> Iterator[Any]:
    return compact(bank, CompactOptions(device="cpu", **options))


def compacted(bank: Path, **options: Any) -> Compacted:
    return list(events_of(bank, **options))[-1]


def kept_files(bank: Path) -> dict[str, bytes]:
    """Every file but the manifests and the lock's signature."""
    return {name: data for name, data in files(bank).items() if not name.startswith(("snapshots/", "lock"))}


def state(bank: Path) -> dict[str, bytes]:
    return {name: data for name, data in files(bank).items() if name != "lock"}


# ── what it comes to ─────────────────────────────────────────────────────────────────────────────────────────────────


def test_after_rm_and_compact_a_bank_is_what_ingesting_without_that_document_makes(
    bank: Path, tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path
) -> None:
    held, answer = rows(bank), ask(bank, QUESTION).answer
    compacted(bank)
    assert rows(bank) == held and ask(bank, QUESTION).answer == answer and sound(bank)
    root = tmp_path / "fresh"
    prior = bank.parent / "prior.safetensors"
    fresh = use_cases.make_bank(root / ".gbank", tiny_model_folder, tiny_embedder_folder, prior=prior)
    texts = {"Velmora.md": story("Velmora"), "Brannoch.md": story("Brannoch", about="the bell is rung by Ilse")}
    for name, text in texts.items():  # one after the other, in another order
        ingest(fresh, write(root / "docs", {name: text}))
    compacted(fresh)
    assert kept_files(fresh) == kept_files(bank)
    assert b"Skerry" not in b"".join(files(bank).values())


def test_ingest_goes_on_in_a_compact_bank(bank: Path) -> None:
    compacted(bank)
    summary = ingest(bank, bank.parent / "docs")
    assert (summary.added, summary.unchanged) == (3, 6)
    assert sources(bank) == {"docs/Brannoch.md", "docs/Skerry.md", "docs/Velmora.md"}
    compacted(bank)
    assert len(rows(bank)) == 9 and sound(bank) and len(layout.snapshot_numbers(bank)) == 1


def test_events_are_progress_and_at_last_what_it_came_to(bank: Path) -> None:
    events = list(events_of(bank))
    done = [event.done for event in events if isinstance(event, Progress)]
    assert done[-1] == 6 and {event.total for event in events if isinstance(event, Progress)} == {6}
    result = events[-1]
    assert isinstance(result, Compacted) and result.seconds > 0
    assert (result.passages, result.documents, result.dead, result.dry_run) == (6, 2, 3, False)
    assert result.bytes["freed"] == result.bytes["before"] - result.bytes["after"] > 0


# ── another codec ────────────────────────────────────────────────────────────────────────────────────────────────────


def decoded(bank: Path) -> dict[str, dict[str, np.ndarray]]:
    with open_bank(bank) as snapshot:
        codec = Codec(snapshot.settings.codec, snapshot.settings.tensors)
        found = {}
        for ref, passage, _ in snapshot.passages():
            row = snapshot.read_rows([ref])
            found[passage.id] = {name: each[0].numpy() for name, each in codec.decode(row.codes, row.scales).items()}
    return found


@pytest.mark.parametrize(("codec", "cosine"), [("r2-int8", 0.999), ("int8", 0.999), ("int4", 0.97), ("r1-int4", 1.0)])
def test_gradients_under_another_codec_are_the_same_gradients(bank: Path, codec: str, cosine: float) -> None:
    old, old_rows = decoded(bank), rows(bank)
    result = compacted(bank, codec=codec)
    assert result.codec == codec and sound(bank)
    new = decoded(bank)
    assert new.keys() == old.keys()
    for passage, tensors in new.items():
        one, other = (np.concatenate([each.ravel() for each in set_.values()]) for set_ in (tensors, old[passage]))
        norm = np.linalg.norm(one) * np.linalg.norm(other)
        assert float(one @ other) >= cosine * norm - 1e-4 * norm
    found = rows(bank)
    assert {place: (*row[:6], row[8]) for place, row in found.items()} == {
        place: (*row[:6], row[8]) for place, row in old_rows.items()
    }, "text, keys and embeddings stay"
    assert (codec == "r1-int4") == (found == old_rows)


def test_after_another_codec_questions_are_answered_and_documents_ingested_under_it(bank: Path) -> None:
    compacted(bank, codec="r2-int8")
    answer = ask(bank, QUESTION)
    assert answer.grounded and answer.answer
    assert ingest(bank, bank.parent / "docs").added == 3
    with open_bank(bank) as snapshot:
        assert str(snapshot.settings.codec) == "r2-int8"
        read = snapshot.read_rows([ref for ref, _, _ in snapshot.passages()])
        layout_ = Codec(snapshot.settings.codec, snapshot.settings.tensors)
    assert read.codes.shape == (9, layout_.code_bytes) and read.scales.shape == (9, layout_.scale_count)
    assert sound(bank)


def test_a_batch_of_any_size_gives_the_same_bits(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    other = Path(shutil.copytree(bank, bank.parent / "other"))
    compacted(bank, codec="int4")
    monkeypatch.setattr("regrad_cli.maintain.DENSE_BYTES", 1)
    compacted(other, codec="int4")
    assert kept_files(other) == kept_files(bank)


def test_more_precision_is_said_to_gain_nothing(bank: Path) -> None:
    def said(codec: str) -> str:
        return " ".join(
            event.message for event in events_of(bank, codec=codec, dry_run=True) if isinstance(event, Notice)
        )

    assert "nothing is gained" in said("int8") and "on cpu" in said("int8")
    compacted(bank, codec="int8")
    assert "nothing is gained" not in said("r1-int4")
    assert "already" in said("int8")


def test_what_is_no_codec_or_no_device_changes_nothing(bank: Path) -> None:
    whole = state(bank)
    with pytest.raises(UsageProblem, match="r9000"):
        compacted(bank, codec="r9000")
    result = call("compact", "--bank", bank, "--yes", "--codec", "int8", "--device", "nonsense")
    assert result.code == 2 and state(bank) == whole
    import torch

    if not torch.cuda.is_available():
        with pytest.raises(ModelUnavailable):
            list(compact(bank, CompactOptions(codec="int8", device="cuda")))
    assert state(bank) == whole


def test_torch_is_loaded_only_for_another_codec(bank: Path) -> None:
    def loaded(*words: str) -> bool:
        arguments = ["compact", "--bank", str(bank), "--yes", *words]
        code = f"import sys; from regrad_cli.cli import main; code = main({arguments!r}); assert code == 0, code; "
        code += "sys.stderr.write(str('torch' in sys.modules))"
        ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
        return ran.stderr.endswith("True")

    assert not loaded()
    assert loaded("--codec", "int8")


# ── the command ──────────────────────────────────────────────────────────────────────────────────────────────────────


def test_it_needs_yes_where_nobody_can_be_asked(bank: Path) -> None:
    whole = state(bank)
    result = call("compact", "--bank", bank)
    assert result.code == 2 and "--yes" in result.err and "Drop 3 older snapshots and 3 removed passages" in result.err
    assert state(bank) == whole
    assert call("compact", "--bank", bank, "--yes").code == 0
    assert len(layout.snapshot_numbers(bank)) == 1


def test_on_a_terminal_it_asks_and_takes_no_for_an_answer(bank: Path) -> None:
    (bank / "quarantine" / "x").write_bytes(b"damaged")
    whole = state(bank)
    result = call("compact", "--bank", bank, stdin=b"n\n", piped_in=False, tty=True)
    assert result.code == 130 and "nothing was changed" in result.err
    assert "Drop 3 older snapshots, 3 removed passages and 1 quarantined file for good? [y/N]" in result.err
    assert state(bank) == whole
    result = call("compact", "--bank", bank, stdin=b"y\n", piped_in=False, tty=True, NO_COLOR="1")
    assert result.code == 0
    assert "dropped 3 older snapshots, 3 removed passages and 1 quarantined file" in result.out
    assert "1 shard for 1, 1 of them written anew" in result.out


def test_it_asks_for_what_is_lost_and_for_nothing_else(bank: Path) -> None:
    asked = call("compact", "--bank", bank, "--keep", "1").err
    assert "Drop 2 older snapshots for good?" in asked, "what was removed is kept"
    assert (
        "under the codec int8, and drop 3 older snapshots and 3"
        in call("compact", "--bank", bank, "--codec", "int8").err
    )
    assert call("compact", "--bank", bank, "--keep", "9").code == 0, "nothing goes"
    assert call("compact", "--bank", bank, "--yes").code == 0
    result = call("compact", "--bank", bank)
    assert result.code == 0 and result.out.startswith("already compact: 1 shard, ")
    assert (
        "Store every gradient under the codec int8 for good?" in call("compact", "--bank", bank, "--codec", "int8").err
    )


def test_json_has_the_names_that_others_rely_on(bank: Path) -> None:
    dry = call("compact", "--bank", bank, "--dry-run", "--json")
    real = call("compact", "--bank", bank, "--yes", "--json")
    for document in (dry.document, real.document):
        assert set(document) == NAMES
        assert set(document["shards"]) == {"before", "after", "rewritten"}
        assert set(document["bytes"]) == {"before", "after", "freed"}
        assert (document["passages"], document["dead"], document["codec"]) == (6, 3, "r1-int4")
        assert document["dropped_snapshots"] == [1, 2, 3] and document["kept_snapshots"] == []
    assert (dry.document["dry_run"], dry.document["snapshot"]) == (True, 3)
    assert (real.document["dry_run"], real.document["snapshot"]) == (False, 4)
    again = call("compact", "--bank", bank, "--yes", "--json").document
    assert (again["changed"], again["snapshot"], again["dead"]) == (False, 4, 0)
    assert call("compact", "--bank", bank, "--codec", "int8", "--json").error["code"] == 2


def test_a_dry_run_says_what_would_be_and_changes_nothing_and_waits_for_nobody(bank: Path) -> None:
    with write_bank(bank):
        whole = files(bank)
        result = call("compact", "--bank", bank, "--dry-run")
        assert result.code == 0 and files(bank) == whole
        assert result.out.startswith("would drop 3 older snapshots and 3 removed passages\nwould be 1 shard for 1, ")
        assert "about" in result.out
        assert call("compact", "--bank", bank, "--dry-run", "--codec", "int8").code == 0
        assert files(bank) == whole
        locked = call("compact", "--bank", bank, "--yes", "--json")
        assert (locked.code, locked.error["kind"]) == (11, "locked")


def test_keep_warns_that_what_was_removed_is_still_there(bank: Path) -> None:
    result = call("compact", "--bank", bank, "--yes", "--keep", "2")
    assert result.code == 0 and "warning: what was removed is still in 2 snapshots that stay: 2, 3" in result.err
    assert b"Skerry" in b"".join(files(bank).values())
    assert [entry["snapshot"] for entry in log(bank)] == [4, 3, 2]
    assert call("compact", "--bank", bank, "--yes", "--keep", "-1").code == 2


def test_a_reader_is_told_of(bank: Path) -> None:
    with open_bank(bank):
        assert "1 older snapshot being read" in call("compact", "--bank", bank, "--yes").err
    assert call("compact", "--bank", bank, "--yes", "--json").document["held_snapshots"] == []
    assert len(layout.snapshot_numbers(bank)) == 1


def test_many_kept_snapshots_are_named_in_short() -> None:
    assert upkeep._stay((5,)) == "stays: 5"
    assert upkeep._stay(tuple(range(1, 21))) == "stay: …, 13, 14, 15, 16, 17, 18, 19, 20"


def test_progress_is_shown_on_a_terminal(bank: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[Progress] = []
    monkeypatch.setattr(Terminal, "progress", lambda self, event: seen.append(event))
    monkeypatch.setenv("REGRAD_INDEX_FROM", "3")
    assert call("compact", "--bank", bank, "--yes", tty=True).code == 0
    assert {event.stage for event in seen} == {"shards read", "passages", "search graph"}


def damage_last_row(shard: Path) -> None:
    """A bit of the last row's codes: behind them lie only documents and keys."""
    data = bytearray(shard.read_bytes())
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    data[8 + int.from_bytes(data[:8], "little") + header["codes"]["data_offsets"][1] - 1] ^= 1
    shard.write_bytes(data)


def test_damage_is_14_with_the_way_out(bank: Path) -> None:
    (shard,) = (bank / "shards").iterdir()
    damage_last_row(shard)
    whole = state(bank)
    result = call("compact", "--bank", bank, "--yes", "--json")
    assert (result.code, result.error["kind"]) == (14, "damaged") and "bank repair" in result.error["hint"]
    assert "docs/Velmora.md" in result.error["message"]
    assert state(bank) == whole


def test_no_bank_is_10_and_a_packed_one_is_to_be_unpacked(bank: Path, tmp_path: Path) -> None:
    assert call("compact", "--bank", tmp_path / "none", "--yes").code == 10
    packed = tmp_path / "packed.gbank"
    assert call("bank", "pack", packed, "--bank", bank).code == 0
    data = packed.read_bytes()
    for words in (["--yes"], ["--dry-run"], []):
        result = call("compact", "--bank", packed, *words)
        assert result.code == 2 and "unpack" in result.err, words
    assert packed.read_bytes() == data


def test_promise_21_a_hostile_name_cannot_forge_what_compact_says(bank: Path) -> None:
    """What is damaged is named."""
    with write_bank(bank) as writer:
        passages = [passage for _, passage, _ in writer.snapshot.passages()]
        read = writer.snapshot.read_rows([ref for ref, _, _ in writer.snapshot.passages()][:1])
        named = replace(passages[0], document=document_id(HOSTILE_NAME), source=HOSTILE_NAME)
        writer.add([named], read.keys, read.codes, read.scales, read.embeddings)
        writer.commit("ingest")
        shard = bank / writer.snapshot.manifest.shards[-1].name
    damage_last_row(shard)
    result = call("compact", "--bank", bank, "--yes", "--quiet", tty=True, NO_COLOR="1")
    assert (
        result.code == 14
        and "owned" in result.err
        and not any(character in result.out + result.err for character in OBEYED)
    )
    assert "\nerror: forged" not in result.err


# ── real processes ───────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGINT], ids=["killed", "interrupted"])
def test_promise_01_and_13_compact_stopped_at_random_moments_loses_nothing(
    made: Path, tmp_path: Path, stop: signal.Signals
) -> None:
    held = rows(made)
    start = Path(shutil.copytree(made, tmp_path / "start" / ".gbank"))
    with write_bank(start) as writer:  # as after many small ingests
        for number in range(40):
            read = writer.snapshot.read_rows([ref for ref, _, _ in writer.snapshot.passages()])
            passages = [_moved(passage, number) for passage in read.passages]
            if number:
                writer.remove(ref for ref, passage, _ in writer.snapshot.passages() if passage.ordinal >= 1000)
            writer.add(passages[:6], read.keys[:6], read.codes[:6], read.scales[:6], read.embeddings[:6])
            writer.commit("ingest")
        writer.remove(ref for ref, passage, _ in writer.snapshot.passages() if passage.ordinal >= 1000)
        writer.commit("rm")
        writer.finish()
    assert rows(start) == held
    bank = Path(shutil.copytree(start, tmp_path / "whole" / ".gbank"))
    started = time.monotonic()
    assert regrad(bank, "compact", "--yes").wait(60) == 0
    whole_s = time.monotonic() - started
    final = kept_files(bank)
    chance = random.Random(3)
    for turn in range(6):
        bank = Path(shutil.copytree(start, tmp_path / str(turn) / ".gbank"))
        process = regrad(bank, "compact", "--yes")
        time.sleep(chance.uniform(0.3, 1.0) * whole_s)
        process.send_signal(stop)
        _, said = process.communicate()
        assert rows(bank) == held and sound(bank)
        starting = process.returncode == -stop or b"init_import_site" in said  # so it ends while Python itself starts
        if stop == signal.SIGINT and not starting:
            assert process.returncode in (0, 130) and b"Traceback" not in said
        with write_bank(bank):
            pass
        assert kept_files(bank) == final or state(bank) == state(start)
        compacted(bank)
        assert kept_files(bank) == final


def _moved(passage: Any, number: int) -> Any:
    return replace(passage, ordinal=1000 * (number + 1) + passage.ordinal % 1000)
