"""A linear layer of every expert whose three grouped matmuls run in FP8, differentiable.

See `kernels/fp8_gemm/linear.py` for the recipe. XLA's own grouped matmul trains through a dense
weight gradient per expert; here each expert's gradient sums over its own tokens alone.
"""

import functools

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import vary_like
from whalejax.kernels.fp8_gemm.api import WEIGHT_TILE
from whalejax.kernels.fp8_gemm.linear import weights
from whalejax.kernels.grouped_gemm.fp8 import fp8_grouped_matmul, fp8_grouped_matmul_wgrad
from whalejax.kernels.groups import ALIGNMENT
from whalejax.kernels.quantization import quantize, quantize_both


def fp8_grouped_linear(
    x: jax.Array,
    w: jax.Array | tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Multiplies each group of rows by its weight in FP8, with gradients in FP8 too.

    Over several devices call it inside of `jax.shard_map`, each device with its own rows: outside,
    XLA gathers on every device all that a kernel reads.

    Args:
      x: `bf16|f32[M, K]`, M a multiple of 128, K of 16. Group g's rows start at the sum of
        `ceil(size / 128) * 128` over the groups before it; padding may hold anything.
      w: `bf16|f32[G, N, K]`; N a multiple of 16. Or a tuple of such weights: x is quantised once
        for all of them.
      group_sizes: `i32[G]`, rows of each group without padding.
      implementation: of the quantisers and matmuls: `"mosaic_gpu"`, `"xla"` or None for the best.

    Returns:
      `[M, N]` in x's dtype, or a tuple of them; padding rows are zero, and so are their gradients.

    Raises:
      ValueError: shapes or dtypes do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    ws = weights("fp8_grouped_linear", w)
    for each in ws:
        _check(x, each)
    # outside of the rule for gradients: what undoes it sums a shared weight's over the devices
    x, ws = vary_like((x, ws), (x, ws, group_sizes))
    ys = _linear(x, ws, group_sizes, implementation)
    return ys if isinstance(w, tuple | list) else ys[0]


def _check(x, w):
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x, ws, group_sizes, implementation):
    x_q = quantize(x, implementation=implementation)
    ws_q = [quantize(w, WEIGHT_TILE, implementation=implementation) for w in ws]
    return tuple(_multiply(x_q, w_q, group_sizes, x.dtype, implementation) for w_q in ws_q)


def _multiply(x, w, group_sizes, dtype, implementation):
    return fp8_grouped_matmul(x, w, group_sizes, out_dtype=dtype, implementation=implementation)


def _forward(x, ws, group_sizes, implementation):
    x_q, x_t = quantize_both(x, group_sizes=group_sizes, implementation=implementation)
    both = [quantize_both(w, WEIGHT_TILE, implementation=implementation) for w in ws]
    ys = tuple(_multiply(x_q, w_q, group_sizes, x.dtype, implementation) for w_q, _ in both)
    of_ws = [jnp.zeros((), w.dtype) for w in ws]
    return ys, (x_t, [w_t for _, w_t in both], group_sizes, of_ws)


def _backward(implementation, residuals, dys):
    x_t, ws_t, group_sizes, of_ws = residuals
    both = [quantize_both(dy, group_sizes=group_sizes, implementation=implementation) for dy in dys]
    dx = sum(
        _multiply(dy_q, w_t, group_sizes, dy.dtype, implementation)
        for (dy_q, _), w_t, dy in zip(both, ws_t, dys, strict=True)
    )
    dws = tuple(
        fp8_grouped_matmul_wgrad(x_t, dy_t, group_sizes, implementation=implementation).astype(
            of_w.dtype
        )
        for (_, dy_t), of_w in zip(both, of_ws, strict=True)
    )
    return dx, dws, None


_linear.defvjp(_forward, _backward)
