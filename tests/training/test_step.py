import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.model.decoder import Execution
from whalejax.model.linear import PRECISIONS
from whalejax.model.sharding import path_name
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.step import (
    StepConfig,
    abstract_state,
    compile_heldout,
    compile_step,
    init_state,
    model_of,
)

CONFIG = StepConfig(steps=50, optimizer=OptimizerConfig(peak_lr=5e-3, warmup_steps=5))


def one_device():
    return make_mesh(MeshConfig(), jax.devices()[:1])


def batch(seed, rows=8, accumulate=1):
    rng = np.random.default_rng(seed)
    line = np.tile(rng.permutation(40).astype(np.int32), 3)[:33]
    tokens = np.stack([np.roll(line, i) for i in range(rows)])
    return jnp.asarray(tokens.reshape(accumulate, rows // accumulate, 33))


def host(tree):
    return jax.tree.map(np.asarray, tree)


def test_loss_falls_on_a_repeated_line(micro):
    mesh = one_device()
    state, step = init_state(micro, CONFIG, mesh, 0), compile_step(micro, CONFIG, mesh)
    seen = []
    for _ in range(40):
        state, metrics = step(state, batch(0))
        seen.append(float(metrics["loss_main"]))
    assert seen[0] == pytest.approx(np.log(256), abs=0.5)
    assert seen[-1] < 1.5
    assert int(state.step) == 40 and int(state.skipped) == 0


def test_microbatches_give_the_gradient_of_the_whole_batch(micro):
    mesh = one_device()
    ends = []
    for accumulate in (1, 4):
        config = dataclasses.replace(CONFIG, accumulate=accumulate)
        state = init_state(micro, config, mesh, 0)
        _, metrics = compile_step(micro, config, mesh)(state, batch(0, 8, accumulate))
        ends.append(host(metrics))
    for name in ("loss", "loss_main", "loss_mtp", "balance_loss", "grad_norm"):
        np.testing.assert_allclose(ends[0][name], ends[1][name], rtol=2e-5, err_msg=name)
    np.testing.assert_array_equal(ends[0]["load"], ends[1]["load"])


@pytest.mark.parametrize(
    "mesh_config",
    [MeshConfig(data=2), MeshConfig(data=2, expert=4), MeshConfig(fsdp=2, expert=4)],
    ids=str,
)
def test_eight_devices_compute_what_one_does(micro, mesh_config):
    results = []
    for mesh in (one_device(), make_mesh(mesh_config)):
        execution = Execution(mesh=mesh if mesh.size > 1 else None)
        config = dataclasses.replace(CONFIG, execution=execution)
        state, step = init_state(micro, config, mesh, 0), compile_step(micro, config, mesh)
        for _ in range(3):
            state, metrics = step(state, batch(1))
        results.append((host(metrics), state))
    (one, _), (eight, state) = results
    for name in ("loss", "grad_norm"):
        np.testing.assert_allclose(one[name], eight[name], rtol=1e-4, err_msg=name)
    np.testing.assert_allclose(one["load"], eight["load"], atol=1e-6)
    cut = {
        path_name(p)
        for p, x in jax.tree_util.tree_flatten_with_path(state.params)[0]
        if not x.sharding.is_fully_replicated
    }
    assert "moe_layers.mlp.experts.gate_proj" in cut
    assert ("lm_head" in cut) == (mesh.shape["fsdp"] > 1)


def test_a_step_that_is_not_finite_changes_nothing_and_is_counted(micro):
    mesh = one_device()
    state, step = init_state(micro, CONFIG, mesh, 0), compile_step(micro, CONFIG, mesh)
    state, _ = step(state, batch(0))
    poisoned = dataclasses.replace(
        state,
        params=jax.tree.map(lambda x: x.at[..., 0].set(jnp.inf), state.params),
    )
    before = host(poisoned)
    after, metrics = step(poisoned, batch(0))
    after = host(after)
    jax.tree.map(np.testing.assert_array_equal, before.params, after.params)
    jax.tree.map(np.testing.assert_array_equal, before.opt_state, after.opt_state)
    jax.tree.map(np.testing.assert_array_equal, before.router_bias, after.router_bias)
    assert (after.step, after.skipped, after.bad_streak) == (2, 1, 1)
    assert int(metrics["bad_streak"]) == 1


def test_router_bias_moves_by_its_speed_against_the_load(micro):
    mesh = one_device()
    state, step = init_state(micro, CONFIG, mesh, 0), compile_step(micro, CONFIG, mesh)
    state, metrics = step(state, batch(0))
    load = np.asarray(metrics["load"])
    biases = [np.asarray(x) for x in jax.tree.leaves(state.router_bias)]
    expected = np.sign(0.25 - load) * np.float32(CONFIG.optimizer.bias_update_speed)
    np.testing.assert_allclose(np.concatenate(biases), expected, atol=1e-9)
    assert np.abs(expected).max() > 0


def test_the_routers_bias_has_no_gradient_and_no_moments(micro):
    state = abstract_state(micro, CONFIG, one_device())
    paths = [path_name(p) for p, _ in jax.tree_util.tree_flatten_with_path(state.opt_state)[0]]
    assert not any("e_score_correction_bias" in path for path in paths)
    assert any("mlp.experts.down_proj" in path for path in paths)


def test_heldout_loss_is_the_main_loss(micro):
    mesh = one_device()
    state, step = init_state(micro, CONFIG, mesh, 0), compile_step(micro, CONFIG, mesh)
    tokens = batch(0)
    loss = compile_heldout(micro, CONFIG.execution, mesh)
    total = loss(state.params, state.router_bias, None, tokens[0], jnp.ones((8, 32)))
    _, metrics = step(state, tokens)
    np.testing.assert_allclose(total / (8 * 32), metrics["loss_main"], rtol=1e-6)


def test_bfloat16_computes_on_float32_weights(micro):
    config = dataclasses.replace(CONFIG, execution=Execution(precision=PRECISIONS["bf16"]))
    mesh = one_device()
    state = init_state(micro, config, mesh, 0)
    state, metrics = compile_step(micro, config, mesh)(state, batch(0))
    assert {x.dtype for x in jax.tree.leaves(state.params)} == {np.dtype("float32")}
    exact = compile_step(micro, CONFIG, mesh)(init_state(micro, CONFIG, mesh, 0), batch(0))[1]
    # bfloat16 keeps 8 bits: near the float32 loss, and not equal to it
    assert 0 < abs(float(metrics["loss"]) - float(exact["loss"])) < 0.05


def test_the_state_rebuilds_the_model(micro):
    state = init_state(micro, CONFIG, one_device(), 0)
    tokens = batch(0)[0, :2, :-1]
    model = model_of(micro, state)
    assert isinstance(model, nnx.Module)
    assert model(tokens).shape == (2, 32, 256)
