"""The one linear: every weight matmul of the model goes through here.

A weight is `[out, in]`, as Hugging Face stores it. Products accumulate in float32, of float64
in float64, and come back in the activations' dtype, so the activations' dtype is the precision of
the computation: float32 master weights with bfloat16 activations compute in bfloat16. In FP8
activations stay bfloat16 and the three matmuls of a linear round their operands (DeepSeek-V3,
arXiv 2412.19437, section 3.3); embedding, head, router and norms are no linears of this kind and
keep their precision. In a pipeline a weight's gradient may wait until later: `deferrable`.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.fp8_gemm import fp8_linear, fp8_matmul
from whalejax.kernels.grouped_gemm import fp8_grouped_linear, fp8_grouped_matmul, grouped_matmul
from whalejax.kernels.quantization import QuantizedArray, quantize
from whalejax.model.parameters import read
from whalejax.parallel.dualpipe import deferrable


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class RoundedWeight:
    """A weight and what FP8 makes of it, for several calls.

    Attributes:
      value: takes the gradient; its numbers are not used.
      rounded: what `round_weight` makes of it.
    """

    value: Any
    rounded: tuple[QuantizedArray, QuantizedArray]


Weight = nnx.Variable | jax.Array | QuantizedArray | RoundedWeight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Precision:
    """In what a model computes.

    Attributes:
      dtype: of activations; None for that of the parameters.
      fp8: whether the matmuls of weights, and of their gradients, run in FP8.
    """

    dtype: Any = None
    fp8: bool = False

    @property
    def master(self) -> Any:
        """The dtype of weights in training and of their moments: float32, float64 for float64."""
        return accumulator(jnp.float32 if self.dtype is None else self.dtype)


PRECISIONS = {
    "f64": Precision(dtype=jnp.float64),
    "f32": Precision(dtype=jnp.float32),
    "bf16": Precision(dtype=jnp.bfloat16),
    "fp8": Precision(dtype=jnp.bfloat16, fp8=True),
}


def weight_in(w: Weight, dtype: jnp.dtype) -> jax.Array:
    """A weight as an array of `dtype`; an FP8 weight is dequantised where it is used."""
    w = read(w)
    if isinstance(w, QuantizedArray):
        return w.dequantize(dtype)
    return w.astype(dtype)


def linear(
    x: jax.Array, w: Weight | tuple[Weight, ...], *, fp8: bool = False
) -> jax.Array | tuple[jax.Array, ...]:
    """Multiplies by a weight.

    Args:
      x: `bf16|f32|f64[..., K]`.
      w: `[N, K]` of any float dtype, or an FP8 `QuantizedArray`; or a tuple of such weights.
      fp8: multiply in FP8, in the gradients too; an FP8 weight is used as it is. x is rounded once
        for all weights.

    Returns:
      `x @ w.T`, `[..., N]` in x's dtype, accumulated in float32 or float64; or a tuple of
      them.
    """
    # XLA:CPU multiplies matrices up to twice as fast as it contracts arrays of three axes
    rows = x.reshape(-1, x.shape[-1])
    ws, rounded = _values(w)
    products = deferrable(functools.partial(_products, fp8=fp8), (rows, rounded), ws)
    products = tuple(product.reshape(*x.shape[:-1], -1) for product in products)
    return products if isinstance(w, tuple) else products[0]


def _values(w):
    """The weights of a call, and what is known of their rounding, None if nothing."""
    ws = tuple(map(read, w if isinstance(w, tuple) else (w,)))
    if not isinstance(ws[0], RoundedWeight):
        return ws, None
    return tuple(each.value for each in ws), tuple(each.rounded for each in ws)


def _products(given, ws, *, fp8):
    rows, rounded = given
    if not fp8:
        return tuple(_multiply(rows, each) for each in ws)
    if isinstance(ws[0], QuantizedArray):
        rows_q = quantize(rows)
        return tuple(fp8_matmul(rows_q, each, out_dtype=rows.dtype) for each in ws)
    return fp8_linear(rows, ws, rounded=rounded)


def _multiply(rows, w):
    product = jax.lax.dot_general(
        rows,
        weight_in(w, rows.dtype),
        (((1,), (1,)), ((), ())),
        preferred_element_type=accumulator(rows.dtype),
    )
    return product.astype(rows.dtype)


def grouped_linear(
    x: jax.Array | QuantizedArray,
    w: Weight | tuple[Weight, ...],
    group_sizes: jax.Array,
    *,
    alignment: int,
    fp8: bool = False,
    carrier: jax.Array | None = None,
) -> jax.Array | tuple[jax.Array, ...]:
    """Multiplies each group of rows by the weight of its expert.

    Args:
      x: `bf16|f32|f64[M, K]`, rows sorted by expert; or FP8, as `dispatch` sends them.
      w: `[G, N, K]`, or a tuple of such weights.
      group_sizes: `i32[G]`, rows of each expert.
      alignment: every expert's rows start on a multiple of this; 128 in FP8.
      fp8: multiply in FP8, as in `linear`.
      carrier: of FP8 rows, the one that `dispatch` gives with them: it takes their gradient.

    Returns:
      `[M, N]` in x's dtype, or the carrier's, or a tuple of them; padding rows are zero.
    """
    ws, rounded = _values(w)
    multiply = functools.partial(_grouped_products, alignment=alignment, fp8=fp8)
    products = deferrable(multiply, (x, rounded, group_sizes, carrier), ws)
    return products if isinstance(w, tuple) else products[0]


def _grouped_products(given, ws, *, alignment, fp8):
    x, rounded, group_sizes, carrier = given
    if not fp8:
        return tuple(
            grouped_matmul(x, weight_in(each, x.dtype), group_sizes, alignment=alignment)
            for each in ws
        )
    if isinstance(ws[0], QuantizedArray):
        x_q, dtype = (quantize(x), x.dtype) if carrier is None else (x, carrier.dtype)
        return tuple(fp8_grouped_matmul(x_q, each, group_sizes, out_dtype=dtype) for each in ws)
    return fp8_grouped_linear(x, ws, group_sizes, carrier=carrier, rounded=rounded)
