"""Runs whose checkpoints Orbax wrote, before there was a format of ours, can go on."""

import jax
import numpy as np
import orbax.checkpoint as ocp

from whalejax.checkpoint import CheckpointStore, import_orbax, read_orbax
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.training.checkpoints import Checkpoints
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.step import StepConfig, abstract_state

CONFIG = StepConfig(steps=50, optimizer=OptimizerConfig(peak_lr=5e-3, warmup_steps=5))


def state(abstract):
    """A training state of random bits."""
    rng = np.random.default_rng(0)

    def made(leaf):
        bits = rng.integers(0, 256, int(np.prod(leaf.shape)) * leaf.dtype.itemsize, np.uint8)
        return jax.device_put(bits.view(leaf.dtype).reshape(leaf.shape), leaf.sharding)

    return jax.tree.map(made, abstract)


def test_an_old_run_is_read_onto_another_mesh_and_imported(micro, tmp_path):
    mesh = make_mesh(MeshConfig(data=2, expert=4))
    before = state(abstract_state(micro, CONFIG, mesh, logical=True))
    folder = tmp_path / "run" / "checkpoints"
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(folder, options=options) as manager:
        manager.save(3, args=ocp.args.StandardSave(before))
    other = abstract_state(
        micro, CONFIG, make_mesh(MeshConfig(expert=2), jax.devices()[:2]), logical=True
    )
    after = read_orbax(folder, like=other)
    store = CheckpointStore(tmp_path / "store")
    assert import_orbax(folder, store, like=other) == 3
    for found in (after, store.restore(3, other)):
        assert jax.tree.structure(found) == jax.tree.structure(before)
        for old, new, wanted in zip(*map(jax.tree.leaves, (before, found, other)), strict=True):
            assert new.sharding == wanted.sharding and new.dtype == old.dtype
            assert np.asarray(new).tobytes() == np.asarray(old).tobytes()


def test_training_goes_on_from_them_and_writes_ours(micro, tmp_path):
    abstract = abstract_state(micro, CONFIG, make_mesh(MeshConfig(), jax.devices()[:1]))
    before = state(abstract)
    options = ocp.CheckpointManagerOptions(max_to_keep=2, create=True)
    with ocp.CheckpointManager(tmp_path / "checkpoints", options=options) as manager:
        manager.save(3, args=ocp.args.StandardSave(before))
    with Checkpoints(tmp_path, micro) as checkpoints:
        assert checkpoints.latest() == 3
        after = checkpoints.restore(3, abstract)
        checkpoints.save(3, after)  # nothing was left to do: it is there
        checkpoints.save(4, after)
    with Checkpoints(tmp_path, micro) as checkpoints:
        assert checkpoints.latest() == 4
        found = checkpoints.restore(4, abstract)
    for old, new in zip(jax.tree.leaves(before), jax.tree.leaves(found), strict=True):
        assert np.asarray(new).tobytes() == np.asarray(old).tobytes()
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["3", "4"]
