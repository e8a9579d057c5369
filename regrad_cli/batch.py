"""What one commit of an ingest adds and removes, and the same in few bytes while it waits. Knows records only."""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable
from dataclasses import astuple, dataclass, field
from typing import Self

from regrad_cli.records import DocumentDone, DocumentGone, Passage, RowRef


@dataclass
class Batch:
    """What one commit adds and removes, and the documents that are complete, or gone, with it."""

    rows: list[tuple[Passage, bytes]] = field(default_factory=list)
    removals: list[RowRef] = field(default_factory=list)
    finished: list[DocumentDone] = field(default_factory=list)
    gone: list[DocumentGone] = field(default_factory=list)

    @property
    def changes(self) -> bool:
        return bool(self.rows or self.removals)

    def packed(self) -> bytes:
        """As few bytes: keys can be made again. In memory, for texts are written nowhere but into the bank."""
        parts = [
            [astuple(passage) for passage, _ in self.rows],
            self.removals,
            [astuple(document) for document in self.finished],
            [astuple(document) for document in self.gone],
        ]
        return zlib.compress(json.dumps(parts).encode(), level=1)

    @classmethod
    def unpacked(cls, data: bytes, key_of: Callable[[Passage], bytes]) -> Self:
        rows, removals, finished, gone = json.loads(zlib.decompress(data))
        passages = [Passage(*fields) for fields in rows]
        return cls(
            rows=[(passage, key_of(passage)) for passage in passages],
            removals=[RowRef(*place) for place in removals],
            finished=[DocumentDone(*fields) for fields in finished],
            gone=[DocumentGone(*fields) for fields in gone],
        )
