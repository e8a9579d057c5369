"""Banks of format 1, made once and kept: every later version reads in them what was in them, and writes to them."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

sys.path.insert(0, str(Path(__file__).parent / "golden"))

import banks as golden
import make

from regrad_cli.bank import move_bank, open_bank, pack_bank, remove_documents, rows_to_move, unpack_bank, verify
from regrad_cli.errors import UsageProblem
from regrad_cli.learn.codec import NAMES, parse_codec
from regrad_cli.records import document_id

pytestmark = pytest.mark.usefixtures("own_state")
NEW = ("new.md", "New", ("what came later", "and more of it"))


@pytest.fixture
def own_state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REGRAD_STATE", str(tmp_path_factory.mktemp("state")))
    monkeypatch.delenv("REGRAD_INDEX_FROM", raising=False)


def expected(name: str) -> dict[str, Any]:
    return json.loads((golden.FOLDER / f"{name}.json").read_text(encoding="utf-8"))


def differences(found: Any, wanted: Any, place: str = "") -> Iterator[str]:
    """Where two values differ; fractions may in their last digits, those of a list in what is little beside others."""
    if isinstance(wanted, dict) and isinstance(found, dict):
        for key in sorted({*map(str, wanted)} | {*map(str, found)}):
            yield from differences(found.get(key, "nothing"), wanted.get(key, "nothing"), f"{place}/{key}")
    elif _fractions(wanted) and _fractions(found) and len(wanted) == len(found):
        largest = max(map(abs, wanted))
        apart = max(abs(one - other) for one, other in zip(found, wanted, strict=True))
        if not apart <= 1e-5 * largest:
            yield f"{place}: {apart} apart, of {largest}"
    elif isinstance(wanted, list | tuple) and isinstance(found, list | tuple) and len(wanted) == len(found):
        for number, (one, other) in enumerate(zip(found, wanted, strict=True)):
            yield from differences(one, other, f"{place}/{number}")
    elif isinstance(wanted, float) and isinstance(found, float):
        if not math.isclose(found, wanted, rel_tol=1e-5):
            yield f"{place}: {found} for {wanted}"
    elif found != wanted or isinstance(found, bool) != isinstance(wanted, bool):
        yield f"{place}: {found!r} for {wanted!r}"


def _fractions(value: Any) -> bool:
    return isinstance(value, list) and bool(value) and all(isinstance(each, float) for each in value)


@pytest.mark.parametrize("name", golden.NAMES)
def test_promise_20_a_bank_of_format_1_opens_and_holds_what_it_held(name: str, tmp_path: Path) -> None:
    path = golden.brought_out(name, tmp_path)
    assert list(differences(golden.told(path), expected(name))) == []
    assert [str(finding) for finding in verify(path) if not finding.note] == []


@pytest.mark.parametrize("name", golden.NAMES)
def test_promise_20_a_bank_of_format_1_can_be_written_to(name: str, tmp_path: Path) -> None:
    path, wanted = golden.brought_out(name, tmp_path), expected(name)
    if path.is_file():
        unpack_bank(path, tmp_path / "bank")
        path = tmp_path / "bank"
    make.ingested(path, NEW)
    with open_bank(path) as bank:
        new = [passage.id for _, passage, _ in bank.passages(document_id("new.md"))]
        assert len(new) == 2
        assert bank.stats()["passages"] == wanted["counts"]["passages"] + 2
    remove_documents(path, ["new.md"])
    if wanted["moved"] is None:
        make.compact(path)
    else:
        with pytest.raises(UsageProblem, match="on its way to the prior 'second'"):
            make.compact(path)
    found = golden.told(path)
    for part in ("rows", "gradients", "found", "documents", "settings", "prior", "moved"):
        assert list(differences(found[part], wanted[part])) == []
    assert [str(finding) for finding in verify(path) if not finding.note] == []


def test_promise_20_a_move_that_format_1_left_under_way_comes_to_its_end(tmp_path: Path) -> None:
    path, wanted = golden.brought_out("moving", tmp_path), expected("moving")
    with move_bank(path) as writer:
        bank, move = writer.snapshot, writer.snapshot.manifest.move
        assert move is not None
        left = rows_to_move(bank, move.settings)
        assert len(left) == wanted["counts"]["passages"] - len(wanted["moved"]) + 1  # and the prior's line there
        for ref in left:
            writer.add(*make.moved_row(move.settings, bank.row(ref).passage, bank.read_rows([ref]).embeddings))
        writer.commit()
        writer.switch()
        writer.finish()
    found = golden.told(path)
    moved = {name: row for name, row in wanted["moved"].items() if name != "prior"}
    assert list(differences({name: found["rows"][name] for name in moved}, moved)) == []
    assert found["rows"].keys() == wanted["rows"].keys()
    assert list(differences(found["prior"], wanted["moved"]["prior"])) == []


def test_promise_20_compacting_gives_the_bytes_that_it_gave_in_format_1(tmp_path: Path) -> None:
    path = golden.brought_out("several", tmp_path)
    make.compact(path)
    with open_bank(path) as bank:
        assert sorted([name, file.bytes] for name, file in bank.manifest.files()) == expected("compacted")["files"]


def test_promise_20_packing_gives_the_bytes_that_it_gave_in_format_1(tmp_path: Path) -> None:
    pack_bank(golden.brought_out("several", tmp_path), tmp_path / "x.gbank")
    assert (tmp_path / "x.gbank").read_bytes() == (golden.FOLDER / "packed.gbank").read_bytes()


def test_promise_20_a_graph_of_format_1_is_used_by_the_machine_that_noted_it(tmp_path: Path) -> None:
    from regrad_cli.bank import index
    from regrad_cli.bank.store import Folder

    path, wanted = golden.brought_out("indexed", tmp_path), expected("indexed")
    with open_bank(path) as bank:
        manifest = bank.manifest
    entry = manifest.index
    assert entry is not None and (entry.shards, entry.rows, len(manifest.shards)) == (1, 4, 2)
    assert index.load(Folder(path), manifest) is None
    note = index._record_path(entry.sha256)
    note.parent.mkdir(parents=True)
    note.write_text(json.dumps({"coverage": index._coverage(manifest, entry)}))
    import numpy as np

    graph = index.load(Folder(path), manifest)
    assert graph is not None and graph.live_rows == 2
    with open_bank(path) as bank:
        hits = bank.search(np.eye(2, 8, dtype=np.float32), 5, warm=True)
    found = [[[hit.passage.id, round(hit.score, 12)] for hit in each] for each in hits]
    assert list(differences(found, wanted["found"])) == []


def test_the_reader_in_the_formats_page_reads_them_too(tmp_path: Path) -> None:
    page = (golden.FOLDER.parents[1] / "docs" / "bank-format.md").read_text(encoding="utf-8")
    reader: dict[str, Any] = {}
    exec(re.search(r"<!-- reader -->\n```python\n(.*?)```", page, re.S)[1], reader)  # type: ignore[index]
    for name in set(golden.NAMES) - {"packed"}:
        wanted, found = expected(name), {}
        for passage, segments in reader["rows"](golden.brought_out(name, tmp_path)):
            one = f"{passage['document']}:{passage['ordinal']}"
            assert [passage["source"], passage["title"], passage["text"]] == wanted["rows"][one][:3]
            begins = [
                [begin, [float(f"{q:.6g}") for q in vector]] for begin, vector, _ in segments if vector is not None
            ]
            assert begins == wanted.get("segments", {}).get(one, [])
            flat = [{n: [v for row in matrix for v in row] for n, matrix in m.items()} for _, _, m in segments]
            found[one] = {n: [sum(each) for each in zip(*(m[n] for m in flat), strict=True)] for n in flat[0]}
        assert found.keys() == wanted["rows"].keys()
        assert list(differences({one: found[one] for one in wanted["gradients"]}, wanted["gradients"])) == []


def test_every_kind_of_codec_has_a_golden_bank() -> None:
    names = re.sub(r"\([^)]*\)", "", NAMES).replace("N", "1").split(",")
    kinds = {(codec.kind, codec.bits) for codec in map(parse_codec, (name.strip() for name in names))}
    kept = {(found["kind"], found["bits"]) for found in (expected(name)["settings"]["codec"] for name in golden.NAMES)}
    assert kinds <= kept, "make one: tests/golden/make.py"
    assert set(golden.NAMES) == set(make.BANKS)


def test_a_golden_bank_is_not_made_a_second_time(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in ("empty.json", "empty.tar.xz"):
        shutil.copy(golden.FOLDER / name, tmp_path / name)
    (tmp_path / "empty.tar.xz").write_bytes(b"as it is")
    assert make.main(["--only", "empty", "--out", str(tmp_path)]) == 1
    assert "frozen" in capsys.readouterr().err
    assert (tmp_path / "empty.tar.xz").read_bytes() == b"as it is"
    assert make.main(["--only", "empty", "--replace", "empty", "--out", str(tmp_path)]) == 0
    for name in ("empty.json", "empty.tar.xz"):
        assert (tmp_path / name).read_bytes() == (golden.FOLDER / name).read_bytes()


def test_they_are_small() -> None:
    assert sum(path.stat().st_size for path in golden.FOLDER.iterdir() if path.is_file()) < 400_000
