"""Attention with all scores in memory: the definition, for tests."""

import jax
import jax.numpy as jnp

from whalejax.kernels.accumulation import accumulator


def why_not(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """`softmax(scale * q k^T) v` per head, and the log of the softmax's denominator.

    Both are computed in float32, of float64 in float64.
    """
    q, k, wide_v = (x.astype(accumulator(v.dtype)) for x in (q, k, v))
    scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if causal:  # the last query sees the last key
        length, key_length = scores.shape[2:]
        seen = jnp.tril(jnp.ones((length, key_length), jnp.bool_), key_length - length)
        scores = jnp.where(seen[None, None], scores, -jnp.inf)
    out = jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores, axis=-1), wide_v)
    return out.astype(v.dtype), jax.nn.logsumexp(scores, axis=-1)


def backward(
    q: jax.Array,
    k: jax.Array,
    v: jax.Array,
    out: jax.Array,
    lse: jax.Array,
    d_out: jax.Array,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients for q, k and v by differentiating the definition."""
    _, pull = jax.vjp(lambda *inputs: forward(*inputs, scale, causal)[0], q, k, v)
    return pull(d_out)
