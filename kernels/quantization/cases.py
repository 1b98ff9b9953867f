"""Cases of quantisation, for tests and benchmarks."""

import dataclasses
import functools

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case:
    """An array to quantise, and the tile that shares a scale."""

    shape: tuple[int, ...]
    tile: tuple[int, int] = (1, 128)
    dtype: str = "float32"

    def __str__(self):
        return f"{'x'.join(map(str, self.shape))}-by-{self.tile[0]}x{self.tile[1]}-{self.dtype}"


CASES = (
    Case(shape=(1, 16)),
    Case(shape=(130, 272)),
    Case(shape=(130, 272), tile=(128, 128)),
    Case(shape=(256, 128), dtype="bfloat16"),
    Case(shape=(576, 144), tile=(128, 128), dtype="bfloat16"),
    Case(shape=(2, 3, 65, 144)),
    Case(shape=(3, 130, 272), tile=(128, 128)),
)


@functools.partial(jax.jit, static_argnames=("shape", "dtype"))
def draw(shape: tuple[int, ...], dtype: str, key: jax.Array) -> jax.Array:
    """Normally distributed numbers of a magnitude between 2^-20 and 2^20 for each row."""
    keys = jax.random.split(key)
    magnitude = jnp.exp2(jax.random.uniform(keys[1], (*shape[:-1], 1), minval=-20, maxval=20))
    return (jax.random.normal(keys[0], shape) * magnitude).astype(dtype)
