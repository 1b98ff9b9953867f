"""The model in FP8: which matmuls change, that their gradients do, and what a GPU would run."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.kernels.backend import mosaic_unusable
from whalejax.kernels.quantization import QuantizedArray, quantize
from whalejax.model.config import MLAConfig, ModelConfig, MoEConfig
from whalejax.model.decoder import Decoder, Execution, forward
from whalejax.model.linear import PRECISIONS, Precision, grouped_linear, linear
from whalejax.model.sharding import shardings
from whalejax.parallel.mesh import MeshConfig, make_mesh

MODEL = ModelConfig(  # all widths multiples of 16, as FP8's rows must be
    vocab_size=64,
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=2,
    num_nextn_predict_layers=0,
    first_k_dense_replace=1,
    mla=MLAConfig(
        num_attention_heads=2,
        q_lora_rank=48,
        kv_lora_rank=32,
        qk_nope_head_dim=32,
        qk_rope_head_dim=16,
        v_head_dim=32,
    ),
    moe=MoEConfig(
        n_routed_experts=4,
        n_shared_experts=1,
        num_experts_per_tok=2,
        moe_intermediate_size=32,
        n_group=1,
        topk_group=1,
    ),
)
FP8 = Execution(precision=Precision(dtype=jnp.float32, fp8=True))
F32 = Execution(precision=PRECISIONS["f32"])


@pytest.fixture(scope="module")
def model():
    return Decoder(MODEL, rngs=nnx.Rngs(0))


@pytest.fixture(scope="module")
def tokens():
    return jax.random.randint(jax.random.key(1), (2, 40), 0, MODEL.vocab_size)


def relative(a, b):
    return float(jnp.linalg.norm(a - b) / jnp.linalg.norm(b))


def loss_of(model, tokens, execution):
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss(params):
        hidden = forward(nnx.merge(graphdef, params, rest), tokens, execution).hidden
        return jnp.mean(jnp.sin(3 * hidden.astype(jnp.float32)))

    return loss, params


def test_differs_from_float32_by_the_rounding_of_fp8(model, tokens):
    run = nnx.jit(forward, static_argnames="execution")
    exact = run(model, tokens, execution=F32).hidden
    rough = run(model, tokens, execution=FP8).hidden
    # e4m3 rounds by 2.6 % of a number at random; a few layers add up
    assert 0.005 < relative(rough, exact) < 0.15


def test_gradients_of_all_weights_are_computed_in_fp8(model, tokens):
    grads = {}
    for name, execution in (("exact", F32), ("fp8", FP8)):
        loss, params = loss_of(model, tokens, execution)
        grads[name] = dict(jax.tree.leaves_with_path(jax.jit(jax.grad(loss))(params)))
    for path, exact in grads["exact"].items():
        name = jax.tree_util.keystr(path)
        if "lm_head" not in name:  # which no hidden state depends on
            # the router's gradients and the first norms' see all roundings that come after them
            assert 0.01 < relative(grads["fp8"][path], exact) < 0.5, name


def test_fp8_weights_are_multiplied_as_they_are():
    keys = jax.random.split(jax.random.key(0), 3)
    x = jax.random.normal(keys[0], (5, 96))
    w = quantize(jax.random.normal(keys[1], (48, 96)), (128, 128))
    product = linear(x, w, fp8=True)
    wanted = quantize(x).dequantize() @ w.dequantize().T
    np.testing.assert_allclose(product, wanted, rtol=1e-4, atol=1e-4)
    assert relative(product, x @ w.dequantize().T) > 0.01  # x was rounded, too
    stacked = quantize(jax.random.normal(keys[2], (3, 48, 96)), (128, 128))
    rows = jax.random.normal(keys[0], (384, 96))
    sizes = jnp.array([100, 0, 7], jnp.int32)
    out = grouped_linear(rows, stacked, sizes, alignment=128, fp8=True)
    first = quantize(rows[:100]).dequantize() @ stacked.dequantize()[0].T
    np.testing.assert_allclose(out[:100], first, rtol=1e-4, atol=1e-4)
    assert not out[100:128].any()


def test_a_width_that_fp8_cannot_take_is_named():
    with pytest.raises(ValueError, match="N=40 and K=96 must be multiples of 16"):
        linear(jnp.ones((2, 96)), jnp.ones((40, 96)), fp8=True)


@pytest.mark.skipif(mosaic_unusable() is not None, reason=str(mosaic_unusable()))
def test_a_gpu_runs_fp8_kernels_forward_and_backward(model, tokens):
    execution = Execution(precision=PRECISIONS["fp8"])
    loss, params = loss_of(model, tokens, execution)
    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    for kernel in ("fp8_matmul", "fp8_wgrad", "fp8_quantize"):
        assert kernel in text


def test_an_fp8_model_decodes_what_its_forward_pass_says(model):
    from whalejax.generation.cache import CacheConfig
    from whalejax.generation.engine import Engine

    config = CacheConfig(num_slots=1, max_length=24, page_size=8)
    engine = Engine(model, config, precision=FP8.precision)
    prompt = [3, 1, 4, 1, 5]
    [completion] = engine.generate([prompt], max_new_tokens=4)
    assert len(completion.tokens) == 4
    weights = nnx.state(model)
    assert not any(isinstance(x, QuantizedArray) for x in jax.tree.leaves(weights))


def over_four_devices(execution, config=MeshConfig(data=2, fsdp=2)):
    mesh = make_mesh(config, jax.devices()[:4])
    return dataclasses.replace(execution, mesh=mesh)


@pytest.mark.parametrize(
    ("batch", "mesh"),
    [
        (4, MeshConfig(data=2, fsdp=2)),
        (8, MeshConfig(data=2, fsdp=2)),
        (4, MeshConfig(data=2, expert=2)),
    ],
    ids=str,
)
def test_devices_that_share_the_batch_give_what_one_gives(model, batch, mesh):
    tokens = jax.random.randint(jax.random.key(2), (batch, 24), 0, MODEL.vocab_size)
    results = []
    for execution in (FP8, over_four_devices(FP8, mesh)):
        loss, params = loss_of(model, tokens, execution)
        if execution.mesh is not None:
            params = jax.device_put(params, shardings(params, execution.mesh))
        results.append(jax.jit(jax.value_and_grad(loss))(params))
    (one, exact), (four, actual) = results
    np.testing.assert_allclose(four, one, rtol=1e-4)
    for (path, a), b in zip(jax.tree.leaves_with_path(actual), jax.tree.leaves(exact), strict=True):
        if "lm_head" not in (name := jax.tree_util.keystr(path)):
            # a device rounds its own tokens together for the gradients of weights
            assert relative(a, b) < 0.1, name


@pytest.mark.skipif(mosaic_unusable() is not None, reason=str(mosaic_unusable()))
def test_kernels_see_the_tokens_of_their_own_device(model):
    """XLA gathers all that a kernel outside of shard_map reads: every device would do all."""
    tokens = jnp.zeros((8, 25), jnp.int32)
    execution = over_four_devices(Execution(precision=PRECISIONS["fp8"]))
    loss, params = loss_of(model, tokens, execution)
    traced = jax.jit(jax.value_and_grad(loss)).trace(params)
    text = traced.lower(lowering_platforms=("cuda",)).as_text()
    kernels = [line for line in text.splitlines() if "custom_call @mosaic_gpu" in line]
    rows = {int(m) for line in kernels for m in re.findall(r"tensor<1x(\d+)x\d+xbf16>", line)}
    assert 2 * 25 in rows and 8 * 25 not in rows


@pytest.mark.parametrize("batch", [1, 6])
def test_a_batch_that_the_devices_do_not_divide_is_named(model, batch):
    tokens = jnp.zeros((batch, 8), jnp.int32)
    with pytest.raises(ValueError, match=f"a batch of {batch} must be a multiple of 4 devices"):
        jax.eval_shape(lambda: forward(model, tokens, over_four_devices(FP8)).hidden)
