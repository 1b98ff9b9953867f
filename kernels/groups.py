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


def group_of_tiles(group_sizes: jax.Array, num_tiles: int, alignment: int) -> jax.Array:
    """The group whose rows fill each tile of `alignment` rows; the last one past the end."""
    ends = jnp.cumsum(aligned(group_sizes, alignment), dtype=group_sizes.dtype)
    starts = jnp.arange(num_tiles, dtype=ends.dtype) * alignment
    tile_group = jnp.sum(starts[:, None] >= ends[None], axis=1)
    return jnp.minimum(tile_group, group_sizes.shape[0] - 1).astype(jnp.int32)


def rows_of_tiles(group_sizes: jax.Array, num_tiles: int, alignment: int) -> jax.Array:
    """`i32[num_tiles]`: how many rows of each tile are real, from its first; 0 past the end."""
    group = group_of_tiles(group_sizes, num_tiles, alignment)
    ends = exclusive_cumsum(aligned(group_sizes, alignment)) + group_sizes
    starts = jnp.arange(num_tiles, dtype=ends.dtype) * alignment
    return jnp.clip(ends[group] - starts, 0, alignment).astype(jnp.int32)


def real_rows(group_sizes: jax.Array, rows: int, alignment: int) -> jax.Array:
    """`bool[rows]`: the row belongs to a group and is not padding."""
    filled = rows_of_tiles(group_sizes, rows // alignment, alignment)
    offset = jnp.arange(alignment, dtype=jnp.int32)
    return (offset[None] < filled[:, None]).reshape(rows)
