"""A schedule laid out in ticks: what every rank does in each, and in which slot every array lies.

All ranks work in lockstep: in a tick a rank takes one step of its schedule, then arrays travel. A
tick reads its slots before it writes any, so a slot that is read in a tick is free for what the
same tick writes.
"""

import dataclasses
from collections.abc import Iterable
from typing import NamedTuple

import numpy as np

from whalejax.parallel.dualpipe.ordering import in_order, needs, outcome
from whalejax.parallel.dualpipe.schedule import FORWARD, INPUT, WEIGHT, Schedule

NONE = -1  # no operation, or no slot


class Forward(NamedTuple):
    """The forward passes, `i32[ticks, ranks]` each; -1 where there is none.

    Attributes:
      microbatch, chunk: which.
      slot: of the activations that it keeps.
      source: slot of its input among arrived ones; -1 on the first stage.
      loss: slot for the gradient of the loss, on the last stage; else -1.
    """

    microbatch: np.ndarray
    chunk: np.ndarray
    slot: np.ndarray
    source: np.ndarray
    loss: np.ndarray


class Backward(NamedTuple):
    """The backward passes, as `Forward`.

    Attributes:
      microbatch, chunk: which.
      slot: of the activations that it frees.
      source: slot of the gradient of its output.
      deferred: slot of what its weight gradients need later; -1 if it computes them itself.
    """

    microbatch: np.ndarray
    chunk: np.ndarray
    slot: np.ndarray
    source: np.ndarray
    deferred: np.ndarray


class Weight(NamedTuple):
    """The deferred weight gradients, as `Forward`.

    Attributes:
      microbatch, chunk: which.
      slot: of what its backward pass left.
    """

    microbatch: np.ndarray
    chunk: np.ndarray
    slot: np.ndarray


class Send(NamedTuple):
    """An array that travels at the end of a tick, perhaps to another chunk of the same rank.

    Attributes:
      tick: at whose end.
      source, destination: ranks.
      slot: where the destination keeps it.
    """

    tick: int
    source: int
    destination: int
    slot: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """A schedule in ticks.

    Attributes:
      stages: `i32[ranks, chunks]`, the stage that each chunk is.
      forward, backward, weight: what runs in each tick on each rank; in a tick with both a forward
        and a backward pass the two are of different microbatches.
      outputs, gradients: what travels to the next stages and to the ones before.
      activation_slots, input_slots, gradient_slots, deferred_slots: how many of each a rank needs.
    """

    stages: np.ndarray
    forward: Forward
    backward: Backward
    weight: Weight
    outputs: tuple[Send, ...]
    gradients: tuple[Send, ...]
    activation_slots: int
    input_slots: int
    gradient_slots: int
    deferred_slots: int

    @property
    def num_ticks(self) -> int:
        """From the first forward pass to the last gradient."""
        return len(self.forward.microbatch)


class Place(NamedTuple):
    """Where an operation runs."""

    tick: int
    rank: int
    chunk: int


Places = dict[tuple[int, int], Place]  # by microbatch and stage


def tabulate(schedule: Schedule) -> Table:
    """Lays a checked schedule out in ticks, each step as early as its inputs are there."""
    forward, backward, weight = places(schedule)
    last = schedule.num_stages - 1
    came_from = {(m, s): forward[m, s - 1] for m, s in forward if s}
    returned_from = {
        (m, s): forward[m, s] if s == last else backward[m, s + 1] for m, s in backward
    }
    kept, activation_slots = allocate(forward, forward, backward)
    inputs, input_slots = allocate(came_from, came_from, forward)
    gradients, gradient_slots = allocate(backward, returned_from, backward)
    deferred, deferred_slots = allocate(weight, backward, weight)
    losses = {key: gradients[key] for key in forward if key[1] == last}
    stages = np.full((schedule.num_ranks, schedule.chunks_per_rank), NONE, np.int32)
    for route in schedule.routes:
        stages[tuple(np.transpose(route))] = np.arange(len(route))
    everything = (*forward.values(), *backward.values(), *weight.values())
    shape = max(place.tick for place in everything) + 1, schedule.num_ranks
    return Table(
        stages=stages,
        forward=Forward(*_cells(shape, forward, kept, inputs, losses)),
        backward=Backward(*_cells(shape, backward, kept, gradients, deferred)),
        weight=Weight(*_cells(shape, weight, deferred)),
        outputs=_sends(came_from, forward, inputs),
        gradients=_sends(
            {k: p for k, p in returned_from.items() if k[1] < last}, backward, gradients
        ),
        activation_slots=activation_slots,
        input_slots=input_slots,
        gradient_slots=gradient_slots,
        deferred_slots=deferred_slots,
    )


def places(schedule: Schedule) -> tuple[Places, Places, Places]:
    """Where the forward, backward and deferred weight passes run, each as early as it can.

    Raises:
      ValueError: ranks wait for each other; prints what each of them waits for.
    """
    found: dict[str, Places] = {FORWARD: {}, INPUT: {}, WEIGHT: {}}
    free = [0] * schedule.num_ranks  # the first tick in which a rank has not taken a step yet
    for rank, index in in_order(schedule):
        step = schedule.steps[rank][index]
        needed = (event for op in step for event in needs(schedule, rank, op))
        inputs = (found[kind][m, stage].tick + 1 for kind, m, stage in needed)
        tick = max(free[rank], *inputs, 0)
        for op in step:
            kind, m, stage = outcome(schedule, rank, op)
            found[kind][m, stage] = Place(tick, rank, op.chunk)
        free[rank] = tick + 1
    return found[FORWARD], found[INPUT], found[WEIGHT]


def allocate(keys: Iterable, written: Places, read: Places) -> tuple[dict, int]:
    """Gives every array a slot of the rank that reads it, and says how many slots a rank needs.

    Args:
      keys: of the arrays.
      written: at the end of whose tick an array is written.
      read: at the start of whose tick it is read, for the last time.
    """
    slots, free_from = {}, {}
    for key in sorted(keys, key=lambda key: written[key].tick):
        of_rank = free_from.setdefault(read[key].rank, [])
        free = [slot for slot, tick in enumerate(of_rank) if tick <= written[key].tick]
        slots[key] = free[0] if free else len(of_rank)
        of_rank[slots[key] : slots[key] + 1] = [read[key].tick]
    return slots, max(map(len, free_from.values()), default=0)


def _cells(shape, passes, *slots):
    """Microbatch, chunk and slots of the passes of one kind, in ticks and ranks."""
    cells = np.full((2 + len(slots), *shape), NONE, np.int32)
    for key, place in passes.items():
        of_key = (each.get(key, NONE) for each in slots)
        cells[:, place.tick, place.rank] = (key[0], place.chunk, *of_key)
    return cells


def _sends(sources, destinations, slots):
    return tuple(
        Send(place.tick, place.rank, destinations[key].rank, slots[key])
        for key, place in sources.items()
    )
