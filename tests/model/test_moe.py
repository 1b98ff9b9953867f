import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.model.config import MoEConfig
from whalejax.model.decoder import Execution
from whalejax.model.moe import MoE, Routing, balance_loss, moe, route
from whalejax.model.parameters import Initializer
from whalejax.parallel.expert import Placement
from whalejax.parallel.mesh import MeshConfig, make_mesh

CONFIG = MoEConfig(
    n_routed_experts=8, num_experts_per_tok=2, moe_intermediate_size=12, n_group=4, topk_group=2,
    routed_scaling_factor=2.5,
)  # fmt: skip
HIDDEN = 16


def layer(config=CONFIG, seed=0):
    init = Initializer(nnx.Rngs(seed), std=0.4, dtype=jnp.float32)
    return MoE(HIDDEN, config, init)


def tokens(batch=8, length=6, seed=0):
    return jax.random.normal(jax.random.key(seed), (batch, length, HIDDEN))


def test_experts_come_from_the_best_groups():
    p, x = layer(), tokens()
    routing = route(p.gate, x, CONFIG)
    scores = np.asarray(routing.scores).reshape(-1, 4, 2)
    allowed = np.argsort(-scores.sum(-1), axis=-1)[:, :2]  # both experts of a group count
    groups = np.asarray(routing.topk_idx).reshape(-1, 2) // 2
    assert all(set(g) <= set(a) for g, a in zip(groups, allowed, strict=True))
    free = route(p.gate, x, dataclasses.replace(CONFIG, n_group=1, topk_group=1))
    assert (np.sort(free.topk_idx) != np.sort(routing.topk_idx)).any()


def test_the_bias_moves_the_choice_and_not_the_weights():
    p, x = layer(), tokens()
    config = dataclasses.replace(CONFIG, n_group=1, topk_group=1, num_experts_per_tok=1)
    before = route(p.gate, x, config)
    p.gate.e_score_correction_bias[...] = jnp.zeros(8).at[3].set(10.0)
    after = route(p.gate, x, config)
    assert (np.asarray(after.topk_idx) == 3).all() and (np.asarray(before.topk_idx) != 3).any()
    np.testing.assert_array_equal(before.scores, after.scores)
    np.testing.assert_allclose(after.topk_weights[..., 0], after.scores[..., 3] * 2.5, rtol=1e-6)


def test_weights_are_normalised_and_scaled_as_each_version_publishes():
    p, x = layer(), tokens()
    v3 = route(p.gate, x, CONFIG)
    np.testing.assert_allclose(v3.topk_weights.sum(-1), 2.5, rtol=1e-5)
    v2 = dataclasses.replace(CONFIG, scoring_func="softmax", topk_method="group_limited_greedy")
    np.testing.assert_allclose(route(p.gate, x, v2).topk_weights.sum(-1), 1.0, rtol=1e-5)
    plain = dataclasses.replace(v2, norm_topk_prob=False)
    routing = route(p.gate, x, plain)
    picked = np.take_along_axis(np.asarray(routing.scores), np.asarray(routing.topk_idx), -1)
    np.testing.assert_allclose(routing.topk_weights, picked * 2.5, rtol=1e-6)


def test_no_gradient_reaches_the_bias():
    p, x = layer(), tokens()
    graphdef, state = nnx.split(p)

    def value(state):
        out, stats = moe(nnx.merge(graphdef, state), x, CONFIG)
        return jnp.sum(out**2) + stats.balance_loss

    grads = nnx.merge(graphdef, jax.grad(value)(state))
    assert (np.asarray(grads.gate.e_score_correction_bias[...]) == 0).all()
    assert np.abs(grads.gate.weight[...]).max() > 0


def test_balance_loss_is_the_published_sum():
    rng = np.random.default_rng(0)
    scores = rng.uniform(size=(3, 5, 8))
    idx = np.stack([[rng.permutation(8)[:2] for _ in range(5)] for _ in range(3)])
    truth = 0.0
    for s, i in zip(scores, idx, strict=True):
        for expert in range(8):
            f = 8 / (2 * 5) * (i == expert).sum()
            truth += f * (s[:, expert] / s.sum(-1)).mean()
    routing = Routing(jnp.asarray(idx, jnp.int32), None, jnp.asarray(scores, jnp.float32))
    np.testing.assert_allclose(balance_loss(routing, 8), truth / 3, rtol=1e-5)


def test_balance_loss_is_one_where_all_is_even():
    idx = jnp.arange(8, dtype=jnp.int32).reshape(1, 4, 2)
    routing = Routing(idx, None, jnp.full((1, 4, 8), 0.3))
    assert float(balance_loss(routing, 8)) == pytest.approx(1.0)


def test_load_counts_every_choice():
    _, stats = moe(layer(), tokens(), CONFIG)
    assert int(stats.load.sum()) == 8 * 6 * 2 and stats.load.shape == (8,)


