"""What an operation waits for, and an order in which all ranks' steps can run."""

from collections.abc import Iterator
from typing import NamedTuple

from whalejax.parallel.dualpipe.schedule import BACKWARD, FORWARD, INPUT, WEIGHT, Op, Schedule


class Event(NamedTuple):
    """Something that an operation leaves behind for others.

    Attributes:
      kind: `FORWARD` for a stage's output, `INPUT` for the gradient of its input, `WEIGHT` for the
        gradient of its weights.
      microbatch: from 0.
      stage: from 0.
    """

    kind: str
    microbatch: int
    stage: int


def outcome(schedule: Schedule, rank: int, op: Op) -> Event:
    """What an operation of a rank leaves behind."""
    stage = schedule.stage_of(rank, op.chunk, schedule.route_of[op.microbatch])
    return Event(INPUT if op.kind == BACKWARD else op.kind, op.microbatch, stage)


def needs(schedule: Schedule, rank: int, op: Op) -> list[Event]:
    """What must exist before an operation of a rank can start."""
    kind, m, stage = outcome(schedule, rank, op)
    if kind == FORWARD:
        return [Event(FORWARD, m, stage - 1)] if stage else []
    if kind == WEIGHT:
        return [Event(INPUT, m, stage)]
    last = stage == schedule.num_stages - 1
    return [Event(FORWARD, m, stage)] + ([] if last else [Event(INPUT, m, stage + 1)])


def in_order(schedule: Schedule) -> Iterator[tuple[int, int]]:
    """Yields every step, as rank and index, after all steps that it needs.

    Raises:
      ValueError: ranks wait for each other; prints what each of them waits for.
    """
    done = set()
    position = [0] * schedule.num_ranks
    waiting = {}  # from an event to the ranks whose next step needs it
    awake = list(reversed(range(schedule.num_ranks)))
    while awake:
        rank = awake.pop()
        while position[rank] < len(schedule.steps[rank]):
            step = schedule.steps[rank][position[rank]]
            missing = _missing(schedule, rank, step, done)
            if missing is not None:
                waiting.setdefault(missing, []).append(rank)
                break
            yield rank, position[rank]
            position[rank] += 1
            for event in (outcome(schedule, rank, op) for op in step):
                done.add(event)
                awake.extend(waiting.pop(event, ()))
    if waiting:
        raise ValueError(_deadlock(schedule, position, waiting))


def _missing(schedule, rank, step, done):
    """An event that a step needs and that is not done; None when it can start."""
    events = (event for op in step for event in needs(schedule, rank, op))
    return next((event for event in events if event not in done), None)


def _deadlock(schedule, position, waiting):
    """Says what each rank that stands still waits for."""
    lines = []
    for event, ranks in waiting.items():
        place = schedule.routes[schedule.route_of[event.microbatch]][event.stage]
        for rank in ranks:
            step = " & ".join(str(op) for op in schedule.steps[rank][position[rank]])
            lines.append(
                f"rank {rank} at step {position[rank]}, {step}, waits for {event.kind} of "
                f"microbatch {event.microbatch} on stage {event.stage} (rank, chunk {place})"
            )
    return f"{schedule.name}: deadlock: " + "; ".join(sorted(lines))
