"""Steps down from a plan in use that change only so many slots of a layer.

What a step costs is counted in what each GPU holds: in which slot it holds it can be arranged
afterwards. Taking a step back costs less than nothing.
"""

import numpy as np

from whalejax.parallel.eplb.placements import MARGIN, Placements
from whalejax.parallel.eplb.search import (
    exchanges,
    fullest_nodes,
    layers_at_a_time,
    replacement_at,
    replacement_pairs,
    replacements,
)


def improve_within(plan: Placements, nodes: int, max_moves: np.ndarray) -> None:
    """Takes the steps that lower peaks most for each slot changed, as long as slots are left.

    Args:
      plan: of `layers * nodes` rows, as in use; changed in place.
      nodes: rows that follow one another make a layer.
      max_moves: `int[layers]`, slots that may change.
    """
    in_use, left = plan.held.copy(), max_moves.copy()
    for layer in layers_at_a_time(plan, nodes):
        while len(layer):
            row, _ = fullest_nodes(plan, layer, nodes)
            cost = _step(plan, row, in_use[row], left[layer], _second(plan, layer, nodes))
            moved = cost <= left[layer]
            left[layer[moved]] -= cost[moved]
            layer = layer[moved]


def _second(plan, layer, nodes):
    """What the second fullest GPU of each layer carries: a step down rarely goes below."""
    total = plan.total[layer[:, None] * nodes + np.arange(nodes)].reshape(len(layer), -1)
    return np.sort(total, axis=1)[:, -2] if total.shape[1] > 1 else np.zeros(len(layer))


def _step(plan, row, in_use, left, second):
    """Takes the best step of each row; returns its cost, more than `left` where there is none."""
    gpu = plan.total[row].argmax(axis=1)
    top = plan.total[row, gpu]
    lost, back = _costs(plan.held[row], in_use)
    pairs = replacement_pairs(plan, row, gpu)
    options = [(exchanges(plan, row, gpu), _exchange_costs(plan.expert[row], gpu, lost, back))]
    for old, new in pairs:
        options.append(
            (replacements(plan, row, old, new), _replacement_costs(old, new, lost, back))
        )
    found = [_best(peaks, cost, top, left, second) for peaks, cost in options]
    scores = np.stack([score for score, _, _ in found])
    chosen, moved = scores.argmax(axis=0), scores.max(axis=0) > 0
    exchanged, *replaced = (np.flatnonzero(moved & (chosen == i)) for i in range(3))
    slot, *there = np.unravel_index(found[0][1][exchanged], options[0][0].shape[1:])
    plan.exchange(row[exchanged], gpu[exchanged], slot, *there)
    for at, (old, new), (_, best, _) in zip(replaced, pairs, found[1:], strict=True):
        plan.replace(*replacement_at(plan, row[at], old[at], new[at], best[at]))
    cost = np.stack([cost for _, _, cost in found])[chosen, np.arange(len(row))]
    return np.where(moved, cost, left + 1)


def _best(peaks, cost, top, left, second):
    """The score of the best step of each row, its flat index, and its cost."""
    peaks, cost = (x.reshape(len(top), -1) for x in (peaks, cost))
    top, second = top[:, None], second[:, None]
    can = (peaks < top * (1 - MARGIN)) & (cost <= left[:, None])
    # what goes beyond the second fullest GPU only decides between steps that are alike
    gain = top - np.maximum(peaks, second) + 1e-3 * (top - peaks)
    score = np.where(can, gain, 0) / np.maximum(cost, 0.5)
    best = score.argmax(axis=1)
    at = np.arange(len(top))
    return score[at, best], best, cost[at, best]


def _costs(held, in_use):
    """Slots changed when a GPU loses an expert, and changed back when it gains one, `[n, e, g]`."""
    return (held <= in_use).astype(np.int64), (held < in_use).astype(np.int64)


def _exchange_costs(expert, gpu, lost, back):
    n, gpus, slots = expert.shape
    at = np.arange(n)
    here = expert[at, gpu]
    there = expert.reshape(n, -1)
    other = np.repeat(np.arange(gpus), slots)
    ours = lost[at[:, None], here, gpu[:, None]][:, :, None] - back[at[:, None], here]
    theirs = lost[at[:, None], there, other] - back[at[:, None], there, gpu[:, None]]
    return ours[..., None] + theirs.reshape(n, 1, gpus, slots)


def _replacement_costs(old, new, lost, back):
    at = np.arange(len(old))[:, None]
    return lost[at, old][:, :, None] - back[at, new][:, None]
