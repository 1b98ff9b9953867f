"""A linear layer of every expert whose three grouped matmuls run in FP8, differentiable.

See `kernels/fp8_gemm/linear.py` for the recipe. XLA's own grouped matmul trains through a dense
weight gradient per expert; here each expert's gradient sums over its own tokens alone.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import vary_like
from whalejax.kernels.fp8_gemm.api import ACTIVATION_TILE
from whalejax.kernels.fp8_gemm.linear import both_ways, by_rows, known, weights
from whalejax.kernels.grouped_gemm.fp8 import fp8_grouped_matmul, fp8_grouped_matmul_wgrad
from whalejax.kernels.groups import ALIGNMENT
from whalejax.kernels.quantization import (
    QuantizedArray,
    quantize,
    quantize_both,
    quantize_transposed,
)


def fp8_grouped_linear(
    x: jax.Array | QuantizedArray,
    w: jax.Array | tuple[jax.Array, ...],
    group_sizes: jax.Array,
    *,
    carrier: jax.Array | None = None,
    rounded: Any = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Multiplies each group of rows by its weight in FP8, with gradients in FP8 too.

    Over several devices call it inside of `jax.shard_map`, each device with its own rows: outside,
    XLA gathers on every device all that a kernel reads.

    Args:
      x: `bf16|f32[M, K]`, M a multiple of 128, K of 16. Group g's rows start at the sum of
        `ceil(size / 128) * 128` over the groups before it; padding may hold anything. Or rows that
        are FP8 already, with tile (1, 128): they are used as they are, and rounded once more, along
        the tokens, for the weights' gradients.
      w: `bf16|f32[G, N, K]`; N a multiple of 16. Or a tuple of such weights: x is quantised once
        for all of them.
      group_sizes: `i32[G]`, rows of each group without padding.
      carrier: with FP8 rows `bf16|f32[M, K]`, whose gradient is that of x, in its dtype; its values
        are not used.
      rounded: as in `fp8_linear`.
      implementation: of the quantisers and matmuls: `"mosaic_gpu"`, `"xla"` or None for the best.

    Returns:
      `[M, N]` in the dtype of x, or of the carrier, or a tuple of them; padding rows are zero, and
      so are their gradients.

    Raises:
      ValueError: shapes or dtypes do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    ws = weights("fp8_grouped_linear", w)
    quantized = isinstance(x, QuantizedArray)
    _check_carrier(x, carrier)
    for each in ws:
        _check(x, each)
    # outside of the rule for gradients: what undoes it sums a shared weight's over the devices
    given = x, carrier, ws, known("fp8_grouped_linear", w, rounded)
    x, carrier, ws, rounded = vary_like(given, (x, ws, group_sizes))
    if quantized:
        ys = _linear_of_quantized(carrier, x, ws, rounded, group_sizes, implementation)
    else:
        ys = _linear(x, ws, rounded, group_sizes, implementation)
    return ys if isinstance(w, tuple | list) else ys[0]


def _check_carrier(x, carrier):
    shape = None if carrier is None else (carrier.dtype.name, carrier.shape)
    if isinstance(x, QuantizedArray):
        if carrier is None or carrier.shape != x.shape or x.tile != ACTIVATION_TILE:
            raise ValueError(
                f"fp8_grouped_linear: FP8 rows {x.shape} with tile {x.tile} must have tile "
                f"{ACTIVATION_TILE} and a carrier of their shape, which is {shape}"
            )
    elif carrier is not None:
        raise ValueError(
            f"fp8_grouped_linear: carrier {shape} is for FP8 rows, x is {x.dtype}{list(x.shape)}"
        )


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def _linear(x, ws, rounded, group_sizes, implementation):
    x_q = quantize(x, implementation=implementation)
    ws_q = by_rows(ws, rounded, implementation)
    return tuple(_multiply(x_q, w_q, group_sizes, x.dtype, implementation) for w_q in ws_q)


def _multiply(x, w, group_sizes, dtype, implementation):
    return fp8_grouped_matmul(x, w, group_sizes, out_dtype=dtype, implementation=implementation)


def _forward(x, ws, rounded, group_sizes, implementation):
    x_q, x_t = quantize_both(x, group_sizes=group_sizes, implementation=implementation)
    ys, kept = _products(x_q, ws, rounded, group_sizes, x.dtype, implementation)
    return ys, (x_t, *kept)


def _products(x_q, ws, rounded, group_sizes, dtype, implementation):
    """The outputs, and what of the weights the backward pass needs."""
    both = both_ways(ws, rounded, implementation)
    ys = tuple(_multiply(x_q, w_q, group_sizes, dtype, implementation) for w_q, _ in both)
    of_ws = [jnp.zeros((), w.dtype) for w in ws]
    return ys, ([w_t for _, w_t in both], group_sizes, of_ws)


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
    return dx, dws, None, None


_linear.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _linear_of_quantized(carrier, x_q, ws, rounded, group_sizes, implementation):
    ws_q = by_rows(ws, rounded, implementation)
    return tuple(_multiply(x_q, w_q, group_sizes, carrier.dtype, implementation) for w_q in ws_q)


def _forward_of_quantized(carrier, x_q, ws, rounded, group_sizes, implementation):
    ys, kept = _products(x_q, ws, rounded, group_sizes, carrier.dtype, implementation)
    return ys, (x_q, *kept)


def _backward_of_quantized(implementation, residuals, dys):
    x_q, *kept = residuals
    group_sizes = kept[1]
    x_t = quantize_transposed(
        x_q.dequantize(dys[0].dtype), group_sizes=group_sizes, implementation=implementation
    )
    dx, dws, *_ = _backward(implementation, (x_t, *kept), dys)
    return dx, None, dws, None, None


_linear_of_quantized.defvjp(_forward_of_quantized, _backward_of_quantized)
