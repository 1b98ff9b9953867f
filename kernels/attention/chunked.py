"""Attention block by block with an online softmax: portable, linear in memory.

The forward pass keeps a running maximum and sum for each query (FlashAttention-2, arXiv
2307.08691, algorithm 1) and saves the output and its log-sum-exp; the backward pass computes each
block of weights again from them (algorithm 2). Blocks above the diagonal are never visited.

```
            keys 0   keys 1   keys 2
queries 0   block                        one scan step, inner loop of 1
queries 1   block    block               one scan step, inner loop of 2
queries 2   block    block    block
```
"""

import functools

import jax
import jax.numpy as jnp

from whalejax.kernels.attention.tuning import pick


def why_not(q: jax.Array, k: jax.Array, v: jax.Array) -> str | None:
    """Runs everywhere."""
    return None


def attention(q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool) -> jax.Array:
    """Attention of `[b, s, h, d]` arrays."""
    batch, length, heads, _ = q.shape
    block = pick(length).block

    def fold(x):  # [b, s, h, d] -> [blocks, b * h, block, d], padded at the end
        x = x.transpose(0, 2, 1, 3).reshape(batch * heads, length, x.shape[3])
        x = jnp.pad(x, ((0, 0), (0, -length % block), (0, 0)))
        return x.reshape(batch * heads, -1, block, x.shape[2]).transpose(1, 0, 2, 3)

    out = blocks_attention(fold(q), fold(k), fold(v), scale, causal, length)
    out = out.transpose(1, 0, 2, 3).reshape(batch, heads, -1, v.shape[3])
    return out[:, :, :length].transpose(0, 2, 1, 3)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def blocks_attention(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool, length: int
) -> jax.Array:
    """Attention of `[blocks, n, block, d]` arrays of which `length` positions are real."""
    return _forward(q, k, v, scale, causal, length)[0]


def _scores(q, k, i, j, scale, causal, length):
    """Scaled scores of query block i and key block j, -inf where a key is not seen."""
    scores = jnp.einsum("nqd,nkd->nqk", q, k, preferred_element_type=jnp.float32) * scale
    block = q.shape[1]
    query = i * block + jnp.arange(block, dtype=jnp.int32)[:, None]
    key = j * block + jnp.arange(block, dtype=jnp.int32)[None]
    seen = (key <= query) if causal else (key < length) & (query >= 0)
    return jnp.where(seen[None], scores, -jnp.inf)


def _key_blocks(i, num_blocks, causal):
    return i + 1 if causal else num_blocks


def _forward(q, k, v, scale, causal, length):
    """The output, and the log-sum-exp of every query `f32[blocks, n, block]`."""
    num_blocks, n, block, _ = q.shape

    def of_queries(_, xs):
        i, q_i = xs

        def add(j, carry):
            top, total, out = carry
            scores = _scores(q_i, k[j], i, j, scale, causal, length)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=-1)
            part = jnp.einsum(
                "nqk,nkd->nqd", weights.astype(v.dtype), v[j], preferred_element_type=jnp.float32
            )
            return new_top, total, out * shrink[..., None] + part

        # key 0 is seen by every query, so that no maximum stays -inf after the first block
        empty = (
            jnp.full_like(q_i, -jnp.inf, jnp.float32)[..., 0],
            jnp.zeros_like(q_i, jnp.float32)[..., 0],
            _zeros_with(q_i, v.shape[3]),
        )
        top, total, out = jax.lax.fori_loop(0, _key_blocks(i, num_blocks, causal), add, empty)
        return None, ((out / total[..., None]).astype(v.dtype), top + jnp.log(total))

    blocks = jnp.arange(num_blocks, dtype=jnp.int32)
    return jax.lax.scan(of_queries, None, (blocks, q))[1]


def _zeros_with(like, width):
    """Float32 zeros `[n, block, width]` that vary over the mesh as `like` does."""
    return jnp.zeros_like(like, jnp.float32)[..., :1] + jnp.zeros((1, 1, width), jnp.float32)


def _save(q, k, v, scale, causal, length):
    out, lse = _forward(q, k, v, scale, causal, length)
    return out, (q, k, v, out, lse)


def _backward(scale, causal, length, residuals, d_out):
    q, k, v, out, lse = residuals
    num_blocks = q.shape[0]
    delta = jnp.sum(d_out.astype(jnp.float32) * out.astype(jnp.float32), axis=-1)

    def of_queries(carry, xs):
        i, q_i, d_out_i, lse_i, delta_i = xs

        def add(j, carry):
            d_q, d_k, d_v = carry
            scores = _scores(q_i, k[j], i, j, scale, causal, length)
            weights = jnp.exp(scores - lse_i[..., None])
            d_weights = jnp.einsum(
                "nqd,nkd->nqk", d_out_i, v[j], preferred_element_type=jnp.float32
            )
            d_scores = (weights * (d_weights - delta_i[..., None]) * scale).astype(q.dtype)
            d_q = d_q + jnp.einsum(
                "nqk,nkd->nqd", d_scores, k[j], preferred_element_type=jnp.float32
            )
            d_k_j = jnp.einsum("nqk,nqd->nkd", d_scores, q_i, preferred_element_type=jnp.float32)
            d_v_j = jnp.einsum(
                "nqk,nqd->nkd",
                weights.astype(v.dtype),
                d_out_i,
                preferred_element_type=jnp.float32,
            )
            return d_q, d_k.at[j].add(d_k_j), d_v.at[j].add(d_v_j)

        start = (jnp.zeros_like(q_i, jnp.float32), *carry)
        d_q, *carry = jax.lax.fori_loop(0, _key_blocks(i, num_blocks, causal), add, start)
        return tuple(carry), d_q.astype(q.dtype)

    blocks = jnp.arange(num_blocks, dtype=jnp.int32)
    zeros = (jnp.zeros_like(k, jnp.float32), jnp.zeros_like(v, jnp.float32))
    (d_k, d_v), d_q = jax.lax.scan(of_queries, zeros, (blocks, q, d_out, lse, delta))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)


blocks_attention.defvjp(_save, _backward)
