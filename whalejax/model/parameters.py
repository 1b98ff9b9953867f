"""Making and reading parameters. Layers of one kind are stacked on a leading axis for scan."""

from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx

from whalejax.kernels.accumulation import accumulator


class RouterBias(nnx.Variable):
    """V3's correction bias: moved by the loads of the experts, never by a gradient."""


class Initializer:
    """Draws the parameters of `layers` stacked layers, or of one unstacked part.

    Attributes:
      rngs: source of keys.
      std: standard deviation of every weight.
      dtype: dtype of the parameters.
      layers: length of the leading axis; None for none.
    """

    def __init__(self, rngs: nnx.Rngs, *, std: float, dtype: Any, layers: int | None = None):
        self.rngs, self.std, self.dtype, self.layers = rngs, std, dtype, layers

    def stacked(self, layers: int) -> "Initializer":
        """The same draw for `layers` layers on a leading axis."""
        return Initializer(self.rngs, std=self.std, dtype=self.dtype, layers=layers)

    def shape(self, *sizes: int) -> tuple[int, ...]:
        """`sizes` behind the layers' axis."""
        return sizes if self.layers is None else (self.layers, *sizes)

    def normal(self, *sizes: int) -> nnx.Param:
        """A weight, normally distributed."""
        key = self.rngs.params()
        return nnx.Param(self.std * jax.random.normal(key, self.shape(*sizes), self.dtype))

    def ones(self, size: int) -> nnx.Param:
        """The weight of a norm."""
        return nnx.Param(jnp.ones(self.shape(size), self.dtype))

    def bias(self, size: int) -> RouterBias:
        """A router's correction bias, zeros: float32, beside float64 weights float64."""
        return RouterBias(jnp.zeros(self.shape(size), accumulator(self.dtype)))


def read(variable: Any) -> Any:
    """The array (or QuantizedArray) inside a flax variable; anything else as it is."""
    return variable.get_value() if isinstance(variable, nnx.Variable) else variable


def rms_norm(x: jax.Array, weight: Any, eps: float) -> jax.Array:
    """Root-mean-square norm over the last axis (arXiv 1910.07467), in float32 or float64.

    Args:
      x: `bf16|f32|f64[..., H]`; computed in float64 where it is, else in float32.
      weight: `[H]`.
      eps: added to the mean square.

    Returns:
      `[..., H]` in x's dtype.
    """
    wide = x.astype(accumulator(x.dtype))
    normed = wide * jax.lax.rsqrt(jnp.mean(jnp.square(wide), axis=-1, keepdims=True) + eps)
    weight = jnp.expand_dims(read(weight).astype(wide.dtype), tuple(range(x.ndim - 1)))
    return (normed * weight).astype(x.dtype)
