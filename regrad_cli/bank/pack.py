"""A bank's snapshot → one file, and such a file → a bank's folder. Knows both forms; believes no byte that it has not
compared with the manifest, and gives a name only to what is whole.

Both write into a hidden folder beside the target and rename at the end: a process that is stopped leaves the old or the
new, and what a killed one left goes when the same target is written again.
"""

from __future__ import annotations

import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, BinaryIO

from regrad_cli.bank import files, layout
from regrad_cli.bank.damage import DamagedFile
from regrad_cli.bank.opening import open_bank
from regrad_cli.bank.packed import (
    BEGINNING,
    BLOCK,
    END,
    START_BYTES,
    WAY_OUT,
    Packed,
    archive_bytes,
    header,
    looks_packed,
    manifest_place,
    members,
    padding,
)
from regrad_cli.bank.parsing import parse
from regrad_cli.bank.store import READ_BYTES, Store, open_plain_file
from regrad_cli.errors import NoBank, RegradError, StorageFailed, UsageProblem
from regrad_cli.places import expanded
from regrad_cli.records import sha256_hex

NOT_PACKED = "a damaged bank is not packed: `regrad bank repair` comes before; `--snapshot N` packs an older one"
Report = Callable[[int, int], None]


# ── packing ──────────────────────────────────────────────────────────────────────────────────────────────────────────


def pack_bank(
    path: Path,
    out: Path | BinaryIO,
    snapshot: int | None = None,
    *,
    force: bool = False,
    report: Report | None = None,
) -> dict[str, Any]:
    """Writes one snapshot of a bank, of either form, as a packed bank. The same snapshot gives the same bytes.

    out      a file that is made, whole or not at all, or a stream
    force    replaces a packed bank that is there
    report   told (bytes done, bytes in all)
    returns  {"path" (None for a stream), "bytes", "sha256" of the file, "snapshot", "documents", "passages", "dead"}
    raises   DamagedFile if any file of the snapshot is not what its checksum says; UsageProblem if something else has
             the name; StorageFailed; NoBank, UnknownFormat
    """
    with open_bank(path, snapshot) as opened:
        digest, manifest = hashlib.sha256(), opened.manifest
        with opened.store.open(manifest.name) as region:
            data = region.read(0, region.length)
        if parse(data, manifest.name).sha256 != manifest.sha256:
            raise DamagedFile(manifest.name, "is another one than when it was opened")
        sizes = members(manifest)
        parts = _hashed(_archive(opened.store, manifest.name, data, sizes, report), digest)
        if isinstance(out, Path):
            out = expanded(out).resolve()
            refuse_to_replace(out, path, force=force)
            try:
                with files.storage(f"write {out}"), _scratch_beside(out) as folder:
                    temporary = files.write_temporary(folder, parts)
                    if force:
                        files.publish(temporary, out)
                    else:
                        files.publish_once(temporary, out, _claim_beside(out))
                        files.discard(temporary)
                    files.sync_folder(out.parent)
            except StorageFailed as error:
                if isinstance(error.__cause__, FileExistsError):  # it came meanwhile
                    refuse_to_replace(out, path, force=False)
                raise
        else:
            for part in parts:
                out.write(part)
            out.flush()
        return {
            "path": str(out) if isinstance(out, Path) else None,
            "bytes": archive_bytes([len(layout.FORMAT_TEXT), len(data), *sizes.values()]),
            "sha256": digest.hexdigest(),
            "snapshot": manifest.number,
            "documents": manifest.counts.documents,
            "passages": manifest.counts.passages,
            "dead": manifest.counts.dead,
        }


def refuse_to_replace(out: Path, bank: Path, *, force: bool) -> None:
    """raises UsageProblem unless a packed bank may be written there: nothing is, or a packed bank that is to go"""
    if bank.is_dir() and bank.resolve() in (out, *out.parents):
        raise UsageProblem(f"{out} is in the bank's own folder", "name a file elsewhere")
    if not out.parent.is_dir():
        raise UsageProblem(f"there is no folder {out.parent}", "make it first, or name a file elsewhere")
    if out.is_dir() or (out.exists() and not out.is_file()):
        raise UsageProblem(f"{out} is {'a folder' if out.is_dir() else 'no plain file'}", "name a file: OUT.gbank")
    if not out.exists():
        return
    with files.storage(f"look at {out}"), out.open("rb") as file:
        if not looks_packed(file.read(START_BYTES)):
            raise UsageProblem(f"{out} is there already, and is no packed bank", "name another file")
    if not force:
        raise UsageProblem(f"{out} is there already", "--force replaces it")


