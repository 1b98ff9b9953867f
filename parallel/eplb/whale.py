"""Counts and places of replicas chosen together: the published plan, searched on from many starts.

The published plan balances the replicas of a node and then its GPUs, and cannot take back a count
that does not fit. Here it is only where a local search starts. Layers that stay above what their
groups allow start again from loads blurred by noise, which lead to other counts and to other nodes
for groups, and each start is then shaken a few times.

No GPU gets two replicas of an expert: they would save its node little and cost a slot. Only where
GPUs have more slots than their node has experts there is nothing else to fill them with; then all
GPUs of a node are alike. Noise is the same for all layers: none depends on which others there are.
"""

import numpy as np

from whalejax.parallel.eplb.budget import improve_within
from whalejax.parallel.eplb.layers import Layers, from_slots, start
from whalejax.parallel.eplb.moves import align, count_moves
from whalejax.parallel.eplb.placements import MARGIN, Placements
from whalejax.parallel.eplb.published import assign_groups
from whalejax.parallel.eplb.search import fullest_nodes, improve
from whalejax.parallel.eplb.sizes import Sizes

CLOSE = 3e-4  # so little above what is possible that a layer is left alone
SEED = 0
STARTS = 32  # for a small problem; fewer where replicas times slots of a GPU are above WORK
WORK = 10_000
MIN_STARTS = 3
DOUBT = 1.5  # of the last of all starts, to which all experts are alike but for noise
ROUNDS = 8  # of shaking each start
SHAKES = 3  # replacements and exchanges that are tried in a round


