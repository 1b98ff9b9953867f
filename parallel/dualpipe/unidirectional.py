"""Schedules whose microbatches all take one way: GPipe, 1F1B, interleaved 1F1B and ZB-H1."""

from whalejax.parallel.dualpipe.programs import Program
from whalejax.parallel.dualpipe.schedule import BACKWARD, FORWARD, INPUT, WEIGHT


def gpipe(rank: int, num_ranks: int, num_microbatches: int) -> Program:
    """Every forward, then every backward (arXiv 1811.06965)."""
    return [((FORWARD, 0),)] * num_microbatches + [((BACKWARD, 0),)] * num_microbatches


def one_forward_one_backward(rank: int, num_ranks: int, num_microbatches: int) -> Program:
    """A backward as soon as there is one, so that a rank keeps at most `num_ranks` activations.

    Source: PipeDream-Flush (arXiv 2006.09503).
    """
    warm_up = num_ranks - 1 - rank
    order = [0] * num_microbatches
    return _alternate(order, order, warm_up)


def interleaved(rank: int, num_ranks: int, num_microbatches: int, chunks: int) -> Program:
    """1F1B over several chunks of each rank, `num_ranks` microbatches at a time through each.

    Source: Megatron-LM (arXiv 2104.04473), section 2.2.
    """
    rounds = num_microbatches // num_ranks
    forward = [chunk for chunk in range(chunks) for _ in range(num_ranks)] * rounds
    backward = [chunk for chunk in reversed(range(chunks)) for _ in range(num_ranks)] * rounds
    warm_up = 2 * (num_ranks - 1 - rank) + (chunks - 1) * num_ranks
    return _alternate(forward, backward, warm_up)


def zero_bubble(rank: int, num_ranks: int, num_microbatches: int) -> Program:
    """1F1B in which rank r computes weight gradients r microbatches late.

    So the last ranks pass input gradients on early, and activations and deferred weight gradients
    are together no more than the activations of 1F1B.

    Source: ZB-H1 (arXiv 2401.10241), section 2.
    """
    warm_up = min(num_ranks - 1 - rank, num_microbatches)
    program = [((FORWARD, 0),)] * warm_up
    for m in range(num_microbatches):
        if warm_up + m < num_microbatches:
            program.append(((FORWARD, 0),))
        program.append(((INPUT, 0),))
        if m >= rank:
            program.append(((WEIGHT, 0),))
    return program + [((WEIGHT, 0),)] * min(rank, num_microbatches)


def _alternate(forward, backward, warm_up):
    """Some forwards, then a forward and a backward in turn, then the backwards that are left.

    `forward` and `backward` are the chunks, in order.
    """
    warm_up = min(warm_up, len(forward))
    program = [((FORWARD, chunk),) for chunk in forward[:warm_up]]
    for i, chunk in enumerate(backward):
        if warm_up + i < len(forward):
            program.append(((FORWARD, forward[warm_up + i]),))
        program.append(((BACKWARD, chunk),))
    return program
