import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalejax.parallel.dualpipe import (
    SCHEDULES,
    Costs,
    Op,
    Schedule,
    analyse,
    make_schedule,
    simulate,
)

PUBLISHED = {  # bubble, peak activations and peak deferred weight gradients; h is PP / 2
    "gpipe": (lambda pp, c: (pp - 1) * (c.forward + c.backward), lambda pp, m: m, lambda pp: 0),
    "1f1b": (lambda pp, c: (pp - 1) * (c.forward + c.backward), lambda pp, m: pp, lambda pp: 0),
    "zb1p": (
        lambda pp, c: (pp - 1) * (c.forward + c.backward - 2 * c.weight),
        lambda pp, m: pp,
        lambda pp: pp,
    ),
    "dualpipe": (
        lambda pp, c: (pp // 2 - 1) * (c.overlapped + c.backward - 3 * c.weight),
        lambda pp, m: pp + 1,
        lambda pp: pp // 2,
    ),
}
# DualPipeV is published in stages, two on each rank
PUBLISHED["dualpipev"] = PUBLISHED["dualpipe"]


@pytest.mark.parametrize("rounds", [2, 3])
@pytest.mark.parametrize("pp", [2, 4, 6, 8, 12, 16, 32])
@pytest.mark.parametrize("name", PUBLISHED)
def test_at_the_published_costs_the_formulas_hold_on_every_rank(name, pp, rounds):
    ranks = pp // 2 if name == "dualpipev" else pp
    found = analyse(name, num_ranks=ranks, num_microbatches=rounds * pp)
    bubble, activations, deferred = PUBLISHED[name]
    assert found.bubble == (bubble(pp, Costs()),) * ranks
    assert found.makespan == rounds * pp * 3 * (2 if name == "dualpipev" else 1) + found.bubble[0]
    assert found.peak_activations == activations(pp, rounds * pp)
    assert found.peak_deferred == deferred(pp)


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("pp", [1, 2, 3, 8, 16])
def test_interleaving_has_the_bubble_of_small_chunks(pp, chunks):
    found = analyse("interleaved", num_ranks=pp, num_microbatches=2 * pp, chunks_per_rank=chunks)
    assert found.bubble == ((pp - 1) * 3,) * pp
    assert found.makespan == 2 * pp * chunks * 3 + (pp - 1) * 3


def test_ranks_keep_what_is_published():
    dual = analyse("dualpipe", num_ranks=8, num_microbatches=20)
    assert dual.activations == (9,) * 8
    assert dual.deferred == (1, 2, 3, 4, 4, 3, 2, 1)
    bent = analyse("dualpipev", num_ranks=4, num_microbatches=20)
    assert (bent.activations, bent.deferred) == ((9,) * 4, (1, 2, 3, 4))
    zero = analyse("zb1p", num_ranks=4, num_microbatches=20)
    assert (zero.activations, zero.deferred) == ((4, 3, 2, 1), (1, 2, 3, 4))
    loop = analyse("interleaved", num_ranks=4, num_microbatches=20, chunks_per_rank=2)
    assert (loop.activations, loop.deferred) == ((11, 9, 7, 5), (0,) * 4)


def test_parameters_are_counted_as_published_and_as_held():
    def copies(name, **numbers):
        found = analyse(name, num_ranks=4, num_microbatches=8, **numbers)
        return found.parameter_copies, found.model_copies

    assert {copies(name) for name in ("gpipe", "1f1b", "zb1p")} == {(1, 1)}
    assert copies("interleaved", chunks_per_rank=3) == (1, 1)
    assert copies("dualpipe") == (2, 2)
    assert copies("dualpipev") == (2, 1)


def starts(found, rank):
    return [span.start for span in found.timeline[rank]]


def test_zero_bubble_by_hand():
    # rank 0: F0 F1 . I0 W0 . I1 W1, and rank 1, which defers: . F0 I0 F1 I1 W0 W1, with I = 3/2
    found = analyse("zb1p", num_ranks=2, num_microbatches=2, weight=0.5)
    assert starts(found, 0) == [0, 1, 3.5, 5, 6, 7.5]
    assert starts(found, 1) == [1, 2, 3.5, 4.5, 6, 6.5]
    assert (found.makespan, found.bubble) == (8, (2, 2))


def test_dualpipe_by_hand_where_the_formula_does_not_hold():
    # With W = 1/2 the formula says 3 + 2 - 3/2 = 7/2. Worked on paper from the order of ranks 0 and
    # 1; the others are their mirror images. The last I of rank 0 waits for that of rank 1 until 25.
    found = analyse("dualpipe", num_ranks=4, num_microbatches=8, weight=0.5)
    assert starts(found, 0) == [0, 1, 2, 3, 4, 5.5, 6, 7, 11, 14, 17, 20, 22, 23.5, 25, 26.5]
    assert starts(found, 1) == [1, 2, 3, 4, 5, 6, 8, 11, 14, 17, 19, 22, 23.5, 25, 25.5]
    assert starts(found, 2) == starts(found, 1) and starts(found, 3) == starts(found, 0)
    assert (found.makespan, found.bubble) == (27, (3,) * 4)


def test_overlap_makes_the_bubbles_of_dualpipe_differ():
    # pinned; the other simulator agrees. The formula says 9/2 on every rank
    found = analyse("dualpipe", num_ranks=8, num_microbatches=32, overlapped=2.5)
    assert found.bubble == (3.5, 4, 4.5, 4.5, 4.5, 4.5, 4, 3.5)
    assert simulated_otherwise(found.schedule, found.costs) == found.timeline


@given(costs=st.tuples(*[st.integers(1, 20)] * 4))
def test_two_ranks_of_dualpipe_never_wait(costs):
    # the ranks are mirror images: what one needs, the other did in its step before
    forward, weight, rest, overlapped = costs
    found = analyse(
        "dualpipe",
        num_ranks=2,
        num_microbatches=6,
        forward=forward,
        backward=weight + rest,
        weight=weight,
        overlapped=overlapped,
    )
    assert found.bubble == (0, 0)


LEAVES = {"F": "F", "B": "IW", "I": "I", "W": "W"}


def edges(schedule):
    """Pairs of steps, as (rank, index), of which the second needs the first."""
    where = {}
    for r, steps in enumerate(schedule.steps):
        for i, step in enumerate(steps):
            for op in step:
                route = schedule.routes[schedule.route_of[op.microbatch]]
                for kind in LEAVES[op.kind]:
                    where[kind, op.microbatch, route.index((r, op.chunk))] = r, i
    for (kind, m, stage), here in where.items():
        before = {
            "F": [("F", m, stage - 1)],
            "I": [("F", m, stage), ("I", m, stage + 1)],
            "W": [("I", m, stage)],
        }
        for other in before[kind]:
            if other in where and where[other] != here:
                yield where[other], here
    yield from (((r, i - 1), (r, i)) for r, i in set(where.values()) if i)


def simulated_otherwise(schedule, costs):
    """The timeline as a fixed point: steps move to later times until none is too early."""
    durations = {
        "F": costs.forward,
        "B": costs.backward,
        "I": costs.backward - costs.weight,
        "W": costs.weight,
        "FB": costs.overlapped,
    }
    takes = {
        (r, i): durations["".join(op.kind for op in step)]
        for r, steps in enumerate(schedule.steps)
        for i, step in enumerate(steps)
    }
    start = dict.fromkeys(takes, 0)
    needed = list(edges(schedule))
    moved = True
    while moved:
        moved = False
        for here, there in needed:
            arrival = start[here] + takes[here] + costs.transfer * (here[0] != there[0])
            if arrival > start[there]:
                start[there], moved = arrival, True
    return tuple(
        tuple((step, start[r, i], start[r, i] + takes[r, i]) for i, step in enumerate(steps))
        for r, steps in enumerate(schedule.steps)
    )


@given(
    name=st.sampled_from(SCHEDULES),
    split=st.booleans(),
    costs=st.builds(
        lambda forward, weight, rest, overlapped, transfer: Costs(
            forward=forward,
            backward=weight + rest,
            weight=weight,
            overlapped=overlapped,
            transfer=transfer,
        ),
        *[st.integers(0, 9)] * 5,
    ),
)
def test_another_simulator_finds_the_same_times(name, split, costs):
    schedule = make_schedule(
        name, 4, 8, chunks_per_rank=2 if name == "interleaved" else 1, split_backward=split
    )
    assert simulate(schedule, costs) == simulated_otherwise(schedule, costs)


def test_transfers_take_time_but_keep_no_rank_busy():
    found = analyse("1f1b", num_ranks=2, num_microbatches=1, transfer=5)
    assert starts(found, 0) == [0, 14] and starts(found, 1) == [6, 7]
    assert found.bubble == (13, 13)


def test_a_schedule_of_ones_own_is_analysed():
    ops = [((Op("F", 0, m),), (Op("B", 0, m),)) for m in range(2)]
    schedule = Schedule(
        name="mine",
        routes=(((0, 0),),),
        route_of=(0, 0),
        steps=((*ops[0], *ops[1]),),
        activations=1,
        deferred=0,
    )
    found = analyse(schedule, forward=2)
    assert (found.makespan, found.bubble, found.activations) == (8, (0,), (1,))
    with pytest.raises(ValueError, match="mine: rank 0 .* promised"):
        analyse(dataclasses.replace(schedule, activations=0))


@pytest.mark.parametrize(
    ("schedule", "numbers", "message"),
    [
        ("gpipe", {"num_ranks": 2}, "got 'gpipe', num_ranks=2, num_microbatches=None"),
        (make_schedule("gpipe", 2, 2), {"num_ranks": 2}, "brings them; got 'gpipe', num_ranks=2"),
        (make_schedule("gpipe", 2, 2), {"chunks_per_rank": 2}, "chunks_per_rank=2"),
        (make_schedule("gpipe", 2, 2), {"weight": 3}, "weight=3 .* backward=2"),
        (make_schedule("gpipe", 2, 2), {"forward": -1}, "'forward': -1"),
        (make_schedule("gpipe", 2, 2), {"overlapped": float("nan")}, "'overlapped': nan"),
        (make_schedule("gpipe", 2, 2), {"transfer": float("inf")}, "'transfer': inf"),
        ("dualpipe", {"num_ranks": 4, "num_microbatches": 6}, "num_microbatches=6"),
    ],
)
def test_impossible_numbers_are_refused(schedule, numbers, message):
    with pytest.raises(ValueError, match=message):
        analyse(schedule, **numbers)
