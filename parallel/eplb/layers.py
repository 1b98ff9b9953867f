"""Placements of all nodes of layers, made from loads or from a plan, and read as a plan."""

import dataclasses

import numpy as np

from whalejax.parallel.eplb.packing import pack_apart
from whalejax.parallel.eplb.placements import MARGIN, Placements
from whalejax.parallel.eplb.published import experts_of_groups, replicate
from whalejax.parallel.eplb.sizes import Sizes


@dataclasses.dataclass
class Layers:
    """Placements of all nodes of some layers.

    Attributes:
      names: `int[layers, nodes, node_experts]`, the experts of each node; `plan` counts these.
      plan: of `layers * nodes` rows.
    """

    names: np.ndarray
    plan: Placements

    @property
    def nodes(self) -> int:
        """Of a layer."""
        return self.names.shape[1]

    def peaks(self) -> np.ndarray:
        """What the fullest GPU of each layer carries, `f64[layers]`."""
        return self.plan.total.reshape(len(self.names), -1).max(axis=1)

    def floors(self) -> np.ndarray:
        """Peaks of the layers were each of their nodes balanced perfectly, `f64[layers]`."""
        gpus = self.plan.total.shape[1]
        return self.plan.total.sum(axis=1).reshape(-1, self.nodes).max(axis=1) / gpus

    def rows(self, layer: np.ndarray) -> np.ndarray:
        """Rows of `plan` that hold some layers, `int[n]`."""
        return (layer[:, None] * self.nodes + np.arange(self.nodes)).reshape(-1)

    def take(self, layer: np.ndarray) -> "Layers":
        """Copies of some layers, `int[n]`."""
        return Layers(self.names[layer], self.plan.take(self.rows(layer)))

    def put(self, layer: np.ndarray, other: "Layers", other_layer: np.ndarray) -> None:
        """Overwrites some layers, `int[n]`, by as many of another."""
        self.names[layer] = other.names[other_layer]
        self.plan.put(self.rows(layer), other.plan, other.rows(other_layer))

    def physical_to_logical(self) -> np.ndarray:
        """The expert of each slot, `int[layers, replicas]`."""
        expert = self.plan.expert.reshape(*self.names.shape[:2], -1)
        return np.take_along_axis(self.names, expert, axis=2).reshape(len(self.names), -1)

    def exchange_singles(self) -> bool:
        """Exchanges an expert of each fullest GPU for one of another node, if that lowers the peak.

        For groups of one expert: one without a second replica may then go to any node.

        Returns:
          Whether there was any.
        """
        found = [self._exchange_single(layer) for layer in range(len(self.names))]
        return any(found)

    def _exchange_single(self, layer):
        rows = self.rows(np.array([layer]))
        plan = self.plan.take(rows)
        _, gpus, slots = plan.expert.shape
        node, gpu = np.unravel_index(plan.total.argmax(), plan.total.shape)
        counts = np.take_along_axis(plan.counts, plan.expert.reshape(self.nodes, -1), axis=1)
        weight = np.where(counts.reshape(plan.expert.shape) == 1, plan.weight, np.nan)
        other = weight.copy()
        other[node] = np.nan
        change = other - weight[node, gpu][:, None, None, None]
        peaks = np.fmax(plan.total[node, gpu] + change, plan.total[..., None] - change)
        peaks = np.where(np.isnan(change), np.inf, peaks)
        slot, at, other_gpu, other_slot = np.unravel_index(peaks.argmin(), peaks.shape)
        if not peaks.min() < plan.total[node, gpu] * (1 - MARGIN):
            return False
        a, b = plan.expert[node, gpu, slot], plan.expert[at, other_gpu, other_slot]
        names = self.names[layer]
        names[node, a], names[at, b] = names[at, b], names[node, a]
        load = plan.load
        load[node, a], load[at, b] = load[at, b], load[node, a]
        self.plan.put(rows, Placements(load, plan.expert), np.arange(self.nodes))
        return True


def start(load: np.ndarray, guide: np.ndarray, groups: np.ndarray, sizes: Sizes) -> Layers:
    """Replicates and packs as published, but for doubles, with counts for other loads if wanted.

    Args:
      load: `f64[layers, experts]`, what experts carry.
      guide: of the same shape, what decides on counts.
      groups: `int[layers, nodes, node_groups]`, the groups of each node.
      sizes: of the plan.

    Returns:
      `Layers`. Where a node has a slot on each GPU for each of its experts, its GPUs are all alike.
    """
    names = experts_of_groups(groups, sizes)
    by_node = (-1, sizes.node_experts)
    layer = np.arange(len(load))[:, None, None]
    load, guide = (x[layer, names].reshape(by_node) for x in (load, guide))
    if sizes.slots >= sizes.node_experts:
        return Layers(names, Placements(load, _all_everywhere(load, sizes)))
    expert, _, counts = replicate(
        guide.astype(np.float32), sizes.node_replicas, most=sizes.node_gpus
    )
    share = np.take_along_axis(load.astype(np.float32) / counts, expert, axis=1)
    slot = pack_apart(share, expert, sizes.node_experts, sizes.node_gpus)
    placed = np.empty_like(slot)
    np.put_along_axis(placed, slot, expert, axis=1)
    return Layers(names, Placements(load, placed.reshape(-1, sizes.node_gpus, sizes.slots)))


def _all_everywhere(load, sizes):
    """Every expert on every GPU, and the slots left over to the heaviest, alike on all."""
    order = np.argsort(-load, axis=1, kind="stable")
    slots = order[:, np.arange(sizes.slots) % sizes.node_experts]
    return np.repeat(slots[:, None], sizes.node_gpus, axis=1)


def from_slots(load: np.ndarray, physical_to_logical: np.ndarray, sizes: Sizes) -> Layers:
    """Reads a valid plan, `int[layers, replicas]`, for loads `f64[layers, experts]`."""
    layers = len(load)
    layer = np.arange(layers)[:, None]
    slot_node = np.arange(sizes.replicas) // sizes.node_replicas
    node = np.empty((layers, sizes.experts), np.int64)
    node[layer, physical_to_logical] = slot_node
    order = np.argsort(node, axis=1, kind="stable")
    local = np.empty_like(order)
    local[layer, order] = np.arange(sizes.experts) % sizes.node_experts
    expert = local[layer, physical_to_logical].reshape(-1, sizes.node_gpus, sizes.slots)
    by_node = load[layer, order].reshape(-1, sizes.node_experts)
    names = order.reshape(layers, sizes.nodes, sizes.node_experts)
    return Layers(names, Placements(by_node, expert))
