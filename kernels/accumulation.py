"""In what dtype sums are kept."""

import jax.numpy as jnp


def accumulator(dtype: jnp.dtype) -> jnp.dtype:
    """The dtype of sums over numbers of `dtype`: float64 for float64, float32 for all others."""
    return jnp.dtype("float64" if jnp.dtype(dtype) == jnp.float64 else "float32")
