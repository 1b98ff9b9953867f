"""How long a schedule takes and what it keeps, found by running it on paper."""

import dataclasses
import math
from typing import NamedTuple

from whalejax.parallel.dualpipe.checking import check
from whalejax.parallel.dualpipe.memory import peak
from whalejax.parallel.dualpipe.ordering import in_order, needs, outcome
from whalejax.parallel.dualpipe.schedule import BACKWARD, FORWARD, INPUT, Schedule, Step
from whalejax.parallel.dualpipe.schedules import make_schedule


@dataclasses.dataclass(frozen=True, kw_only=True)
class Costs:
    """Time that operations take, in any unit. All are of one microbatch on ONE chunk.

    Attributes:
      forward: of F.
      backward: of B, the whole backward; an I alone takes `backward - weight`.
      weight: of W, at most `backward`.
      overlapped: of a forward and a whole backward that run as a pair.
      transfer: from the end of an operation until another rank has its result; it keeps no rank
        busy.
    """

    forward: float = 1
    backward: float = 2
    weight: float = 1
    overlapped: float = 3
    transfer: float = 0

    def __post_init__(self):
        values = dataclasses.asdict(self)
        if not all(math.isfinite(value) and value >= 0 for value in values.values()):
            raise ValueError(f"Costs: {values} must be finite and not negative")
        if self.weight > self.backward:
            raise ValueError(
                f"Costs: weight={self.weight} is a part of backward={self.backward} and cannot be "
                f"more"
            )

    def of(self, step: Step) -> float:
        """Time that a step keeps its rank busy."""
        if len(step) == 2:
            return self.overlapped
        kind = step[0].kind
        if kind == INPUT:
            return self.backward - self.weight
        return {FORWARD: self.forward, BACKWARD: self.backward}.get(kind, self.weight)


class Span(NamedTuple):
    """A step of a rank, and when it runs."""

    step: Step
    start: float
    end: float


# of each rank, its steps in order
Timeline = tuple[tuple[Span, ...], ...]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Analysis:
    """What `analyse` found.

    Attributes:
      schedule: that was run.
      costs: at which.
      timeline: every step of every rank, with its start and end.
      makespan: from the start of the first step to the end of the last.
      bubble: of each rank, the makespan minus the time in which it is busy.
      activations: of each rank, the most that it keeps at once; one is of one microbatch on one
        chunk.
      deferred: of each rank, the most weight gradients that it owes at once; likewise.
      parameter_copies: parameters that a rank holds, in shares of the published baseline: of
        1F1B over the `num_ranks` ranks, so 1 for one chunk a stage or `interleaved`, and 2 for
        `dualpipe`, which holds every stage twice. For `dualpipev` the publication counts stages
        and calls them PP, two on each of PP / 2 ranks, and compares with 1F1B over PP ranks: 2.
      model_copies: parameters of all ranks together, in models; 2 for `dualpipe` and 1 for all
        others, `dualpipev` too.
    """

    schedule: Schedule
    costs: Costs
    timeline: Timeline
    makespan: float
    bubble: tuple[float, ...]
    activations: tuple[int, ...]
    deferred: tuple[int, ...]
    parameter_copies: float
    model_copies: float

    @property
    def peak_activations(self) -> int:
        """The most live activations of any rank."""
        return max(self.activations)

    @property
    def peak_deferred(self) -> int:
        """The most deferred weight gradients of any rank."""
        return max(self.deferred)


def simulate(schedule: Schedule, costs: Costs = Costs()) -> Timeline:
    """Runs a schedule on paper.

    A rank starts its next step as soon as it is free and all inputs of the step have arrived; a
    pair starts as one and leaves both results at its end.

    Args:
      schedule: that can run.
      costs: of its operations.

    Raises:
      ValueError: ranks wait for each other; says which and for what.
    """
    timeline = [[] for _ in range(schedule.num_ranks)]
    results = {}  # from an event to the rank that has it, and since when
    for rank, index in in_order(schedule):
        step = schedule.steps[rank][index]
        start = timeline[rank][-1].end if timeline[rank] else 0
        for event in (event for op in step for event in needs(schedule, rank, op)):
            where, since = results[event]
            start = max(start, since if where == rank else since + costs.transfer)
        end = start + costs.of(step)
        timeline[rank].append(Span(step, start, end))
        results.update({outcome(schedule, rank, op): (rank, end) for op in step})
    return tuple(tuple(spans) for spans in timeline)


def analyse(
    schedule: str | Schedule,
    *,
    num_ranks: int | None = None,
    num_microbatches: int | None = None,
    chunks_per_rank: int = 1,
    forward: float = 1,
    backward: float = 2,
    weight: float = 1,
    overlapped: float = 3,
    transfer: float = 0,
) -> Analysis:
    """Finds bubble, makespan and memory of a schedule by simulating it.

    Costs are of one microbatch on one chunk. Chunks of `dualpipe` are as large as those of `1f1b`
    over as many ranks; to compare `interleaved` with v chunks or `dualpipev` on equally many ranks,
    give them 1/v or 1/2 of the costs.

    Args:
      schedule: a name, see `make_schedule`, or a schedule, which brings its own numbers.
      num_ranks: of a schedule that is named.
      num_microbatches: likewise.
      chunks_per_rank: likewise.
      forward: see `Costs`, as for all that follow.
      backward: the whole backward.
      weight: of a deferred weight gradient.
      overlapped: of a pair.
      transfer: between ranks.

    Raises:
      ValueError: the schedule cannot have these numbers or does not pass `check`, a cost is
        impossible, or numbers are missing or were given beside a schedule.
    """
    costs = Costs(
        forward=forward,
        backward=backward,
        weight=weight,
        overlapped=overlapped,
        transfer=transfer,
    )
    named = isinstance(schedule, str)
    if named == (num_ranks is None or num_microbatches is None) or (
        not named and (num_ranks, num_microbatches, chunks_per_rank) != (None, None, 1)
    ):
        raise ValueError(
            f"analyse: a schedule by name needs num_ranks and num_microbatches, and a Schedule "
            f"brings them; got {schedule if named else schedule.name!r}, num_ranks={num_ranks}, "
            f"num_microbatches={num_microbatches}, chunks_per_rank={chunks_per_rank}"
        )
    if named:
        schedule = make_schedule(
            schedule, num_ranks, num_microbatches, chunks_per_rank=chunks_per_rank
        )
    check(schedule)
    return _measure(schedule, costs)


def _measure(schedule, costs):
    """The analysis of a schedule that was checked."""
    timeline = simulate(schedule, costs)
    makespan = max(span.end for spans in timeline for span in spans)
    peaks = [peak(steps) for steps in schedule.steps]
    held = schedule.chunks_per_rank / schedule.num_stages
    baseline = schedule.num_stages if schedule.name == "dualpipev" else schedule.num_ranks
    return Analysis(
        schedule=schedule,
        costs=costs,
        timeline=timeline,
        makespan=makespan,
        bubble=tuple(makespan - sum(costs.of(span.step) for span in spans) for spans in timeline),
        activations=tuple(most.activations for most in peaks),
        deferred=tuple(most.deferred for most in peaks),
        parameter_copies=held * baseline,
        model_copies=held * schedule.num_ranks,
    )
