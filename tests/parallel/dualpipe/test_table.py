import collections
import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.parallel.dualpipe import SCHEDULES, Op, make_schedule
from whalejax.parallel.dualpipe.segments import align_chunks
from whalejax.parallel.dualpipe.table import NONE, tabulate

FIXED = settings(max_examples=60, derandomize=True, deadline=None)
SIZES = {
    "name": st.sampled_from(SCHEDULES),
    "half": st.integers(1, 4),
    "rounds": st.integers(2, 6),
    "chunks": st.integers(2, 3),
    "split": st.booleans(),
}


def schedule_of(name, half, rounds, chunks, split):
    """A schedule of an even number of ranks."""
    chunks = chunks if name == "interleaved" else 1
    return make_schedule(
        name, 2 * half, 2 * half * rounds, chunks_per_rank=chunks, split_backward=split
    )


class Slots:
    """The slots of all ranks, each with the name of the array in it."""

    def __init__(self, number):
        self.number, self.held = number, {}

    def take(self, rank, slot, name):
        assert self.held.pop((rank, slot), "nothing") == name

    def put(self, rank, slot, name):
        assert 0 <= slot < self.number
        assert (rank, slot) not in self.held, f"{name} over {self.held[rank, slot]}"
        self.held[rank, slot] = name


def passes_of(table, cells, tick):
    """Rank, microbatch, stage and row of every pass of a kind in a tick."""
    for rank in range(len(table.stages)):
        row = type(cells)(*(column[tick, rank].item() for column in cells))
        if row.microbatch != NONE:
            yield rank, row.microbatch, table.stages[rank, row.chunk].item(), row


def replay(table):
    """Runs a table on names instead of arrays; counts what ran."""
    activations, inputs = Slots(table.activation_slots), Slots(table.input_slots)
    gradients, deferred = Slots(table.gradient_slots), Slots(table.deferred_slots)
    last, ran = table.stages.max(), collections.Counter()
    kinds = {"F": table.forward, "B": table.backward, "W": table.weight}
    for tick in range(table.num_ticks):
        passes = {kind: list(passes_of(table, cells, tick)) for kind, cells in kinds.items()}
        for rank, m, stage, row in passes["F"]:
            assert (row.source == NONE) == (stage == 0)
            if stage:
                inputs.take(rank, row.source, (m, stage))
        for rank, m, stage, row in passes["B"]:
            activations.take(rank, row.slot, (m, stage))
            gradients.take(rank, row.source, (m, stage))
        for rank, m, stage, row in passes["W"]:
            deferred.take(rank, row.slot, (m, stage))
            ran["W", m, stage] += 1
        made = {}
        for rank, m, stage, row in passes["F"]:
            ran["F", m, stage] += 1
            made["F", rank] = m, stage
            activations.put(rank, row.slot, (m, stage))
            assert (row.loss != NONE) == (stage == last)
            if stage == last:
                gradients.put(rank, row.loss, (m, stage))
        for rank, m, stage, row in passes["B"]:
            made["B", rank] = m, stage
            ran["B", m, stage] += 1
            if row.deferred == NONE:
                ran["W", m, stage] += 1
            else:
                deferred.put(rank, row.deferred, (m, stage))
        for kind, slots, sends, step in (
            ("F", inputs, table.outputs, 1),
            ("B", gradients, table.gradients, -1),
        ):
            for send in (send for send in sends if send.tick == tick):
                m, stage = made[kind, send.source]
                slots.put(send.destination, send.slot, (m, stage + step))
    assert not any(slots.held for slots in (activations, inputs, gradients, deferred))
    return ran


@FIXED
@given(**SIZES)
def test_every_slot_holds_what_is_read_from_it(name, half, rounds, chunks, split):
    schedule = schedule_of(name, half, rounds, chunks, split)
    every = [(m, s) for m in range(schedule.num_microbatches) for s in range(schedule.num_stages)]
    for table in (tabulate(schedule), align_chunks(tabulate(schedule))):
        assert replay(table) == {(kind, *key): 1 for kind in "FBW" for key in every}


@FIXED
@given(**SIZES)
def test_slots_are_as_many_as_promised(name, half, rounds, chunks, split):
    schedule = schedule_of(name, half, rounds, chunks, split)
    table = tabulate(schedule)
    assert (table.activation_slots, table.deferred_slots) == (
        schedule.activations,
        schedule.deferred,
    )


@pytest.mark.parametrize(("ranks", "microbatches"), [(2, 4), (4, 8), (4, 24), (8, 48), (16, 64)])
def test_dualpipe_keeps_one_activation_more_than_ranks(ranks, microbatches):
    table = tabulate(make_schedule("dualpipe", ranks, microbatches))
    assert table.activation_slots == ranks + 1
    assert table.deferred_slots == ranks // 2
    assert max(table.input_slots, table.gradient_slots) <= 2  # those that are on their way


@FIXED
@given(**SIZES)
def test_a_rank_takes_one_step_a_tick_in_order(name, half, rounds, chunks, split):
    schedule = schedule_of(name, half, rounds, chunks, split)
    table = tabulate(schedule)
    for rank, steps in enumerate(schedule.steps):
        found = []
        for tick in range(table.num_ticks):
            kinds = ("F", table.forward), ("B", table.backward), ("W", table.weight)
            step = []
            for kind, cells in kinds:
                m, chunk = cells.microbatch[tick, rank].item(), cells.chunk[tick, rank].item()
                if m != NONE:
                    waits = kind == "B" and cells.deferred[tick, rank] != NONE
                    step.append(Op("I" if waits else kind, chunk, m))
            found.append(tuple(step))
        assert [step for step in found if step] == list(steps)


def test_steps_come_as_early_as_they_can():
    # GPipe on 4 ranks: 3 ticks to fill, 8 forwards, 8 backwards, 3 ticks to empty
    table = tabulate(make_schedule("gpipe", 4, 8))
    assert table.num_ticks == 3 + 8 + 8 + 3
    np.testing.assert_array_equal((table.forward.microbatch != NONE).argmax(axis=0), np.arange(4))


def test_an_order_in_which_ranks_wait_for_each_other_is_refused():
    schedule = make_schedule("1f1b", 2, 2)
    (forward, later), (backward, last) = ([(Op(kind, 0, m),) for m in (0, 1)] for kind in "FB")
    orders = (forward, backward, later, last), (later, forward, backward, last)
    with pytest.raises(
        ValueError, match="1f1b: deadlock: rank 0 .*waits for .*rank 1 .*waits for "
    ):
        tabulate(dataclasses.replace(schedule, steps=orders))
