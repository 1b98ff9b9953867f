"""Local search over counts and places together: exchanges of two slots, and replacements of one.

An exchange swaps the experts of two slots on different GPUs of a node. A replacement gives a slot
of an expert that has several replicas to another expert: it changes two counts, and with them the
loads of all GPUs that hold either. Both keep a plan valid, so the search can stop after any of
them. Only what takes load off the fullest GPU can lower a peak, so only that is looked at.
"""

import numpy as np

from whalejax.parallel.eplb.placements import MARGIN, Placements

CHUNK = 4_000_000  # numbers that one evaluation may hold at a time


def exchanges(plan: Placements, row: np.ndarray, gpu: np.ndarray) -> np.ndarray:
    """What the fuller of two GPUs would carry after each exchange with the given GPU.

    Args:
      plan: of any number of nodes.
      row: `int[n]`, nodes to look at.
      gpu: `int[n]`, a GPU of each.

    Returns:
      `f64[n, slots, gpus, slots]`: by slot of the GPU, other GPU, and slot of that; infinite where
      an expert would meet another of its replicas.
    """
    expert, weight = plan.expert[row], plan.weight[row]
    n, gpus, slots = expert.shape
    at = np.arange(n)
    here, total = weight[at, gpu], plan.total[row]
    blocked = plan.held[row[:, None], expert[at, gpu]] > 0
    there = np.where(blocked, np.inf, total[:, None] + here[:, :, None])
    held = plan.held[row[:, None], expert.reshape(n, -1), gpu[:, None]] > 0
    moved = np.where(held.reshape(weight.shape), np.inf, weight)
    left = total[at, gpu][:, None] - here
    gained = left[:, :, None, None] + moved[:, None]
    return np.maximum(gained, there[..., None] - weight[:, None], out=gained)


def replacements(plan: Placements, row: np.ndarray, old: np.ndarray, new: np.ndarray) -> np.ndarray:
    """Peaks of nodes after a replica of an expert was replaced by one of another.

    Args:
      plan: of any number of nodes.
      row: `int[n]`, nodes to look at.
      old: `int[n, o]`, experts that may lose a replica.
      new: `int[n, w]`, experts that may gain one.

    Returns:
      `f64[n, o, w, gpus]`, the peak when it happens on that GPU; infinite where it cannot: the GPU
      lacks the old expert or has the new one, or the old one has no other replica.
    """
    at = row[:, None]
    shares = []
    for expert, by in ((old, -1), (new, 1)):
        load, count = plan.load[at, expert], plan.counts[at, expert]
        after = load / np.maximum(count + by, 1)
        shares.append((after, (after - load / count)[..., None] * plan.held[at, expert]))
    (old_share, rise), (new_share, fall) = shares
    total = plan.total[row][:, None, None] + rise[:, :, None] + fall[:, None]
    here = total + (new_share[:, None] - old_share[:, :, None])[..., None]
    # the peak over the other GPUs is the highest total, or the second for the GPU that has it
    if total.shape[3] > 1:
        second, first = np.moveaxis(np.partition(total, -2, axis=3)[..., -2:], 3, 0)
        others = np.where(total == first[..., None], second[..., None], first[..., None])
        here = np.maximum(here, others, out=here)
    can = (plan.held[at, old] > 0) & (plan.counts[at, old] > 1)[..., None]
    can = can[:, :, None] & (plan.held[at, new] == 0)[:, None]
    return np.where(can, here, np.inf)


def replacement_pairs(plan: Placements, row: np.ndarray, gpu: np.ndarray):
    """Old and new experts whose replacement can take load off a GPU, twice `int[n, o], int[n, w]`.

    Either an expert that the GPU holds gets one more replica anywhere, or the GPU gives a slot up.
    """
    many = plan.counts[row] > 1
    here = plan.expert[row, gpu]
    every = np.broadcast_to(np.arange(many.shape[1]), many.shape)
    return (_columns(many), here), (_columns(many & (plan.held[row, :, gpu] > 0)), every)


def _columns(mask):
    """Columns where a mask is true, row by row; rows with fewer than others are filled up."""
    width = max(1, int(mask.sum(axis=1).max(initial=0)))
    return np.argsort(~mask, axis=1, kind="stable")[:, :width]


def replacement_at(plan, row, old, new, best):
    """The arguments of `Placements.replace` for flat indices `int[n]` into `replacements`."""
    o, w, gpu = np.unravel_index(best, (old.shape[1], new.shape[1], plan.total.shape[1]))
    at = np.arange(len(row))
    slot = (plan.expert[row, gpu] == old[at, o][:, None]).argmax(axis=1)
    return row, gpu, slot, new[at, w]


def layers_at_a_time(plan: Placements, nodes: int) -> list[np.ndarray]:
    """All layers, in parts of which one evaluation fits into `CHUNK`."""
    rows, gpus, slots = plan.expert.shape
    many = max(slots, min(plan.load.shape[1], gpus * slots - plan.load.shape[1]))
    step = max(1, CHUNK // (many * slots * gpus))
    layers = np.arange(rows // nodes)
    return [layers[i : i + step] for i in range(0, len(layers), step)]


def improve(plan: Placements, nodes: int, floor: np.ndarray) -> None:
    """Steps down until no exchange and no replacement lowers the peak of a layer.

    Args:
      plan: of `layers * nodes` rows; changed in place.
      nodes: rows that follow one another make a layer.
      floor: `f64[layers]`, peaks below which there is nothing to find.
    """
    for layer in layers_at_a_time(plan, nodes):
        while len(layer):
            row, peak = fullest_nodes(plan, layer, nodes)
            above = np.flatnonzero(peak > floor[layer] * (1 + MARGIN))
            moved = _step(plan, row[above]) if len(above) else above
            layer = layer[above[moved]]


def fullest_nodes(plan: Placements, layer: np.ndarray, nodes: int):
    """The row that has the fullest GPU of each layer, and what this carries."""
    peaks = plan.total[layer[:, None] * nodes + np.arange(nodes)].max(axis=2)
    return layer * nodes + peaks.argmax(axis=1), peaks.max(axis=1)


def _step(plan, row):
    """Takes the best exchange of each row, else the best replacement; says which rows moved."""
    gpu = plan.total[row].argmax(axis=1)
    bar = plan.total[row, gpu] * (1 - MARGIN)
    peaks = exchanges(plan, row, gpu)
    best = peaks.reshape(len(row), -1).argmin(axis=1)
    slot, *there = np.unravel_index(best, peaks.shape[1:])
    moved = peaks.min(axis=(1, 2, 3)) < bar
    plan.exchange(*(x[moved] for x in (row, gpu, slot, *there)))
    stuck = np.flatnonzero(~moved)
    if len(stuck):
        moved[stuck] = _replace(plan, row[stuck], gpu[stuck], bar[stuck])
    return moved


def _replace(plan, row, gpu, bar):
    pairs = replacement_pairs(plan, row, gpu)
    peaks = [replacements(plan, row, *pair).reshape(len(row), -1) for pair in pairs]
    changes = [
        replacement_at(plan, row, *pair, peak.argmin(axis=1))
        for pair, peak in zip(pairs, peaks, strict=True)
    ]
    first, second = (peak.min(axis=1) for peak in peaks)
    change = (np.where(second < first, b, a) for a, b in zip(*changes, strict=True))
    lower = np.minimum(first, second) < bar
    plan.replace(*(x[lower] for x in change))
    return lower
