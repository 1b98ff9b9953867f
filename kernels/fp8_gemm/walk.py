"""Which tiles a CTA works on, and when: computed in the kernel, by its loading warp.

Where groups of rows lie is known on the device alone. XLA could turn their sizes into a table of
items, but takes two or three kernels for it, some 4 us in front of matmuls that take 60. The loader
does it while it waits, and leaves each item in SMEM for the warpgroups that multiply.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.fp8_gemm.tuning import WARPGROUP_ROWS, Tuning
from whalejax.kernels.groups import ALIGNMENT, aligned
from whalejax.kernels.mosaic import place

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
COUNT = FIELDS  # where in SMEM, behind the first slot's item, the number of items stands


class Groups(NamedTuple):
    """In SMEM, `i32[3, groups + 1]`: of each group its size and where it starts.

    Attributes:
      ref: sizes; starts in a list of whole tiles; starts in memory. And where the last one ends.
      count: how many there are.
    """

    ref: Any
    count: int


SIZE, START, PACKED = range(3)


def walk(p: Any, t: Tuning, refs: Any) -> tuple[jax.Array, Any]:
    """How many items a CTA has, and the function that computes its i-th.

    Args:
      p: `hopper_kernel.Problem`.
      t: its tuning.
      refs: `hopper_kernel.Refs`; where there are groups, `refs.GROUPS` is filled here.
    """
    down, across = t.group
    groups, rows = None, -(-p.m // (t.tile_m * down))
    if p.layout != "dense":
        groups = Groups(refs.GROUPS, p.groups)
        rows = lax.div(fill(groups, refs.sizes, p, t), t.tile_m * down)
    columns = -(-p.n // (t.tile_n * across))
    cluster, clusters = lax.axis_index("cluster"), lax.axis_size("cluster")
    count = jnp.maximum(rows * columns - cluster + clusters - 1, 0) // clusters

    def item(i):
        row, column = place(cluster + i * clusters, rows, columns, t.width, t.bands)
        if t.cluster > 1:
            peer = lax.axis_index("peer")
            row = row * down + peer if down > 1 else row
            column = column * across + peer if across > 1 else column
        if groups is None:
            return Item(row * (t.tile_m // WARPGROUP_ROWS), column, 0, 0)
        first, group, filled = locate(groups, row * t.tile_m, p.layout)
        return Item(lax.div(first, WARPGROUP_ROWS), column, group, filled)

    return count, item


def height(p: Any, t: Tuning) -> int:
    """Rows that a group fills up with its tiles, at least: those of a cluster's tiles."""
    return max(t.tile_m, ALIGNMENT) if p.layout == "contiguous" else t.tile_m * t.group[0]


def fill(groups: Groups, sizes: Any, p: Any, t: Tuning) -> jax.Array:
    """Fills `groups` from sizes in GMEM; returns the rows of all tiles."""
    tall = height(p, t)

    def several(chunk, ends):
        loaded = [sizes[jnp.minimum(chunk * AT_ONCE + i, groups.count - 1)] for i in range(AT_ONCE)]
        end, packed = ends
        for i, size in enumerate(loaded):
            g = jnp.minimum(chunk * AT_ONCE + i, groups.count)
            size = jnp.where(g < groups.count, size, 0)
            groups.ref[SIZE, g] = size
            groups.ref[START, g] = end
            groups.ref[PACKED, g] = packed
            end, packed = end + aligned(size, tall), packed + aligned(size, ALIGNMENT)
        return end, packed

    zero = jnp.int32(0)
    end, packed = lax.fori_loop(0, -(-groups.count // AT_ONCE), several, (zero, zero))
    groups.ref[START, groups.count], groups.ref[PACKED, groups.count] = end, packed
    if p.layout == "masked":
        return end
    return end + aligned(p.m - packed, tall)  # what lies behind the last group is tiles too


def locate(groups: Groups, position: jax.Array, layout: str) -> tuple:
    """First row, group and rows that count of the tile at `position` in the list of tiles.

    Rows count from the group's own first one where it has an array of its own, "masked".
    """
    group = jnp.int32(0)  # the last that starts no later
    for bit in reversed(range((groups.count - 1).bit_length())):
        further = group + (1 << bit)
        clipped = jnp.minimum(further, groups.count - 1)
        starts = (further < groups.count) & (groups.ref[START, clipped] <= position)
        group = jnp.where(starts, further, group)
    inside = position - groups.ref[START, group]
    filled = groups.ref[SIZE, group] - inside
    if layout == "masked":
        return inside, group, filled
    beyond = position - groups.ref[START, groups.count]
    behind = beyond >= 0
    first = jnp.where(
        behind, groups.ref[PACKED, groups.count] + beyond, groups.ref[PACKED, group] + inside
    )
    return first, group, jnp.where(behind, 0, filled)
