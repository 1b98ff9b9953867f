"""What a routing sends over each link, to the byte, and how long a machine takes for it.

Nothing here runs on devices: expert parallelism of 8 to hundreds of ranks is planned on paper.
"""

import dataclasses
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from whalejax.parallel.expert.placement import Placement

CHOICE_BYTES = 8  # a slot and a weight of each choice travel with a token
SCALE_BYTES, SCALE_COLUMNS = 4, 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Topology:
    """A machine: nodes of ranks, and what a rank sends a second in one direction.

    Attributes:
      num_ranks: in all.
      ranks_per_node: joined by fast links.
      link_gbs: GB/s of a rank to the other ranks of its node, all together.
      network_gbs: GB/s of a rank to other nodes.
      latency_us: of a step over links, and of one over the network.
    """

    num_ranks: int
    ranks_per_node: int
    link_gbs: float
    network_gbs: float
    latency_us: tuple[float, float] = (10.0, 30.0)

    def __post_init__(self):
        if self.num_ranks < 1 or self.ranks_per_node < 1 or self.num_ranks % self.ranks_per_node:
            raise ValueError(
                f"Topology: num_ranks={self.num_ranks} must be a positive multiple of "
                f"ranks_per_node={self.ranks_per_node}"
            )
        if min(self.link_gbs, self.network_gbs) <= 0:
            raise ValueError(
                f"Topology: link_gbs={self.link_gbs} and network_gbs={self.network_gbs} must be "
                f"positive"
            )

    @property
    def num_nodes(self) -> int:
        """Nodes of the machine."""
        return self.num_ranks // self.ranks_per_node


class Traffic(NamedTuple):
    """Rows that a dispatch sends from each rank to each rank; a combine sends them back.

    Attributes:
      network: `i64[ranks, ranks]`, to other nodes.
      links: `i64[ranks, ranks]`, inside of nodes.
      row_bytes: of a row.
    """

    network: np.ndarray
    links: np.ndarray
    row_bytes: int

    @property
    def network_bytes(self) -> np.ndarray:
        """`i64[ranks, ranks]`, over the network."""
        return self.network * self.row_bytes

    @property
    def link_bytes(self) -> np.ndarray:
        """`i64[ranks, ranks]`, over links."""
        return self.links * self.row_bytes


def row_bytes(hidden: int, k: int, *, quantized: bool, itemsize: int = 2) -> int:
    """Bytes of a token on its way: values, scales in FP8, slots and weights of its k choices."""
    scales = -(-hidden // SCALE_COLUMNS) * SCALE_BYTES if quantized else 0
    return hidden * (1 if quantized else itemsize) + scales + k * CHOICE_BYTES


def traffic(
    topk_idx: ArrayLike,
    placement: Placement,
    topology: Topology,
    *,
    row_bytes: int,
    hierarchical: bool = True,
) -> Traffic:
    """Counts what `dispatch` sends.

    Args:
      topk_idx: `i32[ranks, T, k]`, the experts that each rank's tokens chose; -1 for no choice.
      placement: of the experts on as many ranks.
      topology: the machine.
      row_bytes: of a token, see `row_bytes`.
      hierarchical: a token crosses to another node once, to the rank with its sender's place there,
        and is sent on inside; otherwise it goes to every rank directly.

    Raises:
      ValueError: numbers of ranks differ; prints them.
    """
    topk_idx = np.asarray(topk_idx)
    ranks = topology.num_ranks
    if topk_idx.ndim != 3 or topk_idx.shape[0] != ranks or placement.num_ranks != ranks:
        raise ValueError(
            f"traffic: topk_idx.shape={topk_idx.shape} must be [ranks, T, k], and the ranks of it, "
            f"of the placement ({placement.num_ranks}) and of the topology ({ranks}) the same"
        )
    slots = np.stack([np.asarray(placement.slots_of(topk_idx[r], r)) for r in range(ranks)])
    to_rank = _reached(slots, placement.slots_per_rank, ranks)
    node = np.arange(ranks) // topology.ranks_per_node
    same = node[:, None] == node
    if not hierarchical:
        sent = to_rank.sum(axis=1)
        elsewhere = ~np.eye(ranks, dtype=bool)
        return Traffic(sent * ~same, sent * (same & elsewhere), row_bytes)
    return Traffic(*_over_nodes(to_rank, topology), row_bytes)


def _reached(slots, slots_per_rank, ranks):
    """`bool[ranks, T, ranks]`: whether a token goes to a rank."""
    rank = np.where(slots < 0, -1, slots // slots_per_rank)
    return (rank[..., None] == np.arange(ranks)).any(axis=2)


def _over_nodes(to_rank, topology):
    """Rows over the network and over links, of tokens that cross to a node once."""
    ranks, tokens, _ = to_rank.shape
    size, nodes = topology.ranks_per_node, topology.num_nodes
    by_node = to_rank.reshape(ranks, tokens, nodes, size)
    crossing = by_node.any(axis=3).sum(axis=1)  # [from, node]
    arriving = by_node.sum(axis=1)  # [from, node, place]: at its sender's place there, then on
    network, links = np.zeros((2, ranks, ranks), np.int64)
    for sender in range(ranks):
        home, place = divmod(sender, size)
        for node in range(nodes):
            entry = node * size + place
            if node != home:
                network[sender, entry] += crossing[sender, node]
            links[entry, node * size : (node + 1) * size] += arriving[sender, node]
    np.fill_diagonal(links, 0)
    return network, links


def predicted_us(traffic: Traffic, topology: Topology) -> float:
    """Microseconds of a dispatch: the busiest rank's bytes over its bandwidth, step after step.

    Both directions count, for a rank that all others send to is as late as one that sends to all.
    """

    def step(sent, gbs, latency):
        busiest = max(sent.sum(axis=1).max(), sent.sum(axis=0).max())
        return 0.0 if busiest == 0 else latency + busiest / gbs / 1e3

    link_us, network_us = topology.latency_us
    over_links = step(traffic.link_bytes, topology.link_gbs, link_us)
    over_network = step(traffic.network_bytes, topology.network_gbs, network_us)
    return max(over_links, over_network)  # tokens are sent on while others still arrive
