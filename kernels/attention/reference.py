"""Attention with all scores in memory: the definition, for tests."""

import jax
import jax.numpy as jnp


def why_not(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Runs everywhere."""
    return None


def attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> jax.Array:
    """`softmax(scale * q k^T) v` per head, in float32."""
    q, k, wide_v = (x.astype(jnp.float32) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if causal:
        length = q.shape[1]
        seen = jnp.tril(jnp.ones((length, length), jnp.bool_))
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    weights = jax.nn.softmax(scores, axis=-1)
    return jnp.einsum("bhqk,bkhd->bqhd", weights, wide_v).astype(v.dtype)
