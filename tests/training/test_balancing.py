"""Experts that move during training, against training where they do not."""

import dataclasses
import itertools
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.model.decoder import Execution
from whalejax.model.sharding import path_name
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.training import run
from whalejax.training.balancing import Balancer
from whalejax.training.experts import EPLBConfig, map_experts, unplaced
from whalejax.training.metrics import read_metrics
from whalejax.training.optimizer import OptimizerConfig
from whalejax.training.run import TrainConfig, train
from whalejax.training.step import StepConfig, compile_step, init_state
from whalejax.weights import from_pretrained

EPLB = EPLBConfig(every=2, redundant=2, max_moves=2, delay=1)
OPTIMIZER = OptimizerConfig(peak_lr=5e-3, warmup_steps=2)
STEPS = 6


@pytest.fixture(scope="module")
def six(micro):
    """A model with six experts, which do not divide among four ranks: eight slots do."""
    moe = dataclasses.replace(micro.moe, n_routed_experts=6, n_group=1)
    return dataclasses.replace(micro, moe=moe)


def batch(step, rows=8):
    rng = np.random.default_rng(step)
    return jnp.asarray(rng.integers(0, 40, (1, rows, 33)), jnp.int32)


class Written:
    """Metrics of a run in memory."""

    def __init__(self):
        self.lines = []

    def write(self, **values):
        self.lines.append(values)


def run_of(model, mesh_config, eplb, steps=STEPS):
    """Losses and norms of every step, the last state, plans on the way, and what was moved."""
    devices = jax.devices()[: mesh_config.data * mesh_config.fsdp * mesh_config.expert]
    mesh = make_mesh(mesh_config, devices)
    execution = Execution(mesh=mesh if mesh.size > 1 else None)
    config = StepConfig(steps=50, optimizer=OPTIMIZER, execution=execution, eplb=eplb)
    written, plans, seen = Written(), [], []
    step = compile_step(model, config, mesh)
    with Balancer(model, config, mesh) as balancer:
        state = balancer.start(init_state(model, config, mesh, 0))
        for i in range(steps):
            state, metrics = step(state, batch(i))
            seen.append([float(metrics["loss"]), float(metrics["grad_norm"])])
            plans.append(balancer.plan)
            state = balancer.after(i + 1, state, written)
    return np.array(seen), state, plans, written.lines


@pytest.fixture(scope="module")
def one_device(six):
    return run_of(six, MeshConfig(fsdp=1), EPLBConfig())


@pytest.fixture(scope="module")
def balanced(six):
    return run_of(six, MeshConfig(data=2, fsdp=1, expert=4), EPLB)


def test_moving_experts_changes_no_loss(one_device, balanced):
    np.testing.assert_allclose(balanced[0][:, 0], one_device[0][:, 0], rtol=1e-5)
    np.testing.assert_allclose(balanced[0][:, 1], one_device[0][:, 1], rtol=1e-4)


def test_the_state_without_placement_is_that_of_one_device(one_device, balanced):
    leaves = jax.tree.leaves(one_device[1].params)
    for a, b in zip(leaves, jax.tree.leaves(jax.jit(unplaced)(balanced[1]).params), strict=True):
        # Adam divides gradients near its epsilon by themselves: rounding there is a step's part
        np.testing.assert_allclose(a, b, atol=STEPS * OPTIMIZER.peak_lr * 0.02)
    np.testing.assert_allclose(one_device[1].load_estimate, balanced[1].load_estimate, rtol=1e-5)


def test_replicas_stay_equal_to_the_bit(balanced):
    state, checked = balanced[1], []

    def compare(leaves, placement):
        for layer, slots in enumerate(np.asarray(placement.physical_to_logical)):
            for expert in np.flatnonzero(np.bincount(slots) > 1):
                for path, leaf in leaves.items():
                    rows = np.asarray(leaf)[layer, slots == expert]
                    np.testing.assert_array_equal(rows, rows[:1].repeat(len(rows), 0), path)
                    checked.append(path)
        return leaves

    map_experts(compare, state, state.placement)
    assert any(".mu." in path for path in checked) and any(".nu." in path for path in checked)


