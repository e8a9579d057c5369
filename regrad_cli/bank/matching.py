"""Which rows of one side stand for which rows of the other, by equal keys. Knows arrays of whole numbers only."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

Words = npt.NDArray[np.uint64]
Places = npt.NDArray[np.intp]
NONE: Places = np.zeros(0, np.intp)


def as_words(digests: npt.NDArray[np.uint8] | bytes, size_bytes: int) -> Words:
    """Digests of `size_bytes` each, one after the other, as (n, 2) numbers of their first 16 bytes."""
    data = np.frombuffer(digests, np.uint8).reshape(-1, size_bytes)
    return np.ascontiguousarray(data[:, :16]).view("<u8").astype(np.uint64, copy=False)


def paired(old: Words, new: Words) -> tuple[Places, Places]:
    """Rows with equal keys, one for one: of a key that is there three times here and twice there, two pairs.

    old, new  (n, k) and (m, k)
    returns   places in old and in new, (p,) each, pair by pair; of equal keys the first go together
    """
    both = np.concatenate([old, new])
    if not len(both):
        return NONE, NONE
    is_new = np.arange(len(both)) >= len(old)
    order = np.lexsort((is_new, *both.T))  # stable: rows of one key and one side stay in their order
    keys, is_new = both[order], is_new[order]
    starts = np.concatenate(([True], (keys[1:] != keys[:-1]).any(axis=1)))
    group = np.cumsum(starts) - 1
    of_old, of_new = (np.bincount(group[side], minlength=int(group[-1]) + 1) for side in (~is_new, is_new))
    rank = np.arange(len(both)) - np.flatnonzero(starts)[group]
    rank[is_new] -= of_old[group[is_new]]
    pairs = rank < np.minimum(of_old, of_new)[group]
    return order[pairs & ~is_new], order[pairs & is_new] - len(old)


def others(count: int, chosen: Places) -> Places:
    """Places from 0 to count that are not among the chosen."""
    left = np.ones(count, np.bool_)
    left[chosen] = False
    return np.flatnonzero(left)
