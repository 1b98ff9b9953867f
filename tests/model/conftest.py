"""Small models of both generations."""

import dataclasses

import pytest

from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig

YARN = YarnConfig(factor=4.0, original_max_position_embeddings=16, beta_fast=8, beta_slow=1,
                  mscale=0.707, mscale_all_dim=0.9)  # fmt: skip
V3_STYLE = ModelConfig(
    vocab_size=61,
    hidden_size=32,
    intermediate_size=40,
    num_hidden_layers=3,
    mla=MLAConfig(
        num_attention_heads=3,
        q_lora_rank=20,
        kv_lora_rank=24,
        qk_nope_head_dim=10,
        qk_rope_head_dim=6,
        v_head_dim=7,
        yarn=YARN,
    ),
    moe=MoEConfig(
        n_routed_experts=8,
        num_experts_per_tok=3,
        moe_intermediate_size=12,
        n_shared_experts=2,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    num_nextn_predict_layers=1,
    initializer_range=0.2,
)
V2_STYLE = dataclasses.replace(
    V3_STYLE,
    num_nextn_predict_layers=0,
    first_k_dense_replace=0,
    mla=dataclasses.replace(V3_STYLE.mla, q_lora_rank=None),
    moe=dataclasses.replace(
        V3_STYLE.moe,
        scoring_func="softmax",
        topk_method="group_limited_greedy",
        norm_topk_prob=True,
        n_shared_experts=1,
    ),
)


@pytest.fixture(scope="session", params=["v3", "v2"])
def config(request):
    """V3's or V2's architecture at a small size, YaRN included."""
    return {"v3": V3_STYLE, "v2": V2_STYLE}[request.param]


@pytest.fixture(scope="session")
def v3_config():
    """V3's architecture with an MTP module."""
    return V3_STYLE
