"""Schedules before microbatches are numbered: what the generators write."""

import collections
from collections.abc import Sequence

from whalejax.parallel.dualpipe.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Op, Step

# a rank's steps: of each, the kind and the chunk of its one or two operations
Program = list[tuple[tuple[str, int], ...]]


def join_backward(program: Program) -> Program:
    """The program whose backwards are all whole: an I becomes a B, and W vanishes."""
    joined = {FORWARD: FORWARD, BACKWARD: BACKWARD, INPUT: BACKWARD}
    return [
        tuple((joined[kind], chunk) for kind, chunk in step)
        for step in program
        if step[0][0] != WEIGHT
    ]


def number(program: Program, first: Sequence[int]) -> tuple[Step, ...]:
    """Gives every operation its microbatch.

    A chunk takes its microbatches in order, forward and backward; the oldest deferred weight
    gradient of the rank is computed first, whatever the chunk it is written for.

    Args:
      program: of one rank.
      first: of each chunk, its first microbatch.
    """
    upcoming = {kind: list(first) for kind in (FORWARD, BACKWARD)}
    deferred = collections.deque()

    def numbered(kind, chunk):
        if kind == WEIGHT:
            return Op(WEIGHT, *deferred.popleft())
        counts = upcoming[FORWARD if kind == FORWARD else BACKWARD]
        microbatch, counts[chunk] = counts[chunk], counts[chunk] + 1
        if kind == INPUT:
            deferred.append((chunk, microbatch))
        return Op(kind, chunk, microbatch)

    return tuple(tuple(numbered(*op) for op in step) for step in program)
