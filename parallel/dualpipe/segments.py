"""A table cut into loops: before, within and after the steady state, in which no rank waits.

In the steady state every rank runs a forward and a whole backward pass in every tick. Its loop
needs no conditional, and where ranks take turns between their chunks, a body of two ticks knows the
chunk of each.
"""

import dataclasses
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from whalejax.parallel.dualpipe.table import NONE, Send, Table

MIN_STEADY_TICKS = 4  # fewer are not worth a loop of their own
Permutation = tuple[tuple[int, int], ...]  # pairs of source and destination, each at most once


class Traits(NamedTuple):
    """What is known of one kind of pass in some ticks.

    Attributes:
      some, always: whether any rank runs it in any of them, and whether each does in each.
      chunk: of all of them, if it is one; else None.
    """

    some: bool
    always: bool
    chunk: int | None


class Lane(NamedTuple):
    """Arrays that travel at the same time.

    Attributes:
      permutation: of ranks; None for those that stay on their rank.
      slots: `i32[ticks, ranks]`, where a rank keeps what arrives; -1 where nothing does.
    """

    permutation: Permutation | None
    slots: np.ndarray


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """Every how-manieth tick of a loop: one turn of its body.

    Attributes:
      forward, backward, weight: what is known of the passes.
      deferred: of the backward passes, those that defer their weight gradients.
      outputs, gradients: the ways that arrays travel.
    """

    forward: Traits
    backward: Traits
    weight: Traits
    deferred: Traits
    outputs: tuple[Lane, ...]
    gradients: tuple[Lane, ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Segment:
    """A loop over ticks.

    Attributes:
      start, stop: its ticks.
      parts: turns of its body, one tick each.
    """

    start: int
    stop: int
    parts: tuple[Part, ...]


def align_chunks(table: Table) -> Table:
    """Numbers every rank's chunks so that, if possible, all work on the same ones at a time."""
    start, stop = steady_ticks(table)
    chunks = table.stages.shape[1]
    names = np.tile(np.arange(chunks, dtype=np.int32), (len(table.stages), 1))  # old to new
    for rank in range(1, len(table.stages)):
        window = slice(start, stop)
        own, first = (table.forward.chunk[window, r] for r in (rank, 0))
        pairs = set(zip(own.tolist(), first.tolist(), strict=True))
        if len(pairs) == chunks == len(dict(pairs)) == len({new for _, new in pairs}):
            names[rank] = [dict(pairs)[old] for old in range(chunks)]
    ranks = np.arange(len(names))[None]

    def renamed(cells):
        new = names[ranks, cells.chunk]
        return cells._replace(chunk=np.where(cells.chunk == NONE, NONE, new).astype(np.int32))

    stages = np.empty_like(table.stages)
    np.put_along_axis(stages, names.astype(np.int64), table.stages, axis=1)
    passes = {name: renamed(getattr(table, name)) for name in ("forward", "backward", "weight")}
    return dataclasses.replace(table, stages=stages, **passes)


def segments(table: Table) -> tuple[Segment, ...]:
    """The loops of a table, in order."""
    start, stop = steady_ticks(table)
    if stop - start < MIN_STEADY_TICKS:
        return (_segment(table, 0, table.num_ticks, 1),)
    period = next((p for p in (1, 2) if _takes_turns(table, start, stop, p)), 1)
    stop -= (stop - start) % period
    cuts = ((0, start, 1), (start, stop, period), (stop, table.num_ticks, 1))
    return tuple(_segment(table, *cut) for cut in cuts if cut[0] < cut[1])


def steady_ticks(table: Table) -> tuple[int, int]:
    """Start and stop of the longest run of ticks of the steady state; equal if there is none."""
    whole = (table.backward.microbatch != NONE) & (table.backward.deferred == NONE)
    all_busy = ((table.forward.microbatch != NONE) & whole).all(axis=1)
    best, start = (0, 0), 0
    for tick, busy in enumerate([*all_busy.tolist(), False]):
        if busy:
            best = max(best, (start, tick + 1), key=lambda run: run[1] - run[0])
        else:
            start = tick + 1
    return best


def _takes_turns(table, start, stop, period):
    """Whether in every so-manieth tick all ranks work on the same chunks."""
    return all(
        len(np.unique(cells.chunk[start + turn : stop : period])) == 1
        for turn in range(period)
        for cells in (table.forward, table.backward)
    )


def _segment(table, start, stop, period):
    parts = tuple(_part(table, range(start + turn, stop, period)) for turn in range(period))
    return Segment(start=start, stop=stop, parts=parts)


def _part(table, ticks):
    backward = table.backward
    return Part(
        forward=_traits(table.forward.microbatch, table.forward.chunk, ticks),
        backward=_traits(backward.microbatch, backward.chunk, ticks),
        weight=_traits(table.weight.microbatch, table.weight.chunk, ticks),
        deferred=_traits(backward.deferred, backward.chunk, ticks),
        outputs=_lanes(table.outputs, ticks, table.forward.chunk.shape),
        gradients=_lanes(table.gradients, ticks, table.forward.chunk.shape),
    )


def _traits(cells, chunks, ticks):
    active = cells[ticks.start : ticks.stop : ticks.step] != NONE
    found = np.unique(chunks[ticks.start : ticks.stop : ticks.step][active])
    chunk = int(found[0]) if len(found) == 1 else None
    return Traits(bool(active.any()), bool(active.all()), chunk)


def _lanes(sends: Sequence[Send], ticks: range, shape: tuple[int, int]) -> tuple[Lane, ...]:
    """As few ways as a simple search finds: each rank sends once and receives once in each."""
    by_shift: dict[int, set] = {}
    for send in sends:
        if send.tick in ticks:
            shift = (send.destination - send.source) % shape[1]
            by_shift.setdefault(shift, set()).add((send.source, send.destination))
    stays = by_shift.pop(0, None)  # what stays on its rank need not wait for what travels
    ways: list[set] = []
    for pairs in by_shift.values():
        way = next((w for w in ways if _disjoint(w, pairs)), None)
        if way is None:
            ways.append(way := set())
        way |= pairs
    found = [_lane(sends, ticks, shape, way) for way in ways]
    if stays:
        found.append(_lane(sends, ticks, shape, stays)._replace(permutation=None))
    return tuple(found)


def _lane(sends, ticks, shape, way):
    slots = np.full(shape, NONE, np.int32)
    for send in sends:
        if send.tick in ticks and (send.source, send.destination) in way:
            slots[send.tick, send.destination] = send.slot
    return Lane(tuple(sorted(way)), slots)


def _disjoint(first, second):
    sources, destinations = ({pair[end] for pair in first} for end in (0, 1))
    return not any(s in sources or d in destinations for s, d in second)
