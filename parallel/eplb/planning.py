"""The front door: checks a request, has it planned, and derives the tables that dispatch reads."""

from typing import NamedTuple

import numpy as np

from whalejax.parallel.eplb.published import plan_published
from whalejax.parallel.eplb.sizes import Sizes
from whalejax.parallel.eplb.whale import plan_whale, replan_whale

METHODS = ("published", "whale")


class Plan(NamedTuple):
    """Which replicas there are, and where.

    Attributes:
      physical_to_logical: `i32[layers, replicas]`, the expert of each slot; GPU g has the slots
        from `g * slots` on, `slots` being `num_replicas / num_gpus`.
      logical_to_physical: `i32[layers, experts, max(counts)]`, the slots of each expert, then -1.
      counts: `i32[layers, experts]`, replicas of each expert.
    """

    physical_to_logical: np.ndarray
    logical_to_physical: np.ndarray
    counts: np.ndarray


def rebalance_experts(
    load: np.ndarray,
    num_replicas: int,
    num_groups: int,
    num_nodes: int,
    num_gpus: int,
    *,
    method: str = "published",
    current: np.ndarray | None = None,
    max_moves: int | None = None,
) -> Plan:
    """Chooses how many replicas each expert gets, and a slot for each of them.

    An expert's load is shared equally by its replicas. Where groups divide among nodes, the
    replicas of a group stay on one node, and every node has equally many groups; else any replica
    may be anywhere.

    Args:
      load: `[layers, experts]`, tokens of each expert, or any estimate: finite, not negative.
      num_replicas: slots of a layer, a multiple of `num_gpus`, at least one to an expert.
      num_groups: groups of consecutive experts, equally large.
      num_nodes: of consecutive GPUs; divides `num_gpus`.
      num_gpus: over which the replicas are spread.
      method: `"published"`, DeepSeek's, to the last tie; `"whale"` chooses counts and places
        together, never puts two replicas of an expert on one GPU unless it has more of them than
        there are GPUs for it, and ends where no single exchange or replacement lowers a peak.
      current: `int[layers, num_replicas]`, a `physical_to_logical` in use, for `"whale"`. The new
        one is not worse, and keeps what it can of it.
      max_moves: slots of a layer that may change from `current`; all unless given.

    Returns:
      `Plan`. The published method numbers an expert's replicas as it makes them, the other by slot.

    Raises:
      ValueError: sizes do not divide, a load is negative or not finite, `method` is unknown,
        `current` is no valid plan, or `current` or `max_moves` do not go with the rest; prints what
        is wrong.

    Source: DeepSeek's EPLB; DeepSeek-V3 (arXiv 2412.19437), section 3.4. That counts and places
    belong together is FlashLB's finding (vllm-ascend, pull request 3042).
    """
    load = _checked_load(load)
    sizes = Sizes(
        experts=load.shape[1],
        replicas=num_replicas,
        groups=num_groups,
        nodes=num_nodes,
        gpus=num_gpus,
    )
    _check_request(method, current, max_moves)
    if method == "published":
        return _tables(*plan_published(load.astype(np.float32), sizes), sizes.experts)
    if current is None:
        physical_to_logical = plan_whale(load, sizes)
    else:
        current = _checked_current(current, load, sizes)
        physical_to_logical = replan_whale(load, sizes, current, max_moves)
    return _tables(physical_to_logical, _numbers(physical_to_logical), sizes.experts)


def gpu_loads(load: np.ndarray, physical_to_logical: np.ndarray, num_gpus: int) -> np.ndarray:
    """What each GPU carries under a plan; the largest of a layer is its peak.

    Args:
      load: `[layers, experts]`.
      physical_to_logical: `int[layers, replicas]`.
      num_gpus: divides the replicas.

    Returns:
      `f64[layers, num_gpus]`.

    Raises:
      ValueError: shapes do not fit; prints them.
    """
    load, slots = np.asarray(load, np.float64), np.asarray(physical_to_logical)
    if load.ndim != 2 or slots.ndim != 2 or len(load) != len(slots) or slots.shape[1] % num_gpus:
        raise ValueError(
            f"gpu_loads: load is {list(load.shape)}, must be [layers, experts], and "
            f"physical_to_logical {list(slots.shape)}, [layers, a multiple of num_gpus={num_gpus}]"
        )
    share = load / np.maximum(count_replicas(slots, load.shape[1]), 1)
    carried = np.take_along_axis(share, slots, axis=1)
    return carried.reshape(len(load), num_gpus, -1).sum(axis=2)


