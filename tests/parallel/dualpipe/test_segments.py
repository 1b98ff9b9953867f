import collections

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.parallel.dualpipe import SCHEDULES, make_schedule
from whalejax.parallel.dualpipe.segments import align_chunks, segments, steady_ticks
from whalejax.parallel.dualpipe.table import NONE, tabulate

FIXED = settings(max_examples=60, derandomize=True, deadline=None)
SIZES = {
    "name": st.sampled_from(SCHEDULES),
    "half": st.integers(1, 4),
    "rounds": st.integers(2, 6),
    "chunks": st.integers(2, 3),
}


def table_of(name, half, rounds, chunks=2):
    chunks = chunks if name == "interleaved" else 1
    return tabulate(make_schedule(name, 2 * half, 2 * half * rounds, chunks_per_rank=chunks))


def ticks_of_parts(segment):
    """Each part with its ticks."""
    period = len(segment.parts)
    return [
        (part, range(segment.start + turn, segment.stop, period))
        for turn, part in enumerate(segment.parts)
    ]


@FIXED
@given(**SIZES)
def test_segments_cover_every_tick_once(name, half, rounds, chunks):
    table = align_chunks(table_of(name, half, rounds, chunks))
    found = segments(table)
    covered = [tick for segment in found for tick in range(segment.start, segment.stop)]
    assert covered == list(range(table.num_ticks))
    for segment in found:
        assert (segment.stop - segment.start) % len(segment.parts) == 0


@FIXED
@given(**SIZES)
def test_traits_are_true_of_all_their_ticks(name, half, rounds, chunks):
    table = align_chunks(table_of(name, half, rounds, chunks))
    for part, ticks in (each for s in segments(table) for each in ticks_of_parts(s)):
        rows = slice(ticks.start, ticks.stop, ticks.step)
        for traits, cells, filled in (
            (part.forward, table.forward, table.forward.microbatch),
            (part.backward, table.backward, table.backward.microbatch),
            (part.deferred, table.backward, table.backward.deferred),
            (part.weight, table.weight, table.weight.microbatch),
        ):
            active = filled[rows] != NONE
            assert (traits.some, traits.always) == (active.any(), active.all())
            chunks_there = set(cells.chunk[rows][active].tolist())
            assert (
                {traits.chunk} == chunks_there if len(chunks_there) == 1 else (traits.chunk is None)
            )


@FIXED
@given(**SIZES)
def test_lanes_deliver_every_send_once(name, half, rounds, chunks):
    table = align_chunks(table_of(name, half, rounds, chunks))
    for sends, ways in ((table.outputs, "outputs"), (table.gradients, "gradients")):
        delivered = collections.Counter()
        for part, ticks in (each for s in segments(table) for each in ticks_of_parts(s)):
            for lane in getattr(part, ways):
                stay = tuple((rank, rank) for rank in range(len(table.stages)))
                came_from = {to: start for start, to in lane.permutation or stay}
                for tick in ticks:
                    for rank in np.flatnonzero(lane.slots[tick] != NONE).tolist():
                        arrival = tick, came_from[rank], rank, lane.slots[tick, rank].item()
                        delivered[arrival] += 1
        assert delivered == {tuple(send): 1 for send in sends}


@FIXED
@given(**SIZES)
def test_a_rank_sends_once_and_receives_once_in_a_lane(name, half, rounds, chunks):
    table = align_chunks(table_of(name, half, rounds, chunks))
    for part in (part for segment in segments(table) for part in segment.parts):
        for lane in (*part.outputs, *part.gradients):
            for end in zip(*(lane.permutation or ()), strict=True):
                assert len(set(end)) == len(end)
                assert set(end) <= set(range(len(table.stages)))


def steady(table):
    """The segment that is the steady state."""
    start, _ = steady_ticks(table)
    return next(segment for segment in segments(table) if segment.start == start)


@pytest.mark.parametrize("name", ["dualpipe", "dualpipev"])
@pytest.mark.parametrize("half", [2, 3, 4])
def test_the_steady_state_needs_no_conditional(name, half):
    table = align_chunks(table_of(name, half, 6))
    segment = steady(table)
    longer = steady(align_chunks(table_of(name, half, 7)))
    # every further microbatch is forwarded in the steady state, on each of the ranks' stages
    further = 2 * half * (2 if name == "dualpipev" else 1)
    assert longer.stop - longer.start == segment.stop - segment.start + further
    assert len(segment.parts) == 2
    for part in segment.parts:
        assert part.forward.always and part.backward.always
        assert not part.deferred.some and not part.weight.some
        assert {part.forward.chunk, part.backward.chunk} == {0, 1}
    first, second = segment.parts
    assert (first.forward.chunk, first.backward.chunk) == (
        second.backward.chunk,
        second.forward.chunk,
    )


@pytest.mark.parametrize("half", [2, 3, 4])
def test_dualpipe_sends_once_each_way_in_a_steady_tick(half):
    for part in steady(align_chunks(table_of("dualpipe", half, 6))).parts:
        assert (len(part.outputs), len(part.gradients)) == (1, 1)
        for lane in (*part.outputs, *part.gradients):
            shifts = {to - start for start, to in lane.permutation}
            assert shifts == {1, -1}  # the halves of the ranks go towards each other


@pytest.mark.parametrize("name", ["gpipe", "1f1b", "zb1p", "interleaved"])
def test_where_ranks_never_pair_passes_there_is_one_segment(name):
    table = table_of(name, 2, 3)
    assert steady_ticks(table) == (0, 0)
    assert [(s.start, s.stop, len(s.parts)) for s in segments(table)] == [(0, table.num_ticks, 1)]


@pytest.mark.parametrize(("microbatches", "ticks", "loops"), [(6, 3, 1), (8, 5, 3)])
def test_a_short_steady_state_is_no_loop_of_its_own(microbatches, ticks, loops):
    table = align_chunks(tabulate(make_schedule("dualpipe", 2, microbatches)))
    start, stop = steady_ticks(table)
    assert (stop - start, len(segments(table))) == (ticks, loops)


@FIXED
@given(**SIZES)
def test_alignment_only_gives_chunks_other_numbers(name, half, rounds, chunks):
    before = table_of(name, half, rounds, chunks)
    after = align_chunks(before)
    np.testing.assert_array_equal(np.sort(before.stages, axis=1), np.sort(after.stages, axis=1))
    ranks = np.arange(len(before.stages))[None]
    for name in ("forward", "backward", "weight"):
        old, new = getattr(before, name), getattr(after, name)
        for field in set(old._fields) - {"chunk"}:
            np.testing.assert_array_equal(getattr(old, field), getattr(new, field))
        there = old.microbatch != NONE
        np.testing.assert_array_equal(new.chunk[~there], old.chunk[~there])
        np.testing.assert_array_equal(
            before.stages[ranks, old.chunk][there], after.stages[ranks, new.chunk][there]
        )
    assert (before.outputs, before.gradients) == (after.outputs, after.gradients)


def test_alignment_makes_ranks_work_on_the_same_chunk():
    before = table_of("dualpipe", 2, 6)
    start, stop = steady_ticks(before)
    assert any(len(set(row)) > 1 for row in before.forward.chunk[start:stop].tolist())
    after = align_chunks(before)
    assert all(len(set(row)) == 1 for row in after.forward.chunk[start:stop].tolist())
