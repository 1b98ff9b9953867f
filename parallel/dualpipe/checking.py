"""Proves that a schedule can run, computes all there is to compute, and keeps its promises."""

from whalejax.parallel.dualpipe.memory import kept
from whalejax.parallel.dualpipe.ordering import in_order
from whalejax.parallel.dualpipe.schedule import (
    BACKWARD,
    FORWARD,
    INPUT,
    WEIGHT,
    Op,
    Schedule,
)

KINDS = (FORWARD, BACKWARD, INPUT, WEIGHT)
MAX_PRINTED = 8


def check(schedule: Schedule) -> None:
    """Checks a schedule, the user's own as well as a published one.

    Every route passes ranks and chunks that exist, no chunk is two stages, and all routes have
    equally many; every microbatch is forwarded once on each stage of its route, and has its
    gradients computed once, whole or split; weight gradients follow their input gradients; pairs
    are a forward and a whole backward of different microbatches; all of it can run without ranks
    waiting for each other; and no rank keeps more activations or deferred weight gradients than
    promised.

    Raises:
      ValueError: something of this is not so; says what, and on which rank, step and operation.
    """
    for faults in (_route_faults, _step_faults, _coverage_faults, _sequence_faults):
        _refuse(schedule, faults(schedule))
    for _ in in_order(schedule):
        pass
    _refuse(schedule, _memory_faults(schedule))


def _refuse(schedule, faults):
    """Raises all faults at once."""
    faults = list(faults)
    if faults:
        printed = faults[:MAX_PRINTED]
        if len(faults) > MAX_PRINTED:
            printed.append(f"and {len(faults) - MAX_PRINTED} more")
        raise ValueError(f"{schedule.name}: " + "; ".join(printed))


def _route_faults(schedule):
    """What is wrong with routes and with the microbatches on them."""
    numbers = schedule.steps, schedule.route_of, schedule.routes, *schedule.routes
    if not all(numbers):
        yield (
            f"there are {len(schedule.steps)} ranks, {len(schedule.route_of)} microbatches and "
            f"routes of {[len(route) for route in schedule.routes]} stages; each needs at least one"
        )
        return
    lengths = [len(route) for route in schedule.routes]
    if len(set(lengths)) > 1:
        yield f"routes have {lengths} stages, which must be equally many"
    yield from _place_faults(schedule)
    for m, route in enumerate(schedule.route_of):
        if not 0 <= route < len(schedule.routes):
            yield f"microbatch {m} takes route {route} of {len(schedule.routes)}"


def _place_faults(schedule):
    """What is wrong with the ranks and chunks that routes pass."""
    stages = {}
    for i, route in enumerate(schedule.routes):
        for stage, (rank, chunk) in enumerate(route):
            if not 0 <= rank < schedule.num_ranks or chunk < 0:
                yield (
                    f"stage {stage} of route {i} is on rank {rank}, chunk {chunk}; there are "
                    f"{schedule.num_ranks} ranks"
                )
            elif stages.setdefault((rank, chunk), stage) != stage:
                yield (
                    f"rank {rank}, chunk {chunk} is stage {stages[rank, chunk]} and, on route {i}, "
                    f"stage {stage}"
                )
    for rank in range(schedule.num_ranks):
        for chunk in range(schedule.chunks_per_rank):
            if (rank, chunk) not in stages:
                yield f"no route passes rank {rank}, chunk {chunk}"


def _step_faults(schedule):
    """Steps that are neither an operation nor a pair, and operations that do not exist."""
    for rank, steps in enumerate(schedule.steps):
        for i, step in enumerate(steps):
            where = f"rank {rank}, step {i}"
            kinds = tuple(op.kind for op in step)
            if len(step) != 1 and kinds != (FORWARD, BACKWARD):
                yield f"{where} is {kinds}, neither one operation nor a pair of F and B"
            elif len(step) == 2 and step[0].microbatch == step[1].microbatch:
                yield f"{where}: {step[1]} needs {step[0]} and cannot run beside it"
            for op in step:
                if fault := _op_fault(schedule, rank, op):
                    yield f"{where}: {op}: {fault}"


def _op_fault(schedule, rank, op):
    """Why there is no such operation on a rank, or None."""
    if op.kind not in KINDS:
        return f"the kinds are {', '.join(KINDS)}"
    if not 0 <= op.microbatch < schedule.num_microbatches:
        return f"there are {schedule.num_microbatches} microbatches"
    route = schedule.route_of[op.microbatch]
    if (rank, op.chunk) not in schedule.routes[route]:
        return f"the microbatch takes route {route}, which does not pass there"
    return None


def _coverage_faults(schedule):
    """Operations that are missing or come twice."""
    positions = _positions(schedule)
    for (rank, op), at in positions.items():
        if len(at) > 1:
            yield f"rank {rank} runs {op} at steps {at}; once is right"
    for m, route in enumerate(schedule.route_of):
        for rank, chunk in schedule.routes[route]:
            present = {kind for kind in KINDS if (rank, Op(kind, chunk, m)) in positions}
            if FORWARD not in present:
                yield f"rank {rank} never runs {Op(FORWARD, chunk, m)}"
            if present - {FORWARD} not in ({BACKWARD}, {INPUT, WEIGHT}):
                yield (
                    f"rank {rank} runs {sorted(present - {FORWARD})} for microbatch {m} on chunk "
                    f"{chunk}; it must be B, or I and W"
                )


def _sequence_faults(schedule):
    """Operations of a rank that come before what they need of the same rank and chunk."""
    positions = _positions(schedule)
    for (rank, op), (at,) in positions.items():
        earlier = {BACKWARD: FORWARD, INPUT: FORWARD, WEIGHT: INPUT}.get(op.kind)
        if earlier is not None:
            needed = Op(earlier, op.chunk, op.microbatch)
            (before,) = positions[rank, needed]
            if before > at:
                yield f"rank {rank} runs {op} at step {at}, before {needed} at step {before}"


def _positions(schedule):
    """From rank and operation to the indices of the steps that have it."""
    positions = {}
    for rank, steps in enumerate(schedule.steps):
        for i, step in enumerate(steps):
            for op in step:
                positions.setdefault((rank, op), []).append(i)
    return positions


def _memory_faults(schedule):
    """Of each rank, the first step in which it keeps more than promised."""
    for rank, steps in enumerate(schedule.steps):
        for i, now in enumerate(kept(steps)):
            if now.activations > schedule.activations or now.deferred > schedule.deferred:
                ops = " & ".join(str(op) for op in steps[i])
                yield (
                    f"rank {rank} at step {i}, {ops}, keeps {now.activations} activations and "
                    f"{now.deferred} deferred weight gradients; promised are at most "
                    f"{schedule.activations} and {schedule.deferred}"
                )
                break
