"""A bank of three short documents under a prior that changes answers, for tests of what is done with an answer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import use_cases
from test_answer import write_prior
from use_cases import ingest, story, write


def story_bank(root: Path, model: Path, embedder: Path, **options: Any) -> Path:
    """Nine passages; the prior holds random tensors and step sizes."""
    prior = write_prior(root / "prior.safetensors", model)
    bank = use_cases.make_bank(root / ".gbank", model, embedder, prior=prior, **options)
    texts = {"Velmora.md": story("Velmora"), "Skerry.md": story("Skerry")}
    ingest(bank, write(root / "docs", texts | {"Brannoch.md": story("Brannoch", about="the bell is rung by Ilse")}))
    return bank
