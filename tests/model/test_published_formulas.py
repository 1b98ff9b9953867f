"""The whole model against a float64 NumPy transcription of the published formulas.

DeepSeek-V2 (arXiv 2405.04434) and V3 (2412.19437), with YaRN (2309.00071) as DeepSeek's own code
applies it: both mscales on the rotary part, mscale_all_dim squared on the attention scale.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.model.decoder import Decoder
from whalejax.model.parameters import RouterBias
from whalejax.weights.names import dotted


def rms(x, w):
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + 1e-6) * w


def silu(x):
    return x / (1 + np.exp(-x))


def yarn_frequencies(dim, theta, yarn):
    base = theta ** (np.arange(0, dim, 2) / dim)
    fast, slow = 1 / base, 1 / (yarn.factor * base)

    def correction(rotations):
        return (dim * math.log(yarn.original_max_position_embeddings / (rotations * 2 * math.pi))
                / (2 * math.log(theta)))  # fmt: skip

    low = max(math.floor(correction(yarn.beta_fast)), 0)
    high = min(math.ceil(correction(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / max(high - low, 0.001), 0, 1)
    return slow * ramp + fast * (1 - ramp)


def mscale(factor, m):
    return 0.1 * m * math.log(factor) + 1 if factor > 1 else 1.0


def rope(x, a):
    """Turns interleaved pairs of [t, h, d] as complex numbers."""
    frequencies = yarn_frequencies(x.shape[-1], a.rope_theta, a.yarn)
    angle = np.arange(len(x))[:, None, None] * frequencies
    size = mscale(a.yarn.factor, a.yarn.mscale) / mscale(a.yarn.factor, a.yarn.mscale_all_dim)
    z = (x[..., 0::2] + 1j * x[..., 1::2]) * np.exp(1j * angle) * size
    return np.stack([z.real, z.imag], -1).reshape(x.shape)


def attention(p, x, a):
    t, heads = len(x), a.num_attention_heads
    if a.q_lora_rank is None:
        q = x @ p["q_proj"].T
    else:
        q = rms(x @ p["q_a_proj"].T, p["q_a_layernorm"]) @ p["q_b_proj"].T
    q = q.reshape(t, heads, -1)
    q = np.concatenate([q[..., : a.qk_nope_head_dim], rope(q[..., a.qk_nope_head_dim :], a)], -1)
    compressed = x @ p["kv_a_proj_with_mqa"].T
    k_rope = rope(compressed[:, None, a.kv_lora_rank :], a)
    kv = rms(compressed[:, : a.kv_lora_rank], p["kv_a_layernorm"]) @ p["kv_b_proj"].T
    kv = kv.reshape(t, heads, -1)
    k = np.concatenate([kv[..., : a.qk_nope_head_dim], np.repeat(k_rope, heads, 1)], -1)
    scale = q.shape[-1] ** -0.5 * mscale(a.yarn.factor, a.yarn.mscale_all_dim) ** 2
    scores = np.einsum("qhd,khd->hqk", q, k) * scale
    scores = np.where(np.tril(np.ones((t, t), bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    out = np.einsum("hqk,khd->qhd", weights, kv[..., a.qk_nope_head_dim :])
    return out.reshape(t, -1) @ p["o_proj"].T


def mlp(p, x):
    return (silu(x @ p["gate_proj"].T) * (x @ p["up_proj"].T)) @ p["down_proj"].T


def choose(scores, bias, m):
    """Expert numbers and weights of one token, as published."""
    order = scores + bias
    if m.topk_method != "greedy":
        groups = order.reshape(m.n_group, -1)
        best = 2 if m.topk_method == "noaux_tc" else 1
        strength = np.sort(groups, -1)[:, -best:].sum(-1)
        kept = np.argsort(-strength)[: m.topk_group]
        mask = np.full(groups.shape, -np.inf)
        mask[kept] = 0
        order = (groups + mask).reshape(-1)
    chosen = np.argsort(-order)[: m.num_experts_per_tok]
    weights = scores[chosen]
    if m.norm_topk_prob:
        weights = weights / (weights.sum() + 1e-20)
        if m.topk_method == "noaux_tc":
            weights = weights * m.routed_scaling_factor
    else:
        weights = weights * m.routed_scaling_factor
    return chosen, weights


def moe(p, x, m):
    z = x @ p["gate.weight"].T
    scores = 1 / (1 + np.exp(-z))
    if m.scoring_func == "softmax":
        scores = np.exp(z - z.max(-1, keepdims=True))
        scores /= scores.sum(-1, keepdims=True)
    out = np.zeros_like(x)
    for t in range(len(x)):
        for e, w in zip(
            *choose(scores[t], p.get("gate.e_score_correction_bias", 0), m), strict=True
        ):
            names = ("gate_proj", "up_proj", "down_proj")
            out[t] += w * mlp({n: p[f"experts.{n}"][e] for n in names}, x[t])
    shared = {n.removeprefix("shared_experts."): w for n, w in p.items() if "shared" in n}
    return out + (mlp(shared, x) if shared else 0)


def inside(p, prefix):
    return {n.removeprefix(prefix): w for n, w in p.items() if n.startswith(prefix)}


def reference(model, tokens):
    config = model.config
    params = {
        dotted(path): np.asarray(x, np.float64)
        for path, x in jax.tree_util.tree_flatten_with_path(nnx.state(model))[0]
    }
    x = params["embed_tokens"][tokens]
    for layer in range(config.num_hidden_layers):
        dense = layer < config.num_dense_layers
        kind = "dense_layers." if dense else "moe_layers."
        index = layer if dense else layer - config.num_dense_layers
        p = {n: w[index] for n, w in inside(params, kind).items()}
        x = x + attention(inside(p, "self_attn."), rms(x, p["input_layernorm"]), config.mla)
        h = rms(x, p["post_attention_layernorm"])
        x = x + (mlp(inside(p, "mlp."), h) if dense else moe(inside(p, "mlp."), h, config.moe))
    return rms(x, params["norm"]) @ params["lm_head"].T


def perturbed(config, seed):
    """A model whose norms and biases are not trivial."""
    model = Decoder(config, rngs=nnx.Rngs(seed))
    rng = np.random.default_rng(seed)

    def shake(path, x):
        noise = jnp.asarray(rng.normal(size=x.shape), x.dtype)
        return x * (1 + 0.2 * noise) if "norm" in dotted(path) else x

    nnx.update(model, jax.tree_util.tree_map_with_path(shake, nnx.state(model, nnx.Param)))
    biases = nnx.state(model, RouterBias)
    nnx.update(model, jax.tree.map(
        lambda b: jnp.asarray(rng.normal(size=b.shape) * 0.3, b.dtype), biases))  # fmt: skip
    return model


logits_of = nnx.jit(lambda model, tokens: model(tokens))  # compiled once for both seeds

CHANGES = [
    {},
    {"norm_topk_prob": False},
    {"n_shared_experts": 0},
    {"n_group": 1, "topk_group": 1},
    {"topk_method": "greedy", "n_group": 1, "topk_group": 1},
]


@pytest.mark.parametrize("seed", [0, 1])
@pytest.mark.parametrize("change", CHANGES, ids=lambda c: ",".join(c) or "as published")
def test_logits_equal_the_published_formulas(config, change, seed):
    config = dataclasses.replace(config, moe=dataclasses.replace(config.moe, **change))
    model = perturbed(config, seed)
    tokens = np.random.default_rng(seed).integers(0, config.vocab_size, 21)
    expected = reference(model, tokens)
    got = np.asarray(logits_of(model, jnp.asarray(tokens[None], jnp.int32)))[0]
    assert expected.std() > 0.3
    # float32 through three layers; a near tie in the router may flip one token's choice
    error = np.abs(got - expected).max(-1)
    assert np.sort(error)[: len(error) - 1].max() < 1e-4 * np.abs(expected).max(), error
