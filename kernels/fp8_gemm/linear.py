"""A linear layer whose three matmuls run in FP8, differentiable.

```
forward    y  = x_q · w_q^T      x by 1 x 128 along K       w by 128 x 128
backward   dx = dy_q · w_q       dy by 1 x 128 along N      the same w, transposed
           dw = dy_qt · x_qt^T   both by 1 x 128 along the tokens, accumulated in float32
```

Every operand is quantised once from what it was computed as; the forward pass keeps x only as FP8,
scaled along the tokens.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import vary_like
from whalejax.kernels.fp8_gemm.api import WEIGHT_TILE, fp8_matmul, fp8_matmul_wgrad
from whalejax.kernels.quantization import QuantizedArray, quantize, quantize_both


def round_weight(
    w: jax.Array, *, implementation: str | None = None
) -> tuple[QuantizedArray, QuantizedArray]:
    """A weight as `fp8_linear` and `fp8_grouped_linear` round it, for several calls of them.

    Args:
      w: `bf16|f32[..., N, K]`; N and K multiples of 16.
      implementation: of the quantiser: `"mosaic_gpu"`, `"xla"` or None for the best.

    Returns:
      Values `e4m3[..., N, K]` and `e4m3[..., K, N]`, with the scales of the same 128 x 128 blocks.
    """
    return quantize_both(w, WEIGHT_TILE, implementation=implementation)


def fp8_linear(
    x: jax.Array,
    w: jax.Array | tuple[jax.Array, ...],
    *,
    rounded: Any = None,
    implementation: str | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Multiplies by a weight in FP8, with gradients in FP8 too.

    Over several devices call it inside of `jax.shard_map`, each device with its own rows: outside,
    XLA gathers on every device all that a kernel reads.

    Args:
      x: `bf16|f32[M, K]`; any M, K a multiple of 16.
      w: `bf16|f32[N, K]`; N a multiple of 16. Or a tuple of such weights, a gate's and an up
        projection's say: x is quantised once for all of them.
      rounded: what `round_weight` makes of w, or a tuple of that, if it is known already: then w
        has the gradient, and its values are not used.
      implementation: of the quantisers and matmuls: `"mosaic_gpu"`, `"xla"` or None for the best.

    Returns:
      `x @ w.T`, `[M, N]` in x's dtype, or a tuple of them. Gradients come in the dtypes of x and w.

    Raises:
      ValueError: shapes or dtypes do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    ws = weights("fp8_linear", w)
    for each in ws:
        _check(x, each)
    # outside of the rule for gradients: what undoes it sums a shared weight's over the devices
    x, ws, rounded = vary_like((x, ws, known("fp8_linear", w, rounded)), (x, ws))
    ys = _linear(x, ws, rounded, implementation)
    return ys if isinstance(w, tuple | list) else ys[0]


def weights(op: str, w: Any) -> tuple:
    """The weights that an op is given: one, or a tuple or list of some."""
    ws = tuple(w) if isinstance(w, tuple | list) else (w,)
    if not ws:
        raise ValueError(f"{op}: w={w} must hold at least one weight")
    return ws


def known(op: str, w: Any, rounded: Any) -> list | None:
    """What is known of each weight's rounding: of one, or of a tuple of some."""
    if rounded is None:
        return None
    pairs = rounded if isinstance(w, tuple | list) else (rounded,)
    wanted = [_pair(each.shape) for each in weights(op, w)]
    found = [[_shape_and_tile(q) for q in jax.tree.leaves(p, is_leaf=_is_quantized)] for p in pairs]
    if found != wanted:
        raise ValueError(
            f"{op}: rounded must be what round_weight makes of w, arrays of shapes and tiles "
            f"{wanted}, but is {found}"
        )
    return list(pairs)


def _pair(shape):
    """Shapes and tiles of what `round_weight` makes of a weight."""
    *leading, n, k = shape
    return [((*leading, n, k), WEIGHT_TILE), ((*leading, k, n), WEIGHT_TILE)]


def _shape_and_tile(q):
    return q.shape, getattr(q, "tile", None)


def _is_quantized(leaf):
    return isinstance(leaf, QuantizedArray)


def _check(x, w):
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"fp8_linear: x.shape={x.shape} and w.shape={w.shape} must be [M, K] and [N, K]"
        )
    if w.shape[0] % 16 or w.shape[1] % 16:
        raise ValueError(
            f"fp8_linear: N={w.shape[0]} and K={w.shape[1]} must be multiples of 16 "
            f"(w.shape={w.shape})"
        )


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _linear(x, ws, rounded, implementation):
    x_q = quantize(x, implementation=implementation)
    ws_q = by_rows(ws, rounded, implementation)
    return _multiply(x_q, ws_q, x.dtype, implementation)


def by_rows(ws: Any, rounded: list | None, implementation: str | None) -> list[QuantizedArray]:
    """The weights as the forward pass reads them."""
    if rounded is not None:
        return [w_q for w_q, _ in rounded]
    return [quantize(w, WEIGHT_TILE, implementation=implementation) for w in ws]


def both_ways(ws: Any, rounded: list | None, implementation: str | None) -> list:
    """The weights as the forward and the backward pass read them."""
    if rounded is not None:
        return rounded
    return [round_weight(w, implementation=implementation) for w in ws]


def _multiply(x_q, ws_q, dtype, implementation):
    return tuple(
        fp8_matmul(x_q, w_q, out_dtype=dtype, implementation=implementation) for w_q in ws_q
    )


def _forward(x, ws, rounded, implementation):
    x_q, x_t = quantize_both(x, implementation=implementation)
    both = both_ways(ws, rounded, implementation)
    ys = _multiply(x_q, [w_q for w_q, _ in both], x.dtype, implementation)
    return ys, (x_t, [w_t for _, w_t in both], [jnp.zeros((), w.dtype) for w in ws])


def _backward(implementation, residuals, dys):
    x_t, ws_t, of_ws = residuals
    both = [quantize_both(dy, implementation=implementation) for dy in dys]
    dx = sum(
        fp8_matmul(dy_q, w_t, out_dtype=dy.dtype, implementation=implementation)
        for (dy_q, _), w_t, dy in zip(both, ws_t, dys, strict=True)
    )
    dws = [fp8_matmul_wgrad(x_t, dy_t, implementation=implementation) for _, dy_t in both]
    return dx, tuple(dw.astype(of_w.dtype) for dw, of_w in zip(dws, of_ws, strict=True)), None


_linear.defvjp(_forward, _backward)
