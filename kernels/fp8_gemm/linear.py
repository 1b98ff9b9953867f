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

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import vary_like
from whalejax.kernels.fp8_gemm.api import WEIGHT_TILE, fp8_matmul, fp8_matmul_wgrad
from whalejax.kernels.quantization import quantize, quantize_both


def fp8_linear(x: jax.Array, w: jax.Array, *, implementation: str | None = None) -> jax.Array:
    """Multiplies by a weight in FP8, with gradients in FP8 too.

    Over several devices call it inside of `jax.shard_map`, each device with its own rows: outside,
    XLA gathers on every device all that a kernel reads.

    Args:
      x: `bf16|f32[M, K]`; any M, K a multiple of 16.
      w: `bf16|f32[N, K]`; N a multiple of 16.
      implementation: of the quantisers and matmuls: `"mosaic_gpu"`, `"xla"` or None for the best.

    Returns:
      `x @ w.T`, `[M, N]` in x's dtype. Gradients come in the dtypes of x and w.

    Raises:
      ValueError: shapes or dtypes do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.
    """
    if x.ndim != 2 or w.ndim != 2 or x.shape[1] != w.shape[1]:
        raise ValueError(
            f"fp8_linear: x.shape={x.shape} and w.shape={w.shape} must be [M, K] and [N, K]"
        )
    if w.shape[0] % 16 or w.shape[1] % 16:
        raise ValueError(
            f"fp8_linear: N={w.shape[0]} and K={w.shape[1]} must be multiples of 16 "
            f"(w.shape={w.shape})"
        )
    # outside of the rule for gradients: what undoes it sums a shared weight's over the devices
    x, w = vary_like((x, w), (x, w))
    return _linear(x, w, implementation)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x, w, implementation):
    x_q = quantize(x, implementation=implementation)
    w_q = quantize(w, WEIGHT_TILE, implementation=implementation)
    return fp8_matmul(x_q, w_q, out_dtype=x.dtype, implementation=implementation)


def _forward(x, w, implementation):
    x_q, x_t = quantize_both(x, implementation=implementation)
    w_q, w_t = quantize_both(w, WEIGHT_TILE, implementation=implementation)
    y = fp8_matmul(x_q, w_q, out_dtype=x.dtype, implementation=implementation)
    return y, (x_t, w_t, jnp.zeros((), w.dtype))


def _backward(implementation, residuals, dy):
    x_t, w_t, of_w = residuals
    dy_q, dy_t = quantize_both(dy, implementation=implementation)
    dx = fp8_matmul(dy_q, w_t, out_dtype=dy.dtype, implementation=implementation)
    dw = fp8_matmul_wgrad(x_t, dy_t, implementation=implementation)
    return dx, dw.astype(of_w.dtype)


_linear.defvjp(_forward, _backward)
