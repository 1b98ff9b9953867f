"""Counted traffic is what dispatch sends, and takes as long as its busiest rank."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, PartitionSpec

from whalejax.parallel.expert import (
    Placement,
    Topology,
    Traffic,
    dispatch,
    predicted_us,
    row_bytes,
    traffic,
)

RANKS, NODES, T, K, E = 8, 2, 9, 3, 16
MACHINE = Topology(num_ranks=RANKS, ranks_per_node=RANKS // NODES, link_gbs=200, network_gbs=50)
PLACEMENT = Placement.uniform(E, RANKS)


def choose():
    rng = np.random.default_rng(0)
    idx = np.stack([rng.permutation(E)[:K] for _ in range(RANKS * T)]).astype(np.int32)
    return np.where(rng.random(idx.shape) < 0.2, -1, idx)


def sent_by_dispatch(axis):
    """Rows for each rank of each axis that every rank's dispatch counts."""
    names = (axis,) if isinstance(axis, str) else axis
    shape = (RANKS,) if len(names) == 1 else (NODES, RANKS // NODES)
    mesh = jax.make_mesh(shape, names, axis_types=(AxisType.Auto,) * len(names))
    spec = PartitionSpec(axis)

    def count(x, idx):
        sent = dispatch(x, idx, jnp.ones(idx.shape), PLACEMENT, axis=axis)
        return [hop.group_sizes[None] for hop in sent.handle.hops]

    f = jax.jit(jax.shard_map(count, mesh=mesh, in_specs=spec, out_specs=spec))
    return [np.asarray(a) for a in f(jnp.ones((RANKS * T, 4)), jnp.asarray(choose()))]


def test_direct_rows_are_those_that_dispatch_sends():
    [rows] = sent_by_dispatch("expert")
    counted = traffic(
        choose().reshape(RANKS, T, K), PLACEMENT, MACHINE, row_bytes=100, hierarchical=False
    )
    np.testing.assert_array_equal(counted.network + counted.links, np.where(np.eye(RANKS), 0, rows))
    node = np.arange(RANKS) // 4
    assert not counted.network[node[:, None] == node].any()
    assert not counted.links[node[:, None] != node].any()
    assert counted.network_bytes.sum() == 100 * counted.network.sum()


def test_hierarchical_rows_are_those_that_dispatch_sends():
    to_nodes, to_ranks = sent_by_dispatch(("node", "expert"))
    counted = traffic(choose().reshape(RANKS, T, K), PLACEMENT, MACHINE, row_bytes=1)
    for rank in range(RANKS):
        node, place = divmod(rank, 4)
        other = 1 - node
        assert counted.network[rank].sum() == counted.network[rank, other * 4 + place]
        assert counted.network[rank].sum() == to_nodes[rank, other]
        kept = np.where(np.arange(4) == place, 0, to_ranks[rank])
        np.testing.assert_array_equal(counted.links[rank, node * 4 : node * 4 + 4], kept)


def test_a_token_crosses_to_a_node_once():
    idx = np.full((RANKS, 1, K), -1, np.int32)
    idx[0, 0] = [8, 10, 14]  # ranks 4, 5 and 7, all of the other node
    direct = traffic(idx, PLACEMENT, MACHINE, row_bytes=1, hierarchical=False)
    assert direct.network.sum() == 3 and direct.links.sum() == 0
    by_node = traffic(idx, PLACEMENT, MACHINE, row_bytes=1)
    assert by_node.network[0, 4] == by_node.network.sum() == 1
    assert by_node.links[4, 5] == by_node.links[4, 7] == 1 and by_node.links.sum() == 2


def test_time_is_that_of_the_busiest_rank():
    rows = np.zeros((RANKS, RANKS), np.int64)
    rows[:4, 4] = 1000  # all to one
    counted = Traffic(rows, np.zeros_like(rows), 50_000)
    assert predicted_us(counted, MACHINE) == pytest.approx(30 + 4 * 1000)
    assert predicted_us(Traffic(0 * rows, 0 * rows, 1), MACHINE) == 0


def test_a_row_has_values_scales_slots_and_weights():
    assert row_bytes(7168, 8, quantized=False) == 2 * 7168 + 64
    assert row_bytes(7168, 8, quantized=True) == 7168 + 4 * 56 + 64


def test_what_does_not_fit_is_refused():
    with pytest.raises(ValueError, match=r"topk_idx.shape=\(4, 2, 3\) must be .*\(8\).*\(8\)"):
        traffic(np.zeros((4, 2, 3), np.int32), PLACEMENT, MACHINE, row_bytes=1)
    with pytest.raises(ValueError, match="num_ranks=6 must be a positive multiple of"):
        Topology(num_ranks=6, ranks_per_node=4, link_gbs=1, network_gbs=1)
    with pytest.raises(ValueError, match="network_gbs=0"):
        Topology(num_ranks=8, ranks_per_node=4, link_gbs=1, network_gbs=0)
