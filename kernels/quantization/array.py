"""QuantizedArray: FP8 values and the float32 scales of their tiles, as one pytree."""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class QuantizedArray:
    """An array stored as FP8 with one scale a tile (DeepSeek-V3, arXiv 2412.19437, section 3.3).

    Element `[i, j]` stands for `values[i, j] * scales[i // tile[0], j // tile[1]]`. Leading axes
    (stacked layers, experts) are shared by both arrays, so a QuantizedArray passes through jit,
    scan and checkpoints like any pair of arrays.

    Attributes:
      values: `float8_e4m3fn|float8_e5m2[..., M, K]`.
      scales: `f32[..., ceil(M / tile[0]), ceil(K / tile[1])]`; the last tiles may be partial.
      tile: rows and columns that share a scale: `(128, 128)` for weights.
    """

    values: jax.Array
    scales: jax.Array
    tile: tuple[int, int] = dataclasses.field(default=(128, 128), metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the array that this stands for."""
        return self.values.shape

    @property
    def ndim(self) -> int:
        """Number of axes."""
        return self.values.ndim

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the stored values."""
        return self.values.dtype

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The array that this stands for, multiplied out in float32 and rounded to `dtype`."""
        rows, columns = self.values.shape[-2:]
        scales = jnp.repeat(self.scales, self.tile[0], axis=-2)[..., :rows, :]
        scales = jnp.repeat(scales, self.tile[1], axis=-1)[..., :columns]
        return (self.values.astype(jnp.float32) * scales).astype(dtype)


def scales_shape(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of an array of `shape`: its last two axes in tiles, rounded up."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // tile[0]), -(-columns // tile[1]))
