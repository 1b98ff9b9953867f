"""The published schedules by name."""

from whalejax.parallel.dualpipe.bidirectional import dualpipe, dualpipev
from whalejax.parallel.dualpipe.programs import join_backward, number
from whalejax.parallel.dualpipe.schedule import Schedule
from whalejax.parallel.dualpipe.unidirectional import (
    gpipe,
    interleaved,
    one_forward_one_backward,
    zero_bubble,
)

PROGRAMS = {
    "gpipe": gpipe,
    "1f1b": one_forward_one_backward,
    "interleaved": interleaved,
    "zb1p": zero_bubble,
    "dualpipe": dualpipe,
    "dualpipev": dualpipev,
}
SCHEDULES = tuple(PROGRAMS)


def make_schedule(
    name: str,
    num_ranks: int,
    num_microbatches: int,
    *,
    chunks_per_rank: int = 1,
    split_backward: bool = True,
) -> Schedule:
    """Writes a published schedule down.

    Stages lie on (rank, chunk): stage r on (r, 0) for `gpipe`, `1f1b` and `zb1p`; stage
    c * num_ranks + r on (r, c) for `interleaved`; for `dualpipev` down the ranks with chunk 0 and
    up again with chunk 1. In `dualpipe` the first half of the microbatches finds stage r on (r, 0),
    the second half on (num_ranks - 1 - r, 1): every stage is held twice.

    Args:
      name: one of `SCHEDULES`.
      num_ranks: at least 1; even for `dualpipe`.
      num_microbatches: at least 1; a multiple of `num_ranks` for `interleaved`; at least twice
        `num_ranks` for `dualpipe`, which also needs an even number, and `dualpipev`.
      chunks_per_rank: at least 2 for `interleaved`, and 1, which for `dualpipe` and `dualpipev`
        means their own two, for the others.
      split_backward: defer weight gradients, as `zb1p`, `dualpipe` and `dualpipev` do. Without,
        every backward is whole.

    Raises:
      ValueError: the name is unknown, or the schedule cannot have these numbers; prints them.
    """
    if fault := why_not(name, num_ranks, num_microbatches, chunks_per_rank):
        raise ValueError(
            f"make_schedule: {name!r} with num_ranks={num_ranks}, "
            f"num_microbatches={num_microbatches} and chunks_per_rank={chunks_per_rank}: {fault}"
        )
    extra = (chunks_per_rank,) if name == "interleaved" else ()
    programs = [PROGRAMS[name](r, num_ranks, num_microbatches, *extra) for r in range(num_ranks)]
    if not split_backward:
        programs = [join_backward(program) for program in programs]
    routes = _routes(name, num_ranks, chunks_per_rank)
    per_route = num_microbatches // len(routes)
    first = [0] * max(chunks_per_rank, 2)
    if name == "dualpipe":
        first[1] = per_route
    activations, deferred = _promises(name, num_ranks, num_microbatches, chunks_per_rank)
    return Schedule(
        name=name,
        routes=routes,
        route_of=tuple(m // per_route for m in range(num_microbatches)),
        steps=tuple(number(program, first) for program in programs),
        activations=activations,
        deferred=deferred if split_backward else 0,
    )


def why_not(
    name: str, num_ranks: int, num_microbatches: int, chunks_per_rank: int = 1
) -> str | None:
    """The rule that a schedule with these numbers would break, or None if there is none."""
    if name not in PROGRAMS:
        return f"the schedules are {', '.join(SCHEDULES)}"
    if min(num_ranks, num_microbatches, chunks_per_rank) < 1:
        return "all three must be at least 1"
    if name == "interleaved":
        if chunks_per_rank < 2:
            return "chunks_per_rank must be at least 2; '1f1b' is the same with 1"
        if num_microbatches % num_ranks:
            return "num_microbatches must be a multiple of num_ranks, which go round together"
    elif chunks_per_rank != 1:
        return "only 'interleaved' takes chunks_per_rank"
    if name == "dualpipe" and (num_ranks % 2 or num_microbatches % 2):
        return "num_ranks and num_microbatches must be even, a half for each direction"
    if name in ("dualpipe", "dualpipev") and num_microbatches < 2 * num_ranks:
        return f"num_microbatches must be at least 2 * num_ranks = {2 * num_ranks}"
    return None


def _routes(name, num_ranks, chunks_per_rank):
    """Of each route, the (rank, chunk) of every stage."""
    ranks = range(num_ranks)
    down = tuple((r, 0) for r in ranks)
    up = tuple((r, 1) for r in reversed(ranks))
    if name == "dualpipe":
        return down, up
    if name == "dualpipev":
        return (down + up,)
    return (tuple((r, c) for c in range(chunks_per_rank) for r in ranks),)


def _promises(name, num_ranks, num_microbatches, chunks_per_rank):
    """The most live activations and deferred weight gradients of a rank."""
    if name == "dualpipe":
        return num_ranks + 1, num_ranks // 2
    if name == "dualpipev":
        return 2 * num_ranks + 1, num_ranks
    if name == "gpipe":
        return num_microbatches, 0
    if name == "interleaved":
        forwards = num_microbatches * chunks_per_rank
        return min(2 * (num_ranks - 1) + (chunks_per_rank - 1) * num_ranks + 1, forwards), 0
    most = min(num_ranks, num_microbatches)
    return most, most if name == "zb1p" else 0
