"""A planned batch is the same after it has waited."""

from __future__ import annotations

from regrad_cli.batch import Batch
from regrad_cli.records import DocumentDone, DocumentGone, Passage, RowRef


def test_what_was_packed_is_the_same_again() -> None:
    passages = [
        Passage("00ab", "a/\udce9.md", "A title", 0, 0, 12, "one \ud800 two\n"),
        Passage("00ab", "a/\udce9.md", "", 7, 90, 3, "\u0000“quoted”"),
    ]
    batch = Batch(
        rows=[(passage, bytes([place] * 32)) for place, passage in enumerate(passages)],
        removals=[RowRef(3, 4)],
        finished=[DocumentDone("00ab", "a/\udce9.md", "A title", 2, 1, 1, 5)],
        gone=[DocumentGone("ff", "b.md")],
    )
    keys = dict(batch.rows)
    again = Batch.unpacked(batch.packed(), keys.__getitem__)
    assert again == batch
    assert again.changes
