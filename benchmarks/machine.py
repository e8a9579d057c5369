"""The machine that figures were taken on: processor, memory, device, versions, commit, date. Measures nothing."""

from __future__ import annotations

import datetime
import os
import platform
import subprocess
import sys
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
INSTRUCTIONS = ("amx_bf16", "avx512_bf16", "avx512f", "avx2")  # the widest decides what a matrix product costs


def cpu_info(path: Path = Path("/proc/cpuinfo")) -> tuple[str, str]:
    """(model, the widest known instruction set) of the processor; the latter "" where it cannot be told."""
    try:
        lines = path.read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or platform.machine(), ""
    fields = {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in lines)}
    flags = (fields.get("flags") or "").split()
    found = [name for name in INSTRUCTIONS[:2] if name in flags] or [n for n in INSTRUCTIONS[2:] if n in flags][:1]
    return fields.get("model name") or platform.machine(), ", ".join(found)


def cores() -> int:
    """Cores that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:
        return os.cpu_count() or 1


def memory_gib() -> float:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    except (ValueError, OSError, AttributeError):
        return 0.0


def busy() -> str:
    """A sentence where other work is running on this machine, else "". Figures taken then are worth little."""
    try:
        load = os.getloadavg()[0]
    except (OSError, AttributeError):
        return ""
    if load <= 0.5 * cores():
        return ""
    return f"other work is running here (load {load:.1f} on {cores()} cores): figures are worth little now"


def commit() -> str:
    """The commit of the working tree, and whether it has changes."""
    try:
        command = ["git", "-C", str(ROOT), "describe", "--always", "--abbrev=12", "--dirty= with changes"]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


def has_cuda() -> bool:
    """Asked in a process of its own, so that the one that measures never holds a CUDA context."""
    code = "import torch, sys; sys.exit(0 if torch.cuda.is_available() else 1)"
    return subprocess.run([sys.executable, "-c", code], capture_output=True).returncode == 0


def cuda_name() -> str:
    code = "import torch; print(torch.cuda.get_device_name())"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip()


def describe(device: str) -> str:
    """One line that names the machine, the versions, the date and the commit."""
    model, instructions = cpu_info()
    parts = [
        f"{model}{f' ({instructions})' if instructions else ''}, {cores()} cores, {memory_gib():.0f} GiB",
        f"device {device}" + (f" ({cuda_name()})" if device == "cuda" else ""),
        f"Python {platform.python_version()}, torch {_version('torch')}, transformers {_version('transformers')}",
        datetime.datetime.now(tz=datetime.UTC).strftime("%Y-%m-%d"),
        f"commit {commit()}",
    ]
    return " · ".join(parts)


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"
