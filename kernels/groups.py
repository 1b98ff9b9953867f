"""Where groups of rows lie: group g starts at the sum of all sizes before it, each rounded up.

This is DeepGEMM's contiguous layout: a tile of `alignment` rows belongs to one group, and the rows
between a group's last and the next multiple of `alignment` are padding.
"""

import jax
import jax.numpy as jnp

ALIGNMENT = 128  # rows; what the FP8 kernels need


def aligned(sizes: jax.Array, alignment: int) -> jax.Array:
    """Sizes rounded up to multiples of `alignment`."""
    return (sizes + alignment - 1) // alignment * alignment


def exclusive_cumsum(sizes: jax.Array) -> jax.Array:
    """Sum of all sizes before each."""
    return jnp.cumsum(sizes, dtype=sizes.dtype) - sizes


def group_of_rows(group_sizes: jax.Array, rows: jax.Array, alignment: int) -> jax.Array:
    """The group in which each of `rows` lies, with its padding; the last one past the end."""
    ends = jnp.cumsum(aligned(group_sizes, alignment), dtype=group_sizes.dtype)
    # unrolled, a search is one fusion with what uses it: on a GPU, no kernel of its own
    group = jnp.searchsorted(ends, rows, side="right", method="scan_unrolled")
    return jnp.minimum(group, group_sizes.shape[0] - 1).astype(jnp.int32)


def rows_left(group_sizes: jax.Array, rows: jax.Array, alignment: int) -> jax.Array:
    """How many real rows its group has from each of `rows` on; none or fewer in padding."""
    ends = exclusive_cumsum(aligned(group_sizes, alignment)) + group_sizes
    return ends[group_of_rows(group_sizes, rows, alignment)] - rows


def group_of_tiles(group_sizes: jax.Array, num_tiles: int, alignment: int) -> jax.Array:
    """The group whose rows fill each tile of `alignment` rows; the last one past the end."""
    return group_of_rows(group_sizes, _starts(num_tiles, alignment), alignment)


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
