"""`overlap_microbatches` inside of `jax.shard_map`, against the layers one after another."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from whalejax.parallel.expert import (
    Placement,
    Stages,
    dispatch,
    finish_combine,
    overlap_microbatches,
    start_combine,
)

RANKS, T, H, LAYERS = 4, 6, 8, 3
PLACEMENT = Placement.uniform(RANKS, RANKS)
MESHES = {
    "expert": ((RANKS,), ("expert",)),
    ("node", "expert"): ((2, RANKS // 2), ("node", "expert")),
}


def make_stages(**way):
    """A layer that multiplies each token by the weights of two experts, one to a rank."""

    def send(p, x, shift, hold):
        idx = jnp.argsort(x[:, :RANKS] + shift, axis=1)[:, :2].astype(jnp.int32)
        weights = jax.nn.softmax(jnp.take_along_axis(x, idx, axis=1))
        sent = dispatch(x, idx, weights, PLACEMENT, alignment=1, hold=hold, **way)
        return x, sent._replace(held=None), sent.held, jnp.sum(idx, axis=1)

    def compute(p, x, sent):
        return x, start_combine(jnp.tanh(sent.tokens @ p), sent.handle)

    def receive(x, outputs):
        return x + finish_combine(outputs)

    return Stages(send, compute, receive)


def in_turns(stages, weights, halves, shifts, policy):
    options = {"constants": shifts, "policy": policy}
    return overlap_microbatches(stages, weights, halves, **options)


def one_by_one(stages, weights, halves, shifts, policy):
    def layer(x, p, shift):
        kept, arrived, _, y = stages.send(p, x, shift, None)
        return stages.receive(*stages.compute(p, kept, arrived)), y

    ends = [
        jax.lax.scan(functools.partial(layer, shift=shift), x, weights)
        for x, shift in zip(halves, shifts, strict=True)
    ]
    return tuple(zip(*ends, strict=True))


@pytest.mark.parametrize(
    ("way", "policy"),
    [
        ({"axis": "expert"}, None),
        ({"axis": "expert", "method": "all_gather"}, None),
        ({"axis": "expert", "method": "ragged"}, jax.checkpoint_policies.nothing_saveable),
        ({"axis": ("node", "expert")}, None),
    ],
    ids=["all_to_all", "all_gather", "ragged, all again", "hierarchical"],
)
def test_halves_in_turns_give_what_they_give_one_by_one(way, policy):
    shape, names = MESHES[way["axis"]]
    types = (AxisType.Auto,) * len(names)
    mesh = jax.make_mesh(shape, names, axis_types=types, devices=jax.devices()[:RANKS])
    stages, spec = make_stages(**way), PartitionSpec(names)
    keys = jax.random.split(jax.random.key(0), 3)
    halves = tuple(jax.random.normal(key, (RANKS * T, H)) for key in keys[:2])
    weights = 0.5 * jax.random.normal(keys[2], (LAYERS, RANKS, H, H))

    def value(run, weights, halves):
        def local(weights, halves):
            shift = 0.1 * jnp.arange(RANKS, dtype=jnp.float32)[None]
            return run(stages, weights[:, 0], halves, (shift, -shift), policy)

        specs = PartitionSpec(None, names), (spec, spec)
        out_specs = (spec, spec), (PartitionSpec(None, names),) * 2
        placed = jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=out_specs)
        out, ys = placed(weights, halves)
        return sum(jnp.sum(jnp.sin(x)) for x in out), (out, ys)

    run = jax.jit(jax.grad(value, argnums=(1, 2), has_aux=True), static_argnums=0)
    got, truth = run(in_turns, weights, halves), run(one_by_one, weights, halves)
    assert not np.array_equal(truth[1][0][0], truth[1][0][1])
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(truth), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
