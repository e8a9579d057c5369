"""A bank in one file, opened for reading: a plain tar archive in which the manifest decides every byte but those of the
files it names. Knows blocks, headers and places; not what the files inside mean.

    FORMAT                      a header, "gbank 1\n", zeros up to the next block
    snapshots/00000042.json     a header, the manifest, zeros
    priors/…, shards/…, docs/…  each file that the manifest names, but for the graph, in its order, likewise
                                two blocks of zeros

So opening reads three blocks and the manifest, whatever the size; a header is compared with what it must be before its
file is read. Headers are made here and not by `tarfile`, whose bytes changed with Python 3.9 (bpo-18819): the same bank
is the same bytes for good.
"""

from __future__ import annotations

import os
import re
import struct
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import NamedTuple

from regrad_cli.bank import layout
from regrad_cli.bank.damage import DamagedFile, Finding
from regrad_cli.bank.manifest import MANIFEST_LIMIT, Manifest
from regrad_cli.bank.parsing import parse, refuse_newer_format
from regrad_cli.bank.store import Region, open_plain_file
from regrad_cli.errors import NoBank

BLOCK = 512
START_BYTES = 3 * BLOCK  # FORMAT's header, FORMAT, the manifest's header
END = bytes(2 * BLOCK)
SIZE_LIMIT = 8**11  # bytes; a header has room for 11 octal digits. Our files end far below (256 MiB a shard)
WAY_OUT = (
    "get the file again from where it came from; `tar xf FILE -C FOLDER` takes out what is left of it, which "
    "`--skip-damaged` answers from and `regrad bank repair` puts in order"
)

# name, mode, uid, gid, size, mtime, checksum, type, link, magic, version, user, group, device numbers, prefix
_HEADER = struct.Struct("100s8s8s8s12s12s8sc100s6s2s32s32s8s8s155s12x")
_MANIFEST = re.compile(rb"(snapshots/[0-9]{8,12}\.json)\0")


def header(name: str, size_bytes: int) -> bytes:
    """The block before a file: POSIX ustar, of nothing but name and size (mode 0644, time, owner and group 0)."""
    fields = [name.encode(), b"0000644", b"0000000", b"0000000", b"%011o" % size_bytes, b"%011o" % 0, b" " * 8, b"0"]
    fields += [b"", b"ustar", b"00", b"", b"", b"0000000", b"0000000", b""]
    fields[6] = b"%06o\0 " % sum(_HEADER.pack(*fields))
    return _HEADER.pack(*fields)


def padding(size_bytes: int) -> bytes:
    """The zeros that fill a file's last block."""
    return bytes(-size_bytes % BLOCK)


BEGINNING = header(layout.FORMAT_FILE, len(layout.FORMAT_TEXT)) + layout.FORMAT_TEXT.ljust(BLOCK, b"\0")


def looks_packed(start: bytes) -> bool:
    """Whether a file that begins so is meant to be a packed bank, however damaged, or the beginning of one."""
    return start == BEGINNING[: len(start)] or start.startswith(b"FORMAT\0") or start[BLOCK:].startswith(b"gbank ")


def manifest_place(start: bytes, path: Path) -> tuple[str, int]:
    """Name and size in bytes of the manifest that follows a packed bank's first START_BYTES.

    raises  NoBank for any other file, UnknownFormat for a newer one, DamagedFile
    """
    refuse_newer_format(path, start[BLOCK : 2 * BLOCK].rstrip(b"\0"))
    if not looks_packed(start):
        raise NoBank(f"{path} is not a bank", "`regrad bank pack OUT.gbank` makes a bank of one file")
    if start[: 2 * BLOCK] != BEGINNING[: len(start)]:
        raise DamagedFile(path.name, "does not begin as a packed bank does", hint=WAY_OUT)
    if len(start) < START_BYTES:
        raise DamagedFile(path.name, f"ends after {len(start)} bytes", hint=WAY_OUT)
    block = start[2 * BLOCK :]
    match, digits = _MANIFEST.match(block), block[124:135]
    if match is None or not re.fullmatch(rb"[0-7]{11}", digits):
        raise DamagedFile(path.name, "has a damaged header before its manifest", hint=WAY_OUT)
    name, size = match[1].decode(), int(digits, 8)
    if header(name, size) != block or size > MANIFEST_LIMIT:
        raise DamagedFile(path.name, "has a damaged header before its manifest", hint=WAY_OUT)
    return name, size


