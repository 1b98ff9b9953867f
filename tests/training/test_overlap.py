"""Two half-batches of each device in turns, against the whole batch at once."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.model.decoder import Execution
from whalejax.parallel.mesh import MeshConfig, make_mesh
from whalejax.training.experts import EPLBConfig, placed, some_placement
from whalejax.training.run import TrainConfig, prepare
from whalejax.training.step import StepConfig, init_state, mean_gradients


def gradients(model, mesh, eplb=None, **options):
    """Loss, its parts and gradients of one batch, two sequences on each device."""
    config = StepConfig(steps=3, execution=Execution(mesh=mesh, **options))
    state = init_state(model, config, mesh, 0)
    if eplb is not None:
        state = placed(state, some_placement(model, eplb, mesh))
    tokens = jax.random.randint(jax.random.key(1), (1, 16, 9), 0, model.vocab_size, jnp.int32)
    return jax.jit(lambda s, t: mean_gradients(model, config, s, t))(state, tokens)


@pytest.fixture(scope="module")
def deep(micro):
    """Three MoE layers, so that a carried combine is neither first nor last, and an MTP module."""
    moe = dataclasses.replace(micro.moe, n_routed_experts=8)
    return dataclasses.replace(micro, num_hidden_layers=3, first_k_dense_replace=0, moe=moe)


@pytest.fixture(scope="module")
def whole(deep):
    """Loss, parts and gradients without overlap."""
    return gradients(deep, make_mesh(MeshConfig(expert=8)))


@pytest.mark.parametrize(
    ("mesh", "rematerialise"),
    [("expert=8", "full"), ("data=2,expert=4", "none")],
)
def test_halves_give_the_loss_and_the_gradients_of_the_whole(deep, whole, mesh, rematerialise):
    mesh = make_mesh(MeshConfig.parse(mesh))
    check(gradients(deep, mesh, overlap=True, rematerialise=rematerialise), whole)


@pytest.mark.long
def test_halves_find_experts_in_the_slots_of_a_placement(deep):
    mesh, eplb = make_mesh(MeshConfig.parse("data=2,expert=4")), EPLBConfig(every=9, redundant=4)
    check(gradients(deep, mesh, eplb, overlap=True), gradients(deep, mesh, eplb))


def check(halves, whole):
    """Loss, parts and gradients are equal up to rounding."""
    loss, parts, grads = halves
    np.testing.assert_allclose(loss, whole[0], rtol=1e-6)
    np.testing.assert_array_equal(parts.load, whole[1].load)
    np.testing.assert_array_equal(parts.mtp_load, whole[1].mtp_load)
    np.testing.assert_allclose(parts.balance, whole[1].balance, rtol=1e-6)
    for path, got in jax.tree_util.tree_leaves_with_path(grads):
        truth = dict(jax.tree_util.tree_leaves_with_path(whole[2]))[path]
        # sums in another order: 2**-24 a step, over some hundred of them
        np.testing.assert_allclose(got, truth, rtol=0, atol=1e-5 * np.abs(truth).max())


def test_what_cannot_be_halved_is_refused_before_anything_runs(deep, tmp_path):
    with pytest.raises(ValueError, match=r"overlap=True needs a mesh .*'expert': 1"):
        Execution(mesh=make_mesh(MeshConfig(data=8)), overlap=True)
    with pytest.raises(ValueError, match="overlap=True needs a mesh .*None"):
        Execution(overlap=True)
    with pytest.raises(ValueError, match="exchange='peer' with overlap=True must be 'all_to_all'"):
        Execution(mesh=make_mesh(MeshConfig(expert=8)), overlap=True, exchange="peer")
    with pytest.raises(ValueError, match="exchange='nvlink' is unknown; choose from .*'peer'"):
        Execution(exchange="nvlink")
    (tmp_path / "text.txt").write_text("a line of text\n" * 400)
    options = {"data": tmp_path / "text.txt", "out": tmp_path / "run", "length": 16}
    config = TrainConfig(overlap=True, batch_size=24, mesh=MeshConfig.parse("expert=8"), **options)
    with pytest.raises(ValueError, match="8 devices is 3"):
        prepare(config)
    assert not (tmp_path / "run").exists()
