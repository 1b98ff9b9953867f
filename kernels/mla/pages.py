"""A paged latent cache in FP8: a scale for each 128 values of a token, rotary parts as they are."""

import dataclasses

import jax
import jax.numpy as jnp

from whalejax.kernels.quantization import QuantizedArray, quantize

TILE = (1, 128)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class FP8Pages:
    """Pages of a latent cache, as FlashMLA's and DeepSeek-V3.2's: 656 bytes a token of 1152.

    Attributes:
      latent: `e4m3[pages, page_size, v_dim]`; where it has a NaN, its scale must be one too.
      scales: `f32[pages, page_size, ceil(v_dim / 128)]`; a value stands for itself times a scale.
      rope: `bf16|f16|f32[pages, page_size, rope]`, rotary parts of keys.
    """

    latent: jax.Array
    scales: jax.Array
    rope: jax.Array

    @property
    def shape(self) -> tuple[int, int, int]:
        """Shape of the cache that this stands for, `[pages, page_size, v_dim + rope]`."""
        return (*self.latent.shape[:2], self.latent.shape[2] + self.rope.shape[2])

    @property
    def dtype(self) -> jnp.dtype:
        """Dtype of the queries that it is read with, that of its rotary parts."""
        return self.rope.dtype

    def check(self, op: str) -> None:
        """Checks that the arrays fit together, which a kernel that reads them takes for granted.

        Raises:
          ValueError: dtypes or shapes do not; prints them.
        """
        shapes = self.latent.shape, self.scales.shape, self.rope.shape
        leading, tiles = shapes[0][:2], -(-shapes[0][-1] // TILE[1])
        fits = shapes[1] == (*leading, tiles) and shapes[2][:2] == leading
        dtypes = self.latent.dtype, self.scales.dtype
        if len(shapes[2]) != 3 or not fits or dtypes != (jnp.float8_e4m3fn, jnp.float32):
            raise ValueError(
                f"{op}: FP8Pages of latent {dtypes[0]}{list(shapes[0])}, scales {dtypes[1]}"
                f"{list(shapes[1])} and rope {list(shapes[2])} must be float8_e4m3fn[pages, "
                f"page_size, v_dim], float32[pages, page_size, ceil(v_dim / {TILE[1]})] and "
                f"[pages, page_size, rope]"
            )

    @classmethod
    def zeros(
        cls, shape: tuple[int, int, int], v_dim: int, dtype: jnp.dtype = jnp.bfloat16
    ) -> "FP8Pages":
        """An empty cache of a shape, values being its first `v_dim` columns."""
        *leading, width = shape
        return cls(
            jnp.zeros((*leading, v_dim), jnp.float8_e4m3fn),
            jnp.zeros((*leading, -(-v_dim // TILE[1])), jnp.float32),
            jnp.zeros((*leading, width - v_dim), dtype),
        )

    @classmethod
    def quantize(cls, tokens: jax.Array, v_dim: int) -> "FP8Pages":
        """Tokens `[..., s, v_dim + rope]` as pages hold them; a NaN spoils its own tile alone."""
        latent, rope = tokens[..., :v_dim], tokens[..., v_dim:]
        # which takes no float16
        quantized = quantize(latent.astype(jnp.float32), TILE, implementation="xla")
        scales = jnp.where(_spoiled(quantized.values), jnp.nan, quantized.scales)
        return cls(quantized.values, scales, rope)

    def dequantize(self, dtype: jnp.dtype = jnp.float32) -> jax.Array:
        """The cache that this stands for, in `dtype`."""
        latent = QuantizedArray(self.latent, self.scales, TILE).dequantize(dtype)
        return jnp.concatenate([latent, self.rope.astype(dtype)], axis=-1)


def _spoiled(values: jax.Array) -> jax.Array:
    """Which tiles of `[..., v_dim]` hold a NaN."""
    missing = -values.shape[-1] % TILE[1]
    padded = jnp.pad(jnp.isnan(values), [(0, 0)] * (values.ndim - 1) + [(0, missing)])
    return padded.reshape(*values.shape[:-1], -1, TILE[1]).any(axis=-1)
