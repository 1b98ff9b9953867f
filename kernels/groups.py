"""Where groups of rows lie: group g starts at the sum of all sizes before it, each rounded up.

This is DeepGEMM's contiguous layout: a tile of `alignment` rows belongs to one group, and the rows
between a group's last and the next multiple of `alignment` are padding.
"""

import jax
import jax.numpy as jnp

ALIGNMENT = 128  # rows; what the FP8 kernels need
FEW_GROUPS = 64  # at most, for which a search is written out


def aligned(sizes: jax.Array, alignment: int) -> jax.Array:
    """Sizes rounded up to multiples of `alignment`."""
    if alignment & (alignment - 1) == 0:
        return (sizes + alignment - 1) & -alignment  # XLA would divide in a kernel of its own
    return (sizes + alignment - 1) // alignment * alignment


def exclusive_cumsum(sizes: jax.Array, axis: int = 0) -> jax.Array:
    """Sum of all sizes before each along an axis."""
    return jnp.cumsum(sizes, axis=axis, dtype=sizes.dtype) - sizes


def locate(group_sizes: jax.Array, rows: jax.Array, alignment: int) -> tuple[jax.Array, jax.Array]:
    """The group in which each of `rows` lies, with its padding, and where that group starts.

    Rows past the end count as the last group's. For few groups the search is written out: on a GPU
    XLA makes it part of the kernel that uses it, where sums and searches are kernels of their own.
    """
    last = group_sizes.shape[0] - 1
    if last >= FEW_GROUPS:
        starts = exclusive_cumsum(aligned(group_sizes, alignment))
        group = jnp.searchsorted(starts[1:], rows, side="right", method="scan_unrolled").astype(
            jnp.int32
        )
        return group, starts[group]
    group, start, end = jnp.zeros_like(rows), jnp.zeros_like(rows), jnp.zeros((), rows.dtype)
    for g in range(last):
        size = aligned(group_sizes[g], alignment)
        end += size
        behind = rows >= end
        group += behind.astype(group.dtype)
        start += jnp.where(behind, size, 0)
    return group.astype(jnp.int32), start


def rows_left(group_sizes: jax.Array, rows: jax.Array, alignment: int) -> jax.Array:
    """How many real rows its group has from each of `rows` on; none or fewer in padding."""
    group, start = locate(group_sizes, rows, alignment)
    return group_sizes[group] + start - rows


def group_of_tiles(group_sizes: jax.Array, num_tiles: int, alignment: int) -> jax.Array:
    """The group whose rows fill each tile of `alignment` rows; the last one past the end."""
    return locate(group_sizes, _starts(num_tiles, alignment), alignment)[0]


def rows_of_tiles(group_sizes: jax.Array, num_tiles: int, alignment: int) -> jax.Array:
    """`i32[num_tiles]`: how many rows of each tile are real, from its first; 0 past the end."""
    left = rows_left(group_sizes, _starts(num_tiles, alignment), alignment)
    return jnp.clip(left, 0, alignment).astype(jnp.int32)


def real_rows(group_sizes: jax.Array, rows: int, alignment: int) -> jax.Array:
    """`bool[rows]`: the row belongs to a group and is not padding."""
    filled = rows_of_tiles(group_sizes, rows // alignment, alignment)
    offset = jnp.arange(alignment, dtype=jnp.int32)
    return (offset[None] < filled[:, None]).reshape(rows)


def _starts(num_tiles, alignment):
    return jnp.arange(num_tiles, dtype=jnp.int32) * alignment
