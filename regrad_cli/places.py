"""Where regrad keeps what it can fetch again (cache) and what only this machine knows (state). Knows no contents."""

from __future__ import annotations

import os
from pathlib import Path


def expanded(path: str | Path) -> Path:
    """The path with ~ or ~user as a folder; as it is where there is no such user, as a shell leaves it."""
    try:
        return Path(path).expanduser()
    except RuntimeError:
        return Path(path)


def cache_folder() -> Path:
    """Models and fingerprints: REGRAD_CACHE, or the platform's cache folder for regrad. Not created here."""
    value = os.environ.get("REGRAD_CACHE")
    if value:
        return expanded(value).absolute()
    import platformdirs

    return platformdirs.user_cache_path("regrad", appauthor=False)


def state_folder() -> Path:
    """What this machine wrote and trusts: REGRAD_STATE, or the platform's state folder for regrad. Not created here."""
    value = os.environ.get("REGRAD_STATE")
    if value:
        return expanded(value).absolute()
    import platformdirs

    return platformdirs.user_state_path("regrad", appauthor=False)
