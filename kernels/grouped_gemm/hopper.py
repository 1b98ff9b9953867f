"""Grouped FP8 matmuls on Hopper: the dense kernels, on items that know their group.

Which tiles there are depends on sizes that only the device knows: XLA turns them into the kernel's
table of items. Shapes are static, so there is always room for the worst case; tiles without rows
come last or are left out.
"""

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels import mosaic
from whalejax.kernels.backend import mosaic_unusable, no_gpu
from whalejax.kernels.fp8_gemm.hopper import matmul, wgrad, with_group_axis
from whalejax.kernels.fp8_gemm.tuning import BLOCK_K, Tuning, WgradTuning, pick
from whalejax.kernels.groups import (
    ALIGNMENT,
    aligned,
    exclusive_cumsum,
    locate,
    total,
)
from whalejax.kernels.quantization import QuantizedArray


def unusable() -> str | None:
    """Says why the kernels cannot be used on this machine, None if they can."""
    return mosaic_unusable() or no_gpu()


def why_not(op: str, arrays: tuple, *static) -> str | None:
    """Says why the kernel of `op` cannot run these arguments, None if it can."""
    return mosaic_unusable()


def fp8_grouped_matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    group_sizes: jax.Array,
    out_dtype: jnp.dtype,
    tuning: Tuning | None = None,
) -> jax.Array:
    """`x[rows of g] @ w[g].T`; see `grouped_gemm.fp8.fp8_grouped_matmul`."""
    (m, k), n = x.shape, w.shape[1]
    t = tuned(tuning, m, n, k, out_dtype, tallest=ALIGNMENT)
    num_tiles = m // t.tile_m
    items = mosaic.deal(
        num_tiles,
        -(-n // t.tile_n),
        max_rows=num_tiles,
        width=t.width,
        ctas=mosaic.num_sms() // t.cluster * t.cluster,
        group=t.group,
    )
    first = items.row * t.tile_m
    group, start = locate(group_sizes, first, ALIGNMENT)
    filled = jnp.clip(group_sizes[group] + start - first, 0, t.tile_m)
    table = mosaic.table(items, items.row, items.column, group, filled)
    return matmul(with_group_axis(x), w, table, out_dtype, t, masked=True)[0]


def fp8_masked_matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    counts: jax.Array,
    out_dtype: jnp.dtype,
    tuning: Tuning | None = None,
) -> jax.Array:
    """`x[g, :counts[g]] @ w[g].T`; see `grouped_gemm.fp8.fp8_masked_matmul`."""
    (groups, max_m, k), n = x.shape, w.shape[1]
    # how many rows there are is known on the device alone: as if they filled its SMs
    t = tuned(tuning, max(max_m, 128), n, k, out_dtype, tallest=2 * ALIGNMENT)
    most = -(-max_m // t.tile_m)  # tiles of rows of a group
    items = mosaic.deal(
        lax.div(total(counts, t.tile_m), t.tile_m),
        -(-n // t.tile_n),
        max_rows=groups * most,
        width=t.width,
        ctas=mosaic.num_sms() // t.cluster * t.cluster,
        group=t.group,
    )
    # as if each group's tiles followed on those of the group before it
    group, start = locate(counts, items.row * t.tile_m, t.tile_m)
    row = items.row - lax.div(start, t.tile_m)
    filled = jnp.clip(counts[group] - row * t.tile_m, 0, t.tile_m)
    table = mosaic.table(items, row, items.column, group, filled)
    return matmul(x, w, table, out_dtype, t, masked=True)


def tuned(
    tuning: Tuning | None, m: int, n: int, k: int, out_dtype: jnp.dtype, *, tallest: int
) -> Tuning:
    """The tuning that was given, if it suits groups, or the cost model's; measured are dense ones.

    Raises:
      ValueError: the tiles of a cluster, or a tile of more than `tallest` rows, would reach into
        another group.
    """
    itemsize = jnp.dtype(out_dtype).itemsize
    t = tuning or pick(m, n, k, out_itemsize=itemsize, ctas=mosaic.num_sms())
    if t.tile_m > tallest or t.group[0] > 1:
        raise ValueError(
            f"tile_m={t.tile_m}, cluster={t.cluster} and share={t.share!r}: tiles of a cluster "
            f"must lie in one group and have at most {tallest} rows"
        )
    return t


def fp8_grouped_matmul_wgrad(
    x_t: QuantizedArray,
    dy_t: QuantizedArray,
    group_sizes: jax.Array,
    tuning: WgradTuning | None = None,
) -> jax.Array:
    """The weight gradient of each group; see `grouped_gemm.fp8.fp8_grouped_matmul_wgrad`."""
    t = tuning or WgradTuning()
    n, k, groups = dy_t.shape[0], x_t.shape[0], group_sizes.shape[0]
    rows, columns = -(-n // t.tile_m), -(-k // t.tile_n)
    # a group's tiles stand together: all of them read the same tokens
    items = mosaic.deal(
        groups * rows,
        columns,
        max_rows=groups * rows,
        width=t.width,
        ctas=mosaic.num_sms(),
        group=(1, 1),
    )
    group = items.row // rows
    blocks = aligned(group_sizes, ALIGNMENT) // BLOCK_K
    first = exclusive_cumsum(blocks)[group]
    table = mosaic.table(items, items.row % rows, items.column, group, first, blocks[group])
    return wgrad(x_t, dy_t, None, groups, table, t)
