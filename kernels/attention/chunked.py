"""Attention block by block with an online softmax: portable, linear in memory.

The forward pass keeps a running maximum and sum for each query (FlashAttention-2, arXiv
2307.08691, algorithm 1); the backward pass computes each block of weights again from the output's
log-sum-exp (algorithm 2). Blocks above the diagonal are never visited.

```
            keys 0   keys 1   keys 2
queries 0   block                        one scan step, inner loop of 1
queries 1   block    block               one scan step, inner loop of 2
queries 2   block    block    block
```
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.attention.tuning import pick


class _Plan(NamedTuple):
    """What the loops must know of the whole: which keys a query sees, and the blocks."""

    length: int
    key_length: int
    block: int
    scale: float
    causal: bool

    def num_key_blocks(self, i: jax.Array) -> jax.Array | int:
        """How many blocks of keys some query of block i sees."""
        every = -(-self.key_length // self.block)
        if not self.causal:
            return every
        seen = (i + 1) * self.block + self.key_length - self.length  # by the block's last query
        return jnp.minimum((seen + self.block - 1) // self.block, every)

    def scores(self, q: jax.Array, k: jax.Array, i: jax.Array, j: jax.Array) -> jax.Array:
        """Scaled wide scores of query block i and key block j, -inf where a key is not seen."""
        scores = _product("bhqd,bhkd->bhqk", q, k)
        query = i * self.block + jnp.arange(self.block, dtype=jnp.int32)[:, None]
        key = j * self.block + jnp.arange(self.block, dtype=jnp.int32)[None]
        if self.causal:
            seen = key <= query + (self.key_length - self.length)
        else:
            seen = jnp.broadcast_to(key < self.key_length, (self.block, self.block))
        return jnp.where(seen[None, None], scores * self.scale, -jnp.inf)


def why_not(q: jax.Array, k: jax.Array, v: jax.Array, causal: bool) -> str | None:
    """Runs everywhere."""
    return None


def forward(
    q: jax.Array, k: jax.Array, v: jax.Array, scale: float, causal: bool
) -> tuple[jax.Array, jax.Array]:
    """Attention of `[b, s, h, d]` arrays: the output, and the log-sum-exp `f32|f64[b, h, s]`."""
    length, key_length = q.shape[1], k.shape[1]
    plan = _Plan(length, key_length, pick(length, key_length).block, scale, causal)
    q, k, v = (_blocks(_heads_first(x), plan.block) for x in (q, k, v))
    out, lse = _forward(q, k, v, plan)
    return _heads_first(_joined(out, length)), _joined(lse[..., None], length)[..., 0]


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
    """Gradients for q, k and v from what `forward` returned and the output's gradient."""
    length, key_length = q.shape[1], k.shape[1]
    plan = _Plan(length, key_length, pick(length, key_length).block, scale, causal)
    wide = accumulator(out.dtype)
    delta = jnp.sum(d_out.astype(wide) * out.astype(wide), axis=-1)
    q, k, v, d_out = (_blocks(_heads_first(x), plan.block) for x in (q, k, v, d_out))
    rows = (lse, delta.transpose(0, 2, 1))
    lse, delta = (_blocks(x[..., None], plan.block)[..., 0] for x in rows)
    d_q, d_k, d_v = _backward(q, k, v, lse, delta, d_out, plan)
    return (
        _heads_first(_joined(d_q, length)),
        _heads_first(_joined(d_k, key_length)),
        _heads_first(_joined(d_v, key_length)),
    )


def _heads_first(x):  # [b, s, h, d] -> [b, h, s, d], and back
    return x.transpose(0, 2, 1, 3)


def _blocks(x, block):  # [b, h, s, d] -> [blocks, b, h, block, d], padded at the end
    b, h, s, d = x.shape
    x = jnp.pad(x, ((0, 0), (0, 0), (0, -s % block), (0, 0)))
    return x.reshape(b, h, -1, block, d).transpose(2, 0, 1, 3, 4)


def _joined(x, length):  # the inverse of _blocks
    _, b, h, _, d = x.shape
    return x.transpose(1, 2, 0, 3, 4).reshape(b, h, -1, d)[:, :, :length]


def _product(equation, x, y):
    return jnp.einsum(equation, x, y, preferred_element_type=accumulator(x.dtype))


def _forward(q, k, v, plan):
    """The output, and the log-sum-exp of every query `f32|f64[blocks, b, h, block]`."""
    wide = accumulator(q.dtype)

    def of_queries(_, xs):
        i, q_i = xs

        def add(j, carry):
            top, total, out = carry
            scores = plan.scores(q_i, k[j], i, j)
            new_top = jnp.maximum(top, jnp.max(scores, axis=-1))
            weights = jnp.exp(scores - new_top[..., None])
            shrink = jnp.exp(top - new_top)
            total = total * shrink + jnp.sum(weights, axis=-1)
            part = _product("bhqk,bhkd->bhqd", weights.astype(v.dtype), v[j])
            return new_top, total, out * shrink[..., None] + part

        # key 0 is seen by every query, so that no maximum stays -inf after the first block
        empty = (
            jnp.full_like(q_i, -jnp.inf, wide)[..., 0],
            jnp.zeros_like(q_i, wide)[..., 0],
            jnp.zeros_like(v[0], wide),
        )
        top, total, out = jax.lax.fori_loop(0, plan.num_key_blocks(i), add, empty)
        return None, ((out / total[..., None]).astype(v.dtype), top + jnp.log(total))

    blocks = jnp.arange(q.shape[0], dtype=jnp.int32)
    return jax.lax.scan(of_queries, None, (blocks, q))[1]


def _backward(q, k, v, lse, delta, d_out, plan):
    """Gradients in blocks; padded queries have d_out 0 and add nothing to those of the keys."""
    wide = accumulator(q.dtype)

    def of_queries(carry, xs):
        i, q_i, d_out_i, lse_i, delta_i = xs

        def add(j, carry):
            d_q, d_k, d_v = carry
            weights = jnp.exp(plan.scores(q_i, k[j], i, j) - lse_i[..., None])
            d_weights = _product("bhqd,bhkd->bhqk", d_out_i, v[j])
            d_scores = weights * (d_weights - delta_i[..., None]) * plan.scale
            d_scores, weights = d_scores.astype(q.dtype), weights.astype(v.dtype)
            d_q = d_q + _product("bhqk,bhkd->bhqd", d_scores, k[j])
            d_k = d_k.at[j].add(_product("bhqk,bhqd->bhkd", d_scores, q_i))
            d_v = d_v.at[j].add(_product("bhqk,bhqd->bhkd", weights, d_out_i))
            return d_q, d_k, d_v

        start = (jnp.zeros_like(q_i, wide), *carry)
        d_q, *carry = jax.lax.fori_loop(0, plan.num_key_blocks(i), add, start)
        return tuple(carry), d_q.astype(q.dtype)

    blocks = jnp.arange(q.shape[0], dtype=jnp.int32)
    zeros = (jnp.zeros_like(k, wide), jnp.zeros_like(v, wide))
    (d_k, d_v), d_q = jax.lax.scan(of_queries, zeros, (blocks, q, d_out, lse, delta))
    return d_q, d_k.astype(k.dtype), d_v.astype(v.dtype)
