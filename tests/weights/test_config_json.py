import dataclasses
import json

import pytest

from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from whalejax.presets import TINY, V2_LITE, V3
from whalejax.weights.config_json import parse_config, read_config, write_config

# the published config.json files, without keys that say nothing of the architecture
V3_JSON = {
    "model_type": "deepseek_v3", "vocab_size": 129280, "hidden_size": 7168,
    "intermediate_size": 18432, "num_hidden_layers": 61, "num_attention_heads": 128,
    "num_key_value_heads": 128, "q_lora_rank": 1536, "kv_lora_rank": 512, "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64, "v_head_dim": 128, "n_routed_experts": 256, "n_shared_experts": 1,
    "num_experts_per_tok": 8, "moe_intermediate_size": 2048, "moe_layer_freq": 1, "n_group": 8,
    "topk_group": 4, "scoring_func": "sigmoid", "topk_method": "noaux_tc", "norm_topk_prob": True,
    "routed_scaling_factor": 2.5, "first_k_dense_replace": 3, "num_nextn_predict_layers": 1,
    "max_position_embeddings": 163840, "rms_norm_eps": 1e-6, "initializer_range": 0.02,
    "bos_token_id": 0, "eos_token_id": 1, "rope_theta": 10000, "torch_dtype": "bfloat16",
    "tie_word_embeddings": False, "hidden_act": "silu", "attention_bias": False,
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                     "beta_fast": 32, "beta_slow": 1, "mscale": 1.0, "mscale_all_dim": 1.0},
    "quantization_config": {"activation_scheme": "dynamic", "fmt": "e4m3", "quant_method": "fp8",
                            "weight_block_size": [128, 128]},
    "architectures": ["DeepseekV3ForCausalLM"], "attention_dropout": 0.0, "ep_size": 1,
    "use_cache": True,
}  # fmt: skip
V2_LITE_JSON = {
    "model_type": "deepseek_v2", "vocab_size": 102400, "hidden_size": 2048,
    "intermediate_size": 10944, "num_hidden_layers": 27, "num_attention_heads": 16,
    "q_lora_rank": None, "kv_lora_rank": 512, "qk_nope_head_dim": 128, "qk_rope_head_dim": 64,
    "v_head_dim": 128, "n_routed_experts": 64, "n_shared_experts": 2, "num_experts_per_tok": 6,
    "moe_intermediate_size": 1408, "moe_layer_freq": 1, "n_group": 1, "topk_group": 1,
    "scoring_func": "softmax", "topk_method": "greedy", "norm_topk_prob": False,
    "routed_scaling_factor": 1.0, "first_k_dense_replace": 1, "max_position_embeddings": 163840,
    "rms_norm_eps": 1e-6, "initializer_range": 0.02, "bos_token_id": 100000,
    "eos_token_id": 100001, "rope_theta": 10000, "torch_dtype": "bfloat16",
    "rope_scaling": {"type": "yarn", "factor": 40, "original_max_position_embeddings": 4096,
                     "beta_fast": 32, "beta_slow": 1, "mscale": 0.707, "mscale_all_dim": 0.707},
}  # fmt: skip


def test_the_published_v3_is_our_preset():
    assert parse_config(V3_JSON) == dataclasses.replace(V3, initializer_range=0.02)


def test_the_published_v2_lite_is_our_preset():
    assert parse_config(V2_LITE_JSON) == V2_LITE


def test_transformers_five_spells_it_otherwise():
    values = {k: v for k, v in V3_JSON.items()
              if k not in ("rope_scaling", "rope_theta", "torch_dtype", "scoring_func",
                           "topk_method", "moe_layer_freq")}  # fmt: skip
    values["rope_parameters"] = {**V3_JSON["rope_scaling"], "rope_type": "yarn", "rope_theta": 1e4}
    values["dtype"] = "bfloat16"
    assert parse_config(values) == parse_config(V3_JSON)


@pytest.mark.parametrize("config", [V3, V2_LITE, TINY], ids=["v3", "v2-lite", "tiny"])
def test_written_and_read_again(config):
    values = json.loads(json.dumps(write_config(config, dtype="bfloat16", fp8=False)))
    assert parse_config(values) == config


