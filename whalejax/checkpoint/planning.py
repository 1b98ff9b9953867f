"""What is to be written of a tree, and which process writes which extent."""

import dataclasses
from collections.abc import Iterable
from typing import Any, NamedTuple

import jax
import numpy as np

from whalejax.checkpoint.layout import ArrayLayout, Index, choose_chunk
from whalejax.checkpoint.tree import Leaves, is_key, take_apart

EXTENT_BYTES = 2**24  # of 4 to 32 MiB that serve a FUSE mount best


class Extent(NamedTuple):
    """A chunk of an array: the array's name, and the chunk's place in the grid."""

    array: str
    index: Index


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a checkpoint will hold; equal in all processes but for the arrays' data.

    Attributes:
      leaves: the tree, taken apart; PRNG keys as their data.
      layouts: of every array.
      writers: the process that writes each extent.
    """

    leaves: Leaves
    layouts: dict[str, ArrayLayout]
    writers: dict[Extent, int]

    def extents_of(self, process: int) -> list[Extent]:
        """What a process writes."""
        return [extent for extent, writer in self.writers.items() if writer == process]

    def without_arrays(self) -> "Plan":
        """The same plan once their bytes were copied: it keeps no device's memory."""
        return dataclasses.replace(self, leaves=self.leaves._replace(arrays={}))


def make_plan(
    tree: Any, *, num_processes: int | None = None, extent_bytes: int = EXTENT_BYTES
) -> Plan:
    """Plans to save a tree.

    Args:
      tree: of `jax.Array`s, NumPy arrays, numbers, strings. In a job of several processes what
        does not span them, such as NumPy arrays, is equal in all.
      num_processes: of the job; None for JAX's own.
      extent_bytes: about how large extents shall be.

    Raises:
      TypeError: a leaf cannot be stored.
      ValueError: two leaves get one name.
    """
    num_processes = jax.process_count() if num_processes is None else num_processes
    leaves = take_apart(tree)
    arrays, layouts, holders = {}, {}, {}
    for name, leaf in leaves.arrays.items():
        key = str(jax.random.key_impl(leaf)) if is_key(leaf) else None
        array = arrays[name] = leaf if key is None else jax.random.key_data(leaf)
        shard = shard_shape(array)
        layouts[name] = ArrayLayout(
            shape=array.shape,
            dtype=np.dtype(array.dtype).newbyteorder("<"),
            chunk=choose_chunk(array.shape, shard, array.dtype.itemsize, extent_bytes),
            key=key,
        )
        holders |= _holders(name, array, layouts[name], shard, num_processes)
    writers = balance(holders, {name: layout.extent_bytes for name, layout in layouts.items()})
    return Plan(leaves._replace(arrays=arrays), layouts, writers)


def balance(
    holders: dict[Extent, tuple[int, ...]], extent_bytes: dict[str, int]
) -> dict[Extent, int]:
    """Gives each extent to one of its holders, those with the fewest first, to the least laden.

    Args:
      holders: the processes that have each extent's data.
      extent_bytes: of each array.

    Returns:
      The writer of every extent, in the order of `holders`.
    """
    laden: dict[int, int] = {}
    writers = {}
    for extent in sorted(holders, key=lambda extent: len(holders[extent])):
        writer = min(holders[extent], key=lambda process: (laden.get(process, 0), process))
        laden[writer] = laden.get(writer, 0) + extent_bytes[extent.array]
        writers[extent] = writer
    return {extent: writers[extent] for extent in holders}


def shard_shape(array: Any) -> tuple[int, ...]:
    """The shape of each device's part of an array; the array's own if it lies on the host."""
    if isinstance(array, jax.Array):
        return array.sharding.shard_shape(array.shape)
    return array.shape


def corner(index: Iterable[slice]) -> tuple[int, ...]:
    """Where a shard begins, from the slices that JAX describes it by."""
    return tuple(part.start or 0 for part in index)


def _holders(
    name: str, array: Any, layout: ArrayLayout, shard: tuple[int, ...], num_processes: int
) -> dict[Extent, tuple[int, ...]]:
    """The processes that hold each extent of an array."""
    indices = list(layout.indices())
    if not isinstance(array, jax.Array) or (num_processes > 1 and array.is_fully_addressable):
        everyone = tuple(range(num_processes))  # each has one of its own, and they are equal
        return {Extent(name, index): everyone for index in indices}
    of_shard: dict[tuple[int, ...], set[int]] = {}
    for device, index in array.sharding.devices_indices_map(array.shape).items():
        of_shard.setdefault(corner(index), set()).add(device.process_index)
    found = {begin: tuple(sorted(processes)) for begin, processes in of_shard.items()}
    return {Extent(name, index): found[shard_corner(layout, shard, index)] for index in indices}


def shard_corner(layout: ArrayLayout, shard: tuple[int, ...], index: Index) -> tuple[int, ...]:
    """Where the shard begins that an extent is a part of."""
    return tuple(
        i * chunk // size * size for i, chunk, size in zip(index, layout.chunk, shard, strict=True)
    )
