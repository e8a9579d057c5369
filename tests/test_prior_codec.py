"""A prior that was learned through a codec: banks take it, moves bring it, training goes on with it, and who chooses
another one is told. On tiny models.
"""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import train_runs
import use_cases
from test_stale import write_prior
from use_cases import ingest, rows, story, write

from regrad_cli.bank import open_bank
from regrad_cli.errors import Damaged
from regrad_cli.learn.prior import Prior
from regrad_cli.maintain import CompactOptions, compact
from regrad_cli.move import MoveOptions, move
from regrad_cli.records import Notice

THROUGH = "r2-int2"


@pytest.fixture(scope="module")
def priors(tmp_path_factory: pytest.TempPathFactory, tiny_model_folder: Path) -> dict[str, Path]:
    """One that was learned through no codec, and one that was."""
    root = tmp_path_factory.mktemp("priors")
    plain = write_prior(root / "plain.safetensors", tiny_model_folder, "plain", seed=7)
    prior = Prior.from_bytes(write_prior(root / "own", tiny_model_folder, "own", seed=8).read_bytes())
    own = root / "own.safetensors"
    own.write_bytes(replace(prior, card=prior.card | {"codec": THROUGH}).to_bytes())
    return {"plain": plain, "own": own}


def codec_of(bank: Path) -> str:
    with open_bank(bank) as opened:
        return str(opened.settings.codec)


def notices(events: Any) -> str:
    return "\n".join(event.message for event in events if isinstance(event, Notice))


@pytest.fixture
def make(tmp_path: Path, tiny_model_folder: Path, tiny_embedder_folder: Path) -> Any:
    def made(name: str, prior: Path, **options: Any) -> tuple[Path, str]:
        events = use_cases.use_case.initialise(
            tmp_path / name / ".gbank", model=str(tiny_model_folder), embedder=str(tiny_embedder_folder), prior=prior,
            chunk_tokens=80, chunk_overlap=0, **options,
        )  # fmt: skip
        return tmp_path / name / ".gbank", notices(events)

    return made


def test_a_bank_is_made_with_it_and_says_so_where_another_is_asked_for(make: Any, priors: dict[str, Path]) -> None:
    bank, told = make("own", priors["own"])
    assert codec_of(bank) == THROUGH and not told
    bank, told = make("other", priors["own"], codec="int8")
    assert codec_of(bank) == "int8" and f"learned through the codec {THROUGH}" in told
    bank, told = make("plain", priors["plain"], codec="int8")
    assert codec_of(bank) == "int8" and not told


def test_where_it_was_measured_what_another_codec_costs_is_told(
    make: Any, priors: dict[str, Path], tmp_path: Path
) -> None:
    own = Prior.from_bytes(priors["own"].read_bytes())
    measured = tmp_path / "measured.safetensors"
    measured.write_bytes(replace(own, card=own.card | {"f1": {THROUGH: 38.4, "r1-int2": 35}}).to_bytes())
    _, told = make("smaller", measured, codec="r1-int2")
    assert "under r1-int2 F1 is 35 instead of 38.4" in told
    _, told = make("unmeasured", measured, codec="int8")
    assert "may answer worse" in told


@pytest.mark.parametrize("found", [{"int8": "38"}, {"int8": True}, {"int8": 101}, {"int8": None}, 38, ["int8"]])
def test_a_card_whose_f1_is_none_is_refused(priors: dict[str, Path], found: Any) -> None:
    own = Prior.from_bytes(priors["own"].read_bytes())
    with pytest.raises(Damaged):
        Prior.from_bytes(replace(own, card=own.card | {"f1": found}).to_bytes())


def test_a_move_brings_it_and_a_prior_without_one_leaves_what_is_there(
    make: Any, priors: dict[str, Path], tmp_path: Path
) -> None:
    bank, _ = make("plain", priors["plain"])
    docs = write(tmp_path / "plain" / "docs", {"Velmora.md": story("Velmora"), "Gale.md": story("Gale")})
    ingest(bank, docs)
    assert codec_of(bank) == "r1-int4"
    told = notices(move(bank, MoveOptions(prior=priors["own"], device="cpu", dtype="fp32")))
    assert codec_of(bank) == THROUGH and "stored under r2-int2; they were under r1-int4" in told
    fresh, _ = make("own", priors["own"])
    shutil.copytree(docs, tmp_path / "own" / "docs")
    ingest(fresh, tmp_path / "own" / "docs")
    assert rows(bank) == rows(fresh)
    told = notices(move(bank, MoveOptions(prior=priors["plain"], device="cpu", dtype="fp32")))
    assert codec_of(bank) == THROUGH and "stored under" not in told


def test_whoever_compacts_to_another_codec_is_told(make: Any, priors: dict[str, Path], tmp_path: Path) -> None:
    bank, _ = make("own", priors["own"])
    ingest(bank, write(tmp_path / "own" / "docs", {"Velmora.md": story("Velmora")}))
    assert "learned through" not in notices(compact(bank, CompactOptions(codec=THROUGH, device="cpu")))
    told = notices(compact(bank, CompactOptions(codec="r1-int4", device="cpu")))
    assert f"learned through the codec {THROUGH}: under r1-int4" in told


def test_training_goes_on_through_it_unless_exact_gradients_are_asked_for(
    tmp_path: Path, tiny_model_folder: Path, priors: dict[str, Path]
) -> None:
    def card(name: str, **changes: Any) -> dict[str, Any]:
        given = train_runs.options(tmp_path / name, tiny_model_folder, steps=2, rank=None, **changes)
        train_runs.run(given)
        return Prior.from_bytes(given.out.read_bytes()).card

    assert card("on", init=priors["own"])["codec"] == THROUGH
    assert "codec" not in card("exact", init=priors["own"], codec="none")
    assert card("other", init=priors["own"], codec="int8")["codec"] == "int8"
    assert "codec" not in card("plain", init=priors["plain"])
    assert "codec" not in card("baseline", init=priors["own"], objective="direct")