@pytest.mark.parametrize(
    "mesh_config",
    [
        MeshConfig(),
        MeshConfig(data=2),
        MeshConfig(data=8),
        MeshConfig(expert=8),
        MeshConfig(data=2, fsdp=2, expert=2),
    ],
    ids=str,
)
def test_a_sharded_batch_gives_the_same_output_and_gradient(mesh_config):
    p, x = layer(), tokens()
    graphdef, state = nnx.split(p)
    mesh = make_mesh(mesh_config)

    def value(state, x, mesh):
        out, _ = moe(nnx.merge(graphdef, state), x, CONFIG, mesh=mesh)
        return jnp.sum(jnp.sin(out)), out

    run = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True), static_argnums=2)
    (one, out), (many, out_many) = run(state, x, None), run(state, x, mesh)
    np.testing.assert_allclose(out, out_many, rtol=1e-5, atol=1e-6)
    for a, b in zip(jax.tree.leaves(one), jax.tree.leaves(many), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("exchange", ["all_gather", "ragged", "peer"])
def test_every_exchange_gives_the_same_output(exchange):
    p, x, mesh = layer(), tokens(), make_mesh(MeshConfig(data=2, expert=4))
    run = jax.jit(
        lambda x, exchange: moe(p, x, CONFIG, mesh=mesh, exchange=exchange)[0],
        static_argnames="exchange",
    )
    wanted = run(x, exchange="all_to_all")
    np.testing.assert_allclose(run(x, exchange=exchange), wanted, rtol=1e-5, atol=1e-6)
    assert "all_to_all" in str(run.trace(x, exchange="all_to_all").jaxpr)
    assert "all_to_all" not in str(run.trace(x, exchange=exchange).jaxpr).replace("ragged_all", "")


@pytest.mark.parametrize(
    "mesh_config", [MeshConfig(data=2, expert=4), MeshConfig(fsdp=4, expert=2)]
)
def test_replicas_share_the_work_and_the_gradient_of_their_expert(mesh_config):
    x, mesh = tokens(), make_mesh(mesh_config)
    graphdef, state = nnx.split(layer())
    slots = np.array([3, 7, 0, 3, 1, 2, 3, 4, 5, 6, 3, 0])
    placement = Placement.from_eplb(slots, mesh.shape["expert"])
    in_slots = jax.tree.map(lambda a: a, state)
    in_slots["experts"] = jax.tree.map(lambda a: a[slots], state["experts"])

    def value(state, x, placement, mesh):
        options = {"mesh": mesh, "placement": placement}
        out, stats = moe(nnx.merge(graphdef, state), x, CONFIG, **options)
        return jnp.sum(jnp.sin(out)), (out, stats.load)

    run = jax.jit(jax.grad(value, argnums=(0, 1), has_aux=True), static_argnums=3)
    (one, of_x), (out, load) = run(state, x, None, None)
    (many, of_x_many), (out_many, load_many) = run(in_slots, x, placement, mesh)
    np.testing.assert_allclose(out, out_many, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(of_x, of_x_many, rtol=1e-4, atol=1e-5)
    np.testing.assert_array_equal(load, load_many)
    for a, b in zip(jax.tree.leaves(one["experts"]), jax.tree.leaves(many["experts"]), strict=True):
        b = np.asarray(b)
        assert all(np.abs(b[slot]).max() > 0 for slot in range(12))  # no replica is idle
        summed = np.stack([b[slots == expert].sum(0) for expert in range(8)])
        np.testing.assert_allclose(a, summed, rtol=1e-4, atol=1e-5)


def test_what_exceeds_the_capacity_is_left_out_and_counted():
    p, x = layer(), tokens(batch=8, length=64)
    mesh = make_mesh(MeshConfig(data=2, fsdp=1, expert=4))

    @functools.partial(jax.jit, static_argnums=1)
    def run(x, factor):
        return moe(p, x, CONFIG, mesh=mesh, capacity_factor=factor)

    whole, stats = run(x, None)
    enough, stats_enough = run(x, 4.0)
    assert stats.overflow == stats_enough.overflow == 0
    np.testing.assert_allclose(enough, whole, rtol=1e-5, atol=1e-6)
    chosen = np.asarray(route(p.gate, x, CONFIG).topk_idx).reshape(2, -1)  # of each replica
    rows = 32 + 2 * 8  # a quarter of 64 tokens' 2 choices, and padding for 2 slots of 8 rows
    expected = 0
    for choices in chosen:
        for first, second in np.bincount(choices, minlength=8).reshape(4, 2):
            start = -(-first // 8) * 8
            expected += first - min(first, rows) + second - np.clip(rows - start, 0, second)
    part, stats = run(x, 0.25)
    assert stats.overflow == expected > 0 and jnp.any(part != whole)
    with pytest.raises(ValueError, match="capacity_factor=0 must be positive"):
        Execution(capacity_factor=0)


def test_a_placement_needs_its_ranks():
    placement = Placement.uniform(8, 2)
    for mesh in (None, make_mesh(MeshConfig(expert=4))):
        with pytest.raises(ValueError, match="placement.num_ranks=2 must be the [14] of"):
            moe(layer(), tokens(), CONFIG, mesh=mesh, placement=placement)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"n_group": 3}, "n_routed_experts=8 must be a multiple of n_group=3"),
        ({"topk_group": 5}, "topk_group=5 exceeds n_group=4"),
        ({"num_experts_per_tok": 5}, "num_experts_per_tok=5 exceeds the 4 experts"),
        ({"n_group": 8}, "fewer than 2 experts a group"),
        ({"scoring_func": "relu"}, "'relu'"),
        ({"topk_method": "best"}, "'best'"),
        ({"n_shared_experts": -1}, "n_shared_experts=-1"),
        ({"moe_intermediate_size": 0}, "moe_intermediate_size=0"),
    ],
)
def test_impossible_routing_is_refused(change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(CONFIG, **change)
