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


def exclusive_cumsum(sizes: jax.Array) -> jax.Array:
    """Sum of all sizes before each."""
    return jnp.cumsum(sizes, dtype=sizes.dtype) - sizes


def locate(group_sizes: jax.Array, rows: jax.Array, alignment: int) -> tuple[jax.Array, jax.Array]:
    """The group in which each of `rows` lies, with its padding, and where that group starts.

    Rows past the end count as the last group's.
    """
    group, (start,) = locate_in(group_sizes, rows, alignment)
    return group, start


def locate_in(
    group_sizes: jax.Array, rows: jax.Array, *alignments: int
) -> tuple[jax.Array, list[jax.Array]]:
    """The same among groups padded to the first alignment; starts are given for each of them.

    For few groups the search is written out: on a GPU XLA makes it part of the kernel that uses it,
    where sums and searches are kernels of their own.
    """
    last = group_sizes.shape[0] - 1
    if last >= FEW_GROUPS:
        starts = [exclusive_cumsum(aligned(group_sizes, alignment)) for alignment in alignments]
        group = jnp.searchsorted(starts[0][1:], rows, side="right", method="scan_unrolled").astype(
            jnp.int32
        )
        return group, [start[group] for start in starts]
    group, end = jnp.zeros_like(rows), jnp.zeros((), rows.dtype)
    starts = [jnp.zeros_like(rows) for _ in alignments]
    for g in range(last):
        sizes = [aligned(group_sizes[g], alignment) for alignment in alignments]
        end += sizes[0]
        behind = rows >= end
        group += behind.astype(group.dtype)
        starts = [s + jnp.where(behind, size, 0) for s, size in zip(starts, sizes, strict=True)]
    return group.astype(jnp.int32), starts


def rows_left(group_sizes: jax.Array, rows: jax.Array, alignment: int) -> jax.Array:
    """How many real rows its group has from each of `rows` on; none or fewer in padding."""
    group, start = locate(group_sizes, rows, alignment)
    return group_sizes[group] + start - rows


def total(group_sizes: jax.Array, alignment: int) -> jax.Array:
    """Rows of all groups with their padding; written out for few groups, as in `locate`."""
    if group_sizes.shape[0] > FEW_GROUPS:
        return jnp.sum(aligned(group_sizes, alignment))
    return sum(aligned(group_sizes[g], alignment) for g in range(group_sizes.shape[0]))


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
