"""Rotary position embedding over interleaved pairs, stretched by YaRN where configured."""

import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from whalejax.kernels.accumulation import accumulator
from whalejax.model.config import MLAConfig, YarnConfig


class Rotary(NamedTuple):
    """Cosines and sines of the positions: `f32|f64[b, t, qk_rope_head_dim / 2]` each."""

    cos: jax.Array
    sin: jax.Array


def rotary(positions: jax.Array, config: MLAConfig, dtype: Any = jnp.float32) -> Rotary:
    """Angles of `positions` (`i32[b, t]`), times YaRN's magnitude where it is not 1.

    They are float32, for activations of `dtype` float64 float64.
    """
    wide = accumulator(dtype)
    frequencies = jnp.asarray(inverse_frequencies(config), wide)
    angles = positions[..., None].astype(wide) * frequencies[None, None]
    magnitude = 1.0
    if config.yarn is not None:
        yarn = config.yarn
        magnitude = yarn.magnitude(yarn.mscale) / yarn.magnitude(yarn.mscale_all_dim)
    return Rotary(jnp.cos(angles) * magnitude, jnp.sin(angles) * magnitude)


def rotate(x: jax.Array, angles: Rotary) -> jax.Array:
    """Turns each pair `(x[2i], x[2i + 1])` by its angle, in float32, of float64 in float64.

    Args:
      x: `bf16|f32|f64[b, t, h, qk_rope_head_dim]`.
      angles: of the same `b, t` (b may be 1).

    Returns:
      The same shape and dtype.
    """
    wide = x.astype(accumulator(x.dtype))
    even, odd = wide[..., 0::2], wide[..., 1::2]
    cos, sin = (a[:, :, None].astype(wide.dtype) for a in angles)
    turned = jnp.stack([even * cos - odd * sin, even * sin + odd * cos], axis=-1)
    return turned.reshape(x.shape).astype(x.dtype)


def inverse_frequencies(config: MLAConfig) -> np.ndarray:
    """Radians a position, `f64[qk_rope_head_dim / 2]` (arXiv 2104.09864; YaRN 2309.00071)."""
    dim = config.qk_rope_head_dim
    frequencies = config.rope_theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)
    if config.yarn is None:
        return frequencies
    keep = 1.0 - yarn_ramp(config.yarn, config.rope_theta, dim)
    return frequencies / config.yarn.factor * (1.0 - keep) + frequencies * keep


def yarn_ramp(yarn: YarnConfig, theta: float, dim: int) -> np.ndarray:
    """0 for pairs that turn fast and keep their frequency, 1 for those that are stretched."""

    def pair_of(rotations: float) -> float:
        turns = yarn.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(turns) / (2 * math.log(theta))

    low = max(math.floor(pair_of(yarn.beta_fast)), 0)
    high = min(math.ceil(pair_of(yarn.beta_slow)), dim - 1)
    width = max(high - low, 0.001)
    return np.clip((np.arange(dim // 2, dtype=np.float64) - low) / width, 0.0, 1.0)
