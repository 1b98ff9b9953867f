"""Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434, section 2.1) in its two forms.

Expanded, for training and prefill: keys and values of every head are computed from the latent.
Absorbed, for decode: the up-projections move to the query and the output, so that attention runs
in latent space over a cache of `kv_lora_rank + qk_rope_head_dim` numbers a token.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from whalejax.kernels.attention import attention
from whalejax.kernels.mla import Plan, append, mla_decode
from whalejax.model.config import MLAConfig
from whalejax.model.linear import linear, weight_in
from whalejax.model.parameters import Initializer, rms_norm
from whalejax.model.rope import Rotary, rotate


class MLA(nnx.Module):
    """Weights of the attention of stacked layers, `[layers, out, in]` each."""

    def __init__(self, config: MLAConfig, hidden_size: int, init: Initializer):
        q_width = config.num_attention_heads * config.qk_head_dim
        kv_width = config.num_attention_heads * (config.qk_nope_head_dim + config.v_head_dim)
        if config.q_lora_rank is None:
            self.q_proj = init.normal(q_width, hidden_size)
        else:
            self.q_a_proj = init.normal(config.q_lora_rank, hidden_size)
            self.q_a_layernorm = init.ones(config.q_lora_rank)
            self.q_b_proj = init.normal(q_width, config.q_lora_rank)
        self.kv_a_proj_with_mqa = init.normal(config.cache_dim, hidden_size)
        self.kv_a_layernorm = init.ones(config.kv_lora_rank)
        self.kv_b_proj = init.normal(kv_width, config.kv_lora_rank)
        self.o_proj = init.normal(hidden_size, config.num_attention_heads * config.v_head_dim)


class PagedCache(NamedTuple):
    """What decode reads and writes in a layer: see `kernels.mla.mla_decode`.

    Attributes:
      pages: `[pages, page_size, cache_dim]`, of this layer or of all.
      page_table: `i32[b, max_pages]`, this layer's pages among them.
      lengths: `i32[b]`, tokens in the cache once the new ones are written.
      plan: how the lengths are shared out, the same in all layers.
    """

    pages: jax.Array
    page_table: jax.Array
    lengths: jax.Array
    plan: Plan


def queries(
    p: MLA, x: jax.Array, angles: Rotary, config: MLAConfig, *, fp8: bool = False
) -> tuple[jax.Array, jax.Array]:
    """Queries without position `[b, t, h, nope]` and rotated `[b, t, h, rope]`."""
    if config.q_lora_rank is None:
        q = linear(x, p.q_proj, fp8=fp8)
    else:
        compressed = linear(x, p.q_a_proj, fp8=fp8)
        compressed = rms_norm(compressed, p.q_a_layernorm, config.rms_norm_eps)
        q = linear(compressed, p.q_b_proj, fp8=fp8)
    q = q.reshape(*x.shape[:2], config.num_attention_heads, config.qk_head_dim)
    q_nope, q_rope = jnp.split(q, [config.qk_nope_head_dim], axis=-1)
    return q_nope, rotate(q_rope, angles)


def latents(
    p: MLA, x: jax.Array, angles: Rotary, config: MLAConfig, *, fp8: bool = False
) -> jax.Array:
    """What the tokens leave in the cache: normed latent and rotated key, `[b, t, cache_dim]`."""
    both = linear(x, p.kv_a_proj_with_mqa, fp8=fp8)
    latent, k_rope = jnp.split(both, [config.kv_lora_rank], axis=-1)
    latent = rms_norm(latent, p.kv_a_layernorm, config.rms_norm_eps)
    k_rope = rotate(k_rope[:, :, None], angles)[:, :, 0]
    return jnp.concatenate([latent, k_rope], axis=-1)


def attend_expanded(
    p: MLA,
    x: jax.Array,
    angles: Rotary,
    config: MLAConfig,
    *,
    implementation: str | None = None,
    fp8: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Causal attention among the tokens of x, for training and prefill.

    Args:
      p: weights of one layer.
      x: `bf16|f32|f64[b, t, hidden]`.
      angles: of the positions of x.
      config: sizes.
      implementation: of `kernels.attention`.
      fp8: multiply by the weights in FP8; attention itself keeps x's dtype.

    Returns:
      The output `[b, t, hidden]` and the tokens' latents `[b, t, cache_dim]`.
    """
    heads = config.num_attention_heads
    q = jnp.concatenate(queries(p, x, angles, config, fp8=fp8), axis=-1)
    kept = latents(p, x, angles, config, fp8=fp8)
    latent, k_rope = jnp.split(kept, [config.kv_lora_rank], axis=-1)
    kv = linear(latent, p.kv_b_proj, fp8=fp8).reshape(*x.shape[:2], heads, -1)
    k_nope, v = jnp.split(kv, [config.qk_nope_head_dim], axis=-1)
    k_rope = jnp.broadcast_to(k_rope[:, :, None], (*q.shape[:3], config.qk_rope_head_dim))
    k = jnp.concatenate([k_nope, k_rope], axis=-1)
    with jax.named_scope("attention"):
        out = attention(q, k, v, scale=config.softmax_scale, implementation=implementation)
    out = out.reshape(*x.shape[:2], heads * config.v_head_dim)
    return linear(out, p.o_proj, fp8=fp8), kept


def attend_absorbed(
    p: MLA,
    x: jax.Array,
    angles: Rotary,
    config: MLAConfig,
    cache: PagedCache,
    *,
    fp8: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """Appends the new tokens to the cache and attends to it in latent space.

    Args:
      p: weights of one layer.
      x: `bf16|f32[b, t, hidden]`, the t newest tokens of each sequence.
      angles: of their positions, `lengths - t` to `lengths - 1`.
      config: sizes.
      cache: lengths include the new tokens; a sequence of length 0 is an empty slot.
      fp8: multiply by the weights in FP8, those that are absorbed into attention excepted.

    Returns:
      The output `[b, t, hidden]` and the updated pages.
    """
    batch, new = x.shape[:2]
    positions = cache.lengths[:, None] - new + jnp.arange(new, dtype=jnp.int32)[None]
    positions = jnp.where(cache.lengths[:, None] > 0, positions, -1)
    pages = append(cache.pages, latents(p, x, angles, config, fp8=fp8), cache.page_table, positions)
    up = weight_in(p.kv_b_proj, x.dtype)
    up = up.reshape(config.num_attention_heads, -1, config.kv_lora_rank)
    key_up, value_up = jnp.split(up, [config.qk_nope_head_dim], axis=1)
    q_nope, q_rope = queries(p, x, angles, config, fp8=fp8)
    q_latent = jnp.einsum("bthn,hnc->bthc", q_nope, key_up)
    with jax.named_scope("mla_decode"):
        out, _ = mla_decode(
            jnp.concatenate([q_latent, q_rope], axis=-1).astype(pages.dtype),
            pages,
            cache.page_table,
            cache.lengths,
            v_dim=config.kv_lora_rank,
            scale=config.softmax_scale,
            plan=cache.plan,
        )
    values = jnp.einsum("bthc,hvc->bthv", out.astype(x.dtype), value_up)
    return linear(values.reshape(batch, new, -1), p.o_proj, fp8=fp8), pages
