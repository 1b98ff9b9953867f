"""The one linear: every weight matmul of the model goes through here.

A weight is `[out, in]`, as Hugging Face stores it. Products accumulate in float32 and come back in
the activations' dtype, so the activations' dtype is the precision of the computation: float32
master weights with bfloat16 activations compute in bfloat16.
"""

import jax
import jax.numpy as jnp
from flax import nnx

from whalejax.kernels.grouped_gemm import grouped_matmul
from whalejax.kernels.quantization import QuantizedArray
from whalejax.model.parameters import read

Weight = nnx.Variable | jax.Array | QuantizedArray


def weight_in(w: Weight, dtype: jnp.dtype) -> jax.Array:
    """A weight as an array of `dtype`; an FP8 weight is dequantised where it is used."""
    w = read(w)
    if isinstance(w, QuantizedArray):
        return w.dequantize(dtype)
    return w.astype(dtype)


def linear(x: jax.Array, w: Weight) -> jax.Array:
    """Multiplies by a weight.

    Args:
      x: `bf16|f32[..., K]`.
      w: `[N, K]` of any float dtype, or an FP8 `QuantizedArray`.

    Returns:
      `x @ w.T`, `[..., N]` in x's dtype, accumulated in float32.
    """
    # XLA:CPU multiplies matrices up to twice as fast as it contracts arrays of three axes
    rows = x.reshape(-1, x.shape[-1])
    product = jax.lax.dot_general(
        rows, weight_in(w, x.dtype), (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
    )
    return product.astype(x.dtype).reshape(*x.shape[:-1], -1)


def grouped_linear(x: jax.Array, w: Weight, group_sizes: jax.Array, *, alignment: int) -> jax.Array:
    """Multiplies each group of rows by the weight of its expert.

    Args:
      x: `bf16|f32[M, K]`, rows sorted by expert.
      w: `[G, N, K]`.
      group_sizes: `i32[G]`, rows of each expert.
      alignment: every expert's rows start on a multiple of this.

    Returns:
      `[M, N]` in x's dtype; padding rows are zero.
    """
    return grouped_matmul(x, weight_in(w, x.dtype), group_sizes, alignment=alignment)
