"""The published packing of replicas into GPUs, held to one replica of an expert on a GPU."""

import numpy as np

from whalejax.parallel.eplb.published import as_before, heaviest_first


def pack_apart(weight: np.ndarray, owner: np.ndarray, owners: int, packs: int) -> np.ndarray:
    """Places items, heaviest first, into the lightest pack that neither is full nor has the owner.

    Where `published.pack` puts no two items of an owner together, this places them alike.

    Args:
      weight: `f32[rows, items]`.
      owner: `int[rows, items]`; of an owner there are at most as many items as packs.
      owners: how many there are, numbered from 0.
      packs: of each row, all filled with equally many items, at most `owners`.

    Returns:
      `int[rows, items]`, the place of each item: its pack times their capacity, plus its rank.
    """
    rows, items = weight.shape
    capacity = items // packs
    if capacity == 1:
        return np.broadcast_to(np.arange(items), weight.shape).copy()
    order, weight = heaviest_first(weight)
    owner = np.ascontiguousarray(np.take_along_axis(owner, order, axis=1).T)
    row = np.arange(rows)
    first = row * packs
    total = np.zeros((rows, packs), weight.dtype)  # infinite where a pack is full
    taken = np.zeros((rows, owners, packs), weight.dtype)  # infinite where an owner is
    flat, filled = total.reshape(-1), np.zeros(rows * packs, np.int64)
    place = np.empty((items, rows), np.int64)
    for i in range(items):
        allowed = total + taken[row, owner[i]]
        lightest = allowed.argmin(axis=1)
        item = np.full(rows, i)
        for r in np.flatnonzero(np.isinf(allowed[row, lightest])):
            lightest[r] = total[r].argmin()
            item[r] = _make_way(i, lightest[r], place[:i, r] // capacity, owner[:, r], taken[r])
            place[i, r] = place[item[r], r]
        at = first + lightest
        rank = filled[at]
        filled[at] = rank + 1
        flat[at] = np.where(rank + 1 < capacity, flat[at] + weight[item, row], np.inf)
        place[item, row] = lightest * capacity + rank
        taken[row, owner[item, row], lightest] = np.inf
    return as_before(place, order)


def _make_way(item, pack, pack_of, owner, taken):
    """Puts an item in the place of an earlier one that may go to `pack`, and returns that one.

    All packs that are not full have the item's owner. One has not, as there are no more items of an
    owner than packs; it is full of items of different owners, and `pack` has fewer.
    """
    here = (taken[owner[item]][pack_of] == 0) & (taken[owner[: len(pack_of)], pack] == 0)
    other = np.flatnonzero(here)[-1]  # of those the lightest
    taken[owner[other], pack_of[other]] = 0
    taken[owner[item], pack_of[other]] = np.inf
    return other
