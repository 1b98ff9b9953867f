import pytest

from whalejax.bench.schedules.lockstep import lockstep_s
from whalejax.parallel.dualpipe import Costs, make_schedule, overlap_pairs, simulate
from whalejax.parallel.dualpipe.table import tabulate

RANKS, MICROBATCHES = 4, 12
COSTS = Costs(forward=3, backward=7, weight=2, overlapped=9, transfer=0.5)


def test_of_gpipe_it_is_both_ways_through_the_pipeline():
    table = tabulate(make_schedule("gpipe", RANKS, MICROBATCHES))
    each = MICROBATCHES + RANKS - 1
    # only the last tick sends nothing; the last forward pass and the first backward pass meet
    assert lockstep_s(table, COSTS) == pytest.approx(each * (3 + 7) + 0.5 * (table.num_ticks - 2))


@pytest.mark.parametrize("name", ["1f1b", "zb1p", "dualpipe", "dualpipev", "interleaved"])
def test_no_schedule_is_faster_in_lockstep_than_when_ranks_go_on_at_once(name):
    chunks = 2 if name == "interleaved" else 1
    schedule = make_schedule(name, RANKS, MICROBATCHES, chunks_per_rank=chunks)
    if name == "interleaved":
        schedule = overlap_pairs(schedule)
    ends = max(span.end for spans in simulate(schedule, COSTS) for span in spans)
    lockstep = lockstep_s(tabulate(schedule), COSTS)
    assert ends <= lockstep
    longest = max(COSTS.overlapped, COSTS.forward + COSTS.backward) + COSTS.transfer
    assert lockstep <= tabulate(schedule).num_ticks * longest
