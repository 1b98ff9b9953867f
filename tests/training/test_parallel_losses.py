"""Expert parallelism computes what one device does: the demo's model, step by step."""

import dataclasses

import jax
import numpy as np
import pytest

from whalejax.model.decoder import Execution
from whalejax.model.linear import PRECISIONS
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.presets import preset
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.step import StepConfig, compile_step, init_state

LENGTH, BATCH = 16, 8
MESHES = (MeshConfig(), MeshConfig(data=2, expert=4))
# the demo's, but a warm-up short enough for rates that make routers change their minds
OPTIMIZER = OptimizerConfig(peak_lr=4e-3, final_lr=2e-4, warmup_steps=10)


def losses(precision, mesh_config, steps):
    """Losses of the first steps of 50 on sequences that a model can learn, and the last state."""
    devices = mesh_config.data * mesh_config.expert
    mesh = make_mesh(mesh_config, jax.devices()[:devices])
    execution = Execution(precision=PRECISIONS[precision], mesh=mesh if devices > 1 else None)
    config = StepConfig(steps=50, optimizer=OPTIMIZER, execution=execution)
    model, rng = preset("tiny"), np.random.default_rng(0)
    state, step = init_state(model, config, mesh, 0), compile_step(model, config, mesh)
    found = []
    for _ in range(steps):
        starts, strides = rng.integers(0, 256, (BATCH, 1)), rng.integers(1, 4, (BATCH, 1))
        tokens = (starts + strides * np.arange(LENGTH + 1)) % 256
        state, metrics = step(state, tokens[None].astype(np.int32))
        found.append(metrics["loss"])
    return np.asarray(found), state


@pytest.mark.long
def test_fifty_steps_in_float64_have_the_losses_of_one_device():
    with jax.enable_x64(True):
        (one, state), (eight, _) = (losses("f64", mesh, 50) for mesh in MESHES)
    state = dataclasses.replace(state, load_estimate=None)  # plans come from it, and no loss
    floats = {x.dtype for x in jax.tree.leaves(state) if x.dtype != np.int32}
    assert one.dtype == np.float64 and floats == {np.dtype("float64")}
    assert one[-1] < 0.9 * one[0]  # it learns: what is compared is no constant
    np.testing.assert_allclose(eight, one, rtol=1e-9)  # 1e-13 was seen; float32 anywhere: 1e-7


@pytest.mark.slow
def test_five_steps_in_float32_have_the_losses_of_one_device():
    (one, _), (eight, _) = (losses("f32", mesh, 5) for mesh in MESHES)
    assert one.dtype == np.float32
    np.testing.assert_allclose(eight, one, rtol=1e-5)


def test_float64_without_x64_is_refused():
    with pytest.raises(ValueError, match="needs jax_enable_x64, which is False"):
        Execution(precision=PRECISIONS["f64"])
