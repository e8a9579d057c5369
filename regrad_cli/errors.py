"""Every way regrad can fail, with its exit code. Knows nothing but the standard library.

One class a kind of failure; `kind` is the stable name that `--json` prints, `exit_code` the process's status.
A message names the fact (what and where); the hint names the way out.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any


class RegradError(Exception):
    """The base of all expected failures: carries the exit code, a stable kind, a message and the way out."""

    exit_code = 70
    kind = "unexpected"

    def __init__(self, message: str, hint: str = "") -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint


class UsageProblem(RegradError):
    """The command was called with something it cannot take."""

    exit_code, kind = 2, "usage"


class NoBank(RegradError):
    """There is no bank at the named place, nor in a parent folder."""

    exit_code, kind = 10, "no_bank"


class Locked(RegradError):
    """Another process is writing to the bank."""

    exit_code, kind = 11, "locked"


class Mismatch(RegradError):
    """Bank and model (or tokenizer, prior, embedder) are not those that belong together."""

    exit_code, kind = 12, "mismatch"


class PriorMismatch(Mismatch):
    """Gradients, prior and model differ in their tensors' names or shapes."""

    kind = "prior_mismatch"


class ModelUnavailable(RegradError):
    """A model, an embedder or a device that was asked for is not there and cannot be had."""

    exit_code, kind = 13, "model_unavailable"


class Damaged(RegradError):
    """Something in the bank is not what its checksum says, or is missing."""

    exit_code, kind = 14, "damaged"


class UnknownFormat(RegradError):
    """The bank is of a format, or uses a feature, that this version does not know."""

    exit_code, kind = 14, "unknown_format"


class StorageFailed(RegradError):
    """The disk is full, read-only, or answered with an error; what was committed before stays."""

    kind = "storage_failed"


class NonFinite(RegradError):
    """A loss or a gradient is not a finite number; it never enters a bank."""

    kind = "non_finite"


EXIT_DONE = 0
EXIT_DIFFERS = 1  # what `diff --exit-code` compared is not the same
EXIT_USAGE = 2
EXIT_PARTIAL = 3  # done, but some inputs could not be read; each was named
EXIT_UNEXPECTED = 70
EXIT_INTERRUPTED = 130


def is_panic(error: BaseException) -> bool:
    """Whether a library written in Rust gave up: what it raises then is no Exception, and no reason to end the process
    (tokenizers does so over a merge that is longer than its tokens)."""
    return type(error).__name__ == "PanicException"


@contextmanager
def unreadable_model(what: str, hint: str) -> Iterator[None]:
    """Whatever a library makes of a damaged model's file, a panic too, becomes ModelUnavailable: `what`, and why."""
    try:
        yield
    except RegradError:
        raise
    except BaseException as error:
        if not (isinstance(error, Exception) or is_panic(error)):
            raise
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise ModelUnavailable(f"{what}: {reason}", hint) from error


def describe_error(error: BaseException) -> dict[str, Any]:
    """An exception under the stable names of `--json`: code, kind, message, hint."""
    if isinstance(error, RegradError):
        return {"code": error.exit_code, "kind": error.kind, "message": error.message, "hint": error.hint}
    if isinstance(error, OSError) and error.strerror:
        named = f": {os.fsdecode(error.filename)}" if isinstance(error.filename, str | bytes | Path) else ""
        return {"code": EXIT_UNEXPECTED, "kind": "os_error", "message": f"{error.strerror}{named}", "hint": ""}
    told = f": {error}" if str(error) else ""
    return {
        "code": EXIT_UNEXPECTED,
        "kind": "unexpected",
        "message": f"unexpected {type(error).__name__}{told}",
        "hint": "this is a fault of regrad: please report it with what --debug shows",
    }
