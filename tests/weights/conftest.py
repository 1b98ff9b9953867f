"""Small models with and without the parts that change a directory's tensors."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.kernels.quantization import QuantizedArray
from whalejax.kernels.quantization.array import scales_shape
from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig, YarnConfig
from whalejax.model.decoder import Decoder
from whalejax.weights.names import dotted

V3 = ModelConfig(
    vocab_size=48,
    hidden_size=136,
    intermediate_size=140,
    num_hidden_layers=3,
    mla=MLAConfig(
        num_attention_heads=2,
        q_lora_rank=24,
        kv_lora_rank=16,
        qk_nope_head_dim=8,
        qk_rope_head_dim=4,
        v_head_dim=8,
        yarn=YarnConfig(factor=4.0, mscale=0.7, mscale_all_dim=0.9),
    ),
    moe=MoEConfig(
        n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=24, n_group=2,
        topk_group=1, routed_scaling_factor=2.5,
    ),
    num_nextn_predict_layers=1,
    bos_token_id=1,
    eos_token_id=2,
)  # fmt: skip
V2 = dataclasses.replace(
    V3,
    num_nextn_predict_layers=0,
    mla=dataclasses.replace(V3.mla, q_lora_rank=None, yarn=None),
    moe=dataclasses.replace(
        V3.moe, scoring_func="softmax", topk_method="greedy", norm_topk_prob=False, n_group=1
    ),
)


def make(config, dtype=jnp.float32, seed=0):
    """A model whose every parameter is random, drawn by NumPy: nothing is compiled."""
    graphdef, state = nnx.split(
        nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0), dtype=dtype))
    )
    rng = np.random.default_rng(seed)

    def draw(path, x):
        std = 0.05 if len(x.shape) > 2 else 1.0
        return jnp.asarray(rng.normal(size=x.shape) * std, x.dtype)

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(draw, state))


def quantised(model, seed=0):
    """The model with its projections in FP8, as published checkpoints have them."""
    graphdef, state = nnx.split(model)
    rng = np.random.default_rng(seed)

    def to_fp8(path, x):
        if "_proj" not in dotted(path) or "eh_proj" in dotted(path):
            return x
        values = jnp.asarray(rng.normal(size=x.shape) * 40, jnp.float8_e4m3fn)
        scales = rng.uniform(0.001, 0.01, scales_shape(x.shape, (128, 128)))
        return QuantizedArray(values, jnp.asarray(scales, jnp.float32), (128, 128))

    return nnx.merge(graphdef, jax.tree_util.tree_map_with_path(to_fp8, state))


@pytest.fixture(scope="session", params=["v3", "v2"])
def model(request):
    """A float32 model of each generation."""
    return make({"v3": V3, "v2": V2}[request.param])


@pytest.fixture(scope="session")
def v3_model():
    """A float32 model with an MTP module."""
    return make(V3)


@pytest.fixture(scope="session")
def bf16_model():
    """A bfloat16 model."""
    return make(V3, jnp.bfloat16)


@pytest.fixture(scope="session")
def fp8_model():
    """A bfloat16 model whose projections are FP8."""
    return quantised(make(V3, jnp.bfloat16))
