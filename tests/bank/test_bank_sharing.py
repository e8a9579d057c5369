"""Promises 8, 9, 10, 18: several processes on one bank, and a bank that meets the wrong model."""

from __future__ import annotations

import errno
import fcntl
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import numpy as np
import pytest
from made_banks import content, make_bank, rows, settings

from regrad_cli.bank import log, open_bank, remove_documents, verify, write_bank
from regrad_cli.errors import Locked, Mismatch, StorageFailed
from regrad_cli.records import RowRef, document_id

HOLD = """
import sys, pathlib, time
sys.path.insert(0, sys.argv[2])
from made_banks import rows
from regrad_cli.bank import write_bank
with write_bank(pathlib.Path(sys.argv[1]), wait_s=20) as writer:
    print("holding", flush=True)
    writer.add(*rows(sys.argv[3], 3))
    time.sleep(float(sys.argv[4]))
    writer.commit("ingest")
    writer.finish()
"""


def holder(bank: Path, source: str, seconds: float) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", HOLD, str(bank), str(Path(__file__).parent), source, str(seconds)],
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None and process.stdout.readline() == "holding\n"
    return process


def test_promise_08_a_second_writer_is_refused_by_name_or_waits(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    process = holder(bank, "other.md", 0.5)
    with pytest.raises(Locked) as caught, write_bank(bank):
        pass
    assert f"pid {process.pid}" in caught.value.message and caught.value.exit_code == 11 and caught.value.hint
    with open_bank(bank) as snapshot:  # readers don't wait
        assert snapshot.stats()["passages"] == 0
    with write_bank(bank, wait_s=20) as writer:
        writer.add(*rows("mine.md", 2))
        writer.commit("ingest")
        writer.finish()
    assert process.wait() == 0
    assert {passage.source for passage, *_ in content(bank).values()} == {"other.md", "mine.md"}
    assert list(verify(bank)) == []


def test_promise_08_many_writers_lose_nothing(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    arguments = [str(bank), str(Path(__file__).parent)]
    processes = [
        subprocess.Popen([sys.executable, "-c", HOLD, *arguments, f"{name}.md", "0"], stdout=subprocess.PIPE)
        for name in "abcd"
    ]
    assert [process.wait() for process in processes] == [0, 0, 0, 0]
    for process in processes:
        assert process.stdout is not None
        process.stdout.close()
    assert len(content(bank)) == 12 and list(verify(bank)) == []
    assert [entry["snapshot"] for entry in log(bank)] == [5, 4, 3, 2, 1]


def test_promise_08_within_one_process_too(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    with write_bank(bank), pytest.raises(Locked), write_bank(bank):
        pass


def test_promise_09_a_dead_writers_lock_does_not_block(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    process = holder(bank, "other.md", 60)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert process.stdout is not None
    process.stdout.close()
    with write_bank(bank) as writer:
        writer.add(*rows("mine.md", 2))
        writer.commit("ingest")
    assert len(content(bank)) == 2


def test_a_lock_file_that_was_removed_guards_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Someone deletes `lock` between its opening and its locking: the writer must take the new one."""
    bank = make_bank(tmp_path / "b")
    from regrad_cli.bank import files

    real = files.lock_exclusive
    seen = []

    def racing(fd: int) -> bool:
        if not seen:
            (bank / "lock").unlink()
            seen.append(fd)
        return real(fd)

    monkeypatch.setattr(files, "lock_exclusive", racing)
    with write_bank(bank, wait_s=5), pytest.raises(Locked), write_bank(bank):
        pass


def test_a_file_system_without_locks_is_refused_to_writers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)])

    def unsupported(file: object, how: int) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(fcntl, "flock", unsupported)
    assert len(content(bank)) == 2
    with pytest.raises(StorageFailed, match="no locks"), write_bank(bank):
        pass


def _read_over_and_over(path: str, stop: Event, failures: object, rounds: object) -> None:
    while not stop.is_set():
        try:
            with open_bank(Path(path)) as snapshot:
                first = snapshot.stats()
                passages = list(snapshot.passages())
                texts = {(p.source, p.text) for _, p, _ in passages}
                rounds_of = {p.text.split()[0] for _, p, _ in passages if p.text}
                read = snapshot.read_rows([ref for ref, _, _ in passages])
                hits = snapshot.search(np.ones((1, 16), np.float32) / 4, 3)[0]
                again = {(p.source, p.text) for _, p, _ in snapshot.passages()}
                assert texts == again and first == snapshot.stats()
                assert len(passages) == first["passages"] == len(read.passages) == 6 and len(hits) == 3
                assert len(rounds_of) == 1, rounds_of  # both documents are of the same round: one snapshot
            rounds.value += 1  # type: ignore[attr-defined]
        except BaseException as error:
            failures.put(repr(error))  # type: ignore[attr-defined]
            return


def test_promise_10_a_reader_sees_one_snapshot_while_others_write(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    with write_bank(bank) as writer:
        for source in ("a.md", "b.md"):
            writer.add(*rows(source, 3, text="0"))
        writer.commit("ingest")
    context = multiprocessing.get_context("spawn")
    failures, rounds = context.Queue(), context.Value("i", 0)
    stop = context.Event()
    readers = [context.Process(target=_read_over_and_over, args=(str(bank), stop, failures, rounds)) for _ in range(2)]
    for reader in readers:
        reader.start()
    number, least, most = 0, time.time() + 3, time.time() + 60  # the longer, the busier the machine is
    while time.time() < least or (rounds.value <= 5 and failures.empty() and time.time() < most):
        with write_bank(bank, wait_s=5) as writer:
            for _ in range(4):
                number += 1
                writer.remove(ref for ref, _, _ in writer.snapshot.passages())
                for source in ("a.md", "b.md"):
                    writer.add(*rows(source, 3, text=str(number)))
                writer.commit("ingest")
            writer.finish()
    stop.set()
    for reader in readers:
        reader.join()
    assert failures.empty(), failures.get()
    assert rounds.value > 5 and number > 5


def test_promise_10_a_snapshot_that_is_read_is_not_dropped(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    with write_bank(bank) as writer:
        writer.add(*rows("a.md", 3))
        number = writer.commit("ingest")
        with open_bank(bank, number) as reader:
            for source in ("b.md", "c.md", "d.md"):
                writer.add(*rows(source, 3))
                writer.commit("ingest")
            writer.finish()
            assert number in [entry["snapshot"] for entry in log(bank)]
            assert len(list(reader.passages())) == 3
    with write_bank(bank):
        pass
    assert [entry["snapshot"] for entry in log(bank)] == [5, 1]  # nobody reads it any more


def test_a_reader_that_loses_the_race_for_a_snapshot_takes_the_newest(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bank = make_bank(tmp_path / "b")
    from regrad_cli.bank import files

    real = files.lock_shared
    raced: list[int] = []

    def racing(fd: int) -> None:
        if not raced:
            raced.append(fd)
            remove_or_add()
        real(fd)

    def remove_or_add() -> None:
        with write_bank(bank) as writer:
            for source in ("b.md", "c.md", "d.md"):
                writer.add(*rows(source, 3))
                writer.commit("ingest")
            writer.finish()
        (bank / "snapshots" / "00000001.json").unlink()

    monkeypatch.setattr(files, "lock_shared", racing)
    with open_bank(bank) as snapshot:
        assert snapshot.number == 4 and len(list(snapshot.passages())) == 9


def test_a_closed_snapshot_holds_no_lock(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b")
    path = bank / "snapshots" / "00000001.json"
    with open_bank(bank):
        assert not free(path)
    assert free(path)


def free(path: Path) -> bool:
    with path.open("rb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return False
        return True


def test_threads_may_share_a_snapshot(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", *[[(f"{number}.md", 5)] for number in range(12)])
    with open_bank(bank) as snapshot:
        vector = np.ones((1, 16), np.float32) / 4
        expected = snapshot.search(vector, 5)
        results = []
        threads = [threading.Thread(target=lambda: results.append(snapshot.search(vector, 5))) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert results == [expected] * 8


# ── promise 18 ───────────────────────────────────────────────────────────────────────────────────────────────────────


@pytest.mark.parametrize("what", ["model", "tokenizer", "prior", "embedder"])
def test_promise_18_another_one_is_refused_and_both_are_named(tmp_path: Path, what: str) -> None:
    bank = make_bank(tmp_path / "b")
    with open_bank(bank) as snapshot:
        own = settings()
        snapshot.check(model=own.model, tokenizer=own.tokenizer, prior=own.prior, embedder=own.embedder)
        snapshot.check()
        with pytest.raises(Mismatch) as caught:
            snapshot.check(**{what: "f" * 64})
    message = caught.value.message
    assert what in message and getattr(own, what)[:12] in message and "f" * 12 in message
    assert caught.value.hint and caught.value.exit_code == 12


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_where_only_reading_is_allowed_reading_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2)])
    real = os.open

    def read_only(path: str, flags: int, *more: int) -> int:
        if flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
            raise OSError(code, os.strerror(code), str(path))
        return real(path, flags, *more)

    monkeypatch.setattr(os, "open", read_only)
    assert len(content(bank)) == 2 and list(verify(bank)) == []
    with pytest.raises(StorageFailed, match=os.strerror(code)) as caught, write_bank(bank):
        pass
    assert caught.value.hint


def test_removing_waits_for_no_reader(tmp_path: Path) -> None:
    bank = make_bank(tmp_path / "b", [("a.md", 2), ("b.md", 2)])
    with open_bank(bank) as reader:
        remove_documents(bank, ["a.md"])
        assert reader.row(RowRef(0, 0)).passage.document == document_id("a.md")
        assert len(list(reader.passages())) == 4
    assert len(content(bank)) == 2
