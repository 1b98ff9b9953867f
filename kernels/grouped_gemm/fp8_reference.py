"""Grouped FP8 matmuls in plain XLA: the definition, on operands dequantised to float32."""

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import vary_like
from whalejax.kernels.fp8_gemm.reference import multiply
from whalejax.kernels.groups import ALIGNMENT, group_of_tiles, real_rows
from whalejax.kernels.quantization import QuantizedArray


def why_not(op: str, arrays: tuple, *static) -> str | None:
    """Runs everywhere."""
    return None


def fp8_grouped_matmul(
    x: QuantizedArray, w: QuantizedArray, group_sizes: jax.Array, out_dtype: jnp.dtype
) -> jax.Array:
    """`x[rows of g] @ w[g].T` for each group g; padding rows are zero, whatever they hold."""
    rows, k = x.shape
    tiles = x.dequantize().reshape(rows // ALIGNMENT, ALIGNMENT, k)
    group = group_of_tiles(group_sizes, rows // ALIGNMENT, ALIGNMENT)
    weights = w.dequantize()

    def step(_, tile):
        values, g = tile
        return None, multiply(values, weights[g])

    _, product = jax.lax.scan(step, None, (tiles, group))
    real = real_rows(group_sizes, rows, ALIGNMENT)[:, None]
    return jnp.where(real, product.reshape(rows, w.shape[1]), 0).astype(out_dtype)


def fp8_masked_matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    counts: jax.Array,
    out_dtype: jnp.dtype,
    expected_rows: int | None = None,
) -> jax.Array:
    """`x[g, :counts[g]] @ w[g].T` for each group g; all other rows are zero."""
    del expected_rows  # here it changes nothing
    product = jnp.einsum(
        "gmk,gnk->gmn", x.dequantize(), w.dequantize(), precision=jax.lax.Precision.HIGHEST
    )
    real = jnp.arange(x.shape[1], dtype=jnp.int32)[None] < counts[:, None]
    return jnp.where(real[..., None], product, 0).astype(out_dtype)


def fp8_grouped_matmul_wgrad(
    x_t: QuantizedArray, dy_t: QuantizedArray, group_sizes: jax.Array
) -> jax.Array:
    """`dy_t[:, tokens of g] @ x_t[:, tokens of g].T` for each group g; zero where g is empty."""
    (k, tokens), n = x_t.shape, dy_t.shape[0]
    num_tiles = tokens // ALIGNMENT
    group = group_of_tiles(group_sizes, num_tiles, ALIGNMENT)

    def blocks(q):
        return q.dequantize().reshape(q.shape[0], num_tiles, ALIGNMENT).swapaxes(0, 1)

    def step(total, tile):
        x, dy, g = tile
        return total.at[g].add(multiply(dy, x)), None

    zeros = jnp.zeros((group_sizes.shape[0], n, k), jnp.float32)
    zeros = vary_like(zeros, (x_t, dy_t, group_sizes))
    # past the last group tokens are zero, and so is what they add to it
    return jax.lax.scan(step, zeros, (blocks(x_t), blocks(dy_t), group))[0]
