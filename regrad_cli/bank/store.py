"""Reading a bank's files: one reader over (file, offset, length) for a live bank and a packed one.
Knows sizes and bounds, not what the bytes mean. Never maps memory: a file that shrinks under a mapping kills the
process with SIGBUS, where a short read is an error that names the file.
"""

from __future__ import annotations

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Protocol

from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.files import storage_failed

READ_BYTES = 1 << 20


class Region:
    """`length` bytes of an open file from `offset` on; reads nothing outside them.

    raises  DamagedFile if the file ends early or cannot be read
    """

    def __init__(self, fd: int, offset: int, length: int, name: str) -> None:
        self.fd, self.offset, self.length, self.name = fd, offset, length, name

    def read(self, start: int, count: int) -> bytes:
        buffer = bytearray(count)
        self.read_into(start, memoryview(buffer))
        return bytes(buffer)

    def read_into(self, start: int, target: memoryview) -> None:
        """Fills the whole of `target` (bytes) from position `start` of the region."""
        if start < 0 or start + len(target) > self.length:
            raise DamagedFile(self.name, f"bytes {start} to {start + len(target)} lie outside the file")
        done = 0
        while done < len(target):
            try:
                count = os.preadv(self.fd, [target[done:]], self.offset + start + done)
            except OSError as error:
                raise DamagedFile(self.name, f"cannot be read ({error.strerror})") from error
            if count == 0:
                raise DamagedFile(self.name, f"ends after {start + done} of {self.length} bytes")
            done += count

    def pieces(self) -> Iterator[bytes]:
        """The whole region, a megabyte at a time."""
        for start in range(0, self.length, READ_BYTES):
            yield self.read(start, min(READ_BYTES, self.length - start))

    def sha256(self) -> str:
        """Of the whole region."""
        digest = hashlib.sha256()
        for piece in self.pieces():
            digest.update(piece)
        return digest.hexdigest()


class Store(Protocol):
    """A bank's files by their names inside it, in whichever form it lies.

    path    of the folder, or of the packed file
    form    "live" or "packed"
    """

    @property
    def path(self) -> Path: ...
    @property
    def form(self) -> str: ...
    def open(self, name: str, size_bytes: int | None = None) -> AbstractContextManager[Region]:
        """One file as a region, closed again at the end.

        size_bytes  what the manifest says, checked before anything is read
        raises      DamagedFile if it is missing, no plain file, or of another size
        """


class Folder:
    """A live bank's folder; a Store."""

    form = "live"

    def __init__(self, path: Path) -> None:
        self.path = path

    @contextmanager
    def open(self, name: str, size_bytes: int | None = None) -> Iterator[Region]:
        """As Store says."""
        fd = open_plain_file(self.path / name, name)
        try:
            length = os.fstat(fd).st_size
            if size_bytes is not None and length != size_bytes:
                raise DamagedFile(name, f"has {length} bytes, not {size_bytes}")
            yield Region(fd, 0, length, name)
        finally:
            os.close(fd)


def open_plain_file(path: Path, name: str) -> int:
    """A descriptor of a regular file, never of a pipe or a device (which could block for ever).

    raises  DamagedFile, or StorageFailed where only a permission is missing
    """
    try:
        fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        if error.errno in (errno.ENOENT, errno.ENOTDIR):
            raise DamagedFile(name, "is missing") from error
        if error.errno in (errno.EACCES, errno.EPERM):
            raise storage_failed("read the bank", error) from error
        raise DamagedFile(name, f"cannot be opened ({error.strerror})") from error
    if not stat.S_ISREG(os.fstat(fd).st_mode):
        os.close(fd)
        raise DamagedFile(name, "is not a file")
    return fd
