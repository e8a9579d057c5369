"""Search: exact against a plain computation, the graph against exact, and promises 14 and 17."""

from __future__ import annotations

import io
import json
import os
import pickle
from pathlib import Path

import numpy as np
import pytest
from faults import every_flip
from hypothesis import given
from hypothesis import settings as run_with
from hypothesis import strategies as st
from made_banks import copy_of, make_bank, rows

from regrad_cli.bank import index, log, open_bank, remove_documents, search, verify, write_bank
from regrad_cli.errors import NonFinite, UsageProblem
from regrad_cli.records import Hit

DOCUMENTS = [[(f"{number}.md", 40) for number in range(start, start + 3)] for start in (0, 3, 6)]


def vectors(count: int, dimension: int = 16) -> np.ndarray:
    made = np.random.default_rng(5).normal(size=(count, dimension))
    return (made / np.linalg.norm(made, axis=1, keepdims=True)).astype(np.float32)


def plain_search(bank: Path, questions: np.ndarray, k: int) -> list[list[tuple[str, float]]]:
    """The reference: every live row, float64, sorted."""
    with open_bank(bank) as snapshot:
        refs = [ref for ref, _, _ in snapshot.passages()]
        read = snapshot.read_rows(refs)
    scores = questions.astype(np.float64) @ read.embeddings.astype(np.float64).T
    ids = [passage.id for passage in read.passages]
    return [[(ids[place], row[place]) for place in np.argsort(-row)[:k]] for row in scores]


def shown(hits: list[list[Hit]]) -> list[list[tuple[str, float]]]:
    return [[(hit.passage.id, pytest.approx(hit.score, abs=1e-12)) for hit in row] for row in hits]


@pytest.fixture
def bank(tmp_path: Path) -> Path:
    made = make_bank(tmp_path / "b", *DOCUMENTS)
    remove_documents(made, ["1.md", "4.md"])
    return made


