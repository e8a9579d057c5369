"""Faults, made where they happen: system calls that fail or kill, processes stopped in the middle, disks that are full,
bytes that change. For the tests and for `python -m reliability`; knows the bank's system calls, not what they are for.
"""

from __future__ import annotations

import ctypes
import errno
import json
import mmap
import os
import signal
import struct
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from regrad_cli.bank import files
from regrad_cli.errors import RegradError

STEPS = ("the start", "open", "write", "fsync", "fsync folder", "rename", "link", "unlink", "mkdir")
STEPS_OF_A_COMMIT = {*STEPS} - {"the start", "mkdir"}
Told = Callable[[int], None]


class Watched(files.System):
    """The system calls that change a disk, with a word before each: `before(step, path)` may raise, kill or note.
    Nothing is synced for real: what a process wrote outlives it without; only a power cut would tell."""

    def __init__(self, before: Callable[[str, str], None]) -> None:
        self.before = before

    @staticmethod
    def _name(fd: int) -> str:
        return str(Path(f"/proc/self/fd/{fd}").readlink())

    def open(self, path, flags, mode=0o777):  # type: ignore[override]
        self.before("open", str(path))
        return os.open(path, flags, mode)

    def write(self, fd, data):  # type: ignore[override]
        self.before("write", self._name(fd))
        return os.write(fd, data)

    def fsync(self, fd):  # type: ignore[override]
        name = self._name(fd)
        self.before("fsync folder" if Path(name).is_dir() else "fsync", name)

    def rename(self, source, target):  # type: ignore[override]
        self.before("rename", f"{source} {target}")
        Path(source).rename(target)

    def link(self, source, target):  # type: ignore[override]
        self.before("link", f"{source} {target}")
        os.link(source, target)

    def unlink(self, path):  # type: ignore[override]
        self.before("unlink", str(path))
        Path(path).unlink()

    def mkdir(self, path):  # type: ignore[override]
        self.before("mkdir", str(path))
        Path(path).mkdir()


class Fault:
    """Raises `error` at the n-th call it is told of; `hit` says at which step, if it came so far."""

    def __init__(self, number: int, error: Callable[[], BaseException]) -> None:
        self.left, self.error, self.hit = number, error, ""

    def __call__(self, step: str, path: str) -> None:
        self.left -= 1
        if self.left == 0:
            self.hit = step
            raise self.error()


def no_links(step: str, path: str) -> None:
    """A file system without hard links."""
    if step == "link":
        raise OSError(errno.EPERM, "no links here")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def fails(code: int) -> Callable[[], None]:
    """What raises that error of the system."""

    def fail() -> None:
        raise OSError(code, os.strerror(code))

    return fail


# ── processes ────────────────────────────────────────────────────────────────────────────────────────────────────────


@dataclass(frozen=True, slots=True)
class Ended:
    """How a child process ended.

    step      one of STEPS: the call at which the fault was made, or the last one before a signal; "" without either
    calls     how many calls it had begun
    reported  the last number it told
    code      its exit code; None if it was killed
    said      what it told of its failure, a traceback if that was no failure of ours
    seconds   how long it ran
    """

    step: str
    calls: int
    reported: int
    code: int | None
    said: str
    seconds: float

    @property
    def killed(self) -> bool:
        return self.code is None


class Child:
    """A process of its own that does `work(told)`; what it has begun and told is known also if it is killed.

    work     may return an exit code; a RegradError is its exit code and its message
    at       the call before which `then` is called; 0 for none
    then     kills, by default, or raises
    lasting  `then` is called before every later call too, but for those that make room
    links    False for a file system without hard links
    """

    _PLACES = struct.Struct("<qqqq")  # begun calls, the last one's step, the fault's step, the number told

    def __init__(
        self,
        work: Callable[[Told], int | None],
        *,
        at: int = 0,
        then: Callable[[], None] = die,
        lasting: bool = False,
        links: bool = True,
    ) -> None:
        self._shared = mmap.mmap(-1, mmap.PAGESIZE * 4)
        self._started = time.monotonic()
        interrupts = {signal.SIGINT}  # held back until the child is where it can be interrupted
        before = signal.pthread_sigmask(signal.SIG_BLOCK, interrupts)
        self.pid = os.fork()
        if self.pid:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
            return
        code = 130
        try:
            signal.signal(signal.SIGINT, signal.default_int_handler)
            signal.pthread_sigmask(signal.SIG_UNBLOCK, interrupts)
            code = self._run(work, at, then, lasting, links)
        finally:
            os._exit(code)

    def _run(
        self, work: Callable[[Told], int | None], at: int, then: Callable[[], None], lasting: bool, links: bool
    ) -> int:
        calls = 0

        def before(step: str, path: str) -> None:
            nonlocal calls
            calls += 1
            struct.pack_into("<qq", self._shared, 0, calls, STEPS.index(step))
            if calls == at:
                struct.pack_into("<q", self._shared, 16, STEPS.index(step))
            if calls == at or (lasting and calls > at > 0 and step != "unlink"):
                then()
            if not links:
                no_links(step, path)

        try:
            files.SYSTEM = Watched(before)
            return work(lambda number: struct.pack_into("<q", self._shared, 24, number)) or 0
        except KeyboardInterrupt:
            return 130
        except RegradError as error:
            self._say(f"{error.message}; {error.hint}")
            return error.exit_code
        except BaseException:
            self._say(traceback.format_exc())
            return 70

    def _say(self, text: str) -> None:
        data = text.encode("utf-8", "replace")[: len(self._shared) - 40]
        self._shared[32 : 32 + len(data)] = data

    def stop_after(self, seconds: float, *, interrupt: bool = False) -> None:
        """Kills it after that time, or interrupts it as Ctrl-C does."""
        time.sleep(seconds)
        os.kill(self.pid, signal.SIGINT if interrupt else signal.SIGKILL)

    def wait(self, limit_s: float = 120.0) -> Ended:
        """raises AssertionError if it does not end in time"""
        pause_s, deadline = 0.0002, time.monotonic() + limit_s
        while True:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                break
            if time.monotonic() > deadline:
                os.kill(self.pid, signal.SIGKILL)
                os.waitpid(self.pid, 0)
                raise AssertionError(f"a process did not end within {limit_s} s")
            time.sleep(pause_s)
            pause_s = min(2 * pause_s, 0.01)
        seconds = time.monotonic() - self._started
        calls, last, fault, reported = self._PLACES.unpack_from(self._shared)
        code = os.waitstatus_to_exitcode(status)
        said = self._shared[32:].rstrip(b"\0").decode("utf-8", "replace")
        self._shared.close()
        stopped = code < 0 or code == 130
        step = STEPS[fault or last] if fault or stopped else ""
        return Ended(step, calls, reported, None if code < 0 else code, said, seconds)


