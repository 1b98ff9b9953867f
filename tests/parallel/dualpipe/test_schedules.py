import collections
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from whalejax.parallel.dualpipe import SCHEDULES, Op, check, make_schedule

# of a rank: F0.3 is the forward of microbatch 3 on chunk 0
DUALPIPE = {
    0: "F0.0 F0.1 F0.2 F1.4 I1.4 W1.4 F1.5 F0.3&B1.5 F1.6&B0.0 B1.6 F1.7&B0.1 B1.7 I0.2 W0.2 "
    "I0.3 W0.3",
    1: "F0.0 F1.4 F0.1 F1.5 F0.2 B1.4 F1.6&B0.0 F0.3&B1.5 F1.7&B0.1 B1.6 B0.2 I1.7 I0.3 W1.7 W0.3",
}
ZB1P = {
    0: "F0.0 F0.1 F0.2 I0.0 W0.0 F0.3 I0.1 W0.1 I0.2 W0.2 I0.3 W0.3",
    2: "F0.0 I0.0 F0.1 I0.1 F0.2 I0.2 W0.0 F0.3 I0.3 W0.1 W0.2 W0.3",
}
INTERLEAVED = {
    0: "F0.0 F0.1 F1.0 F1.1 F0.2 B1.0 F0.3 B1.1 F1.2 B0.0 F1.3 B0.1 B1.2 B1.3 B0.2 B0.3",
    1: "F0.0 F0.1 F1.0 B1.0 F1.1 B1.1 F0.2 B0.0 F0.3 B0.1 F1.2 B1.2 F1.3 B1.3 B0.2 B0.3",
}


def written(steps):
    return " ".join(
        "&".join(f"{op.kind}{op.chunk}.{op.microbatch}" for op in step) for step in steps
    )


@pytest.mark.parametrize(
    ("schedule", "expected"),
    [
        (make_schedule("dualpipe", 4, 8), DUALPIPE),
        (make_schedule("zb1p", 3, 4), ZB1P),
        (make_schedule("interleaved", 2, 4, chunks_per_rank=2), INTERLEAVED),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_ranks_run_the_published_order(schedule, expected):
    for rank, steps in expected.items():
        assert written(schedule.steps[rank]) == steps


def test_the_second_half_of_dualpipe_mirrors_the_first():
    schedule = make_schedule("dualpipe", 6, 14)
    for rank in range(3):
        mirrored = tuple(
            tuple(Op(op.kind, 1 - op.chunk, (op.microbatch + 7) % 14) for op in step)
            for step in schedule.steps[rank]
        )
        assert schedule.steps[5 - rank] == mirrored


def test_stages_lie_where_the_methods_put_them():
    def places(name, chunks=1):
        return make_schedule(name, 4, 8, chunks_per_rank=chunks).routes

    down, up = ((0, 0), (1, 0), (2, 0), (3, 0)), ((3, 1), (2, 1), (1, 1), (0, 1))
    assert places("gpipe") == places("1f1b") == places("zb1p") == (down,)
    assert places("dualpipe") == (down, up)
    assert places("dualpipev") == (down + up,)
    assert places("interleaved", 3)[0][:6] == ((0, 0), (1, 0), (2, 0), (3, 0), (0, 1), (1, 1))


def test_a_schedule_knows_its_sizes():
    schedule = make_schedule("dualpipe", 4, 10)
    assert (schedule.num_ranks, schedule.num_microbatches) == (4, 10)
    assert (schedule.num_stages, schedule.chunks_per_rank) == (4, 2)
    assert schedule.route_of == (0,) * 5 + (1,) * 5
    assert schedule.stage_of(1, 1, 1) == 2
    with pytest.raises(ValueError, match="chunk 1 of rank 3 is no stage of route 0"):
        schedule.stage_of(3, 1, 0)


def legal(name, num_ranks, rounds, chunks):
    """Numbers that the named schedule can have."""
    ranks = 2 * num_ranks if name == "dualpipe" else num_ranks
    return ranks, ranks * (rounds + 1), chunks + 1 if name == "interleaved" else 1


@given(
    name=st.sampled_from(SCHEDULES),
    num_ranks=st.integers(1, 5),
    rounds=st.integers(1, 4),
    chunks=st.integers(1, 3),
    split=st.booleans(),
)
def test_every_schedule_passes_the_check(name, num_ranks, rounds, chunks, split):
    ranks, microbatches, chunks = legal(name, num_ranks, rounds, chunks)
    schedule = make_schedule(
        name, ranks, microbatches, chunks_per_rank=chunks, split_backward=split
    )
    check(schedule)


@given(name=st.sampled_from(["gpipe", "1f1b", "zb1p"]), size=st.tuples(*[st.integers(1, 6)] * 2))
def test_few_microbatches_are_enough_for_one_chunk(name, size):
    check(make_schedule(name, *size))


@pytest.mark.parametrize("name", SCHEDULES)
def test_without_split_every_backward_is_whole(name):
    chunks = 2 if name == "interleaved" else 1
    schedule = make_schedule(name, 4, 8, chunks_per_rank=chunks, split_backward=False)
    assert schedule.deferred == 0
    kinds = collections.Counter(
        op.kind for steps in schedule.steps for op in itertools.chain(*steps)
    )
    assert kinds == {"F": 8 * schedule.num_stages, "B": 8 * schedule.num_stages}


@pytest.mark.parametrize(
    ("arguments", "chunks", "message"),
    [
        (("zb2p", 4, 8), 1, "'zb2p' .* schedules are gpipe, 1f1b"),
        (("gpipe", 0, 8), 1, "num_ranks=0, .* at least 1"),
        (("1f1b", 4, 0), 1, "num_microbatches=0 .* at least 1"),
        (("zb1p", 4, 8), 2, "chunks_per_rank=2: only 'interleaved'"),
        (("dualpipe", 4, 8), 2, "chunks_per_rank=2: only 'interleaved'"),
        (("interleaved", 4, 8), 1, "chunks_per_rank=1: .* at least 2"),
        (("interleaved", 4, 6), 2, "num_ranks=4, num_microbatches=6 .* multiple"),
        (("dualpipe", 3, 8), 1, "num_ranks=3, num_microbatches=8 .* even"),
        (("dualpipe", 4, 9), 1, "num_ranks=4, num_microbatches=9 .* even"),
        (("dualpipe", 4, 6), 1, "num_microbatches=6 .* at least 2 . num_ranks = 8"),
        (("dualpipev", 4, 7), 1, "num_microbatches=7 .* at least 2 . num_ranks = 8"),
    ],
)
def test_impossible_numbers_are_refused(arguments, chunks, message):
    with pytest.raises(ValueError, match=message):
        make_schedule(*arguments, chunks_per_rank=chunks)
