"""Which tiles a CTA works on, and when: computed in the kernel, by its loading warp.

Where groups of rows lie is known on the device alone. XLA could turn their sizes into a table of
items, but takes two or three kernels for it, some 4 us in front of matmuls that take 60. The loader
does it while it waits, and leaves each item in SMEM for the warpgroups that multiply.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.fp8_gemm.tuning import GROUP_FIELDS, ITEM_WORDS, WARPGROUP_ROWS, Tuning
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
COUNT = ITEM_WORDS - 1  # where in SMEM, in the first slot's item, the number of items stands
# In SMEM, of each group and of what lies behind the last: its size, where it starts in a list of
# whole tiles, and where in memory.
SIZE, START, PACKED = range(GROUP_FIELDS)


def walk(p: Any, t: Tuning, refs: Any) -> tuple[jax.Array, Any]:
    """How many items a CTA has, and the function that computes its i-th.

    Args:
      p: `hopper_kernel.Problem`.
      t: its tuning.
      refs: `hopper_kernel.Refs`; where there are groups, `refs.GROUPS` is filled here.
    """
    down, across = t.group
    rows = -(-p.m // (t.tile_m * down))
    if p.layout != "dense":
        tall = height(p, t)
        end, packed = fill(refs.GROUPS, p.groups, refs.sizes, tall)
        if p.layout == "contiguous":
            end += aligned(p.m - packed, tall)  # what lies behind the last group is tiles too
        rows = lax.div(end, t.tile_m * down)
    columns = -(-p.n // (t.tile_n * across))
    cluster, clusters = lax.axis_index("cluster"), lax.axis_size("cluster")

    def item(i):
        row, column = place(cluster + i * clusters, rows, columns, t.width, t.bands)
        if t.cluster > 1:
            peer = lax.axis_index("peer")
            row = row * down + peer if down > 1 else row
            column = column * across + peer if across > 1 else column
        if p.layout == "dense":
            return Item(row * (t.tile_m // WARPGROUP_ROWS), column, 0, 0)
        first, group, filled = locate(p, refs.GROUPS, row * t.tile_m)
        return Item(lax.div(first, WARPGROUP_ROWS), column, group, filled)

    return turns(rows * columns, cluster, clusters), item


def height(p: Any, t: Tuning) -> int:
    """Rows that a group's tiles fill up: each group begins with a tile, or a cluster's tiles."""
    return max(t.tile_m, ALIGNMENT) if p.layout == "contiguous" else t.tile_m * t.group[0]


def fill(table: Any, count: int, sizes: Any, tall: int) -> tuple[jax.Array, jax.Array]:
    """Fills the table of groups from their sizes in GMEM.

    Args:
      table: SMEM, `i32[GROUP_FIELDS, count + 1]`.
      count: of groups.
      sizes: GMEM, `i32[count]`.
      tall: rows that a group's tiles fill up.

    Returns:
      Where the last group ends, in tiles and in memory.
    """

    def several(chunk, ends):
        numbers = [chunk * AT_ONCE + i for i in range(AT_ONCE)]
        loaded = [sizes[jnp.minimum(g, count - 1)] for g in numbers]
        for g, size in zip(numbers, loaded, strict=True):
            size, g = jnp.where(g < count, size, 0), jnp.minimum(g, count)
            table[SIZE, g], (table[START, g], table[PACKED, g]) = size, ends
            ends = ends[0] + aligned(size, tall), ends[1] + aligned(size, ALIGNMENT)
        return ends

    nowhere = jnp.int32(0), jnp.int32(0)
    ends = lax.fori_loop(0, -(-count // AT_ONCE), several, nowhere)
    table[START, count], table[PACKED, count] = ends
    return ends


def locate(p: Any, table: Any, position: jax.Array) -> tuple:
    """First row, group and rows that count of the tile at `position` in the list of tiles.

    Rows count from the group's own first one where it has an array of its own, "masked".
    """
    group = jnp.int32(0)  # the last that starts no later
    for bit in reversed(range((p.groups - 1).bit_length())):
        further = group + (1 << bit)
        start = table[START, jnp.minimum(further, p.groups - 1)]
        group = jnp.where((further < p.groups) & (start <= position), further, group)
    inside = position - table[START, group]
    filled = table[SIZE, group] - inside
    if p.layout == "masked":
        return inside, group, filled
    beyond = position - table[START, p.groups]
    first = jnp.where(beyond < 0, table[PACKED, group] + inside, table[PACKED, p.groups] + beyond)
    return first, group, jnp.where(beyond < 0, filled, 0)
