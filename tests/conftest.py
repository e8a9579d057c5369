"""What every test gets: caches and state of its own, no hub, and tiny models; for `starter` tests, the real ones.

A `starter` test is skipped where the starter cannot be had, except under REGRAD_REQUIRE_STARTER=1 (as .ci/run sets it):
there that is a failure.
"""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny

from regrad_cli import models
from regrad_cli.errors import ModelUnavailable

USERS_CACHE = models.cache_folder()
models.quiet_libraries()  # before any test module imports a library that reads its variables then


def pytest_configure() -> None:
    """A shell's background job ignores Ctrl-C, and so would every process that a test starts and then interrupts."""
    if signal.getsignal(signal.SIGINT) == signal.SIG_IGN:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@pytest.fixture(scope="session", autouse=True)
def own_folders(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """REGRAD_CACHE and REGRAD_STATE in a temporary folder, no REGRAD_* of the user's, no hub; for processes too."""
    root = tmp_path_factory.mktemp("regrad")
    with pytest.MonkeyPatch.context() as patch:
        for name in [name for name in os.environ if name.startswith("REGRAD_") and name != "REGRAD_REQUIRE_STARTER"]:
            patch.delenv(name)
        patch.setenv("REGRAD_CACHE", str(root / "cache"))
        patch.setenv("REGRAD_STATE", str(root / "state"))
        patch.setenv("XDG_CONFIG_HOME", str(root / "config"))
        patch.setenv("HF_HOME", str(root / "hub"))
        patch.setenv("HF_HUB_OFFLINE", "1")
        models.quiet_libraries()
        yield root


@pytest.fixture(scope="session")
def tiny_model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random Llama (4 layers, width 32) with a byte-level tokenizer and a chat template; a complete folder."""
    return tiny.write_model(tmp_path_factory.mktemp("models") / "tiny")


@pytest.fixture(scope="session")
def tiny_embedder_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random BERT embedder of dimension 16 in the layout of sentence-transformers."""
    return tiny.write_embedder(tmp_path_factory.mktemp("models") / "tiny-embedder")


@pytest.fixture(scope="session")
def starter_folder(own_folders: Path) -> Path:
    """The real starter. It lies in the user's cache and is linked into the tests' own, so "starter" resolves there."""
    return _real("starter", own_folders)


@pytest.fixture(scope="session")
def embedder_folder(own_folders: Path) -> Path:
    """The real embedder, "minilm", likewise."""
    return _real("minilm", own_folders)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Iterator[None]:
    """Under REGRAD_REQUIRE_STARTER=1 a skip is a failure, but for tests of a machine that has no CUDA."""
    report = yield
    if report.skipped and os.environ.get("REGRAD_REQUIRE_STARTER") == "1" and not hasattr(report, "wasxfail"):
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else str(report.longrepr)
        if "CUDA" not in reason:
            report.outcome, report.longrepr = "failed", f"skipped where nothing may be: {reason}"
    return report


def _real(name: str, root: Path) -> Path:
    resolve = models.resolve_model if name == "starter" else models.resolve_embedder
    try:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("REGRAD_CACHE", str(USERS_CACHE))
            path = resolve(name).path
    except ModelUnavailable as error:
        if os.environ.get("REGRAD_REQUIRE_STARTER") == "1":
            pytest.fail(f"{error.message}; {error.hint}", pytrace=False)
        pytest.skip(error.message)
    link = root / "cache" / "models" / name
    link.parent.mkdir(parents=True, exist_ok=True)
    if not link.exists():
        link.symlink_to(path, target_is_directory=True)
    return path