def _archive(store: Store, name: str, manifest: bytes, sizes: dict[str, int], report: Report | None) -> Iterator[bytes]:
    """The packed bank in pieces. Every file is compared with the manifest while it is copied."""
    yield BEGINNING
    yield header(name, len(manifest)) + manifest + padding(len(manifest))
    total, done = sum(sizes.values()), 0
    for member, size_bytes in sizes.items():
        yield header(member, size_bytes)
        digest = hashlib.sha256()
        try:
            with store.open(member, size_bytes) as region:
                yield from _hashed(region.pieces(), digest)
            _prove(member, digest)
        except DamagedFile as error:
            raise DamagedFile(member, error.finding.what, hint=NOT_PACKED) from error
        yield padding(size_bytes)
        done += size_bytes
        if report is not None:
            report(done, total)
    yield END


def _hashed(parts: Iterable[bytes], digest: Any) -> Iterator[bytes]:
    for part in parts:
        digest.update(part)
        yield part


def _prove(name: str, digest: Any) -> None:
    """raises DamagedFile unless a file named by its content has that content"""
    if not name.split("/")[1].startswith(f"{digest.hexdigest()}."):
        raise DamagedFile(name, "does not match its checksum")


# ── unpacking ────────────────────────────────────────────────────────────────────────────────────────────────────────


def unpack_bank(file: Path | BinaryIO, folder: Path, *, report: Report | None = None) -> dict[str, Any]:
    """Makes a live bank of a packed one, which is read once from its beginning to its end.

    file     the packed bank, or a stream of one; a pipe that has a name is a stream
    folder   what is made, whole or not at all: it must not be there yet, or be empty
    report   told (bytes done, bytes in all)
    returns  {"path", "bytes", "snapshot", "documents", "passages"}
    raises   DamagedFile on any byte that is not what was packed; UsageProblem if the folder is not free; StorageFailed;
             NoBank, UnknownFormat
    """
    if isinstance(file, Path):
        with files.storage(f"read {file}"):
            is_there = file.is_file()
        if not is_there and not file.is_fifo():
            what = "is a folder, and not packed" if file.is_dir() else "is not there"
            raise NoBank(f"{file} {what}", "name the file that `regrad bank pack` wrote")
        if is_there:
            Packed(file).close()  # what can be seen at once is said before anything is written
        with files.storage(f"read {file}"), file.open("rb") as stream:
            return _unpack(stream, file, folder, report)
    return _unpack(file, Path("standard input"), folder, report)


def _unpack(source: BinaryIO, named: Path, folder: Path, report: Report | None) -> dict[str, Any]:
    folder = expanded(folder).resolve()
    _refuse_taken_folder(folder)
    name, size_bytes = manifest_place(source.read(START_BYTES), named)
    data = b"".join(_content(source, size_bytes, named))
    manifest = parse(data, name)
    sizes = members(manifest)
    total, done = sum(sizes.values()), 0
    with files.storage(f"unpack into {folder}"), _scratch_beside(folder) as scratch:
        for inner in layout.FOLDERS:
            files.make_folder(scratch / inner)
        own = {".gitignore": b"*\n", layout.FORMAT_FILE: layout.FORMAT_TEXT}
        own |= {name: data, layout.copy_name(manifest.number): data}
        for inner, content in own.items():
            files.publish(files.write_temporary(scratch / "tmp", [content]), scratch / inner)
        for member, size_bytes in sizes.items():
            if source.read(BLOCK) != header(member, size_bytes):
                raise DamagedFile(named.name, f"holds something else where {member} belongs", hint=WAY_OUT)
            digest = hashlib.sha256()
            parts = _hashed(_content(source, size_bytes, named), digest)
            temporary = files.write_temporary(scratch / "tmp", parts)
            _prove(member, digest)
            files.publish(temporary, scratch / member)
            done += size_bytes
            if report is not None:
                report(done, total)
        if source.read(len(END) + 1) != END:
            raise DamagedFile(named.name, "does not end as it was packed", hint=WAY_OUT)
        for inner in (*layout.FOLDERS, "."):
            files.sync_folder(scratch / inner)
        _put_in_place(scratch, folder)
    counts = manifest.counts
    return {
        "path": str(folder),
        "bytes": total,
        "snapshot": manifest.number,
        "documents": counts.documents,
        "passages": counts.passages,
    }


def _content(source: BinaryIO, size_bytes: int, named: Path) -> Iterator[bytes]:
    """A file's bytes in pieces, then what fills its last block."""
    left = size_bytes
    while left:
        part = source.read(min(READ_BYTES, left))
        if not part:
            raise DamagedFile(named.name, "ends early", hint=WAY_OUT)
        left -= len(part)
        yield part
    fill = padding(size_bytes)
    if source.read(len(fill)) != fill:
        raise DamagedFile(named.name, "holds something after one of its files", hint=WAY_OUT)


