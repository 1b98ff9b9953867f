"""Which tiles a CTA works on, and when: computed in the kernel, by its loading warp.

Where groups of rows lie is known on the device alone. XLA could turn their sizes into a table of
items, but takes two or three kernels for it, some 4 us in front of matmuls that take 60. The loader
does it while it waits, and leaves each item in SMEM for the warpgroups that multiply.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl

from whalejax.kernels.fp8_gemm.tuning import WALK_WORDS, WARPGROUP_ROWS, Tuning
from whalejax.kernels.groups import ALIGNMENT, aligned
from whalejax.kernels.mosaic import place, turns

AT_ONCE = 8  # sizes of groups whose loads are under way together


class Item(NamedTuple):
    """A tile.

    Attributes:
      row: its first row / 64.
      column: tile of columns.
      group: of x, w or both.
      filled: rows of its group that count from its first row on; more than it has, or none.
    """

    row: Any
    column: Any
    group: Any
    filled: Any


FIELDS = len(Item._fields)
COUNT = WALK_WORDS - 1  # where in SMEM, in the first slot's item, the number of items stands
# In SMEM, of each group and of what lies behind the last: its size, and where it starts in the list
# of items and in memory.
SIZE, START, PACKED = range(3)
NONE_COUNTS = -(2**30)  # rows that count where no group is


def walk(p: Any, t: Tuning, refs: Any) -> tuple[jax.Array, Any]:
    """How many items a CTA has, and the function that computes its i-th.

    The function returns an `Item` and whether the cluster's tiles lie side by side though the
    tuning stacks them, see `grouped_walk`.

    Args:
      p: `hopper_kernel.Problem`.
      t: its tuning.
      refs: `hopper_kernel.Refs`; where there are groups, their table is filled here.
    """
    if p.layout != "dense":
        return grouped_walk(p, t, refs)
    down, across = t.group
    rows, columns = -(-p.m // (t.tile_m * down)), -(-p.n // (t.tile_n * across))
    cluster, clusters = lax.axis_index("cluster"), lax.axis_size("cluster")

    def item(i):
        row, column = place(cluster + i * clusters, rows, columns, t.width, t.bands)
        row, column = of_peer(row, down), of_peer(column, across)
        return Item(row * (t.tile_m // WARPGROUP_ROWS), column, 0, 0), False

    return turns(rows * columns, cluster, clusters), item


def grouped_walk(p: Any, t: Tuning, refs: Any) -> tuple[jax.Array, Any]:
    """The walk through groups, one after another so that the L2 holds their weights; see `walk`.

    Where a cluster's tiles are stacked, to share w, a group's last row of tiles may be left over.
    Two of these tiles that lie side by side are a cluster's item, then, and share x.
    """
    down, across = t.group
    columns = -(-p.n // (t.tile_n * across))
    cluster, clusters = lax.axis_index("cluster"), lax.axis_size("cluster")

    def cut(size):
        """Rows of a cluster's tiles in a group, and rows of single ones: none or one."""
        tall = max(t.tile_m, ALIGNMENT) if p.layout == "contiguous" else t.tile_m
        tiles = lax.div(aligned(size, tall), t.tile_m)
        return lax.div(tiles, down), lax.rem(tiles, down)

    def num_items(size):
        stacked, single = cut(size)
        return stacked * columns + single * -(-columns // down)

    table = table_of_groups(p, t, refs)
    count, packed = fill(table, p.groups, refs.sizes, num_items)
    if p.layout == "contiguous":  # what lies behind the last group is tiles too
        table[p.groups, SIZE] = p.m - packed
        count += num_items(p.m - packed)

    def item(i):
        group, number = locate(p, table, cluster + i * clusters)
        stacked, _ = cut(table[group, SIZE])
        row, column = place(number, jnp.maximum(stacked, 1), columns, t.width, t.bands)
        row, column, beside = of_peer(row, down), of_peer(column, across), False
        if down > 1:
            beside = number >= stacked * columns
            row = jnp.where(beside, stacked * down, row)
            column = jnp.where(beside, of_peer(number - stacked * columns, down), column)
        first, group, filled = describe(p, table, group, row * t.tile_m)
        return Item(lax.div(first, WARPGROUP_ROWS), column, group, filled), beside

    return turns(count, cluster, clusters), item


def of_peer(number: jax.Array, peers: int) -> jax.Array:
    """Of the tiles of a cluster's `number`-th row or column, this CTA's."""
    return number * peers + lax.axis_index("peer") if peers > 1 else number


def table_of_groups(p: Any, t: Any, refs: Any) -> Any:
    """The part of `refs.WALK` behind the slots' items."""
    return refs.WALK.at[pl.ds(t.stages, p.groups + 1)]


def fill(
    table: Any, count: int, sizes: Any, num_items: Callable[[jax.Array], Any]
) -> tuple[jax.Array, jax.Array]:
    """Fills the table of groups from their sizes in GMEM.

    Args:
      table: SMEM, `i32[count + 1, WALK_WORDS]`.
      count: of groups.
      sizes: GMEM, `i32[count]`.
      num_items: how many items a group of a size has.

    Returns:
      Where the last group ends, in the list of items and in memory.
    """

    def several(chunk, ends):
        numbers = [chunk * AT_ONCE + i for i in range(AT_ONCE)]
        loaded = [sizes[jnp.minimum(g, count - 1)] for g in numbers]
        for g, size in zip(numbers, loaded, strict=True):
            size, g = jnp.where(g < count, size, 0), jnp.minimum(g, count)
            table[g, SIZE], (table[g, START], table[g, PACKED]) = size, ends
            ends = ends[0] + num_items(size), ends[1] + aligned(size, ALIGNMENT)
        return ends

    nowhere = jnp.int32(0), jnp.int32(0)
    ends = lax.fori_loop(0, -(-count // AT_ONCE), several, nowhere)
    table[count, START], table[count, PACKED] = ends
    return ends


def locate(p: Any, table: Any, number: jax.Array) -> tuple[jax.Array, jax.Array]:
    """The group of an item, the last that starts no later, and the item's number in it."""
    group, entries = jnp.int32(0), p.groups + (p.layout == "contiguous")
    for bit in reversed(range((entries - 1).bit_length())):
        further = group + (1 << bit)
        start = table[jnp.minimum(further, entries - 1), START]
        group = jnp.where((further < entries) & (start <= number), further, group)
    return group, number - table[group, START]


def describe(p: Any, table: Any, group: jax.Array, inside: jax.Array) -> tuple:
    """First row, group and rows that count of the tile whose first row is a group's `inside`-th.

    Rows count from the group's own first one where it has an array of its own, "masked".
    """
    filled = table[group, SIZE] - inside
    if p.layout == "masked":
        return inside, group, filled
    filled = jnp.where(group < p.groups, filled, NONE_COUNTS)
    return table[group, PACKED] + inside, jnp.minimum(group, p.groups - 1), filled
