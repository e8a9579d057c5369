"""Whether the promises of docs/promises.md hold where things go wrong: faults by the thousand, and guards taken out one
by one. Knows the bank and the rows that its tests make up; no model."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT / "tests" / "bank"))  # its made-up rows, and the machinery that makes faults
