"""Writing to disk so that it survives a crash: temporary file, fsync, rename or link, fsync of the folder.
Knows paths and bytes, not what they mean.

All system calls that change a disk go through SYSTEM, one object, so that tests can count, order and fail them.
"""

from __future__ import annotations

import errno
import fcntl
import os
import secrets
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from regrad_cli.errors import StorageFailed

CLAIM = ".claim"
# What link(2) answers where a file system has no hard links (FAT, some network and FUSE mounts).
NO_LINKS = {errno.EPERM, errno.EOPNOTSUPP, errno.ENOTSUP, errno.ENOSYS, errno.EMLINK}


class System:
    """The calls that change a disk, under their own names."""

    open = staticmethod(os.open)
    write = staticmethod(os.write)
    close = staticmethod(os.close)
    rename = staticmethod(os.rename)
    link = staticmethod(os.link)
    unlink = staticmethod(os.unlink)
    mkdir = staticmethod(os.mkdir)

    @staticmethod
    def fsync(fd: int) -> None:
        full = getattr(fcntl, "F_FULLFSYNC", None)  # macOS: fsync alone leaves the data in the drive's cache
        if full is not None:
            fcntl.fcntl(fd, full)
        else:
            os.fsync(fd)


SYSTEM = System()


@contextmanager
def storage(what: str) -> Iterator[None]:
    """Turns any OSError into a StorageFailed that says what was being done and what the system answered."""
    try:
        yield
    except OSError as error:
        raise storage_failed(what, error) from error


def storage_failed(what: str, error: OSError) -> StorageFailed:
    hints = {
        errno.ENOSPC: "the disk is full: free some space and run the same command again; what was committed stays",
        errno.EDQUOT: "your quota is used up: free some space and run the same command again; what was committed stays",
        errno.EFBIG: "a limit on file sizes is in force (ulimit -f); what was committed stays",
        errno.EROFS: "the file system is mounted read-only",
        errno.EACCES: "check who owns the bank's folder and its permissions",
        errno.EPERM: "check who owns the bank's folder and its permissions",
        errno.EIO: "the disk answered with an error: look at the system's log; what was committed stays",
    }
    name = f" ({error.filename})" if error.filename else ""
    hint = hints.get(error.errno or 0, "what was committed before stays; run the same command again")
    return StorageFailed(f"could not {what}: {error.strerror or error}{name}", hint)


def write_temporary(folder: Path, parts: Iterable[Any], prefix: str = "") -> Path:
    """Writes buffers to a new file in `folder`, with the umask's mode, and syncs it; removed again if that fails.

    prefix  what its name begins with; the rest is random
    raises  OSError
    """
    path = folder / f"{prefix}{secrets.token_hex(16)}"
    fd = SYSTEM.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        try:
            for part in parts:
                view = memoryview(part).cast("B")
                while len(view):
                    view = view[SYSTEM.write(fd, view) :]
            SYSTEM.fsync(fd)
        finally:
            SYSTEM.close(fd)
    except BaseException:
        discard(path)
        raise
    return path


def sync_file(path: Path) -> None:
    """Syncs a file that somebody else wrote (hnswlib does not)."""
    fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        SYSTEM.fsync(fd)
    finally:
        os.close(fd)


def sync_folder(path: Path) -> None:
    """Makes renames and links in this folder durable."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        SYSTEM.fsync(fd)
    finally:
        os.close(fd)


def make_folder(path: Path) -> None:
    """Makes a folder that may be there already, and makes its name durable."""
    if path.is_dir():
        return
    with suppress(FileExistsError):  # another process was faster
        SYSTEM.mkdir(path)
    sync_folder(path.parent)


def publish(temporary: Path, target: Path) -> None:
    """Gives a synced temporary file its name. Overwrites: a file named by its content may only be healed by that."""
    try:
        SYSTEM.rename(temporary, target)
    except BaseException:
        discard(temporary)
        raise


def publish_once(temporary: Path, target: Path, claim: Path | None = None) -> None:
    """Gives a synced temporary file a name that nothing has yet, atomically. It may keep its own beside that; who calls
    removes that, and syncs the folder.

    claim   what keeps others off the name where there are no links; beside the target, if nothing is said
    raises  FileExistsError if the name is taken
    """
    try:
        SYSTEM.link(temporary, target)
    except OSError as error:
        if error.errno not in NO_LINKS:
            raise
        _claim_and_rename(temporary, target, claim or target.with_suffix(CLAIM))


def _claim_and_rename(temporary: Path, target: Path, claim: Path) -> None:
    """Where there are no links: an O_EXCL claim keeps others off while the name is checked. Writing the target itself
    with O_EXCL would let a crash leave half a file under its final name."""
    SYSTEM.close(SYSTEM.open(claim, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666))
    try:
        if target.exists():
            raise FileExistsError(errno.EEXIST, os.strerror(errno.EEXIST), str(target))
        SYSTEM.rename(temporary, target)
    finally:
        discard(claim)


def discard(path: Path) -> bool:
    """Removes a file if that is possible; what stays is cleared by the next writer."""
    with suppress(OSError):
        SYSTEM.unlink(path)
        return True
    return False


def lock_exclusive(file: IO[bytes] | int) -> bool:
    """Tries to take the exclusive lock; False if another process holds one. raises OSError where locks don't exist."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def lock_shared(fd: int) -> None:
    """Takes the shared lock. Where the file system has none, a reader goes on without: only `compact` looks at it."""
    with suppress(OSError):
        fcntl.flock(fd, fcntl.LOCK_SH)
