import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalejax.parallel.dualpipe import SCHEDULES, Op, Schedule, check, make_schedule

SMALL = {
    name: make_schedule(name, 2, 4, chunks_per_rank=2 if name == "interleaved" else 1)
    for name in SCHEDULES
}


def with_steps(schedule, rank, steps):
    """The schedule with other steps of one rank."""
    return dataclasses.replace(
        schedule, steps=(*schedule.steps[:rank], tuple(steps), *schedule.steps[rank + 1 :])
    )


def everywhere(schedule):
    return [(r, i) for r, steps in enumerate(schedule.steps) for i in range(len(steps))]


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_operation_may_be_missing(name):
    schedule = SMALL[name]
    for rank, i in everywhere(schedule):
        for op in schedule.steps[rank][i]:
            steps = list(schedule.steps[rank])
            steps[i] = tuple(other for other in steps[i] if other != op)
            with pytest.raises(ValueError, match=f"rank {rank} .* {op.microbatch}"):
                check(with_steps(schedule, rank, [step for step in steps if step]))


@pytest.mark.parametrize("name", SCHEDULES)
def test_no_operation_may_come_twice(name):
    schedule = SMALL[name]
    for rank, i in everywhere(schedule):
        op = schedule.steps[rank][i][-1]
        with pytest.raises(ValueError, match=f"rank {rank} runs {op.kind}.* at steps .{i}, "):
            check(with_steps(schedule, rank, [*schedule.steps[rank], (op,)]))


def runs(schedule):
    """Whether rounds over all ranks, each as far as it comes, get to the end."""
    position, forwarded, returned, weighted = [0] * schedule.num_ranks, set(), set(), set()

    def ready(rank, op):
        route = schedule.routes[schedule.route_of[op.microbatch]]
        stage = route.index((rank, op.chunk))
        if op.kind == "F":
            return stage == 0 or (op.microbatch, stage - 1) in forwarded
        if op.kind == "W":
            return (op.microbatch, stage) in returned
        after = stage == len(route) - 1 or (op.microbatch, stage + 1) in returned
        return after and (op.microbatch, stage) in forwarded

    moved = True
    while moved:
        moved = False
        for rank, steps in enumerate(schedule.steps):
            while position[rank] < len(steps) and all(
                ready(rank, op) for op in steps[position[rank]]
            ):
                for op in steps[position[rank]]:
                    route = schedule.routes[schedule.route_of[op.microbatch]]
                    done = {"F": forwarded, "W": weighted}.get(op.kind, returned)
                    done.add((op.microbatch, route.index((rank, op.chunk))))
                position[rank] += 1
                moved = True
    return position == [len(steps) for steps in schedule.steps]


@given(name=st.sampled_from(SCHEDULES), seed=st.data())
def test_what_is_reordered_passes_exactly_if_it_runs(name, seed):
    schedule = dataclasses.replace(SMALL[name], activations=99, deferred=99)
    rank = seed.draw(st.integers(0, 1))
    steps = list(schedule.steps[rank])
    i, j = seed.draw(st.tuples(*[st.integers(0, len(steps) - 1)] * 2))
    steps.insert(j, steps.pop(i))
    moved = with_steps(schedule, rank, steps)
    if runs(moved):
        check(moved)
    else:
        with pytest.raises(ValueError, match=r"before .* at step|deadlock: rank \d at step"):
            check(moved)


def test_a_deadlock_is_told_with_both_ranks():
    forward, backward = [Op("F", 0, m) for m in (0, 1)], [Op("B", 0, m) for m in (0, 1)]
    schedule = make_schedule("1f1b", 2, 2)
    first = [(forward[0],), (backward[0],), (forward[1],), (backward[1],)]
    second = [(forward[1],), (forward[0],), (backward[0],), (backward[1],)]
    stuck = dataclasses.replace(schedule, steps=(tuple(first), tuple(second)))
    with pytest.raises(ValueError) as error:  # noqa: PT011, the whole message is compared
        check(stuck)
    assert str(error.value) == (
        "1f1b: deadlock: rank 0 at step 1, B(chunk 0, microbatch 0), waits for I of microbatch 0 "
        "on stage 1 (rank, chunk (1, 0)); rank 1 at step 0, F(chunk 0, microbatch 1), waits for F "
        "of microbatch 1 on stage 0 (rank, chunk (0, 0))"
    )


