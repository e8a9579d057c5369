"""The command line: parse, call a use case, render. `main` is the entry point; nothing else happens at import."""

from __future__ import annotations

import sys
from collections.abc import Sequence

__all__ = ["main"]


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command and return the process's exit code. Ctrl-C is 130 from the start, also during imports."""
    try:
        from regrad_cli.cli.app import run

        return run(sys.argv[1:] if arguments is None else list(arguments))
    except KeyboardInterrupt:
        from regrad_cli.render import Terminal

        Terminal.of_process().interrupted()
        return 130
