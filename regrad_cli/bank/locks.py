"""The writer's lock: one process writes to a bank at a time, and a dead one holds nothing. Knows the lock's file."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path

from regrad_cli.bank import files, layout
from regrad_cli.errors import Locked, StorageFailed


@contextlib.contextmanager
def hold_lock(bank: Path, wait_s: float = 0.0) -> Iterator[None]:
    """Holds the bank's exclusive lock; the system lets go of it when the process dies, however it dies.

    wait_s   how long to wait for another writer
    raises   Locked naming the holder; StorageFailed where the file system has no locks
    """
    path = bank / layout.LOCK_FILE
    deadline = time.monotonic() + wait_s
    pause_s = 0.02
    while True:
        fd = _try(path)
        if fd is not None:
            break
        left_s = deadline - time.monotonic()
        if left_s <= 0:
            holder = _holder(path)
            raise Locked(
                f"another process{holder} is writing to {bank}",
                "wait for it to end, or let this one wait (--wait SECONDS); reading works meanwhile",
            )
        time.sleep(min(pause_s, left_s))
        pause_s = min(2 * pause_s, 0.5)
    try:
        _sign(fd)
        yield
    finally:
        os.close(fd)


def _try(path: Path) -> int | None:
    """The lock's descriptor, or None while another process holds it."""
    with files.storage("open the bank's lock"):
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    try:
        try:
            got = files.lock_exclusive(fd)
        except OSError as error:
            raise StorageFailed(
                f"the file system of {path.parent} has no locks ({error.strerror})",
                "keep the bank on a file system that has them",
            ) from error
        # A lock on a file that somebody removed meanwhile guards nothing.
        if got and _same_file(fd, path):
            return fd
    except BaseException:
        os.close(fd)
        raise
    os.close(fd)
    return None


def _same_file(fd: int, path: Path) -> bool:
    try:
        there = path.stat()
    except OSError:
        return False
    here = os.fstat(fd)
    return (here.st_ino, here.st_dev) == (there.st_ino, there.st_dev)


def _sign(fd: int) -> None:
    """Leaves who holds the lock, for the message others get; the lock holds without it."""
    with contextlib.suppress(OSError):
        os.ftruncate(fd, 0)
        os.pwrite(fd, json.dumps({"pid": os.getpid(), "host": socket.gethostname()}).encode(), 0)


def _holder(path: Path) -> str:
    try:
        with path.open("rb") as file:
            value = json.loads(file.read(1000))
        return f" (pid {int(value['pid'])} on {str(value['host'])[:64]})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""