def _refuse_taken_folder(folder: Path) -> None:
    """raises UsageProblem unless a bank can be put there"""
    if not folder.parent.is_dir():
        raise UsageProblem(f"there is no folder {folder.parent}", "make it first, or name another place")
    if not folder.exists():
        return
    if not folder.is_dir():
        raise UsageProblem(f"{folder} is a file, not a place for a bank", "name a folder that is not there yet")
    with files.storage(f"look into {folder}"):
        taken = any(folder.iterdir())
    if taken:
        what = "there is a bank at {} already" if layout.looks_like_a_bank(folder) else "{} holds other things"
        raise UsageProblem(what.format(folder), "name a folder that is not there yet")
    if folder.samefile(Path.cwd()):
        raise UsageProblem(
            f"{folder} is the folder you are in, and would be replaced", f"name one in it: {layout.BANK_FOLDER}"
        )


def _put_in_place(scratch: Path, folder: Path) -> None:
    """The commit: one rename, onto nothing or an empty folder."""
    try:
        files.SYSTEM.rename(scratch, folder)
    except OSError:
        _refuse_taken_folder(folder)  # somebody else was faster
        raise
    files.sync_folder(folder.parent)


# ── the place where both write ───────────────────────────────────────────────────────────────────────────────────────


@contextmanager
def _scratch_beside(target: Path) -> Iterator[Path]:
    """A hidden folder beside the target, for the life of the block. It holds a locked file, by which one that a killed
    process left is known: its lock is free, and it goes first. Where there are no locks, such a one stays."""
    beginning = _beginning(target)
    for left in target.parent.glob(f"{beginning}*"):
        _clear_if_dead(left)
    claim = _claim_beside(target)
    if claim.exists() and not any(target.parent.glob(f"{beginning}*")):  # nobody is at work on it
        files.discard(claim)
    lock_fd = None
    while lock_fd is None:
        folder = target.parent / f"{beginning}{secrets.token_hex(8)}"
        try:
            files.make_folder(folder)
            lock_fd = _lock(folder)
        except BaseException:
            _clear(folder, lock_too=True)
            raise
    try:
        yield folder
    finally:
        _clear(folder, lock_too=False)
        files.SYSTEM.close(lock_fd)  # before its name goes: NFS keeps a name for what is open
        _clear(folder, lock_too=True)


def _beginning(target: Path) -> str:
    """How the names of what lies beside a target begin while it is written."""
    return f".regrad-{sha256_hex(os.fsencode(target.name))[:12]}-"


def _claim_beside(target: Path) -> Path:
    """What keeps others off the target's name where there are no links; not among what `_beginning` begins."""
    return target.parent / f"{_beginning(target)[:-1]}{files.CLAIM}"


def _clear(folder: Path, *, lock_too: bool) -> None:
    """Removes what lies in it, and only when nothing else does, its lock and itself: by its lock it is known as long as
    there is anything. A link is not followed."""
    with suppress(OSError):
        fd = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC)
        try:
            for entry in list(os.scandir(fd)):
                if entry.is_dir(follow_symlinks=False):
                    shutil.rmtree(entry.name, ignore_errors=True, dir_fd=fd)
                elif entry.name != layout.LOCK_FILE:
                    os.unlink(entry.name, dir_fd=fd)
            if lock_too and [entry.name for entry in os.scandir(fd)] == [layout.LOCK_FILE]:
                os.unlink(layout.LOCK_FILE, dir_fd=fd)
        finally:
            os.close(fd)
        if lock_too:
            folder.rmdir()


def _lock(folder: Path) -> int | None:
    """The descriptor that keeps others from clearing this folder; None if somebody just did."""
    path = folder / layout.LOCK_FILE
    try:
        lock_fd = files.SYSTEM.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o666)
    except FileNotFoundError:
        return None
    try:
        held = files.lock_exclusive(lock_fd)
    except OSError:
        return lock_fd  # no locks here, so nobody clears anything
    if held and path.exists():
        return lock_fd
    files.SYSTEM.close(lock_fd)
    return None


def _clear_if_dead(left: Path) -> None:
    """Removes what a killed process left; one whose lock is held, or cannot be asked for, is left alone."""
    with suppress(OSError):
        left.rmdir()  # killed before there was a lock
    with suppress(OSError, RegradError):
        lock_fd = open_plain_file(left / layout.LOCK_FILE, left.name)
        try:
            dead = files.lock_exclusive(lock_fd)
            if dead:
                _clear(left, lock_too=False)
        finally:
            os.close(lock_fd)
        if dead:
            _clear(left, lock_too=True)
