"""FP8 matmuls in plain XLA: the definition.

Operands are dequantised to float32 and multiplied in full float32. The kernels scale the partial
product of every 128 elements instead, which is the same sum in another order.
"""

import jax
import jax.numpy as jnp

from whalejax.kernels.quantization import QuantizedArray


def why_not(op: str, arrays: tuple, *static) -> str | None:
    """Runs everywhere."""
    return None


def fp8_matmul(x: QuantizedArray, w: QuantizedArray, out_dtype: jnp.dtype) -> jax.Array:
    """`x @ w.T`."""
    return multiply(x.dequantize(), w.dequantize()).astype(out_dtype)


def fp8_matmul_wgrad(
    x_t: QuantizedArray, dy_t: QuantizedArray, accumulate: jax.Array | None
) -> jax.Array:
    """`dy_t @ x_t.T`, added to `accumulate`."""
    product = multiply(dy_t.dequantize(), x_t.dequantize())
    return product if accumulate is None else accumulate + product


def multiply(a: jax.Array, b: jax.Array) -> jax.Array:
    """`a @ b.T` of float32 arrays, in full float32 on every device."""
    return jax.lax.dot_general(
        a, b, (((a.ndim - 1,), (b.ndim - 1,)), ((), ())), precision=jax.lax.Precision.HIGHEST
    )
