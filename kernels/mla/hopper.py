"""Paged MLA decode on Hopper: lays out queries and cache, attends, merges what was cut."""

import math

import jax
import jax.numpy as jnp

from whalejax.kernels import mosaic
from whalejax.kernels.backend import mosaic_unusable
from whalejax.kernels.mla.plan import BLOCK, CUT, SEQUENCE, Plan, plan_mla_decode

DTYPES = (jnp.bfloat16, jnp.float16)
ROPE = 64


def why_not(q: jax.Array, kv_pages: jax.Array, v_dim: int) -> str | None:
    """Says why the kernel cannot run these arguments, None if it can."""
    if reason := mosaic_unusable():
        return reason
    if q.dtype not in DTYPES:
        return f"the kernel takes bfloat16 and float16, not {q.dtype}"
    if v_dim % 64 or not 128 <= v_dim <= 512 or q.shape[3] - v_dim != ROPE:
        return (
            f"the kernel takes v_dim in steps of 64 from 128 to 512 and {ROPE} columns of keys "
            f"behind it, not v_dim={v_dim} of d={q.shape[3]}"
        )
    if kv_pages.shape[1] not in (64, 128):
        return f"the kernel takes pages of 64 and 128 keys, not {kv_pages.shape[1]}"
    return None


def workers(s_q: int, heads: int) -> int:
    """How many work at the same time: each is a CTA for every 64 rows of queries."""
    return max(mosaic.num_sms() // -(-s_q * heads // 64), 1)


def mla_decode(
    q: jax.Array,
    kv_pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    v_dim: int,
    scale: float,
    causal: bool,
    plan: Plan | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends by a plan, then merges the pieces of the sequences that it cuts."""
    from whalejax.kernels.mla.hopper_kernel import Problem, build

    batch, s_q, heads, d = q.shape
    if plan is None:
        count, page_size = workers(s_q, heads), kv_pages.shape[1]
        plan = plan_mla_decode(lengths, page_table, page_size=page_size, workers=count)
    p = Problem(
        batch=batch,
        s_q=s_q,
        heads=heads,
        v_dim=v_dim,
        pieces=plan.pieces.shape[0],
        scale=scale,
        causal=causal,
        dtype=q.dtype,
    )
    rows, blocks = q.reshape(batch, s_q * heads, d), kv_pages.reshape(-1, BLOCK, d)
    attend = build(p, plan.steps.shape[0])
    arguments = plan.steps, plan.starts, plan.pieces, rows, blocks
    out, parts, lse = attend(*mosaic.unvarying(arguments))
    out, lse = merge(p, plan, out, parts, lse)
    out = out[:, : s_q * heads].reshape(batch, s_q, heads, v_dim)
    lse = lse[:, : s_q * heads].reshape(batch, s_q, heads).transpose(0, 2, 1)
    return out, lse


def merge(p, plan, out, parts, lse):
    """The output and its sums of exponentials, of whole sequences and of those that were cut."""
    sequence = plan.pieces[:, SEQUENCE]
    real = jnp.arange(p.pieces) < plan.first_piece[-1]
    lse = jnp.where(real[:, None, None], lse.reshape(p.pieces, p.tiles, -1), -jnp.inf)
    lse = jnp.where(lse < -1e20, -jnp.inf, lse)
    top = jax.ops.segment_max(lse, sequence, p.batch)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    weight = jnp.exp2(lse - top[sequence])
    total = jax.ops.segment_sum(weight, sequence, p.batch)
    cut = (plan.pieces[:, CUT] != 0) & real
    share = jnp.where(cut[:, None, None], weight / total[sequence], 0.0)
    # what no piece was written to may hold anything
    parts = jnp.where(cut[:, None, None, None], parts, 0.0)
    merged = jax.ops.segment_sum(parts * share[..., None], sequence, p.batch)
    is_cut = jax.ops.segment_max(cut.astype(jnp.int32), sequence, p.batch) > 0
    merged = merged.reshape(out.shape).astype(out.dtype)
    out = jnp.where(is_cut[:, None, None], jnp.where(jnp.isnan(merged), 0, merged), out)
    lse = jnp.where(total > 0, (top + jnp.log2(total)) * math.log(2), jnp.inf)
    return out, lse.reshape(p.batch, -1)
