"""QuantizedArray: FP8 values and the float32 scales of their tiles, as one pytree."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp

# Rows of a block in every kernel: it moves the scales of so many at once, which TMA would not clip.
SCALES_ALIGNMENT = 128


@jax.tree_util.register_pytree_with_keys_class
@dataclasses.dataclass(frozen=True, init=False)
class QuantizedArray:
    """An array stored as FP8 with one scale a tile (DeepSeek-V3, arXiv 2412.19437, section 3.3).

    Element `[i, j]` stands for `values[i, j] * scales[i // tile[0], j // tile[1]]`. Leading axes
    (stacked layers, experts) are shared by both arrays, so a QuantizedArray passes through jit,
    scan and checkpoints like any pair of arrays.

    How the scales lie in memory is static: as they are read (`scales_by_column=False`, what
    checkpoints hold), or column by column with columns padded to a multiple of 128, so that a
    kernel moves the scales of many rows at once (`True`, what quantisers leave). `scales` reads
    both.

    Attributes:
      values: `float8_e4m3fn|float8_e5m2[..., M, K]`.
      stored_scales: the scales as they lie in memory.
      tile: rows and columns that share a scale: `(1, 128)` for activations, `(128, 128)` for
        weights.
      scales_by_column: whether `stored_scales` is `f32[..., ceil(K / tile[1]), R]`, R being
        `ceil(M / tile[0])` rounded up to a multiple of 128; what pads them is arbitrary.
    """

    values: jax.Array
    stored_scales: jax.Array
    tile: tuple[int, int]
    scales_by_column: bool

    def __init__(
        self,
        values: Any,
        scales: Any,
        tile: tuple[int, int] = (128, 128),
        *,
        scales_by_column: bool = False,
    ):
        object.__setattr__(self, "values", values)
        object.__setattr__(self, "stored_scales", scales)
        object.__setattr__(self, "tile", tuple(tile))
        object.__setattr__(self, "scales_by_column", scales_by_column)

    def tree_flatten_with_keys(self):
        """Both arrays as leaves named `values` and `scales`; all else is static."""
        key = jax.tree_util.GetAttrKey
        children = ((key("values"), self.values), (key("scales"), self.stored_scales))
        return children, (self.tile, self.scales_by_column)

    @classmethod
    def tree_unflatten(cls, static, children):
        """The inverse of `tree_flatten_with_keys`; children may be anything."""
        tile, scales_by_column = static
        return cls(*children, tile, scales_by_column=scales_by_column)

    @property
    def scales(self) -> jax.Array:
        """`f32[..., ceil(M / tile[0]), ceil(K / tile[1])]`; the last tiles may be partial."""
        if not self.scales_by_column:
            return self.stored_scales
        rows = scales_shape(self.values.shape, self.tile)[-2]
        return self.stored_scales[..., :rows].swapaxes(-1, -2)

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

    def with_scales_by_column(self) -> "QuantizedArray":
        """The same array with its scales column by column, as the kernels read them."""
        if self.scales_by_column:
            return self
        rows = self.stored_scales.shape[-2]
        padding = [(0, 0)] * (self.ndim - 1) + [(0, -rows % SCALES_ALIGNMENT)]
        stored = jnp.pad(self.stored_scales.swapaxes(-1, -2), padding)
        return QuantizedArray(self.values, stored, self.tile, scales_by_column=True)

    def transpose(self) -> "QuantizedArray":
        """The last two axes exchanged: of the values, the scales and the tile."""
        return QuantizedArray(
            self.values.swapaxes(-1, -2), self.scales.swapaxes(-1, -2), self.tile[::-1]
        )


def scales_shape(shape: tuple[int, ...], tile: tuple[int, int]) -> tuple[int, ...]:
    """The shape of the scales of an array of `shape`: its last two axes in tiles, rounded up."""
    *leading, rows, columns = shape
    return (*leading, -(-rows // tile[0]), -(-columns // tile[1]))


def stored_scales_shape(
    shape: tuple[int, ...], tile: tuple[int, int], by_column: bool
) -> tuple[int, ...]:
    """The shape in which the scales of an array of `shape` lie in memory."""
    *leading, rows, columns = scales_shape(shape, tile)
    if not by_column:
        return (*leading, rows, columns)
    return (*leading, columns, -(-rows // SCALES_ALIGNMENT) * SCALES_ALIGNMENT)
