"""Keeps the bank's tests away from the user's own state folder, and from waiting for the disk."""

import os
from pathlib import Path

import pytest

from regrad_cli.bank import files


@pytest.fixture(autouse=True)
def state(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path_factory.mktemp("state")
    monkeypatch.setenv("REGRAD_STATE", str(folder))
    monkeypatch.delenv("REGRAD_INDEX_FROM", raising=False)
    return folder


@pytest.fixture(autouse=True)
def quick_disk(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """fsync takes most of a small commit's time and changes nothing that a test can see; the processes that tests start
    do sync, and so does what is marked with it."""
    if "real_disk" not in request.fixturenames:
        monkeypatch.setattr(files.System, "fsync", staticmethod(os.fstat))


@pytest.fixture
def real_disk() -> None:
    """Asks for real fsync calls."""
