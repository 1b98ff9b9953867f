"""Paged MLA decode on Hopper: lays out queries and cache, attends, merges what was cut."""

import jax
import jax.numpy as jnp

from whalejax.kernels import mosaic
from whalejax.kernels.backend import mosaic_unusable, no_gpu
from whalejax.kernels.mla.pages import FP8Pages
from whalejax.kernels.mla.plan import Plan, plan_mla_decode
from whalejax.kernels.mla.sizes import BLOCK, ROPE, num_tiles

FP8_V_DIMS = (256, 512)  # of which a thread converts columns of one scale
DTYPES = (jnp.bfloat16, jnp.float16)


def unusable() -> str | None:
    """Says why the kernel cannot be used on this machine, None if it can."""
    return mosaic_unusable() or no_gpu()


def why_not(op: str, arrays: tuple, v_dim: int, *static) -> str | None:
    """Says why the kernel cannot run these arguments, None if it can."""
    q, kv_pages, *_ = arrays
    if reason := mosaic_unusable():
        return reason
    if isinstance(kv_pages, FP8Pages) and v_dim not in FP8_V_DIMS:
        return f"the kernel takes an FP8 cache of v_dim {FP8_V_DIMS}, not {v_dim}"
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


def mla_workers(s_q: int, heads: int) -> int:
    """How many work at the same time: each is a CTA for every 64 rows of queries."""
    return max(mosaic.num_sms() // num_tiles(s_q, heads), 1)


def mla_decode(
    q: jax.Array,
    kv_pages: jax.Array | FP8Pages,
    page_table: jax.Array,
    lengths: jax.Array,
    plan: Plan | None,
    v_dim: int,
    scale: float,
    causal: bool,
) -> tuple[jax.Array, jax.Array]:
    """Attends by a plan, then merges the pieces of the sequences that it cuts."""
    from whalejax.kernels.mla.hopper_kernel import build
    from whalejax.kernels.mla.merge_kernel import build as build_merge
    from whalejax.kernels.mla.worker import Problem

    batch, s_q, heads, d = q.shape
    if plan is None:
        plan = plan_mla_decode(lengths, workers=mla_workers(s_q, heads))
    p = Problem(
        batch=batch,
        s_q=s_q,
        heads=heads,
        v_dim=v_dim,
        workers=plan.bounds.shape[0] - 1,
        page_blocks=kv_pages.shape[1] // BLOCK,
        scale=scale,
        causal=causal,
        dtype=q.dtype,
        fp8=isinstance(kv_pages, FP8Pages),
    )
    num_rows = s_q * heads
    blocks = [a.reshape(-1, BLOCK, a.shape[2]) for a in jax.tree.leaves(kv_pages)]
    rows = jnp.pad(q.reshape(batch, num_rows, d), ((0, 0), (0, p.rows - num_rows), (0, 0)))
    arguments = plan.pieces, plan.bounds, lengths, page_table, rows, *blocks
    pieces, bounds, *arguments = mosaic.unvarying(arguments)
    out, lse, *parts = mosaic.call(build, p, arguments=(bounds, *arguments))
    out, lse = jax.new_ref(out), jax.new_ref(lse)
    if p.workers > 1:  # else nothing can be cut
        mosaic.call(build_merge, p, arguments=(pieces, bounds, *parts, out, lse))
    out = jax.freeze(out)[:, :num_rows, :v_dim].reshape(batch, s_q, heads, v_dim)
    lse = jax.freeze(lse)[:, :num_rows].reshape(batch, s_q, heads)
    return out, lse.transpose(0, 2, 1)
