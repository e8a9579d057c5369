"""Bytes that a stranger may hand to regrad, thrown at every reader of them: see targets.py, and docs/security.md.

`python -m tests.fuzz TARGET --seconds N` runs one with atheris; tests/test_fuzz.py runs all of them for a short time.
"""

import sys
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
for folder in (TESTS, TESTS / "bank"):  # the tests' own helpers, where pytest has not seen to that
    if str(folder) not in sys.path:
        sys.path.append(str(folder))
