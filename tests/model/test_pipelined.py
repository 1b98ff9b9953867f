"""Division into stages, and stages one after another against the whole model."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from hypothesis import given
from hypothesis import strategies as st

from whalejax.model.decoder import Decoder, Execution
from whalejax.model.parameters import RouterBias
from whalejax.model.pipelined import Division, divide, from_stages, join, split, to_stages
from whalejax.presets import preset
from whalejax.training.loss import LossConfig, training_loss
from whalejax.training.pipeline import stage_functions, whole_parts

TINY = preset("tiny")


def sized(dense, moe, mtp):
    """The demo's model with other numbers of layers."""
    return dataclasses.replace(
        TINY,
        num_hidden_layers=dense + moe,
        first_k_dense_replace=dense,
        num_nextn_predict_layers=mtp,
    )


@pytest.mark.parametrize(
    ("layers", "stages", "expected"),
    [
        ((1, 2, 1), 4, (0, 1, 1, 0)),  # the demo: a layer in each
        ((0, 8, 0), 4, (2, 2, 2, 2)),
        ((1, 4, 0), 4, (1, 1, 1, 1)),  # 5 layers: the dense one shares, so that no slot is empty
        ((3, 58, 1), 16, (1, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 4, 3, 3, 3)),  # V3
        ((4, 2, 0), 3, (0, 1, 1)),
        ((1, 1, 1), 1, (1,)),
    ],
)
def test_layers_are_shared_out(layers, stages, expected):
    assert divide(sized(*layers), stages).layers == expected


@given(st.integers(0, 5), st.integers(1, 40), st.integers(0, 3), st.integers(1, 16))
def test_no_stage_has_more_layers_than_it_must(dense, moe, mtp, stages):
    config = sized(dense, moe, mtp)
    if moe + (dense > 0) + (mtp > 0) < stages:
        with pytest.raises(ValueError, match=f"num_stages={stages} leaves stages without layers"):
            divide(config, stages)
        return
    counts = list(divide(config, stages).layers)
    assert sum(counts) == moe
    counts[0] += dense
    counts[-1] += mtp
    assert min(counts) >= 1
    fixed = dense + mtp if stages == 1 else max(dense, mtp)
    assert max(counts) <= max(fixed, -(-(dense + moe + mtp) // stages))


def test_a_model_without_experts_has_no_stages():
    config = dataclasses.replace(TINY, first_k_dense_replace=3)
    with pytest.raises(ValueError, match="first_k_dense_replace=3: a pipeline shares out MoE"):
        divide(config, 2)


@pytest.mark.parametrize("layers", [(0, 2, 1, 0), (2, 2, 2), (1, 0, 3)])
def test_what_goes_to_stages_comes_back(layers):
    division, rows = Division(layers), np.arange(3 * sum(layers)).reshape(-1, 3)
    staged = to_stages({"a": jnp.asarray(rows)}, division)
    assert [slot["a"].shape for slot in staged] == [(len(layers), 3)] * max(layers)
    stacked = np.stack([slot["a"] for slot in staged], axis=1)
    np.testing.assert_array_equal(stacked[division.active], rows)
    np.testing.assert_array_equal(from_stages(staged, division)["a"], rows)


@pytest.fixture(scope="module")
def model():
    """Three MoE layers between a dense one and an MTP module; routers that have a bias."""
    model = Decoder(sized(1, 3, 1), rngs=nnx.Rngs(3))
    bias = model.moe_layers.mlp.gate.e_score_correction_bias
    bias[...] = jax.random.normal(jax.random.key(4), bias.shape)
    return model


def parts_of(model):
    return nnx.split(model, nnx.Param, RouterBias)


@pytest.mark.parametrize("stages", [3, 5])
def test_a_split_model_is_whole_again(model, stages):
    _, params, router_bias = parts_of(model)
    division = divide(model.config, stages)
    of_stages, of_ends = split(params, router_bias, division)
    # which stages have a layer in the slot, where not all do
    assert [len(slot) for slot in of_stages] == [3 if stages == 5 else 2]
    whole = join(of_stages, of_ends, division)
    assert jax.tree.structure(whole) == jax.tree.structure(params)
    jax.tree.map(np.testing.assert_array_equal, whole, params)


def in_sequence(model, tokens, stages, microbatches, execution):
    """Loss and parts of the stages, one after another, as the pipeline's functions give them."""
    _, params, router_bias = parts_of(model)
    division = divide(model.config, stages)
    of_stages, of_ends = split(params, router_bias, division)
    first, inner, last = stage_functions(model.config, LossConfig(), execution)

    def of_one(tokens):
        x, stats = first(of_ends, tokens[:, :-1]), []
        for stage in range(stages):
            x, reported = inner(jax.tree.map(lambda a, stage=stage: a[stage], of_stages), x)
            stats.append(reported)
        loss, parts = last(of_ends, x, tokens)
        return loss, (jax.tree.map(lambda *a: jnp.stack(a), *stats), parts)

    each = [of_one(part) for part in jnp.split(tokens, microbatches)]
    loss, aux = jax.tree.map(lambda *a: sum(a), *each)
    return loss / microbatches, whole_parts(*aux, division, microbatches)


@pytest.mark.parametrize("stages", [3, 5])
def test_stages_one_after_another_have_the_loss_of_the_model(model, stages):
    execution = Execution(rematerialise="full")
    tokens = jax.random.randint(jax.random.key(1), (4, 9), 0, 256, jnp.int32)
    loss, parts = jax.jit(lambda m, t: training_loss(m, t, LossConfig(), execution))(model, tokens)
    run = jax.jit(lambda m, t: in_sequence(m, t, stages, 2, execution))
    staged, of_stages = run(model, tokens)
    # sums in another order: a few steps of 2**-24
    np.testing.assert_allclose(staged, loss, rtol=1e-6)
    assert not parts.overflow and np.asarray(parts.load).std() > 0
    for name, value in parts._asdict().items():
        np.testing.assert_allclose(getattr(of_stages, name), value, rtol=1e-6, err_msg=name)