def count_replicas(physical_to_logical: np.ndarray, experts: int) -> np.ndarray:
    """Replicas of each expert, `int[layers, experts]`, of `int[layers, replicas]`."""
    layers = len(physical_to_logical)
    flat = physical_to_logical + np.arange(layers)[:, None] * experts
    return np.bincount(flat.reshape(-1), minlength=layers * experts).reshape(layers, experts)


def _numbers(physical_to_logical):
    """The number of each replica among those of its expert, in the order of slots."""
    order = np.argsort(physical_to_logical, axis=1, kind="stable")
    expert = np.take_along_axis(physical_to_logical, order, axis=1)
    position = np.broadcast_to(np.arange(expert.shape[1]), expert.shape)
    first = np.ones(expert.shape, bool)
    first[:, 1:] = expert[:, 1:] != expert[:, :-1]
    start = np.maximum.accumulate(np.where(first, position, 0), axis=1)
    number = np.empty_like(order)
    np.put_along_axis(number, order, position - start, axis=1)
    return number


def _tables(physical_to_logical, number, experts):
    counts = count_replicas(physical_to_logical, experts)
    slots = np.full((*counts.shape, counts.max()), -1, np.int32)
    layer = np.arange(len(counts))[:, None]
    slots[layer, physical_to_logical, number] = np.arange(number.shape[1], dtype=np.int32)
    return Plan(physical_to_logical.astype(np.int32), slots, counts.astype(np.int32))


def _checked_load(load):
    load = np.asarray(load)
    if load.ndim != 2 or not load.size or load.dtype.kind not in "iuf":
        raise ValueError(
            f"load is {load.dtype}{list(load.shape)}, must be numbers [layers, experts]"
        )
    load = load.astype(np.float64)
    wrong = ~(np.isfinite(load) & (load >= 0))
    if wrong.any():
        layer, expert = np.argwhere(wrong)[0]
        raise ValueError(
            f"load[{layer}, {expert}]={load[layer, expert]} must be finite and not negative "
            f"({wrong.sum()} of {load.size} are not)"
        )
    total = load.sum(axis=1)
    if total.max() > np.finfo(np.float32).max:
        raise ValueError(f"load of layer {total.argmax()} sums to {total.max()}, beyond float32")
    return load


def _check_request(method, current, max_moves):
    if method not in METHODS:
        raise ValueError(f"method={method!r} must be one of {', '.join(METHODS)}")
    if method == "published" and current is not None:
        raise ValueError("method='published' plans anew: current= is for method='whale'")
    if max_moves is not None and current is None:
        raise ValueError(f"max_moves={max_moves} counts changes from current=, which is missing")
    if max_moves is not None and max_moves < 0:
        raise ValueError(f"max_moves={max_moves} must not be negative")


def _checked_current(current, load, sizes):
    """`current` as int64, if it is a plan for these sizes."""
    current = np.asarray(current)
    shape = (len(load), sizes.replicas)
    if current.shape != shape or current.dtype.kind not in "iu":
        raise ValueError(
            f"current is {current.dtype}{list(current.shape)}, must be integers {list(shape)}"
        )
    current = current.astype(np.int64)
    if current.min() < 0 or current.max() >= sizes.experts:
        raise ValueError(
            f"current has experts {current.min()} to {current.max()}, must be 0 to "
            f"{sizes.experts - 1}"
        )
    counts = count_replicas(current, sizes.experts)
    if not counts.all():
        layer, expert = np.argwhere(counts == 0)[0]
        raise ValueError(f"current has no replica of expert {expert} in layer {layer}")
    for layer, groups in enumerate(
        (current // sizes.group_experts).reshape(-1, sizes.nodes, sizes.node_replicas)
    ):
        of_nodes = [np.unique(g).tolist() for g in groups]
        if any(len(g) != sizes.groups // sizes.nodes for g in of_nodes):
            raise ValueError(
                f"current has in layer {layer} the groups {of_nodes} on its nodes, must be "
                f"{sizes.groups // sizes.nodes} on each and each on one"
            )
    return current
