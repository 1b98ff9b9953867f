"""The bytes of a tree as they were when it was saved, on the host."""

import dataclasses
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from whalejax.checkpoint.layout import ArrayLayout, within
from whalejax.checkpoint.planning import (
    ALIGNMENT,
    Extent,
    Plan,
    corner,
    padded,
    shard_corner,
    shard_shape,
)

COPY_THREADS = 4  # two already saturate the memory of the machine that this was measured on
COPY_BYTES = 2**22  # a turn of a thread


class Arena:
    """Host memory that one snapshot after the other uses.

    It grows to the largest snapshot and stays: memory that was never touched costs ten times as
    much to write as memory that was.
    """

    def __init__(self):
        self._bytes = np.empty(0, np.uint8)

    @property
    def nbytes(self) -> int:
        """What it holds on to."""
        return self._bytes.nbytes

    def reserve(self, nbytes: int) -> np.ndarray:
        """`u8[nbytes]` that begins on a page; what was reserved before is no longer one's own."""
        if nbytes + ALIGNMENT > self._bytes.nbytes:
            self._bytes = np.empty(0, np.uint8)  # first give the old one back
            self._bytes = np.empty(nbytes + ALIGNMENT, np.uint8)
        start = -self._bytes.ctypes.data % ALIGNMENT
        return self._bytes[start : start + nbytes]


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
    """The extents that a process writes.

    Args:
      plan: what to save.
      process: which of the job's.
      arena: where they are copied to, so that the arrays may be donated; None to leave on the host
        what is there already: the arrays must then live, unchanged, as long as the snapshot.
    """
    extents, views = plan.extents_of(process), _Views(plan)
    for name in dict.fromkeys(extent.array for extent in extents):
        views.begin(name)
    sources = {extent: views.of(extent) for extent in extents}
    nbytes = sum(source.nbytes for source in sources.values())
    if arena is not None:
        sources = _copied(sources, arena)
    whole = {
        extent: _filled_up(source, plan.layouts[extent.array]) for extent, source in sources.items()
    }
    return Snapshot(whole, nbytes)


class _Views:
    """The bytes of extents where they lie on the host; of other devices, once they were moved."""

    def __init__(self, plan: Plan):
        self._plan = plan
        self._shards: dict[str, dict[tuple[int, ...], Any]] = {}

    def begin(self, name: str) -> None:
        """Begins to move an array's shards to the host, those of several devices at once."""
        array = self._plan.leaves.arrays[name]
        if not isinstance(array, jax.Array):
            self._shards[name] = {(0,) * len(array.shape): array}
            return
        shards = {corner(shard.index): shard.data for shard in array.addressable_shards}
        for data in shards.values():
            data.copy_to_host_async()
        self._shards[name] = shards

    def of(self, extent: Extent) -> np.ndarray:
        """`u8[n]`, n being the bytes of an extent without those that fill it up."""
        layout, shards = self._plan.layouts[extent.array], self._shards[extent.array]
        shape = shard_shape(self._plan.leaves.arrays[extent.array])
        begin = shard_corner(layout, shape, extent.index)
        outer = tuple((b, b + size) for b, size in zip(begin, shape, strict=True))
        host = np.asarray(shards[begin])[within(layout.box(extent.index), outer)]
        host = np.ascontiguousarray(host, layout.dtype)
        return host.reshape(-1).view(np.uint8)


def _copied(sources: dict[Extent, np.ndarray], arena: Arena) -> dict[Extent, np.ndarray]:
    room = arena.reserve(sum(padded(source.nbytes) for source in sources.values()))
    targets, start = {}, 0
    for extent, source in sources.items():
        targets[extent] = room[start : start + source.nbytes]
        start += padded(source.nbytes)
    turns = [
        (targets[extent][i : i + COPY_BYTES], source[i : i + COPY_BYTES])
        for extent, source in sources.items()
        for i in range(0, source.nbytes, COPY_BYTES)
    ]
    with ThreadPoolExecutor(COPY_THREADS) as threads:
        for _ in threads.map(lambda turn: np.copyto(*turn), turns):
            pass
    return targets


def _filled_up(source: np.ndarray, layout: ArrayLayout) -> tuple[memoryview, ...]:
    """An extent's buffers: its bytes, and the zeros of what reaches beyond the array."""
    missing = layout.extent_bytes - source.nbytes
    zeros = (memoryview(np.zeros(missing, np.uint8)),) if missing else ()
    return (memoryview(source), *zeros)
