"""Front doors of paged MLA decode: check sizes, choose a backend, call it."""

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import run
from whalejax.kernels.mla.pages import FP8Pages
from whalejax.kernels.mla.plan import Plan

BACKENDS = {
    "mosaic_gpu": "whalejax.kernels.mla.hopper",
    "xla": "whalejax.kernels.mla.reference",
}


@jax.custom_vjp
def _without_gradient(arrays):
    return arrays


def _refuse(arrays):
    raise NotImplementedError(
        "mla_decode has no gradient: it decodes; whalejax.kernels.attention has one"
    )


_without_gradient.defvjp(_refuse, _refuse)


def mla_decode(
    q: jax.Array,
    kv_pages: jax.Array | FP8Pages,
    page_table: jax.Array,
    lengths: jax.Array,
    *,
    v_dim: int = 512,
    scale: float,
    causal: bool = True,
    plan: Plan | None = None,
    implementation: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Attends from new tokens to a paged latent cache that all heads share.

    Args:
      q: `bf16|f16|f32[b, s_q, h_q, d]`, queries in latent space, the rotary part last.
      kv_pages: `[pages, page_size, d]` of q's dtype; keys, whose first `v_dim` columns are the
        values. Or `FP8Pages`, rotary parts of q's dtype.
      page_table: `i32[b, max_pages]`, the pages of each sequence in order; entries past a
        sequence's pages may hold anything.
      lengths: `i32[b]`, tokens of each sequence in the cache, the s_q new ones included.
      v_dim: width of the values, kv_lora_rank.
      scale: factor on the scores before the softmax.
      causal: query t sees `lengths - (s_q - 1 - t)` keys; otherwise all see `lengths`.
      plan: `plan_mla_decode(lengths, workers=mla_workers(s_q, h_q))`, for the kernel, which makes
        its own without; XLA needs none.
      implementation: `"mosaic_gpu"`, `"xla"`, or None: the kernel where CUDA is lowered for and it
        can run the arguments, XLA elsewhere.

    Returns:
      `out [b, s_q, h_q, v_dim]` in q's dtype and `lse f32[b, h_q, s_q]`, the natural logarithm of
      the sum of exponentials; where a query sees no key, out is 0 and lse +inf. Slots that no
      query sees may hold NaN.

    Raises:
      ValueError: shapes or dtypes do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run, or a gradient is taken;
        says why.

    Source: FlashMLA's interface; the absorbed form is DeepSeek-V2 (arXiv 2405.04434), section 2.1.
    """
    if isinstance(kv_pages, FP8Pages):
        kv_pages.check("mla_decode")
    if q.ndim != 4 or len(kv_pages.shape) != 3 or q.shape[3] != kv_pages.shape[2]:
        raise ValueError(
            f"mla_decode: q.shape={q.shape} must be [b, s_q, h_q, d] and "
            f"kv_pages.shape={kv_pages.shape} [pages, page_size, d] with the same d"
        )
    batch = q.shape[0]
    if page_table.ndim != 2 or page_table.shape[0] != batch or lengths.shape != (batch,):
        raise ValueError(
            f"mla_decode: page_table.shape={page_table.shape} must be [b, max_pages] and "
            f"lengths.shape={lengths.shape} [b] for b={batch}"
        )
    if page_table.dtype != jnp.int32 or lengths.dtype != jnp.int32:
        raise ValueError(
            f"mla_decode: page_table.dtype={page_table.dtype} and lengths.dtype={lengths.dtype} "
            f"must be int32"
        )
    if not 0 < v_dim <= q.shape[3]:
        raise ValueError(f"mla_decode: v_dim={v_dim} must lie in 1..d={q.shape[3]}")
    if q.dtype != kv_pages.dtype:
        raise ValueError(
            f"mla_decode: q.dtype={q.dtype} and kv_pages.dtype={kv_pages.dtype} differ"
        )
    if isinstance(kv_pages, FP8Pages) and kv_pages.latent.shape[2] != v_dim:
        raise ValueError(
            f"mla_decode: v_dim={v_dim} must be the width of "
            f"kv_pages.latent.shape={kv_pages.latent.shape}"
        )
    if plan is not None and plan.pieces.shape[0] != batch:
        raise ValueError(
            f"mla_decode: the plan is for {plan.pieces.shape[0]} sequences, q.shape={q.shape} has "
            f"{batch}"
        )
    q, kv_pages = _without_gradient((q, kv_pages))
    arrays = q, kv_pages, page_table, lengths, plan
    return run("mla_decode", BACKENDS, implementation, arrays, v_dim, scale, causal)


def append(
    kv_pages: jax.Array | FP8Pages,
    latent: jax.Array,
    page_table: jax.Array,
    positions: jax.Array,
) -> jax.Array | FP8Pages:
    """Writes new tokens into their slots of a paged cache.

    Args:
      kv_pages: `[pages, page_size, d]`, or `FP8Pages`, for which tokens are quantised.
      latent: `[b, s, d]`, what the new tokens leave in the cache.
      page_table: `i32[b, max_pages]`.
      positions: `i32[b, s]`, the place of each token in its sequence; a negative one is not
        written.

    Returns:
      The pages with the tokens written, in their own dtype.

    Raises:
      ValueError: shapes do not fit; prints them.
    """
    if isinstance(kv_pages, FP8Pages):
        kv_pages.check("append")
    if latent.shape[:2] != positions.shape or latent.shape[2] != kv_pages.shape[2]:
        raise ValueError(
            f"append: latent.shape={latent.shape} must be [b, s, d] for "
            f"positions.shape={positions.shape} [b, s] and kv_pages.shape={kv_pages.shape}"
        )
    num_pages, page_size, _ = kv_pages.shape
    index = jnp.clip(positions // page_size, 0, page_table.shape[1] - 1)
    page = jnp.take_along_axis(page_table, index, axis=1)
    page = jnp.where(positions < 0, num_pages, page)

    def write(pages, tokens):
        return pages.at[page, positions % page_size].set(tokens.astype(pages.dtype), mode="drop")

    if isinstance(kv_pages, FP8Pages):
        latent = FP8Pages.quantize(latent, kv_pages.latent.shape[2])
    return jax.tree.map(write, kv_pages, latent)
