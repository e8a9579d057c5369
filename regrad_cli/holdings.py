"""What a bank holds already: the rows of a document, and the row of a passage whatever document it is of. Knows a
snapshot's identities of rows; reads a text only where it is asked for a document.

An ingest of one file into a bank of a million passages so reads 40 bytes a row, not the million texts.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from regrad_cli.bank import Snapshot
from regrad_cli.records import RowRef

Place = tuple[int, int, bytes]  # a row's ordinal and offset in its document, and its key


class Holdings:
    """Of one snapshot, which must stay: its live rows in two orders, some 80 bytes each.

    raises  DamagedFile where identities are damaged; `of_document` where a text is
    """

    def __init__(self, snapshot: Snapshot) -> None:
        self._snapshot = snapshot
        documents, keys, shards, rows = [np.zeros(0, np.uint64)], [np.zeros((0, 32), np.uint8)], [], []
        for position, live, of, own in snapshot.identities():
            documents.append(of)
            keys.append(own)
            shards.append(np.full(len(live), position, np.int32))
            rows.append(live.astype(np.int32))
        self._documents = np.concatenate(documents)  # (n,) ids as numbers, ascending
        order = np.argsort(self._documents, kind="stable")
        self._documents = self._documents[order]
        self._keys = np.concatenate(keys)[order]  # (n, 32)
        self._shards = np.concatenate([np.zeros(0, np.int32), *shards])[order]
        self._rows = np.concatenate([np.zeros(0, np.int32), *rows])[order]
        self._heads = self._keys[:, :8].copy().view(">u8").reshape(-1).astype(np.uint64)
        self._by_head = np.argsort(self._heads, kind="stable")
        self._heads = self._heads[self._by_head]

    def refs(self, document: str) -> list[RowRef]:
        """The live rows of a document, by its id."""
        return [self._ref(place) for place in self._places(document)]

    def of_document(self, document: str) -> dict[Place, RowRef]:
        """The live rows of a document by what they are."""
        places = self._places(document)
        if not places:
            return {}
        keys = {self._ref(place): self._keys[place].tobytes() for place in places}
        texts = self._snapshot.texts(keys, warm=True)
        return {(passage.ordinal, passage.offset, keys[ref]): ref for ref, passage in texts}

    def row_of(self, key: bytes) -> RowRef | None:
        """A live row with this key; None where there is none."""
        head = np.uint64(int.from_bytes(key[:8], "big"))
        for place in self._by_head[_equal(self._heads, head)].tolist():
            if self._keys[place].tobytes() == key:
                return self._ref(place)
        return None

    def _places(self, document: str) -> range:
        found = _equal(self._documents, np.uint64(int(document, 16)))
        return range(found.start, found.stop)

    def _ref(self, place: int) -> RowRef:
        return RowRef(int(self._shards[place]), int(self._rows[place]))


def _equal(ascending: npt.NDArray[np.uint64], number: np.uint64) -> slice:
    """Where a number stands."""
    return slice(*(int(np.searchsorted(ascending, number, side)) for side in ("left", "right")))