@pytest.mark.parametrize("name", SCHEDULES)
def test_promises_are_tight_and_kept(name):
    schedule = SMALL[name]
    check(schedule)
    less = dataclasses.replace(schedule, activations=schedule.activations - 1)
    with pytest.raises(
        ValueError, match=rf"rank \d at step \d+, F.* promised .* {less.activations}"
    ):
        check(less)
    if schedule.deferred:
        less = dataclasses.replace(schedule, deferred=schedule.deferred - 1)
        with pytest.raises(ValueError, match=rf"step \d+, I.* and {less.deferred}$"):
            check(less)


def alone(*steps, microbatches=2):
    """A schedule of one rank and stage."""
    return Schedule(
        name="mine",
        routes=(((0, 0),),),
        route_of=(0,) * microbatches,
        steps=(steps,),
        activations=2,
        deferred=2,
    )


F0, F1, B0, B1 = Op("F", 0, 0), Op("F", 0, 1), Op("B", 0, 0), Op("B", 0, 1)
I0, W0 = Op("I", 0, 0), Op("W", 0, 0)


def test_a_schedule_of_ones_own_passes():
    check(alone((F0,), (F1, B0), (B1,)))
    check(alone((F0,), (I0,), (F1,), (W0,), (B1,)))


@pytest.mark.parametrize(
    ("schedule", "message"),
    [
        (alone((F0,), (F1, B1), (B0,)), "rank 0, step 1: B.* 1. needs F.* 1. and cannot run"),
        (alone((F0,), (B0, F1), (B1,)), "rank 0, step 1 is .'B', 'F'., neither"),
        (alone((F0, F1), (B0,), (B1,)), "rank 0, step 0 is .'F', 'F'., neither"),
        (alone((F0,), (F1, I0), (W0,), (B1,)), "rank 0, step 1 is .'F', 'I'., neither"),
        (alone((F0,), (), (F1,), (B0,), (B1,)), "rank 0, step 1 is .., neither"),
        (alone((F0,), (F1,), (Op("X", 0, 0),), (B1,)), "step 2: X.*: the kinds are F, B, I, W"),
        (alone((F0,), (B0,), (F1,), (Op("B", 0, 2),)), "step 3: B.* 2.: there are 2 microbatches"),
        (alone((F0,), (B0,), (F1,), (Op("B", 1, 1),)), "step 3: B.chunk 1, .* does not pass there"),
        (alone((F0,), (F1,), (W0,), (I0,), (B1,)), "runs W.* at step 2, before I.* at step 3"),
        (alone((F0,), (B1,), (F1,), (B0,)), "runs B.* at step 1, before F.* at step 2"),
        (alone((F0,), (F1,), (B0,), (I0,), (W0,), (B1,)), r"\['B', 'I', 'W'\] for microbatch 0"),
        (alone((F0,), (F1,), (I0,), (B1,)), r"\['I'\] for microbatch 0 on chunk 0; it must be"),
    ],
)
def test_steps_that_make_no_sense_are_refused(schedule, message):
    with pytest.raises(ValueError, match=message):
        check(schedule)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"routes": ()}, "2 ranks, 4 microbatches and routes of .. stages"),
        ({"routes": ((),)}, r"routes of \[0\] stages"),
        ({"route_of": ()}, "0 microbatches"),
        ({"steps": ()}, "0 ranks"),
        ({"route_of": (0, 0, 0, 1)}, "microbatch 3 takes route 1 of 1"),
        ({"routes": (((0, 0), (2, 0)),)}, "stage 1 of route 0 is on rank 2, chunk 0; there are 2"),
        ({"routes": (((0, 0), (1, -1)),)}, "stage 1 of route 0 is on rank 1, chunk -1"),
        ({"routes": (((0, 0), (0, 0)),)}, "rank 0, chunk 0 is stage 0 and, on route 0, stage 1"),
        ({"routes": (((0, 0), (1, 0)), ((1, 0), (0, 0)))}, "is stage 1 and, on route 1, stage 0"),
        ({"routes": (((0, 0), (1, 0)), ((1, 1),))}, r"routes have \[2, 1\] stages"),
        ({"routes": (((0, 0), (1, 1)),)}, "no route passes rank 0, chunk 1"),
    ],
)
def test_routes_that_make_no_sense_are_refused(changes, message):
    with pytest.raises(ValueError, match=message):
        check(dataclasses.replace(SMALL["1f1b"], **changes))


def test_many_faults_make_one_error():
    schedule = SMALL["gpipe"]
    with pytest.raises(ValueError, match="rank 0 never runs F.*; rank 1 .*and 8 more"):
        check(dataclasses.replace(schedule, steps=((), ())))
