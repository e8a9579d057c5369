"""Making a new bank. Knows the layout and the first manifest; not what a prior holds."""

from __future__ import annotations

import datetime
import errno
import secrets
from pathlib import Path

import regrad_cli
from regrad_cli.bank import cleanup, files, layout
from regrad_cli.bank.commit import link_manifest
from regrad_cli.bank.damage import REPAIR
from regrad_cli.bank.locks import hold_lock
from regrad_cli.bank.manifest import Counts, FileEntry, Manifest
from regrad_cli.bank.opening import lost_snapshot
from regrad_cli.errors import UsageProblem
from regrad_cli.records import BankSettings, sha256_hex

TOOL = f"regrad {regrad_cli.__version__}"


def now() -> str:
    return datetime.datetime.now(datetime.UTC).strftime("%Y-%m-%dT%H:%M:%SZ")


def create_bank(path: Path, settings: BankSettings, prior: bytes) -> None:
    """Makes an empty bank at `path`, which must be free: no folder, an empty one, or what a killed `init` left.

    The first manifest comes last; until then there is no bank, and doing it again finishes it.

    settings.prior   SHA-256 of `prior`, the prior's safetensors file
    raises           UsageProblem if something else is there (nothing is touched), StorageFailed
    """
    if sha256_hex(prior) != settings.prior:
        raise ValueError("settings.prior is not the prior's SHA-256")
    refuse_what_is_there(path)
    with files.storage(f"make a bank at {path}"):
        missing = [folder for folder in (path, *path.parents) if not folder.exists()]
        for folder in reversed(missing):
            files.make_folder(folder)
        with hold_lock(path):
            refuse_what_is_there(path)  # another init may have been faster
            for name in layout.FOLDERS:
                files.make_folder(path / name)
            cleanup.clear_claims(path)
            temporary = path / "tmp"
            parts = {
                ".gitignore": b"*\n",
                layout.FORMAT_FILE: layout.FORMAT_TEXT,
                layout.content_name("priors", settings.prior): prior,
            }
            for name, data in parts.items():
                files.publish(files.write_temporary(temporary, [data]), path / name)
            files.sync_folder(path / "priors")
            files.sync_folder(path)
            manifest = Manifest(
                bank=secrets.token_hex(16),
                number=1,
                parent=None,
                time=now(),
                tool=TOOL,
                operation="init",
                run=secrets.token_hex(8),
                settings=settings,
                prior=FileEntry(settings.prior, len(prior)),
                shards=(),
                index=None,
                counts=Counts(),
            )
            link_manifest(path, manifest)
            files.sync_folder(path / "snapshots")


def refuse_what_is_there(path: Path) -> None:
    """raises UsageProblem unless `path` is free, or holds only the beginnings of a bank that was never finished;
    StorageFailed where one may not look"""
    try:
        if not path.exists() and not path.is_symlink():
            return
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            way_out = "name another place: `regrad init PATH`"
            raise UsageProblem(f"no bank can have so long a name: {path}", way_out) from error
        raise files.storage_failed(f"look at {path}", error) from error
    if not path.exists():
        raise UsageProblem(
            f"{path} is a link that leads nowhere", "make the folder that it leads to, or name another place"
        )
    if not path.is_dir():
        raise UsageProblem(f"{path} is a file, not a place for a bank", "name another place: `regrad init PATH`")
    if layout.snapshot_numbers(path):
        raise UsageProblem(
            f"there is a bank at {path} already", "`regrad ingest` adds to it; `regrad init PATH` makes another one"
        )
    shards = any(name.startswith("shards/") for name in layout.content_files(path))
    if lost_snapshot(path) is not None or (shards and layout.looks_like_a_bank(path)):
        raise UsageProblem(f"there is a damaged bank at {path}: it has no snapshot", f"{REPAIR}, or name another place")
    if not layout.only_beginnings(path):
        raise UsageProblem(f"{path} holds other things", f"name a free one: `regrad init {path / layout.BANK_FOLDER}`")
