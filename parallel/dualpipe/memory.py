"""What a rank keeps while it runs its steps."""

from collections.abc import Iterable, Iterator
from typing import NamedTuple

from whalejax.parallel.dualpipe.schedule import FORWARD, INPUT, WEIGHT, Step


class Kept(NamedTuple):
    """How much a rank keeps.

    Attributes:
      activations: of microbatches that were forwarded and have no input gradient yet.
      deferred: weight gradients of microbatches that have one.
    """

    activations: int
    deferred: int


def kept(steps: Iterable[Step]) -> Iterator[Kept]:
    """Yields the most that a rank keeps in each of its steps.

    A forward has its activation from its start, a backward gives it up at its end: in a pair of the
    two both are live.
    """
    activations = deferred = 0
    for step in steps:
        activations += sum(op.kind == FORWARD for op in step)
        deferred += sum(op.kind == INPUT for op in step)
        yield Kept(activations, deferred)
        activations -= sum(op.kind not in (FORWARD, WEIGHT) for op in step)
        deferred -= sum(op.kind == WEIGHT for op in step)


def peak(steps: Iterable[Step]) -> Kept:
    """The most activations, and the most deferred weight gradients, of a rank's steps."""
    highest = Kept(0, 0)
    for now in kept(steps):
        highest = Kept(*map(max, highest, now))
    return highest
