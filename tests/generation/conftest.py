"""Two small models, one of each generation, of bytes so that they can write text."""

import dataclasses

import jax
import pytest
from flax import nnx

from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from whalejax.model.decoder import Decoder

V3_STYLE = ModelConfig(
    vocab_size=256,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=2,
    mla=MLAConfig(
        num_attention_heads=2,
        q_lora_rank=20,
        kv_lora_rank=24,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=7,
    ),
    moe=MoEConfig(
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    num_nextn_predict_layers=1,
    max_position_embeddings=64,
    initializer_range=0.3,
)
V2_STYLE = dataclasses.replace(
    V3_STYLE,
    num_nextn_predict_layers=0,
    mla=dataclasses.replace(
        V3_STYLE.mla,
        q_lora_rank=None,
        yarn=YarnConfig(
            factor=4.0, original_max_position_embeddings=16, mscale=0.7, mscale_all_dim=0.7
        ),
    ),
    moe=MoEConfig(
        n_routed_experts=6,
        num_experts_per_tok=2,
        moe_intermediate_size=12,
        n_shared_experts=2,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
    ),
)


@pytest.fixture(scope="session", params=["v3", "v2"])
def model(request):
    """V3's or V2-Lite's architecture, float32."""
    return Decoder({"v3": V3_STYLE, "v2": V2_STYLE}[request.param], rngs=nnx.Rngs(5))


@pytest.fixture(scope="session")
def v3_model():
    """V3's architecture alone."""
    return Decoder(V3_STYLE, rngs=nnx.Rngs(5))


@pytest.fixture(scope="session")
def prompts():
    """Prompts that end before, on and behind the edge of a page of 8."""
    keys = jax.random.split(jax.random.key(1), 6)
    lengths = (1, 5, 8, 17, 9, 3)
    return [
        jax.random.randint(k, (n,), 0, 256).tolist() for k, n in zip(keys, lengths, strict=True)
    ]