def test_plans_are_taken_after_the_delay_and_move_little_at_a_time(balanced):
    _, state, plans, lines = balanced
    assert lines and all(line["step"] > line["planned_at"] for line in lines)
    assert {line["planned_at"] % 2 for line in lines} == {0} and lines[0]["step"] == 3
    for before, after in itertools.pairwise(plans):
        assert (before != after).sum(1).max() <= 2
    # three matrices of 24 x 32 for weights and two moments, float32
    assert lines[0]["migrated_bytes"] == lines[0]["migrated_slots"] * 3 * 3 * 24 * 32 * 4
    assert state.placement.physical_to_logical.shape == (2, 8)
    paths = jax.tree_util.tree_flatten_with_path(state.opt_state)[0]
    assert {x.shape[1] for p, x in paths if ".experts." in path_name(p)} == {8}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"max_moves": 1}, "max_moves=1"),
        ({"every": 4, "delay": 4}, "delay=4"),
        ({"delay": 0}, "delay=0"),
        ({"decay": 1.0}, "decay=1.0"),
        ({"redundant": -1, "every": -2}, "every=-2, redundant=-1"),
    ],
)
def test_settings_out_of_range_are_named(change, says):
    with pytest.raises(ValueError, match=says):
        EPLBConfig(**change)


@pytest.mark.parametrize(
    ("mesh_config", "change", "says"),
    [
        (MeshConfig(), {}, "several ranks of the mesh axis 'expert', but expert=1"),
        (MeshConfig(expert=4), {"redundant": 1}, "are 7 slots, must be a multiple of expert=4"),
    ],
)
def test_slots_that_do_not_fit_the_mesh_are_refused(six, mesh_config, change, says):
    with pytest.raises(ValueError, match=says):
        EPLBConfig(every=4, **change).slots(six, make_mesh(mesh_config))


@pytest.fixture
def few_devices(monkeypatch):
    """Meshes of as many devices as are named."""
    make = run.make_mesh
    monkeypatch.setattr(
        run, "make_mesh", lambda config: make(config, jax.devices()[: config.data * config.expert])
    )


@pytest.fixture
def config(six, monkeypatch, tmp_path):
    model = dataclasses.replace(six, num_nextn_predict_layers=0)  # compiles in half the time
    monkeypatch.setattr(run, "preset", lambda name: model)
    (tmp_path / "text.txt").write_text(" ".join(random.Random(0).choices(["a", "whale"], k=3000)))
    return TrainConfig(
        out=tmp_path / "run",
        data=tmp_path / "text.txt",
        steps=9,
        batch_size=4,
        length=32,
        log_every=1,
        optimizer=OPTIMIZER,
        mesh=MeshConfig(expert=2),
        eplb=EPLB,
    )


def losses(config):
    lines = read_metrics(config.out / "metrics.jsonl")
    return [line["loss"] for line in sorted(lines, key=lambda x: x["step"]) if "loss" in line]


@pytest.mark.usefixtures("few_devices")
@pytest.mark.long
def test_a_run_goes_on_without_balancing_and_with_it_again(config):
    train(config)
    again = dataclasses.replace(config, out=config.out.with_name("again"))
    train(dataclasses.replace(again, stop_at=3))
    plain = {"mesh": MeshConfig(), "eplb": EPLBConfig()}
    train(dataclasses.replace(again, stop_at=6, **plain))
    train(dataclasses.replace(again, mesh=MeshConfig(expert=4)))
    assert len(losses(again)) == 9
    np.testing.assert_allclose(losses(again), losses(config), rtol=1e-4)
    shapes = [read_metrics(again.out / "metrics.jsonl")[i].get("rank_load") for i in (0, -2)]
    assert [np.shape(shape) for shape in shapes] == [(1, 2), (1, 4)]
    for out in (config.out, again.out):
        assert (out / "expert_load.png").stat().st_size > 1000
        exported = from_pretrained(out / "model")
        assert exported.moe_layers.mlp.experts.gate_proj.shape == (1, 6, 24, 32)
