"""Paged MLA decode in plain XLA: the definition, and the backend of machines without a GPU."""

import jax
import jax.numpy as jnp

from whalejax.kernels.mla.pages import FP8Pages
from whalejax.kernels.mla.plan import Plan


def why_not(op: str, arrays: tuple, *static) -> str | None:
    """Runs everywhere."""
    return None


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
    """Gathers each sequence's pages and attends to them, softmax in float32."""
    del plan  # every sequence is attended to as a whole
    batch, s_q = q.shape[:2]
    num_pages, page_size, width = kv_pages.shape
    used = jnp.clip(page_table, 0, num_pages - 1)
    keys = jax.tree.map(lambda pages: pages[used], kv_pages)
    if isinstance(keys, FP8Pages):
        keys = keys.dequantize(q.dtype)
    keys = keys.reshape(batch, page_table.shape[1] * page_size, width)
    place = jnp.arange(keys.shape[1], dtype=lengths.dtype)[None]
    # unused slots may hold NaN, and 0 * NaN is NaN: clear them before any product
    keys = jnp.where((place < lengths[:, None])[:, :, None], keys, 0)
    back = jnp.arange(s_q - 1, -1, -1, dtype=lengths.dtype)[None] * int(causal)
    visible = place[:, None] < (lengths[:, None] - back)[:, :, None]
    scores = jnp.einsum("bqhd,bkd->bhqk", q, keys, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(visible[:, None], scores, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    seen = jnp.isfinite(lse)
    weights = jnp.exp(scores - jnp.where(seen, lse, 0.0)[..., None])
    out = jnp.einsum(
        "bhqk,bkv->bqhv",
        weights.astype(q.dtype),
        keys[..., :v_dim],
        preferred_element_type=jnp.float32,
    )
    return out.astype(q.dtype), jnp.where(seen, lse, jnp.inf)
