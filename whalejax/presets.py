"""Ready-made models: `tiny` (the demo), `small` (one GPU), DeepSeek's `v2-lite` and `v3`."""

from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig

TINY = ModelConfig(
    vocab_size=256,
    hidden_size=128,
    intermediate_size=384,
    num_hidden_layers=3,
    mla=MLAConfig(
        num_attention_heads=4,
        q_lora_rank=64,
        kv_lora_rank=64,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    moe=MoEConfig(
        n_routed_experts=8,
        num_experts_per_tok=2,
        moe_intermediate_size=96,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=1.0,
    ),
    num_nextn_predict_layers=1,
    max_position_embeddings=2048,
    initializer_range=0.02,
    eos_token_id=0,
)

SMALL = ModelConfig(
    vocab_size=32768,
    hidden_size=768,
    intermediate_size=2048,
    num_hidden_layers=12,
    mla=MLAConfig(
        num_attention_heads=12,
        q_lora_rank=384,
        kv_lora_rank=256,
        qk_nope_head_dim=128,
        qk_rope_head_dim=64,
        v_head_dim=128,
    ),
    moe=MoEConfig(
        n_routed_experts=16,
        num_experts_per_tok=4,
        moe_intermediate_size=512,
        n_group=4,
        topk_group=2,
        routed_scaling_factor=2.5,
    ),
    num_nextn_predict_layers=1,
    max_position_embeddings=4096,
)

V2_LITE = ModelConfig(
    vocab_size=102400,
    hidden_size=2048,
    intermediate_size=10944,
    num_hidden_layers=27,
    mla=MLAConfig(
        num_attention_heads=16,
        kv_lora_rank=512,
        yarn=YarnConfig(factor=40, mscale=0.707, mscale_all_dim=0.707),
    ),
    moe=MoEConfig(
        n_routed_experts=64,
        num_experts_per_tok=6,
        moe_intermediate_size=1408,
        n_shared_experts=2,
        scoring_func="softmax",
        topk_method="greedy",
        norm_topk_prob=False,
        routed_scaling_factor=1.0,
    ),
    max_position_embeddings=163840,
    initializer_range=0.02,
    bos_token_id=100000,
    eos_token_id=100001,
)

V3 = ModelConfig(
    vocab_size=129280,
    hidden_size=7168,
    intermediate_size=18432,
    num_hidden_layers=61,
    first_k_dense_replace=3,
    mla=MLAConfig(
        num_attention_heads=128,
        q_lora_rank=1536,
        kv_lora_rank=512,
        yarn=YarnConfig(factor=40, mscale=1.0, mscale_all_dim=1.0),
    ),
    moe=MoEConfig(
        n_routed_experts=256,
        num_experts_per_tok=8,
        moe_intermediate_size=2048,
        n_group=8,
        topk_group=4,
        routed_scaling_factor=2.5,
    ),
    num_nextn_predict_layers=1,
    max_position_embeddings=163840,
    bos_token_id=0,
    eos_token_id=1,
)

PRESETS = {"tiny": TINY, "small": SMALL, "v2-lite": V2_LITE, "v3": V3}


def preset(name: str) -> ModelConfig:
    """Looks a preset up by name.

    Raises:
      ValueError: there is no preset of that name; lists those there are.
    """
    if name not in PRESETS:
        raise ValueError(f"preset {name!r} is unknown; there are {', '.join(PRESETS)}")
    return PRESETS[name]
