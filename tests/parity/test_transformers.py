"""Logits against transformers' DeepSeek models in PyTorch, float32, on random small models.

transformers' V2 leaves out YaRN's mscale squared in the attention scale and `norm_topk_prob`, so
those two are off here and tested against the published formulas in tests/model. Without
`mscale_all_dim` it also takes `mscale` for 1, so V2 has 1 here.
"""

import jax.numpy as jnp
import numpy as np
import pytest
import torch
import transformers

from whalejax.weights import from_pretrained, save_pretrained

BASE = {
    "vocab_size": 97, "hidden_size": 64, "intermediate_size": 80, "moe_intermediate_size": 24,
    "num_hidden_layers": 3, "num_attention_heads": 4, "num_key_value_heads": 4,
    "n_shared_experts": 1, "n_routed_experts": 8, "num_experts_per_tok": 2, "kv_lora_rank": 32,
    "q_lora_rank": 24, "qk_rope_head_dim": 8, "qk_nope_head_dim": 16, "v_head_dim": 16,
    "first_k_dense_replace": 1, "max_position_embeddings": 256, "initializer_range": 0.15,
    "routed_scaling_factor": 1.7,
}  # fmt: skip
V3_ONLY = {"n_group": 4, "topk_group": 2, "norm_topk_prob": True}
YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 16,
        "beta_fast": 8, "beta_slow": 1, "mscale": 0.8, "mscale_all_dim": 1.1,
        "rope_theta": 10000.0}  # fmt: skip
V3_CASES = {
    "plain": {},
    "no q_lora": {"q_lora_rank": None},
    "yarn": {"rope_parameters": YARN},
    "two shared, all dense-first 0": {"n_shared_experts": 2, "first_k_dense_replace": 0},
    "dense-first 2": {"first_k_dense_replace": 2},
    # as odd as torch takes: its grouped matmul wants rows of 16 bytes, its RoPE even strides
    "odd sizes": {"hidden_size": 60, "intermediate_size": 37, "moe_intermediate_size": 12,
                  "num_attention_heads": 3, "num_key_value_heads": 3, "kv_lora_rank": 22,
                  "q_lora_rank": 13, "v_head_dim": 10, "qk_nope_head_dim": 10,
                  "qk_rope_head_dim": 6, "vocab_size": 101},
    "one group, not normalised": {"n_group": 1, "topk_group": 1, "norm_topk_prob": False},
}  # fmt: skip
V2_CASES = {
    "plain": {"topk_method": "greedy"},
    "no q_lora": {"topk_method": "greedy", "q_lora_rank": None},
    "groups": {"topk_method": "group_limited_greedy", "n_group": 4, "topk_group": 2},
    "yarn": {"topk_method": "greedy",
             "rope_parameters": {**YARN, "mscale": 1.0, "mscale_all_dim": 0.0}},
    "two shared, dense-first 0": {"topk_method": "greedy", "n_shared_experts": 2,
                                  "first_k_dense_replace": 0},
    "dense-first 2": {"topk_method": "greedy", "first_k_dense_replace": 2},
    "odd sizes": {"topk_method": "greedy", "hidden_size": 60, "intermediate_size": 37,
                  "moe_intermediate_size": 12, "num_attention_heads": 3,
                  "num_key_value_heads": 3, "kv_lora_rank": 22, "q_lora_rank": 13,
                  "v_head_dim": 10, "qk_nope_head_dim": 10, "qk_rope_head_dim": 6,
                  "vocab_size": 101},
}  # fmt: skip


def build(version, change, seed):
    """A transformers model with random norms, and biases that leave all scores positive."""
    torch.manual_seed(seed)
    values = {**BASE, **(V3_ONLY if version == 3 else {"norm_topk_prob": False}), **change}
    config = getattr(transformers, f"DeepseekV{version}Config")(**values)
    model = getattr(transformers, f"DeepseekV{version}ForCausalLM")(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.copy_(1 + 0.2 * torch.randn_like(parameter))
            if name.endswith("mlp.gate.weight") or "experts" in name:
                parameter.copy_(0.15 * torch.randn_like(parameter))
        for name, buffer in model.named_buffers():
            if name.endswith("e_score_correction_bias"):
                buffer.copy_(0.2 * torch.rand_like(buffer))
    return model


def logits(model, tokens):
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


CASES = [(3, name) for name in V3_CASES] + [(2, name) for name in V2_CASES]


@pytest.mark.parametrize(("version", "name"), CASES, ids=lambda v: str(v))
def test_logits_agree_both_ways(version, name, tmp_path):
    change = (V3_CASES if version == 3 else V2_CASES)[name]
    theirs = build(version, change, seed=sum(map(ord, name)))
    tokens = np.random.default_rng(0).integers(0, theirs.config.vocab_size, (2, 40))
    expected = logits(theirs, tokens)
    assert expected.std() > 0.2
    theirs.save_pretrained(tmp_path / "theirs")
    ours = from_pretrained(tmp_path / "theirs")
    got = np.asarray(ours(jnp.asarray(tokens, jnp.int32)))
    assert np.abs(got - expected).max() <= 1e-4

    save_pretrained(ours, tmp_path / "ours")
    cls = type(theirs)
    again = cls.from_pretrained(tmp_path / "ours", dtype=torch.float32).eval()
    assert np.abs(logits(again, tokens) - expected).max() <= 1e-6
