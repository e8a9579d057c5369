"""What `doctor` looks at: versions, folders, models, device and its speed, bank. Changes and fetches nothing."""

import os
import platform
import sys
import time
from collections.abc import Callable
from importlib import metadata
from pathlib import Path
from typing import Any

from regrad_cli import __version__
from regrad_cli.cli.call import Call, config_file
from regrad_cli.errors import NoBank, RegradError

PACKAGES = (
    "torch",
    "transformers",
    "sentence-transformers",
    "safetensors",
    "hnswlib",
    "numpy",
    "gguf",
    "typer",
    "rich",
)
MATRIX = 1024  # side of the square matrices that are multiplied
MEASURE_S = 0.15  # how long each number format is measured


def examine(call: Call) -> dict[str, Any]:
    """The report: {section: {name: value}}, and "problems", each a sentence with its way out."""
    problems: list[str] = []
    report: dict[str, Any] = {
        "regrad": {
            "version": __version__,
            "python": platform.python_version(),
            "system": f"{platform.system()} {platform.machine()}",
            "executable": sys.executable,
        },
        "packages": _packages(problems),
        "folders": _folders(problems),
    }
    for name, look in (("models", _models), ("device", _device), ("bank", _bank)):
        try:
            report[name] = look(call, problems)
        except RegradError as error:
            problems.append(f"{error.message}: {error.hint}" if error.hint else error.message)
            report[name] = {}
        except (ImportError, OSError) as error:
            problems.append(f"{name}: {error}")
            report[name] = {}
    return report | {"problems": problems}


def _packages(problems: list[str]) -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "missing"
            problems.append(f"the package {name} is missing: pip install {name}")
    return found


def _folders(problems: list[str]) -> dict[str, str]:
    from regrad_cli.models import cache_folder, state_folder

    folders = {"cache": cache_folder(), "state": state_folder()}
    for name, folder in folders.items():
        there = next(parent for parent in (folder, *folder.parents) if parent.exists())
        if not os.access(there, os.W_OK):
            problems.append(f"the {name} folder {folder} cannot be written: set REGRAD_{name.upper()} to one that can")
    file = config_file()
    shown = {name: str(folder) for name, folder in folders.items()}
    return shown | {"config": str(file) + ("" if file.is_file() else " (not there)")}


def _models(call: Call, problems: list[str]) -> list[dict[str, Any]]:
    from regrad_cli.models import installed

    found = installed()
    missing = [str(each["name"]) for each in found if not each.get("present")]
    if missing:
        fetch = "`regrad model fetch`" if len(missing) > 1 else f"`regrad model fetch {missing[0]}`"
        problems.append(f"not there yet: {', '.join(missing)}; {fetch} gets what is missing, and so does the first use")
    return [
        {"name": each["name"], "kind": each["kind"], "present": bool(each.get("present")), "path": each.get("path")}
        for each in found
    ]


def _device(call: Call, problems: list[str]) -> dict[str, Any]:
    import torch

    from regrad_cli.learn.model import DTYPES, choose_device, choose_dtype

    device = choose_device(call.value("device", call.device))
    dtype = choose_dtype(call.value("dtype", call.dtype), device)
    chosen = next(name for name, kind in DTYPES.items() if kind == dtype)
    report: dict[str, Any] = {"device": str(device), "dtype": chosen}
    if device.type == "cuda":
        report["name"] = torch.cuda.get_device_name(device)
        report["memory_bytes"] = torch.cuda.get_device_properties(device).total_memory
    elif device.type == "cpu":
        report["cores"] = os.cpu_count()
        report["threads"] = torch.get_num_threads()
    speeds = {name: _gflops(torch, device, DTYPES[name]) for name in ("fp32", "bf16")}
    report["gflops"] = speeds
    if chosen in speeds and speeds[chosen] * 1.5 < max(speeds.values()):
        faster = max(speeds, key=lambda name: speeds[name])
        problems.append(f"{faster} is faster here than {chosen}, which is in force: try --dtype {faster}")
    return report


def _gflops(torch: Any, device: Any, dtype: Any) -> int:
    """Speed of matrix products on the device, in 10⁹ floating-point operations a second."""
    left = torch.ones(MATRIX, MATRIX, device=device, dtype=dtype)
    right = torch.ones(MATRIX, MATRIX, device=device, dtype=dtype)
    wait: Callable[[], None] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    left @ right
    wait()
    rounds, start = 0, time.perf_counter()
    while (elapsed := time.perf_counter() - start) < MEASURE_S:
        left @ right
        wait()
        rounds += 1
    return round(2 * MATRIX**3 * rounds / elapsed / 1e9)


def _bank(call: Call, problems: list[str]) -> dict[str, Any]:
    from regrad_cli.bank import open_bank

    try:
        path: Path = call.bank_path()
    except NoBank as problem:
        if call.value("bank", call.bank_flag) is not None:
            problems.append(f"{problem.message}: {problem.hint}")
        return {"path": "none here; `regrad init` makes one"}
    with open_bank(path) as opened:
        stats = opened.stats()
        trained = opened.settings.prior_trained
    if not trained:
        problems.append("the bank's prior is untrained: answers will be poor until one is learned")
    return {
        "path": str(path),
        "form": stats["form"],
        "snapshot": stats["snapshot"],
        "documents": stats["documents"],
        "passages": stats["passages"],
        "bytes": stats["bytes"]["total"],
    }
