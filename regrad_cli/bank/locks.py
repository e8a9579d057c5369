"""The writer's lock: one process writes to a bank at a time, and a dead one holds nothing. Knows the lock's file."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import socket
import stat
import time
from collections.abc import Iterator
from pathlib import Path

from regrad_cli.bank import files, layout
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.errors import Locked, StorageFailed

NO_LINKS = (
    "put a folder in its place, with what it leads to, or take it away: `regrad bank repair` then sees to the rest; "
    "the bank's folder itself may be a link"
)
TAKE_IT_AWAY = "take it away: a writer makes a new one"
_NO_FILE = {errno.ELOOP, errno.EISDIR, errno.ENXIO, errno.ENODEV}  # a link, a folder, a socket, a device of nothing


@contextlib.contextmanager
def hold_lock(bank: Path, wait_s: float = 0.0, *, dry_run: bool = False) -> Iterator[None]:
    """Holds the bank's exclusive lock; the system lets go of it when the process dies, however it dies.

    wait_s   how long to wait for another writer
    dry_run  keep other writers off without a byte that changes; where there is no lock's file, nobody writes
    raises   Locked naming the holder; DamagedFile where a link or another thing stands for the lock or for a folder,
             for who writes through one writes elsewhere; StorageFailed where the file system has no locks
    """
    for name, what in layout.strange_folders(bank):
        raise DamagedFile(name, what, hint=NO_LINKS)
    path = bank / layout.LOCK_FILE
    if dry_run and not os.path.lexists(path):
        yield
        return
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
        if not dry_run:
            _sign(fd)
        yield
    finally:
        os.close(fd)


def _try(path: Path) -> int | None:
    """The lock's descriptor, or None while another process holds it."""
    with files.storage("open the bank's lock"):
        try:
            fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)
        except OSError as error:
            if error.errno in _NO_FILE:
                raise DamagedFile(layout.LOCK_FILE, "is no file of the bank's own", hint=TAKE_IT_AWAY) from error
            raise
    try:
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            raise DamagedFile(layout.LOCK_FILE, "is no file of the bank's own", hint=TAKE_IT_AWAY)
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
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return ""
