"""The bytes of a tree as they were when it was saved, on the host."""

import dataclasses
from functools import partial
from typing import Any

import jax
import numpy as np
from jax.sharding import SingleDeviceSharding

from whalejax.checkpoint.layout import ArrayLayout, within
from whalejax.checkpoint.planning import (
    Extent,
    Plan,
    corner,
    shard_corner,
    shard_shape,
)
from whalejax.checkpoint.threads import run_all
from whalejax.storage.memory import Arena, padded

COPY_THREADS = 8  # copy 27 GB/s on 16 cores, where 4 copy 19
COPY_BYTES = 2**22  # a turn of a thread


@dataclasses.dataclass(frozen=True)
class Snapshot:
    """The bytes of a process's extents.

    Attributes:
      extents: the buffers that each consists of, one after the other.
      nbytes: of all.
    """

    extents: dict[Extent, tuple[memoryview, ...]]
    nbytes: int


def take_snapshot(plan: Plan, process: int, arena: Arena | None) -> Snapshot:
    """The extents that a process writes; once it returns, the arrays may be donated.

    From a GPU shards go to pinned memory, of which JAX keeps what it once had: 55 GB/s from an
    H100, where pageable memory takes them at 2.

    Args:
      plan: what to save.
      process: which of the job's.
      arena: where to copy what is on the host; None to leave it there: those arrays must then live,
        unchanged, as long as the snapshot.
    """
    extents = plan.extents_of(process)
    names = dict.fromkeys(extent.array for extent in extents)
    shards = {name: _on_host(plan.leaves.arrays[name]) for name in names}  # all under way at once
    sources = {extent: _elements(plan, extent, shards[extent.array]) for extent in extents}
    layouts = {extent: plan.layouts[extent.array] for extent in extents}
    found = {}
    if arena is not None:
        shared = [e for e in extents if _is_shared(plan.leaves.arrays[e.array])]
        found = _copied({extent: sources[extent] for extent in shared}, layouts, arena)
    for extent in extents:
        if extent not in found:
            flat = np.ascontiguousarray(sources[extent], layouts[extent].dtype).reshape(-1)
            found[extent] = flat.view(np.uint8)
    whole = {extent: _filled_up(found[extent], layouts[extent]) for extent in extents}
    return Snapshot(whole, sum(source.nbytes for source in sources.values()))


def _on_host(array: Any) -> dict[tuple[int, ...], Any]:
    """An array's shards by their corners; begins to move those that are not on the host."""
    if not isinstance(array, jax.Array):
        return {(0,) * len(array.shape): array}
    shards = {corner(shard.index): shard.data for shard in array.addressable_shards}
    if _is_shared(array):
        return shards
    return {begin: jax.device_put(data, _pinned(data)) for begin, data in shards.items()}


def _pinned(data: jax.Array) -> jax.sharding.Sharding:
    """Memory of the host that a device's data goes to fastest."""
    (device,) = data.devices()
    return SingleDeviceSharding(device, memory_kind="pinned_host")


def _is_shared(array: Any) -> bool:
    """Whether the snapshot would see what the array's memory is used for next."""
    return not isinstance(array, jax.Array) or next(iter(array.devices())).platform == "cpu"


def _elements(plan: Plan, extent: Extent, shards: dict[tuple[int, ...], Any]) -> np.ndarray:
    """An extent's elements without those that fill it up, in any order of bytes and axes."""
    layout = plan.layouts[extent.array]
    shape = shard_shape(plan.leaves.arrays[extent.array])
    begin = shard_corner(layout, shape, extent.index)
    outer = tuple((b, b + size) for b, size in zip(begin, shape, strict=True))
    return np.asarray(shards[begin])[(*within(layout.box(extent.index), outer), ...)]


def _copied(
    sources: dict[Extent, np.ndarray], layouts: dict[Extent, ArrayLayout], arena: Arena
) -> dict[Extent, np.ndarray]:
    room = arena.reserve(sum(padded(source.nbytes) for source in sources.values()))
    targets, turns, start = {}, [], 0
    for extent, source in sources.items():
        targets[extent] = room[start : start + source.nbytes]
        turns += _turns(targets[extent], source, layouts[extent].dtype)
        start += padded(source.nbytes)
    run_all([partial(np.copyto, *turn) for turn in turns], COPY_THREADS, lambda _: None)
    return targets


def _turns(
    target: np.ndarray, source: np.ndarray, dtype: np.dtype
) -> list[tuple[np.ndarray, np.ndarray]]:
    """What is copied where at a time; without another copy of what lies in another order."""
    if source.dtype != dtype or not source.flags.c_contiguous:
        return [(target.view(dtype).reshape(source.shape), source)]
    flat = source.reshape(-1).view(np.uint8)
    starts = range(0, flat.nbytes, COPY_BYTES)
    return [(target[i : i + COPY_BYTES], flat[i : i + COPY_BYTES]) for i in starts]


def _filled_up(source: np.ndarray, layout: ArrayLayout) -> tuple[memoryview, ...]:
    """An extent's buffers: its bytes, and the zeros of what reaches beyond the array."""
    missing = layout.extent_bytes - source.nbytes
    zeros = (memoryview(np.zeros(missing, np.uint8)),) if missing else ()
    return (memoryview(source), *zeros)
