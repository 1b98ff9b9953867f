"""From one plan to another in steps that change few slots, each of them a valid plan."""

import numpy as np

from whalejax.parallel.eplb.planning import count_replicas

MIN_MOVES = 2  # two experts without a second replica can only change places both at once


def walk(current: np.ndarray, target: np.ndarray, max_moves: int) -> list[np.ndarray]:
    """The plans on the way, of which each gives every expert a slot.

    In each layer slots whose expert has another replica get the expert that they shall have. Where
    there is none left, those that differ hold the only replicas of their experts: one of them
    changes places with the slot where its expert shall go, which brings at least this slot home. So
    each change lowers the number of slots that differ, and each step makes one at least. On its way
    a layer may be less balanced than at either end.

    Args:
      current: `int[layers, replicas]`, a valid plan.
      target: of the same shape, another, over the same experts.
      max_moves: slots of a layer that a step may change, 2 or more.

    Returns:
      Plans, `i32[layers, replicas]` each, the last of them `target`; none if there is nothing to
      change.

    Raises:
      ValueError: `max_moves` is below 2, shapes differ, or an expert has no slot; prints them.
    """
    current, target = (np.array(plan, np.int32) for plan in (current, target))
    _check(current, target, max_moves)
    plans = []
    while (current != target).any():
        current = current.copy()
        for slots, wanted in zip(current, target, strict=True):
            _step(slots, wanted, max_moves)
        plans.append(current)
    return plans


def _step(slots, wanted, max_moves):
    """Changes at most `max_moves` slots of a layer, in place."""
    counts = np.bincount(slots)
    pivot, touched = None, set()
    while len(touched) < max_moves:
        differing = np.flatnonzero(slots != wanted)
        spare = differing[counts[slots[differing]] > 1]
        if len(spare):
            slot = spare[0]
            counts[slots[slot]] -= 1
            counts[wanted[slot]] += 1
            slots[slot] = wanted[slot]
            touched.add(int(slot))
            continue
        if not len(differing):
            return
        if pivot is None or slots[pivot] == wanted[pivot]:
            pivot = int(differing[0])
        goal = int(np.flatnonzero(wanted == slots[pivot])[0])
        if len(touched | {pivot, goal}) > max_moves:
            return
        slots[pivot], slots[goal] = slots[goal], slots[pivot]
        touched |= {pivot, goal}


def _check(current, target, max_moves):
    if max_moves < MIN_MOVES:
        raise ValueError(
            f"max_moves={max_moves} must be {MIN_MOVES} or more: experts without a second replica "
            f"change places two at a time"
        )
    if current.ndim != 2 or current.shape != target.shape:
        raise ValueError(
            f"walk: current {list(current.shape)} and target {list(target.shape)} must be equal "
            f"[layers, replicas]"
        )
    experts = max(current.max(initial=0), target.max(initial=0)) + 1
    for name, plan in (("current", current), ("target", target)):
        if plan.min(initial=0) < 0 or not (counts := count_replicas(plan, experts)).all():
            missing = "" if plan.min() < 0 else f", without one: {np.argwhere(counts == 0)[0]}"
            raise ValueError(
                f"walk: every expert of 0..{experts - 1} must have a slot in every layer of "
                f"{name}; smallest number {plan.min()}{missing} ([layer, expert])"
            )