@pytest.fixture
def indexed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A bank whose graph covers three shards, not merged; rows were removed and others added since."""
    monkeypatch.setattr("regrad_cli.bank.merging.due", lambda *_, **__: None)
    monkeypatch.setenv("REGRAD_INDEX_FROM", "100")
    monkeypatch.setattr(index, "EXTEND_SHARE", 0.5)
    made = make_bank(tmp_path / "b", *DOCUMENTS)
    remove_documents(made, ["1.md"])
    with write_bank(made) as writer:
        writer.add(*rows("late.md", 20))
        writer.commit("ingest")
        writer.finish()
    with open_bank(made) as snapshot:
        assert snapshot.manifest.index is not None and snapshot.manifest.index.shards == 3
        assert len(snapshot.manifest.shards) == 4
    return made


@pytest.mark.parametrize("warm", [False, True])
@pytest.mark.parametrize("k", [1, 3, 50, 279, 280, 281, 5000])
def test_exact_search_agrees_with_a_plain_one(bank: Path, warm: bool, k: int) -> None:
    questions = vectors(4)
    with open_bank(bank) as snapshot:
        found = snapshot.search(questions, k, warm=warm)
        assert shown(found) == plain_search(bank, questions, k)
        assert all(isinstance(hit.score, float) for hit in found[0])


def test_a_score_is_the_same_bits_however_the_row_is_found(indexed: Path) -> None:
    questions = vectors(6)
    with open_bank(indexed) as snapshot:
        together = snapshot.search(questions, 5)
        alone = [snapshot.search(questions[row : row + 1], 5)[0] for row in range(6)]
        warm = snapshot.search(questions, 5, warm=True)
    assert together == alone == warm


def test_equal_scores_come_in_the_canonical_order(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    with write_bank(bank) as writer:
        for source in ("z.md", "a.md", "m.md"):
            arguments = list(rows(source, 2))
            arguments[4] = np.full((2, 16), 0.25, np.float16)
            writer.add(*arguments)
        writer.commit("ingest")
    with open_bank(bank) as snapshot:
        found = [hit.passage.id for hit in snapshot.search(np.full((1, 16), 0.25, np.float32), 6)[0]]
    assert found == sorted(found)


def test_an_empty_bank_and_no_questions_have_no_hits(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    for warm in (False, True):
        with open_bank(bank) as snapshot:
            assert snapshot.search(vectors(2), 3, warm=warm) == [[], []]
            assert snapshot.search(vectors(0), 3, warm=warm) == []


def test_questions_that_make_no_sense_are_refused(bank: Path) -> None:
    with open_bank(bank) as snapshot:
        with pytest.raises(UsageProblem):
            snapshot.search(vectors(1), 0)
        with pytest.raises(ValueError):
            snapshot.search(vectors(1, 8), 1)
        with pytest.raises(ValueError):
            snapshot.search(1000 * vectors(1), 1)
        with pytest.raises(NonFinite):
            snapshot.search(np.full((1, 16), np.nan, np.float32), 1)


@run_with(max_examples=60, deadline=None)
@given(
    st.lists(st.floats(width=16, allow_nan=False, allow_infinity=False), min_size=6, max_size=6),
    st.lists(st.floats(min_value=-1, max_value=1, width=32), min_size=3, max_size=3),
)
def test_widening_by_bits_is_exact_for_every_float16(values: list[float], question: list[float]) -> None:
    stored = np.array(values, np.float16).reshape(2, 3)
    vector = np.array([question], np.float32)
    exact = stored.astype(np.float64) @ vector.astype(np.float64).T
    size = np.abs(stored.astype(np.float64)) @ np.abs(vector.astype(np.float64)).T
    assert np.all(np.abs(search.similarities(stored, vector) - exact) <= 1e-6 * size + 1e-30)


def test_every_float16_is_widened_to_its_own_value() -> None:
    everything = np.arange(1 << 16, dtype=np.uint16).view(np.float16)
    finite = everything[np.isfinite(everything)].reshape(-1, 1)
    one = np.ones((1, 1), np.float32)
    np.testing.assert_array_equal(search.similarities(finite, one)[:, 0], finite[:, 0].astype(np.float32))


def test_a_score_is_always_a_number() -> None:
    vector = np.array([1.0, 0.0], np.float32)
    for row in ([np.nan, 0], [np.inf, 0], [-np.inf, 1], [0, np.inf]):
        assert search.cosine(vector, np.array(row, np.float16)) == -1.0
    assert search.cosine(vector, np.array([1.5, 0], np.float16)) == 1.0


# ── the graph ────────────────────────────────────────────────────────────────────────────────────────────────────────


def loads(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Notes for each attempt whether a graph was loaded."""
    real, seen = index.load, []

    def watched(*arguments: object) -> object:
        graph = real(*arguments)  # type: ignore[arg-type]
        seen.append(graph is not None)
        return graph

    monkeypatch.setattr(index, "load", watched)
    return seen