def run_and_kill(work: Callable[[Told], Any], at: int, links: bool) -> tuple[str, int]:
    """Runs `work` in a child that kills itself before its `at`-th system call.

    returns  the step it died at ("" if it ended before), and the last commit it had reported by then
    """
    ended = Child(lambda told: work(told) and None, at=at, links=links).wait()
    return ended.step, ended.reported


# ── disks ────────────────────────────────────────────────────────────────────────────────────────────────────────────


_NEW_MOUNTS, _NEW_USER, _PRIVATE = 0x00020000, 0x10000000, (1 << 18) | (1 << 14)  # unshare(2), mount(2)


class NoSmallDisk(Exception):
    """A file system of so many bytes cannot be had here: no right to mount one, and no user namespaces."""


def on_small_disk(size_bytes: int, work: Callable[[Path], Any]) -> Any:
    """`work(folder)` in a child process, on a file system (tmpfs) of that size which goes with the process.

    returns  what `work` returns, through JSON
    raises   NoSmallDisk; AssertionError with what went wrong in `work`
    """
    with tempfile.TemporaryDirectory(prefix="regrad-disk-") as folder:
        out = Path(folder, "result.json")
        place = Path(folder, "disk")
        place.mkdir()
        child = os.fork()
        if child == 0:
            code = 1
            try:
                code = _on_small_disk(size_bytes, place, out, work)
            finally:
                os._exit(code)
        _, status = os.waitpid(child, 0)
        code = os.waitstatus_to_exitcode(status)
        if code == 2:
            raise NoSmallDisk(out.read_text(encoding="utf-8"))
        assert code == 0, out.read_text(encoding="utf-8") or f"ended with {code}"
        return json.loads(out.read_bytes())


def _on_small_disk(size_bytes: int, place: Path, out: Path, work: Callable[[Path], Any]) -> int:
    with out.open("w", encoding="utf-8") as told:  # opened before: half a namespace may not make files
        try:
            _mount(size_bytes, place)
        except OSError as error:
            told.write(f"{error.strerror}")
            return 2
        try:
            told.write(json.dumps(work(place)))
        except BaseException:
            told.write(traceback.format_exc())
            return 1
    return 0


def _mount(size_bytes: int, place: Path) -> None:
    """Mounts a tmpfs that this process and its children alone can see. raises OSError where that is not allowed"""
    user, group = os.getuid(), os.getgid()
    if user == 0:
        with suppress(OSError):
            _call("unshare", _NEW_MOUNTS)
            _mount_here(size_bytes, place)
            return
    _call("unshare", _NEW_USER | _NEW_MOUNTS)
    for name, line in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
        Path("/proc/self", name).write_text(line, encoding="ascii")
    _mount_here(size_bytes, place)


def _mount_here(size_bytes: int, place: Path) -> None:
    _call("mount", b"none", b"/", None, _PRIVATE, None)
    _call("mount", b"tmpfs", os.fsencode(place), b"tmpfs", 0, f"size={size_bytes}".encode())


def _call(name: str, *values: Any) -> None:
    function = getattr(ctypes.CDLL(None, use_errno=True), name, None)
    if function is None:
        raise OSError(errno.ENOSYS, f"no {name} here")
    flags = [ctypes.c_ulong(value) if isinstance(value, int) and len(values) > 1 else value for value in values]
    if function(*flags) != 0:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))


def fill(disk: Path, left_bytes: int) -> Path:
    """A file that leaves so many bytes free on this disk, in whole blocks; unlink it to make room again."""
    ballast, found = disk / "ballast", os.statvfs(disk)
    blocks = max(0, found.f_bavail - left_bytes // found.f_frsize)
    with ballast.open("wb") as file:
        os.posix_fallocate(file.fileno(), 0, max(1, blocks * found.f_frsize))
    return ballast


# ── bytes ────────────────────────────────────────────────────────────────────────────────────────────────────────────


def every_flip(data: bytes, places: int) -> Iterator[tuple[int, bytes]]:
    """Copies of `data` with one bit flipped: in the first and last bytes, and at `places` spread over the rest."""
    chosen = {0, 1, 7, 8, 9, len(data) - 1, len(data) - 2, *np.linspace(0, len(data) - 1, places).astype(int).tolist()}
    for position in sorted(place for place in chosen if 0 <= place < len(data)):
        flipped = bytearray(data)
        flipped[position] ^= 1 << (position % 8)
        yield position, bytes(flipped)


def flip(file: Path, position: int) -> None:
    """Flips one bit of a file, in place."""
    data = bytearray(file.read_bytes())
    data[position] ^= 1 << (position % 8)
    file.write_bytes(data)
