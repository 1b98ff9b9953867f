"""Parameter counts by formula, against abstract shapes: nothing is allocated."""

import math

import jax
import pytest
from flax import nnx

from whalejax.model.decoder import Decoder
from whalejax.model.parameters import RouterBias
from whalejax.presets import PRESETS, V2_LITE, V3, preset


def counts(config):
    """Parameters of the main model and of the MTP modules, from the shapes."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))

    def total(module):
        return sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(module, nnx.Param)))

    mtp = total(model.mtp_layers) if config.num_nextn_predict_layers else 0
    return total(model) - mtp, mtp


def formula(config):
    """The same from the published architecture; the third number is what one token meets."""
    a, m, h = config.mla, config.moe, config.hidden_size
    heads, qk = a.num_attention_heads, a.qk_nope_head_dim + a.qk_rope_head_dim
    if a.q_lora_rank:
        attention = h * a.q_lora_rank + a.q_lora_rank + a.q_lora_rank * heads * qk
    else:
        attention = h * heads * qk
    attention += h * (a.kv_lora_rank + a.qk_rope_head_dim) + a.kv_lora_rank
    attention += a.kv_lora_rank * heads * (a.qk_nope_head_dim + a.v_head_dim)
    attention += heads * a.v_head_dim * h + 2 * h
    expert = 3 * h * m.moe_intermediate_size
    routed = lambda n: h * m.n_routed_experts + expert * (n + m.n_shared_experts)  # noqa: E731
    dense = config.first_k_dense_replace * (attention + 3 * h * config.intermediate_size)
    layers = config.num_hidden_layers - config.first_k_dense_replace
    ends = 2 * config.vocab_size * h + h
    main = dense + layers * (attention + routed(m.n_routed_experts)) + ends
    active = dense + layers * (attention + routed(m.num_experts_per_tok)) + ends
    mtp = attention + routed(m.n_routed_experts) + 2 * h * h + 3 * h
    return main, mtp * config.num_nextn_predict_layers, active


@pytest.mark.parametrize("name", PRESETS)
def test_counts_equal_the_formula(name):
    assert counts(PRESETS[name]) == formula(PRESETS[name])[:2]


def test_v3_is_the_published_size():
    main, mtp, active = formula(V3)
    assert main == 671_026_404_352  # 671B
    assert round(active / 1e9, 1) == 37.6  # 37B active: 36.6 without the embedding
    assert round((active - V3.vocab_size * V3.hidden_size) / 1e9, 1) == 36.6
    assert round(mtp / 1e9, 1) == 11.6  # the report counts 14B with the shared embedding and head
    assert round((mtp + 2 * V3.vocab_size * V3.hidden_size) / 1e9, 1) == 13.5
    assert round((main + mtp + 2 * V3.vocab_size * V3.hidden_size) / 1e9) == 684


def test_v2_lite_is_the_published_size():
    main, mtp, active = formula(V2_LITE)
    assert (round(main / 1e9, 1), mtp) == (15.7, 0)
    assert round(active / 1e9, 1) == 2.7  # the report's 2.4B leave out the embedding
    assert 2.4e9 < active - V2_LITE.vocab_size * V2_LITE.hidden_size < 2.46e9


def test_small_is_about_a_third_of_a_billion():
    assert 0.25e9 < counts(PRESETS["small"])[0] < 0.4e9
    assert counts(PRESETS["tiny"])[0] < 1.5e6


def test_the_routers_bias_is_no_parameter():
    model = nnx.eval_shape(lambda: Decoder(V3, rngs=nnx.Rngs(0)))
    biases = jax.tree.leaves(nnx.state(model, RouterBias))
    assert sum(math.prod(b.shape) for b in biases) == 59 * 256


def test_an_unknown_preset_lists_those_there_are():
    with pytest.raises(ValueError, match="'v4' is unknown; there are tiny, small, v2-lite, v3"):
        preset("v4")
