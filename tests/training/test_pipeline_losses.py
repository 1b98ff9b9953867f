"""A pipeline computes what one device does: losses step by step, and the gradients of a batch."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.model.decoder import Execution
from whalejax.model.linear import PRECISIONS
from whalejax.model.sharding import path_name
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.presets import preset
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.pipeline import PipelineConfig
from whalejax.training.step import StepConfig, compile_step, init_state, mean_gradients

LENGTH, BATCH = 16, 16
MESHES = (MeshConfig(fsdp=1), MeshConfig(stage=4, expert=2, fsdp=1))
# the demo's, but a warm-up short enough for rates that make routers change their minds
OPTIMIZER = OptimizerConfig(peak_lr=4e-3, final_lr=2e-4, warmup_steps=10)


def mesh_of(config):
    """A mesh of as many of the eight devices as it needs, and what runs over it."""
    mesh = make_mesh(config, jax.devices()[: config.stage * config.data * config.expert])
    return mesh, mesh if mesh.size > 1 else None


def losses(precision, mesh_config, steps):
    """Losses of the first steps of 50 on sequences that a model can learn."""
    mesh, over = mesh_of(mesh_config)
    execution = Execution(precision=PRECISIONS[precision], mesh=over)
    config = StepConfig(steps=50, optimizer=OPTIMIZER, execution=execution)
    model, rng = preset("tiny"), np.random.default_rng(0)
    state, step = init_state(model, config, mesh, 0), compile_step(model, config, mesh)
    found = []
    for _ in range(steps):
        starts, strides = rng.integers(0, 256, (BATCH, 1)), rng.integers(1, 4, (BATCH, 1))
        tokens = (starts + strides * np.arange(LENGTH + 1)) % 256
        state, metrics = step(state, tokens[None].astype(np.int32))
        found.append(metrics["loss"])
    return np.asarray(found)


def test_fifty_steps_in_float64_have_the_losses_of_one_device():
    with jax.enable_x64(True):
        one, eight = (losses("f64", mesh, 50) for mesh in MESHES)
    assert one.dtype == eight.dtype == np.float64
    assert one[-1] < 0.9 * one[0]  # it learns: what is compared is no constant
    np.testing.assert_allclose(eight, one, rtol=1e-9)  # float32 anywhere: 1e-7


def test_five_steps_in_float32_have_the_losses_of_one_device():
    one, eight = (losses("f32", mesh, 5) for mesh in MESHES)
    assert one.dtype == eight.dtype == np.float32
    np.testing.assert_allclose(eight, one, rtol=1e-5)
