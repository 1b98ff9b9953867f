"""A model small enough that compilation is what its tests wait for."""

import pytest

from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig


@pytest.fixture(scope="session")
def micro() -> ModelConfig:
    """One dense layer, one MoE layer, one MTP module."""
    return ModelConfig(
        vocab_size=256,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        mla=MLAConfig(
            num_attention_heads=2,
            q_lora_rank=16,
            kv_lora_rank=16,
            qk_nope_head_dim=8,
            qk_rope_head_dim=4,
            v_head_dim=8,
        ),
        moe=MoEConfig(
            n_routed_experts=4,
            num_experts_per_tok=2,
            moe_intermediate_size=24,
            n_group=2,
            topk_group=1,
            routed_scaling_factor=2.5,
        ),
        num_nextn_predict_layers=1,
        initializer_range=0.05,
        eos_token_id=0,
    )
