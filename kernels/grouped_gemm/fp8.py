"""Front doors of the grouped FP8 matmuls: check sizes, choose a backend, call it."""

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import run
from whalejax.kernels.fp8_gemm.api import (
    ACTIVATION_TILE,
    WEIGHT_TILE,
    check_operand,
    check_product,
    check_wgrad,
)
from whalejax.kernels.groups import ALIGNMENT
from whalejax.kernels.quantization import QuantizedArray

BACKENDS = {
    "mosaic_gpu": "whalejax.kernels.grouped_gemm.hopper",
    "xla": "whalejax.kernels.grouped_gemm.fp8_reference",
}


def fp8_grouped_matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    group_sizes: jax.Array,
    *,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies the FP8 rows of each group by the FP8 weight of that group.

    Group g's rows start at the sum of `ceil(size / 128) * 128` over the groups before it:
    DeepGEMM's contiguous layout. Tiles of padding alone are not multiplied.

    Args:
      x: `e4m3[M, K]` with tile `(1, 128)`, M a multiple of 128, K of 16. Padding rows may hold
        anything, NaN included.
      w: `e4m3[G, N, K]` with tile `(128, 128)`; N a multiple of 8.
      group_sizes: `i32[G]`, rows of each group without padding; their aligned sum is at most M.
      out_dtype: `bfloat16` or `float32`.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      `out_dtype[M, N]`; padding rows are zero.

    Raises:
      ValueError: shapes, dtypes or tiles do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    op = "fp8_grouped_matmul"
    check_operand(op, "x", x, ACTIVATION_TILE, ndim=2)
    check_operand(op, "w", w, WEIGHT_TILE, ndim=3)
    check_product(op, x, w, out_dtype)
    _check_sizes(op, "group_sizes", group_sizes, w.shape[0])
    _check_aligned(op, x.shape[0])
    return run(op, BACKENDS, implementation, (x, w, group_sizes), jnp.dtype(out_dtype))


def fp8_masked_matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    counts: jax.Array,
    *,
    expected_rows: int | None = None,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies the first `counts[g]` FP8 rows of each group by the FP8 weight of that group.

    The layout of decode: shapes are fixed, counts live on the device, and the cost follows them.

    Args:
      x: `e4m3[G, max_m, K]` with tile `(1, 128)`, K a multiple of 16. Rows past a count may hold
        anything, NaN included.
      w: `e4m3[G, N, K]` with tile `(128, 128)`; N a multiple of 8.
      counts: `i32[G]`, rows of each group, at most max_m.
      expected_rows: about how many rows a group has, by which tiles are chosen: results do not
        depend on it. By default max_m.
      out_dtype: `bfloat16` or `float32`.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      `out_dtype[G, max_m, N]`. Rows past a count are zero up to the next multiple of 64 and may be
      anything beyond it, since writing them all would cost more than the product.

    Raises:
      ValueError: shapes, dtypes or tiles do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    op = "fp8_masked_matmul"
    check_operand(op, "x", x, ACTIVATION_TILE, ndim=3)
    check_operand(op, "w", w, WEIGHT_TILE, ndim=3)
    check_product(op, x, w, out_dtype)
    if x.shape[0] != w.shape[0]:
        raise ValueError(
            f"{op}: G={x.shape[0]} of x and G={w.shape[0]} of w differ (x.shape={x.shape}, "
            f"w.shape={w.shape})"
        )
    _check_sizes(op, "counts", counts, w.shape[0])
    if expected_rows is not None and not 1 <= expected_rows <= x.shape[1]:
        raise ValueError(f"{op}: expected_rows={expected_rows} must be 1 to max_m={x.shape[1]}")
    static = jnp.dtype(out_dtype), expected_rows
    return run(op, BACKENDS, implementation, (x, w, counts), *static)


def fp8_grouped_matmul_wgrad(
    x_t: QuantizedArray,
    dy_t: QuantizedArray,
    group_sizes: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """The weight gradient of every group, of FP8 operands that are scaled along the tokens.

    Args:
      x_t: `e4m3[K, M]` with tile `(1, 128)`, M a multiple of 128, K of 8: from
        `quantize_transposed(x, group_sizes=group_sizes)`, which makes padding tokens zero.
      dy_t: `e4m3[N, M]` alike; any N.
      group_sizes: `i32[G]`, tokens of each group without padding.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      `f32[G, N, K]`; zero where a group is empty.

    Raises:
      ValueError: shapes, dtypes or tiles do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    op = "fp8_grouped_matmul_wgrad"
    check_operand(op, "x_t", x_t, ACTIVATION_TILE, ndim=2)
    check_operand(op, "dy_t", dy_t, ACTIVATION_TILE, ndim=2)
    check_wgrad(op, x_t, dy_t)
    _check_sizes(op, "group_sizes", group_sizes, None)
    _check_aligned(op, x_t.shape[1])
    return run(op, BACKENDS, implementation, (x_t, dy_t, group_sizes))


def _check_sizes(op, name, sizes, num_groups):
    wanted = "G" if num_groups is None else num_groups
    fits = sizes.ndim == 1 and sizes.shape[0] and num_groups in (None, sizes.shape[0])
    if not fits or sizes.dtype != jnp.int32:
        raise ValueError(
            f"{op}: {name} is {sizes.dtype}{list(sizes.shape)}, must be int32[{wanted}]"
        )


def _check_aligned(op, m):
    if m % ALIGNMENT:
        raise ValueError(f"{op}: M={m} must be a multiple of {ALIGNMENT}, on which groups start")