def plan_whale(load: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Plans all layers anew.

    Args:
      load: `f64[layers, experts]`.
      sizes: of the plan.

    Returns:
      `int[layers, replicas]`, the expert of each slot.
    """
    groups = assign_groups(load.astype(np.float32), sizes)
    best = start(load, load, groups, sizes)
    improve(best.plan, best.nodes, best.floors())
    bar = lowest_peaks(load, sizes) * (1 + CLOSE)
    far = np.flatnonzero(best.peaks() > bar)
    if len(far):
        _start_again(best, far, load[far], bar[far], sizes)
    while sizes.nodes > 1 and sizes.group_experts == 1 and best.exchange_singles():
        improve(best.plan, best.nodes, best.floors())
    return best.physical_to_logical()


def replan_whale(
    load: np.ndarray, sizes: Sizes, current: np.ndarray, max_moves: int | None
) -> np.ndarray:
    """Plans all layers from a plan in use, for the better and with few changes.

    Of three plans, staying, the current one improved step by step, and a new one whose nodes, GPUs
    and slots are renumbered to keep what they can, each layer gets the lowest peak that `max_moves`
    allows, and of equal ones that which changes least.

    Args:
      load: `f64[layers, experts]`.
      sizes: of the plan.
      current: `int[layers, replicas]`, a valid plan.
      max_moves: slots of a layer that may change; None for all.

    Returns:
      `int[layers, replicas]`, the expert of each slot.
    """
    limit = sizes.replicas if max_moves is None else max_moves
    stepped = from_slots(load, current, sizes)
    best, peak = current, stepped.peaks()
    improve_within(stepped.plan, sizes.nodes, np.full(len(load), limit))
    for found in (stepped.physical_to_logical(), plan_whale(load, sizes)):
        found = align(found, current, sizes)
        found_peak = from_slots(load, found, sizes).peaks()
        better = (count_moves(found, current) <= limit) & (found_peak < peak * (1 - MARGIN))
        best = np.where(better[:, None], found, best)
        peak = np.where(better, found_peak, peak)
    return best


def lowest_peaks(load: np.ndarray, sizes: Sizes) -> np.ndarray:
    """Bounds, `f64[layers]`, below which no plan without doubles takes a layer."""
    layers = len(load)
    group = np.sort(load.reshape(layers, sizes.groups, -1).sum(axis=2), axis=1)
    node = np.maximum(group.sum(axis=1) / sizes.nodes, group[:, -1])
    if sizes.groups == 2 * sizes.nodes:
        node = (group + group[:, ::-1]).max(axis=1)  # the heaviest with the lightest is best
    extra = sizes.node_replicas - sizes.node_experts
    return np.maximum(node / sizes.node_gpus, load.max(axis=1) / (extra + 1))


def _start_again(best, far, load, bar, sizes):
    """Searches from blurred loads, and gives layers `far` of `best` what was found."""
    starts = int(np.clip(WORK // (sizes.replicas * sizes.slots), MIN_STARTS, STARTS))
    rng = np.random.default_rng(SEED)
    guide = _doubt(load, starts, rng).reshape(-1, sizes.experts)
    load = np.tile(load, (starts, 1))
    groups = assign_groups(guide.astype(np.float32), sizes)
    balanced = np.flatnonzero(np.arange(len(load)) // len(far) % 2)
    groups[balanced] = _balance_groups(load[balanced], groups[balanced], sizes)
    chains = start(load, guide, groups, sizes)
    floor = chains.floors()
    improve(chains.plan, chains.nodes, floor)
    for _ in range(ROUNDS):
        peak = chains.peaks().reshape(starts, -1)
        live = np.flatnonzero(np.tile(peak.min(axis=0) > bar, starts) & (chains.peaks() > floor))
        if len(live):
            _shake(chains, live, floor[live], live // len(far), starts, rng)
    peak = chains.peaks().reshape(starts, -1)
    chain = peak.argmin(axis=0)
    better = np.flatnonzero(peak.min(axis=0) < best.peaks()[far])
    best.put(far[better], chains, chain[better] * len(far) + better)
    improve(best.plan, best.nodes, best.floors())  # nodes that were not the fullest, but are now


def _doubt(load, starts, rng):
    """Loads that are less and less like the true ones, `f64[starts, layers, experts]`."""
    noise = rng.standard_normal((starts, 1, load.shape[1]))
    doubt = np.linspace(0, DOUBT * starts / STARTS, starts)[:, None, None]
    relative = load / load.mean(axis=1, keepdims=True)
    return relative ** np.maximum(1 - doubt, 0) * np.exp(doubt * noise)


def _shake(chains: Layers, layer, floor, chain, starts, rng):
    """Changes the fullest node of some layers at random, improves it, and keeps what is no worse.

    Draws are those of a start, `chain`, whatever the layer.
    """
    row, peak = fullest_nodes(chains.plan, layer, chains.nodes)
    trial = chains.plan.take(row)
    at = np.arange(len(row))
    _, gpus, slots = trial.expert.shape
    for _ in range(SHAKES):
        draws = rng.integers((gpus, slots, trial.load.shape[1], gpus, slots), size=(starts, 5))
        gpu, slot, new, other_gpu, other_slot = draws[chain].T
        old = trial.expert[at, gpu, slot]
        can = (trial.counts[at, old] > 1) & (trial.held[at, new, gpu] == 0)
        trial.replace(*(x[can] for x in (at, gpu, slot, new)))
        a, b = trial.expert[at, gpu, slot], trial.expert[at, other_gpu, other_slot]
        can = (trial.held[at, a, other_gpu] == 0) & (trial.held[at, b, gpu] == 0)
        trial.exchange(*(x[can] for x in (at, gpu, slot, other_gpu, other_slot)))
    improve(trial, 1, floor)
    kept = np.flatnonzero(trial.total.max(axis=1) <= peak)
    chains.plan.put(row[kept], trial, kept)


def _balance_groups(load, groups, sizes):
    """Exchanges groups `int[layers, nodes, node_groups]` between nodes, like experts of GPUs."""
    group_load = load.reshape(len(load), sizes.groups, -1).sum(axis=2)
    plan = Placements(group_load, groups)
    improve(plan, 1, plan.total.mean(axis=1))
    return plan.expert
