"""A linear layer of every expert whose three grouped matmuls run in FP8, differentiable.

See `kernels/fp8_gemm/linear.py` for the recipe. XLA's own grouped matmul trains through a dense
weight gradient per expert; here each expert's gradient sums over its own tokens alone.
"""

import functools

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import vary_like
from whalejax.kernels.fp8_gemm.api import WEIGHT_TILE
from whalejax.kernels.grouped_gemm.fp8 import fp8_grouped_matmul, fp8_grouped_matmul_wgrad
from whalejax.kernels.groups import ALIGNMENT
from whalejax.kernels.quantization import quantize, quantize_both


def fp8_grouped_linear(
    x: jax.Array, w: jax.Array, group_sizes: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """Multiplies each group of rows by its weight in FP8, with gradients in FP8 too.

    Over several devices call it inside of `jax.shard_map`, each device with its own rows: outside,
    XLA gathers on every device all that a kernel reads.

    Args:
      x: `bf16|f32[M, K]`, M a multiple of 128, K of 16. Group g's rows start at the sum of
        `ceil(size / 128) * 128` over the groups before it; padding may hold anything.
      w: `bf16|f32[G, N, K]`; N a multiple of 16.
      group_sizes: `i32[G]`, rows of each group without padding.
      implementation: of the quantisers and matmuls: `"mosaic_gpu"`, `"xla"` or None for the best.

    Returns:
      `[M, N]` in x's dtype; padding rows are zero, and so are their gradients.

    Raises:
      ValueError: shapes or dtypes do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    if x.ndim != 2 or w.ndim != 3 or x.shape[1] != w.shape[2]:
        raise ValueError(
            f"fp8_grouped_linear: x.shape={x.shape} and w.shape={w.shape} must be [M, K] and "
            f"[G, N, K]"
        )
    if w.shape[1] % 16 or w.shape[2] % 16 or x.shape[0] % ALIGNMENT:
        raise ValueError(
            f"fp8_grouped_linear: N={w.shape[1]} and K={w.shape[2]} must be multiples of 16, "
            f"M={x.shape[0]} of {ALIGNMENT} (x.shape={x.shape}, w.shape={w.shape})"
        )
    # outside of the rule for gradients: what undoes it sums a shared weight's over the devices
    x, w = vary_like((x, w), (x, w, group_sizes))
    return _linear(x, w, group_sizes, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x, w, group_sizes, implementation):
    x_q = quantize(x, implementation=implementation)
    w_q = quantize(w, WEIGHT_TILE, implementation=implementation)
    return _multiply(x_q, w_q, group_sizes, x.dtype, implementation)


def _multiply(x, w, group_sizes, dtype, implementation):
    return fp8_grouped_matmul(x, w, group_sizes, out_dtype=dtype, implementation=implementation)


def _forward(x, w, group_sizes, implementation):
    x_q, x_t = quantize_both(x, group_sizes=group_sizes, implementation=implementation)
    w_q, w_t = quantize_both(w, WEIGHT_TILE, implementation=implementation)
    y = _multiply(x_q, w_q, group_sizes, x.dtype, implementation)
    return y, (x_t, w_t, group_sizes, jnp.zeros((), w.dtype))


def _backward(implementation, residuals, dy):
    x_t, w_t, group_sizes, of_w = residuals
    dy_q, dy_t = quantize_both(dy, group_sizes=group_sizes, implementation=implementation)
    dx = _multiply(dy_q, w_t, group_sizes, dy.dtype, implementation)
    dw = fp8_grouped_matmul_wgrad(x_t, dy_t, group_sizes, implementation=implementation)
    return dx, dw.astype(of_w.dtype), None


_linear.defvjp(_forward, _backward)
