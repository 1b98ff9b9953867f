"""Slots that a new plan changes, and numbers for its nodes, GPUs and slots that change few."""

import numpy as np

from whalejax.parallel.eplb.placements import count_held
from whalejax.parallel.eplb.sizes import Sizes


def count_moves(physical_to_logical: np.ndarray, current: np.ndarray) -> np.ndarray:
    """Slots whose expert changes, `int[layers]`, between two `int[layers, replicas]`."""
    return (physical_to_logical != current).sum(axis=1)


def align(physical_to_logical: np.ndarray, current: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Renumbers nodes, GPUs in nodes and slots in GPUs so that few slots change.

    Nodes are alike, and so are the GPUs of a node: loads stay as they are, but for their numbers.
    Pairs with most in common are matched first.

    Args:
      physical_to_logical: `int[layers, replicas]`, a valid plan.
      current: of the same shape, another.
      sizes: of both.

    Returns:
      `int[layers, replicas]`.
    """
    plan = physical_to_logical
    for units, outer in ((sizes.nodes, 1), (sizes.node_gpus, sizes.nodes)):
        shape = (len(plan) * outer, units, -1)
        plan = _match(plan.reshape(shape), current.reshape(shape), sizes.experts)
    shape = (-1, sizes.slots)
    return _keep_slots(plan.reshape(shape), current.reshape(shape)).reshape(current.shape)


def _match(plan, current, experts):
    """Orders the second axis of `plan` to have much in common with that of `current`."""
    held, in_use = (count_held(x, experts).astype(np.float32) for x in (plan, current))
    common = held.transpose(0, 2, 1) @ in_use
    rows, units, _ = common.shape
    row, source = np.arange(rows), np.empty((rows, units), np.int64)
    for _ in range(units):
        ours, theirs = np.divmod(common.reshape(rows, -1).argmax(axis=1), units)
        source[row, theirs] = ours
        common[row, ours] = -1
        common[row, :, theirs] = -1
    return plan[row[:, None], source]


def _keep_slots(plan, current):
    """Leaves in their slots the experts that a GPU has already; arguments are `[gpus, slots]`."""
    ours, theirs = _distinct(plan), _distinct(current)
    same = (ours[:, :, None] == theirs[:, None]).all(axis=3)
    new, free = ~same.any(axis=2), ~same.any(axis=1)
    source = np.argsort(~new, axis=1, kind="stable")  # new experts first, then those that stay
    slot = np.argsort(~free, axis=1, kind="stable")
    moved = np.arange(plan.shape[1]) < new.sum(axis=1)[:, None]
    values = np.where(
        moved, np.take_along_axis(plan, source, axis=1), np.take_along_axis(current, slot, axis=1)
    )
    kept = np.empty_like(current)
    np.put_along_axis(kept, slot, values, axis=1)
    return kept


def _distinct(expert):
    """Each slot's expert and how often it occurs before: `int[gpus, slots, 2]`, no two alike."""
    slots = expert.shape[1]
    earlier = np.tri(slots, k=-1, dtype=bool)
    before = ((expert[:, :, None] == expert[:, None]) & earlier).sum(axis=2)
    return np.stack((expert, before), axis=2)