def members(manifest: Manifest) -> dict[str, int]:
    """The files that follow the manifest: sizes in bytes by name, in their order. raises DamagedFile"""
    found = {name: file.bytes for name, file in replace(manifest, index=None).files()}
    for name, size_bytes in found.items():
        if size_bytes >= SIZE_LIMIT:
            raise DamagedFile(manifest.name, f"says of {name} that it has {size_bytes} bytes, which cannot be")
    return found


def archive_bytes(sizes: Iterable[int]) -> int:
    """Of a packed bank whose files have these sizes."""
    return sum(BLOCK + size + len(padding(size)) for size in sizes) + len(END)


class Place(NamedTuple):
    """Where a file lies in a packed bank; its header is the block before."""

    offset: int
    size_bytes: int


class Packed:
    """A packed bank's file; a Store. One descriptor serves for its life: whatever takes the file's name meanwhile, what
    is read comes from this one.

    manifest  of the one snapshot it holds, without the graph, which is not packed
    raises    NoBank, UnknownFormat, DamagedFile; StorageFailed where a permission is missing
    """

    form = "packed"

    def __init__(self, path: Path) -> None:
        self.path = path
        self._fd = open_plain_file(path, path.name)
        self._proved: set[str] = set()  # files whose headers were compared
        try:
            length = os.fstat(self._fd).st_size
            whole = Region(self._fd, 0, length, path.name)
            name, size = manifest_place(whole.read(0, min(length, START_BYTES)), path)
            if START_BYTES + size > length:
                raise DamagedFile(path.name, f"ends after {length} bytes, inside its manifest", hint=WAY_OUT)
            self.manifest = replace(parse(whole.read(START_BYTES, size), name), index=None)
            self._places: dict[str, Place] = {}
            sizes = {layout.FORMAT_FILE: len(layout.FORMAT_TEXT), name: size} | members(self.manifest)
            self.length = archive_bytes(sizes.values())
            if length != self.length:
                raise DamagedFile(path.name, f"has {length} bytes, not {self.length}", hint=WAY_OUT)
            offset = BLOCK
            for member, size in sizes.items():
                self._places[member] = Place(offset, size)
                offset += size + len(padding(size)) + BLOCK
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Packed:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Closes the file; reading from it is an error then."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            os.close(fd)

    @contextmanager
    def open(self, name: str, size_bytes: int | None = None) -> Iterator[Region]:
        """As Store says."""
        place = self._places.get(name)
        if place is None:
            raise DamagedFile(name, "is missing", hint=WAY_OUT)
        if size_bytes is not None and place.size_bytes != size_bytes:
            raise DamagedFile(name, f"has {place.size_bytes} bytes, not {size_bytes}", hint=WAY_OUT)
        if name not in self._proved:
            if self._read(place.offset - BLOCK, BLOCK) != header(name, place.size_bytes):
                raise DamagedFile(name, f"has another header in {self.path.name} than it was packed with", hint=WAY_OUT)
            self._proved.add(name)
        yield Region(self._fd, place.offset, place.size_bytes, name)

    def _read(self, start: int, count: int) -> bytes:
        return Region(self._fd, 0, self.length, self.path.name).read(start, count)

    def after_files(self) -> Iterator[Finding]:
        """What is wrong with the bytes that no reader looks at: what fills each file's last block, and the end."""
        ends = [(f"after {name}", sum(place), padding(place.size_bytes)) for name, place in self._places.items()]
        for where, start, expected in (*ends, ("at its end", self.length - len(END), END)):
            try:
                if self._read(start, len(expected)) != expected:
                    yield Finding(self.path.name, f"is damaged {where}")
            except DamagedFile as error:
                yield error.finding
