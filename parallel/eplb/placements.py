"""Nodes filled with replicas, and the two changes that keep them valid."""

import numpy as np

MARGIN = 1e-9  # by which a change has to lower a peak; less is rounding


class Placements:
    """Nodes filled with replicas, a row each; changed in place.

    Attributes:
      load: `f64[rows, experts]` of the experts of each node.
      expert: `int[rows, gpus, slots]`, the expert of each slot, counted within its node.
      counts: `int[rows, experts]`.
      held: `int[rows, experts, gpus]`, replicas of an expert on a GPU.
      weight: `f64[rows, gpus, slots]`, what each slot carries.
      total: `f64[rows, gpus]`, what each GPU carries.
    """

    def __init__(self, load: np.ndarray, expert: np.ndarray):
        self.load = np.asarray(load, np.float64)
        self.expert = expert.copy()
        self.held = count_held(expert, load.shape[1])
        self.counts = self.held.sum(axis=2)
        self.weight = np.empty(expert.shape)
        self.total = np.empty(expert.shape[:2])
        self._weigh(np.arange(len(load)))

    def take(self, row: np.ndarray) -> "Placements":
        """Copies of some rows, `int[n]`."""
        taken = object.__new__(Placements)
        for name, value in vars(self).items():
            setattr(taken, name, value[row])
        return taken

    def put(self, row: np.ndarray, other: "Placements", other_row: np.ndarray) -> None:
        """Overwrites some rows, `int[n]`, by as many of another."""
        for name, value in vars(self).items():
            value[row] = getattr(other, name)[other_row]

    def exchange(self, row, gpu, slot, other_gpu, other_slot) -> None:
        """Swaps the experts of two slots in each of some rows; the arguments are `int[n]`."""
        here, there = (row, gpu, slot), (row, other_gpu, other_slot)
        a, b = self.expert[here], self.expert[there]
        self.expert[here], self.expert[there] = b, a
        self.held[row, a, gpu] -= 1
        self.held[row, b, gpu] += 1
        self.held[row, b, other_gpu] -= 1
        self.held[row, a, other_gpu] += 1
        self.weight[here], self.weight[there] = self.weight[there], self.weight[here]
        for at in ((row, gpu), (row, other_gpu)):
            self.total[at] = self.weight[at].sum(axis=1)

    def replace(self, row, gpu, slot, expert) -> None:
        """Gives a slot in each of some rows to another expert; the arguments are `int[n]`."""
        old = self.expert[row, gpu, slot]
        self.expert[row, gpu, slot] = expert
        for changed, by in ((old, -1), (expert, 1)):
            self.held[row, changed, gpu] += by
            self.counts[row, changed] += by
        self._weigh(row)

    def _weigh(self, row):
        share = self.load[row] / self.counts[row]
        self.weight[row] = share[np.arange(len(row))[:, None, None], self.expert[row]]
        self.total[row] = self.weight[row].sum(axis=2)


def count_held(expert: np.ndarray, experts: int) -> np.ndarray:
    """Replicas of each expert on each GPU, `int[rows, experts, gpus]`, of `[rows, gpus, slots]`."""
    rows, gpus, _ = expert.shape
    flat = (np.arange(rows)[:, None, None] * experts + expert) * gpus + np.arange(gpus)[:, None]
    held = np.bincount(flat.reshape(-1), minlength=rows * experts * gpus)
    return held.reshape(rows, experts, gpus)
