"""DualPipe and DualPipeV: a rank's two chunks work for microbatches that go opposite ways.

Source: DeepSeek-V3 (arXiv 2412.19437), section 3.2.1, and the eight steps of its DualPipe project.
"""

from whalejax.parallel.dualpipe.programs import Program
from whalejax.parallel.dualpipe.schedule import BACKWARD, FORWARD, INPUT, WEIGHT


def dualpipe(rank: int, num_ranks: int, num_microbatches: int) -> Program:
    """A rank's program in DualPipe: half of the microbatches enter at each end.

    Ranks mirror each other: the second half of them does with chunk 1 what the first does with
    chunk 0.
    """
    half = num_ranks // 2
    depth = min(rank, num_ranks - 1 - rank)
    near = 0 if rank < half else 1
    return _eight_steps(depth, half, num_microbatches // 2, near, 1 - near)


def dualpipev(rank: int, num_ranks: int, num_microbatches: int) -> Program:
    """A rank's program in DualPipeV: the half of DualPipe's ranks, its routes joined to a V."""
    return _eight_steps(rank, num_ranks, num_microbatches, 0, 1)


def _eight_steps(depth, num_depths, num_microbatches, near, far):
    """The steps as published, of a rank that is `depth` ranks away from an end.

    `near` is the chunk whose microbatches enter at that end. `num_microbatches` are those of one
    chunk.
    """
    outer = num_depths - depth - 1
    inner = depth + 1
    forward = {chunk: ((FORWARD, chunk),) for chunk in (near, far)}
    backward = {chunk: ((BACKWARD, chunk),) for chunk in (near, far)}
    gradient = {chunk: ((INPUT, chunk),) for chunk in (near, far)}
    weight = ((WEIGHT, near),)
    first = [forward[near] + backward[far]]
    if outer == 0:  # overlapped, it would hold up all other ranks
        first = [forward[near], backward[far]]
    steady = [forward[near] + backward[far], forward[far] + backward[near]]
    return [
        *[forward[near]] * (2 * outer),
        *[forward[near], forward[far]] * inner,
        *[gradient[far], weight, forward[far]] * outer,
        *first,
        *steady[1:],
        *steady * (num_microbatches - 2 * num_depths + depth),
        *[backward[far], forward[far] + backward[near]] * outer,
        # the second half defers, which leaves a weight gradient for each step that is to come
        *([backward[far], backward[near]] * inner)[:inner],
        *([gradient[far], gradient[near]] * inner)[inner:],
        *[weight, gradient[near]] * outer,
        *[weight] * inner,
    ]