def test_the_graph_finds_what_exact_search_finds(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = loads(monkeypatch)
    questions = vectors(40)
    with open_bank(indexed) as snapshot:
        exact = snapshot.search(questions, 10)
        assert seen == []  # one-shot queries don't load it
        graphed = snapshot.search(questions, 10, warm=True)
    assert seen == [True]
    same = [len(set(map(id_of, one)) & set(map(id_of, two))) for one, two in zip(exact, graphed, strict=True)]
    assert sum(same) >= 0.99 * 400
    assert not any(hit.passage.source == "1.md" for row in graphed for hit in row)
    assert any(hit.passage.source == "late.md" for row in graphed for hit in row)
    assert list(verify(indexed)) == []


def id_of(hit: Hit) -> str:
    return hit.passage.id


def test_more_neighbours_than_there_are_give_all(indexed: Path) -> None:
    with open_bank(indexed) as snapshot:
        assert len(snapshot.search(vectors(1), 5000, warm=True)[0]) == snapshot.stats()["passages"] == 340


def test_small_banks_get_no_graph(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", *DOCUMENTS)
    assert not list((bank / "index").iterdir())


def test_a_graph_grows_when_too_much_is_outside(indexed: Path, state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hnswlib

    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("built from nothing")

    with monkeypatch.context() as patch:
        patch.setattr(hnswlib, "Index", type("Growing", (hnswlib.Index,), {"init_index": refuse}))
        with write_bank(indexed) as writer:
            writer.add(*rows("more.md", 600))
            writer.commit("ingest")
            writer.finish()
    with open_bank(indexed) as snapshot:
        entry = snapshot.manifest.index
        assert entry is not None and entry.shards == 5
    assert [path.stem for path in (indexed / "index").iterdir()] == [entry.sha256]
    assert [path.stem for path in (state / "indexes").iterdir()] == [entry.sha256]
    assert list(verify(indexed)) == []
    seen = loads(monkeypatch)
    exact_and_warm(indexed)
    assert seen == [True]
    with open_bank(indexed, log(indexed)[1]["snapshot"]) as old:  # what an older snapshot named is gone: exact answers
        assert shown(old.search(vectors(3), 5, warm=True)) == shown(old.search(vectors(3), 5))


def test_a_graph_of_mostly_dead_rows_is_built_from_nothing(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    remove_documents(indexed, ["0.md", "2.md", "3.md"])
    with open_bank(indexed) as snapshot:
        assert snapshot.manifest.index is not None and snapshot.manifest.index.shards == 4
    exact_and_warm(indexed)


def exact_and_warm(bank: Path) -> None:
    with open_bank(bank) as snapshot:
        assert snapshot.search(vectors(5), 8, warm=True) == snapshot.search(vectors(5), 8)


def test_promise_14_a_missing_index_is_done_without(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = loads(monkeypatch)
    for path in (indexed / "index").iterdir():
        path.unlink()
    exact_and_warm(indexed)
    assert seen == [False]
    assert [finding.note for finding in verify(indexed)] == [True]


def test_promise_14_a_damaged_index_is_never_given_to_hnswlib(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = loads(monkeypatch)
    (path,) = (indexed / "index").iterdir()
    data = path.read_bytes()
    damaged = [flipped for _, flipped in every_flip(data, 25)]
    for other in [*damaged, data[:100], b"", data + b"\0", b"\xff" * len(data)]:
        path.write_bytes(other)
        exact_and_warm(indexed)
    assert not any(seen) and len(seen) > 25
    path.write_bytes(data)
    exact_and_warm(indexed)
    assert seen[-1]


def test_promise_14_an_index_this_machine_did_not_write_is_never_loaded(
    indexed: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hash is right, and a hostile file's would be too: whoever hands a bank over writes its manifest."""
    seen = loads(monkeypatch)
    for record in (state / "indexes").iterdir():
        record.unlink()
    exact_and_warm(indexed)
    monkeypatch.setenv("REGRAD_STATE", str(state / "nowhere"))
    exact_and_warm(indexed)
    assert seen == [False, False]


def test_promise_14_an_index_of_another_bank_is_never_loaded(
    indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its file is one that this machine wrote, of as many rows, but of other ones."""
    from dataclasses import replace

    monkeypatch.setattr(index, "EXTEND_SHARE", 0.5)
    other = make_bank(tmp_path / "other", *[[(f"x{source}", count) for source, count in part] for part in DOCUMENTS])
    with open_bank(other) as snapshot:
        manifest = snapshot.manifest
    with open_bank(indexed) as snapshot:
        foreign = snapshot.manifest.index
    assert foreign is not None and manifest.index is not None
    (other / "index" / f"{foreign.sha256}.hnsw").write_bytes(
        (indexed / "index" / f"{foreign.sha256}.hnsw").read_bytes()
    )
    seen = loads(monkeypatch)
    for wrong in (foreign, replace(foreign, dimension=8), replace(foreign, shards=1, rows=120)):
        (other / manifest.name).write_bytes(replace(manifest, index=wrong).to_bytes()[0])
        exact_and_warm(other)
    assert seen == [False] * 3


@pytest.mark.parametrize("record", [b"", b"{", b"[]", b'{"coverage": 5}', b"[" * 100_000, b"\xff"])
def test_promise_14_a_damaged_record_is_no_trust(
    indexed: Path, state: Path, monkeypatch: pytest.MonkeyPatch, record: bytes
) -> None:
    seen = loads(monkeypatch)
    (path,) = (state / "indexes").iterdir()
    path.write_bytes(record)
    exact_and_warm(indexed)
    assert seen == [False]


def test_promise_14_whatever_hnswlib_raises_is_done_without(indexed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hnswlib

    def broken(*arguments: object, **options: object) -> None:
        raise RuntimeError("Cannot return the results in a contiguous 2D array. Probably ef or M is too small")

    for name in ("knn_query", "load_index"):
        with monkeypatch.context() as patch:
            # hnswlib's class takes no new attributes, so a stand-in takes its place
            patch.setattr(hnswlib, "Index", type("Broken", (hnswlib.Index,), {name: broken}))
            exact_and_warm(indexed)


def test_promise_14_an_index_that_cannot_be_built_costs_nothing_else(
    tmp_path: Path, state: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk that hnswlib does not report, and a state folder that cannot be written."""
    import hnswlib

    monkeypatch.setenv("REGRAD_INDEX_FROM", "100")

    def cut_short(self: object, path: str) -> None:
        Path(path).write_bytes(b"half")

    with monkeypatch.context() as patch:
        patch.setattr(hnswlib, "Index", type("Full", (hnswlib.Index,), {"save_index": cut_short}))
        bank = make_bank(tmp_path / "full", *DOCUMENTS)
    assert not list((bank / "index").iterdir()) and not list((bank / "tmp").iterdir())
    exact_and_warm(bank)
    (state / "file").touch()
    monkeypatch.setenv("REGRAD_STATE", str(state / "file"))
    bank = make_bank(tmp_path / "b", *DOCUMENTS)
    assert not list((bank / "index").iterdir()) and not list((bank / "tmp").iterdir())
    assert list(verify(bank)) == []
    exact_and_warm(bank)


def test_a_copied_bank_answers_without_its_index(indexed: Path, tmp_path: Path) -> None:
    exact_and_warm(copy_of(indexed, tmp_path / "copy"))


def test_promise_17_no_pickle_is_ever_loaded(indexed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*arguments: object, **options: object) -> None:
        raise AssertionError("a pickle was loaded")

    class Refusing:
        def __init__(self, *arguments: object, **options: object) -> None:
            refuse()

    for name in ("load", "loads"):
        monkeypatch.setattr(pickle, name, refuse)
    monkeypatch.setattr(pickle, "Unpickler", Refusing)
    monkeypatch.setattr(pickle, "_Unpickler", Refusing)
    with pytest.raises(AssertionError):
        pickle.load(io.BytesIO(pickle.dumps(1)))
    bank = make_bank(tmp_path / "new", *DOCUMENTS)
    for place in (bank, indexed):
        exact_and_warm(place)
        remove_documents(place, ["2.md"])
        assert list(verify(place)) == []


def test_the_record_of_a_graph_says_no_path_and_no_text(indexed: Path, state: Path) -> None:
    (record,) = (state / "indexes").iterdir()
    assert set(json.loads(record.read_text())) == {"coverage"}
    assert os.environ["REGRAD_STATE"] == str(state)


def test_labels_of_a_foreign_graph_that_are_no_live_row_are_left_out() -> None:
    graph = index.Graph.__new__(index.Graph)
    graph._live = np.array([True, False, True, True])
    graph._starts = np.array([0, 3, 4])
    labels = np.array([2**64 - 1, 3, 4, 1, 2**63, 2, 0], np.uint64)
    found = graph._candidates(labels, np.arange(7, dtype=np.float32) / 8, 2)
    assert [(each.ref, each.score) for each in found] == [((1, 0), 1 - 1 / 8), ((0, 2), 1 - 5 / 8)]
