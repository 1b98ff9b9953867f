"""Quantisation in plain XLA: the definition.

A tile's scale is `max(|tile|, 1e-4) / 448` (e4m3's largest number), so that its largest element
becomes the largest FP8 number; the floor keeps a tile of zeros at zero.
"""

import jax
import jax.numpy as jnp

from whalejax.kernels.groups import ALIGNMENT, real_rows
from whalejax.kernels.quantization.array import QuantizedArray

MIN_AMAX = 1e-4  # DeepGEMM's floor
BLOCK = 128  # elements of the contraction that share a scale
MANTISSA = 0x7FFFFF  # bits of a float32


def why_not(op: str, arrays: tuple, *static) -> str | None:
    """Runs everywhere."""
    return None


def quantize(x: jax.Array, tile: tuple[int, int], power_of_two: bool) -> QuantizedArray:
    """One scale a tile of `[..., M, K]`; the last tiles may be partial."""
    *leading, rows, columns = x.shape
    missing = (-rows % tile[0], -columns % tile[1])
    x = x.astype(jnp.float32)
    padded = jnp.pad(x, [(0, 0)] * len(leading) + [(0, m) for m in missing])
    row_tiles, column_tiles = padded.shape[-2] // tile[0], padded.shape[-1] // tile[1]
    blocks = padded.reshape(*leading, row_tiles, tile[0], column_tiles, tile[1])
    scales = scale_of(jnp.max(jnp.abs(blocks), axis=(-3, -1)), power_of_two)
    values = blocks * (1 / scales)[..., :, None, :, None]
    values = values.reshape(padded.shape)[..., :rows, :columns].astype(jnp.float8_e4m3fn)
    quantized = QuantizedArray(values, scales, tile)
    return quantized.with_scales_by_column() if tile[0] == 1 else quantized


def quantize_transposed(
    x: jax.Array, group_sizes: jax.Array | None, power_of_two: bool
) -> QuantizedArray:
    """`x.T` with a scale every 128 tokens, padded with zeros to a multiple of 128 tokens."""
    if group_sizes is not None:
        x = jnp.where(real_rows(group_sizes, x.shape[0], ALIGNMENT)[:, None], x, 0)
    x = jnp.pad(x, ((0, -x.shape[0] % BLOCK), (0, 0)))
    return quantize(x.T, (1, BLOCK), power_of_two)


def quantize_both(
    x: jax.Array, group_sizes: jax.Array | None, tile: tuple[int, int], power_of_two: bool
) -> tuple[QuantizedArray, QuantizedArray]:
    """`x` with one scale a tile, and `x.T` with tiles that lie alike in it."""
    along = quantize(x, tile, power_of_two)
    if tile[0] == tile[1]:
        return along, along.transpose()
    return along, quantize_transposed(x, group_sizes, power_of_two)


def swiglu(gate_up: jax.Array) -> jax.Array:
    """`silu(gate) * up` in float32, of `[M, 2 I]` whose first half is the gate."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    return gate * jax.nn.sigmoid(gate) * up


def swiglu_quantize(gate_up: jax.Array, power_of_two: bool) -> QuantizedArray:
    """`swiglu` with a scale every 128 columns."""
    return quantize(swiglu(gate_up), (1, BLOCK), power_of_two)


def swiglu_gradient(gate_up: jax.Array, d_hidden: jax.Array) -> jax.Array:
    """The gradient of `swiglu` for `gate_up`, in its dtype."""
    gate, up = jnp.split(gate_up.astype(jnp.float32), 2, axis=-1)
    d_hidden = d_hidden.astype(jnp.float32)
    sigmoid = jax.nn.sigmoid(gate)
    d_gate = d_hidden * up * sigmoid * (1 + gate * (1 - sigmoid))
    d_up = d_hidden * gate * sigmoid
    return jnp.concatenate([d_gate, d_up], axis=-1).astype(gate_up.dtype)


def scale_of(amax: jax.Array, power_of_two: bool) -> jax.Array:
    """The scale of tiles whose largest magnitude is `amax`; rounded up to a power of two or not."""
    limit = float(jnp.finfo(jnp.float8_e4m3fn).max)
    scale = jnp.maximum(amax, MIN_AMAX) / limit
    if not power_of_two:
        return scale
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    rounded = jax.lax.bitcast_convert_type((bits + MANTISSA) & ~MANTISSA, jnp.float32)
    return jnp.where(jnp.isfinite(scale), rounded, scale)
