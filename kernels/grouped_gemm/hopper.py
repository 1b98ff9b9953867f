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
from whalejax.kernels.fp8_gemm.tuning import (
    BLOCK_K,
    WARPGROUP_ROWS,
    Tuning,
    WgradTuning,
    pick,
    pick_wgrad,
)
from whalejax.kernels.groups import (
    ALIGNMENT,
    aligned,
    exclusive_cumsum,
    locate,
    locate_in,
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
    m, (groups, n, k) = x.shape[0], w.shape
    t = tuning or choose(groups, -(-m // groups), n, k, out_dtype, above=False)
    if t.group[0] > 1:
        raise ValueError(
            f"cluster={t.cluster} and share={t.share!r}: tiles that share w must lie in one group; "
            f"share='x' has no such limit"
        )
    # a group's last tile may reach into the next group: its rows there are not stored
    height = max(t.tile_m, ALIGNMENT)
    if height == ALIGNMENT:
        num_tiles = most = m // t.tile_m
    else:
        end, packed_end = total(group_sizes, height), total(group_sizes, ALIGNMENT)
        num_tiles = lax.div(end + aligned(m - packed_end, height), t.tile_m)
        # half a tile is lost to each group, and to the rows behind the last
        most = (m // ALIGNMENT + groups + 1) // (height // ALIGNMENT)
    items = deal(num_tiles, most, n, t)
    position = items.row * t.tile_m
    group, (start, packed) = locate_in(group_sizes, position, height, ALIGNMENT)
    first, filled = packed + position - start, group_sizes[group] + start - position
    if height > ALIGNMENT:
        first = jnp.where(position < end, first, packed_end + position - end)
        filled = jnp.where(position < end, filled, 0)
    table = mosaic.table(items, first // WARPGROUP_ROWS, items.column, group, filled)
    return matmul(with_group_axis(x), w, table, out_dtype, t, masked=True)[0]


def fp8_masked_matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    counts: jax.Array,
    out_dtype: jnp.dtype,
    expected_rows: int | None = None,
    tuning: Tuning | None = None,
) -> jax.Array:
    """`x[g, :counts[g]] @ w[g].T`; see `grouped_gemm.fp8.fp8_masked_matmul`."""
    (groups, max_m, k), n = x.shape, w.shape[1]
    t = tuning or choose(groups, expected_rows or max_m, n, k, out_dtype)
    height = t.tile_m * t.group[0]  # of the tiles that lie in one group
    items = deal(
        lax.div(total(counts, height), t.tile_m),
        groups * -(-max_m // height) * t.group[0],
        n,
        t,
    )
    # as if each group's tiles followed on those of the group before it
    group, start = locate(counts, items.row * t.tile_m, height)
    first = items.row * t.tile_m - start
    table = mosaic.table(items, first // WARPGROUP_ROWS, items.column, group, counts[group] - first)
    return matmul(x, w, table, out_dtype, t, masked=True)


def choose(
    groups: int, rows: int, n: int, k: int, out_dtype: jnp.dtype, *, above: bool = True
) -> Tuning:
    """The cost model's tuning for groups of so many rows; what was measured are dense matmuls."""
    return pick(
        rows,
        n,
        k,
        groups=groups,
        above=above,
        out_itemsize=jnp.dtype(out_dtype).itemsize,
        ctas=mosaic.num_sms(),
    )


def deal(rows: jax.Array | int, most: int, n: int, t: Tuning) -> mosaic.Items:
    """`mosaic.deal` of at most so many tiles of rows."""
    return mosaic.deal(
        rows,
        -(-n // t.tile_n),
        max_rows=most,
        width=t.width,
        ctas=mosaic.num_sms() // t.cluster * t.cluster,
        group=t.group,
        bands=t.bands,
    )


def fp8_grouped_matmul_wgrad(
    x_t: QuantizedArray,
    dy_t: QuantizedArray,
    group_sizes: jax.Array,
    tuning: WgradTuning | None = None,
) -> jax.Array:
    """The weight gradient of each group; see `grouped_gemm.fp8.fp8_grouped_matmul_wgrad`."""
    n, (k, m), groups = dy_t.shape[0], x_t.shape, group_sizes.shape[0]
    t = tuning or pick_wgrad(n, k, m, groups=groups, ctas=mosaic.num_sms())
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
