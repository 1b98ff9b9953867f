"""DeepSeek's published balancer, for all layers and nodes at once.

Three greedy steps: groups of experts are packed into nodes, the replica that carries most is split
further until the slots of a node are used up, and replicas are packed into the GPUs of their node.
A step does not look ahead to the next: counts are chosen without regard to places.
"""

import numpy as np

from whalejax.parallel.eplb.sizes import Sizes


def plan_published(load: np.ndarray, sizes: Sizes) -> tuple[np.ndarray, np.ndarray]:
    """Plans as DeepSeek's code does, tie by tie.

    Args:
      load: `f32[layers, experts]`.
      sizes: of the plan.

    Returns:
      `int[layers, replicas]`, the expert of each slot, and of the same shape its number among the
      replicas of that expert, in the order in which they were made.
    """
    layers = len(load)
    names = experts_of_groups(assign_groups(load, sizes), sizes).reshape(layers * sizes.nodes, -1)
    node_load = np.take_along_axis(np.repeat(load, sizes.nodes, axis=0), names, axis=1)
    expert, number, counts = replicate(node_load, sizes.node_replicas)
    share = np.take_along_axis(node_load / counts, expert, axis=1)
    slot = pack(share, sizes.node_gpus)
    by_slot = np.empty_like(slot)
    np.put_along_axis(by_slot, slot, expert, axis=1)
    physical_to_logical = np.take_along_axis(names, by_slot, axis=1)
    number_of_slot = np.empty_like(slot)
    np.put_along_axis(number_of_slot, slot, number, axis=1)
    return physical_to_logical.reshape(layers, -1), number_of_slot.reshape(layers, -1)


def assign_groups(load: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Packs groups into nodes by their loads.

    Args:
      load: `f32[layers, experts]`.
      sizes: of the plan.

    Returns:
      `int[layers, nodes, node_groups]`, the groups of each node.
    """
    place = pack(load.reshape(len(load), sizes.groups, -1).sum(axis=2), sizes.nodes)
    return np.argsort(place, axis=1).reshape(len(load), sizes.nodes, -1)


def experts_of_groups(groups: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Experts of each node, `int[layers, nodes, node_experts]`, from its groups."""
    experts = groups[..., None] * sizes.group_experts + np.arange(sizes.group_experts)
    return experts.reshape(len(groups), sizes.nodes, sizes.node_experts)


def replicate(
    load: np.ndarray, replicas: int, *, most: int | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Splits, until there are `replicas`, the expert whose replicas carry most.

    Args:
      load: `f32[rows, experts]`.
      replicas: wanted of each row, at least one to an expert.
      most: replicas that an expert may have; as many as it likes unless given.

    Returns:
      `int[rows, replicas]` the expert of each replica, of the same shape its number among that
      expert's, and `f32[rows, experts]` the counts.
    """
    rows, experts = load.shape
    row = np.arange(rows)
    counts = np.ones((rows, experts), np.float32)
    share = load.astype(np.float32)  # of a replica
    expert = np.broadcast_to(np.arange(replicas), (rows, replicas)).copy()
    number = np.zeros((rows, replicas), np.int64)
    if most == 1:
        share[:] = -1
    for i in range(experts, replicas):
        heaviest = share.argmax(axis=1)
        count = counts[row, heaviest]
        expert[:, i], number[:, i] = heaviest, count
        counts[row, heaviest] = count + 1
        split = load[row, heaviest] / (count + 1)
        share[row, heaviest] = split if most is None else np.where(count + 1 < most, split, -1)
    return expert, number, counts


def pack(weight: np.ndarray, packs: int) -> np.ndarray:
    """Places items, heaviest first, into the lightest pack that is not full.

    Args:
      weight: `f32[rows, items]`.
      packs: of each row, all filled with equally many items.

    Returns:
      `int[rows, items]`, the place of each item: its pack times their capacity, plus its rank.
    """
    rows, items = weight.shape
    capacity = items // packs
    if capacity == 1:
        return np.broadcast_to(np.arange(items), weight.shape).copy()
    order, in_order = heaviest_first(weight)
    first = np.arange(rows) * packs
    total = np.zeros((rows, packs), weight.dtype)  # infinite where a pack is full
    flat, filled = total.reshape(-1), np.zeros(rows * packs, np.int64)
    place = np.empty((items, rows), np.int64)
    for i in range(items):
        lightest = total.argmin(axis=1)
        at = first + lightest
        rank = filled[at]
        filled[at] = rank + 1
        flat[at] = np.where(rank + 1 < capacity, flat[at] + in_order[i], np.inf)
        place[i] = lightest * capacity + rank
    return as_before(place, order)


def heaviest_first(weight: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Orders `int[rows, items]` of falling weights, ties as they are; and these, turned."""
    order = np.argsort(-weight, axis=1, kind="stable")
    return order, np.ascontiguousarray(np.take_along_axis(weight, order, axis=1).T)


def as_before(place: np.ndarray, order: np.ndarray) -> np.ndarray:
    """`int[rows, items]` in the items' own order, of `int[items, rows]` in another."""
    unsorted = np.empty(order.shape, np.int64)
    np.put_along_axis(unsorted, order, place.T, axis=1)
    return unsorted