# no field has the value that it would have if its key were ignored
UNUSUAL = ModelConfig(
    vocab_size=50, hidden_size=40, intermediate_size=30, num_hidden_layers=7,
    mla=MLAConfig(num_attention_heads=3, q_lora_rank=5, kv_lora_rank=6, qk_nope_head_dim=7,
                  qk_rope_head_dim=8, v_head_dim=9, rope_theta=5e5,
                  yarn=YarnConfig(factor=3.0, original_max_position_embeddings=77, beta_fast=9.0,
                                  beta_slow=2.0, mscale=0.6, mscale_all_dim=0.7)),
    moe=MoEConfig(n_routed_experts=12, num_experts_per_tok=2, moe_intermediate_size=11,
                  n_shared_experts=3, n_group=3, topk_group=2, scoring_func="softmax",
                  norm_topk_prob=False, routed_scaling_factor=1.5),
    first_k_dense_replace=2, num_nextn_predict_layers=2, max_position_embeddings=99,
    rms_norm_eps=1e-5, initializer_range=0.1, bos_token_id=3, eos_token_id=4,
)  # fmt: skip


def test_every_key_is_read_and_written():
    values = json.loads(json.dumps(write_config(UNUSUAL, dtype="float32", fp8=False)))
    assert parse_config(values) == UNUSUAL
    scaling = {**values.pop("rope_scaling"), "rope_theta": values.pop("rope_theta")}
    scaling["rope_type"] = scaling.pop("type")
    assert parse_config({**values, "rope_parameters": scaling}) == UNUSUAL
    for name in ("config", "mla", "moe"):
        part = UNUSUAL if name == "config" else getattr(UNUSUAL, name)
        usual = [
            field.name
            for field in dataclasses.fields(part)
            if getattr(part, field.name) == field.default
        ]
        # DeepSeek's code gives the latents' norms a constant of their own
        assert usual == {"config": [], "mla": ["rms_norm_eps"], "moe": ["topk_method"]}[name]


def test_a_model_without_experts_is_dense():
    config = parse_config({**V2_LITE_JSON, "n_routed_experts": None})
    assert config.moe is None and config.num_dense_layers == 27


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"model_type": "llama"}, "model_type='llama'"),
        ({"hidden_size": None, "v_head_dim": None}, "hidden_size is missing; v_head_dim is"),
        ({"moe_layer_freq": 2, "hidden_act": "gelu"},
         "moe_layer_freq=2 is not supported, only 1; hidden_act='gelu'"),
        ({"tie_word_embeddings": True}, "tie_word_embeddings=True"),
        ({"attention_bias": True}, "attention_bias=True"),
        ({"rope_scaling": {"type": "linear", "factor": 2}}, "'linear' is not supported"),
        ({"rope_scaling": {"type": "yarn"}}, "factor is missing"),
        ({"n_group": 7}, "n_group=7"),
        ({"hidden_size": "wide"}, "hidden_size='wide'"),
        ({"rope_scaling": "linear"}, "rope_scaling='linear' must be an object"),
        ({"rope_scaling": {"type": "yarn", "factor": "big"}}, "factor='big' must be a number"),
        ({"rope_scaling": {"type": "yarn", "factor": 2, "attention_factor": 1.5}},
         "attention_factor=1.5 is not supported"),
        ({"rope_theta": [1]}, r"rope_theta=\[1\] must be a number"),
        ({"moe_layer_freq": 2, "rope_scaling": {"type": "linear"}, "rms_norm_eps": "x"},
         "moe_layer_freq=2 .*; rms_norm_eps='x' .*; rope_scaling: type 'linear'"),
        ({"eos_token_id": [1, 2]}, r"eos_token_id=\[1, 2\] must be a whole number"),
        ({"first_k_dense_replace": "3"}, "first_k_dense_replace='3' must be a whole"),
        ({"norm_topk_prob": "no"}, "norm_topk_prob='no' must be true or false"),
        ({"model_type": ["deepseek_v3"]}, "model_type="),
        ({"quantization_config": {"quant_method": "gptq"}}, "quant_method='gptq' is not"),
        ({"quantization_config": {"quant_method": "fp8", "weight_block_size": [64, 64]}},
         r"weight_block_size=\[64, 64\] is not supported, only \[128, 128\]"),
    ],
)  # fmt: skip
def test_what_cannot_be_built_is_named(tmp_path, change, says):
    (tmp_path / "config.json").write_text(json.dumps({**V3_JSON, **change}))
    with pytest.raises(ValueError, match=says) as error:
        read_config(tmp_path)
    assert str(tmp_path) in str(error.value)


def test_null_is_as_good_as_absent():
    optional = ("rope_theta", "rms_norm_eps", "scoring_func", "norm_topk_prob", "hidden_act",
                "quantization_config", "attention_bias")  # fmt: skip
    assert parse_config({**V3_JSON, **dict.fromkeys(optional)}) == parse_config(V3_JSON)


@pytest.mark.parametrize(
    ("text", "says"),
    [("{", "is not JSON"), ("[]", "holds a list"), ("[" * 10**5, "is not JSON")],
    ids=["cut off", "list", "too deep"],
)
def test_what_is_no_config(tmp_path, text, says):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match=says):
        read_config(tmp_path)
