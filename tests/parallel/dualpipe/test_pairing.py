import dataclasses

import pytest

from whalejax.parallel.dualpipe import Op, analyse, make_schedule, overlap_pairs


def test_interleaved_pairs_every_forward_after_the_warm_up():
    schedule = make_schedule("interleaved", 4, 8, chunks_per_rank=2)
    paired = overlap_pairs(schedule)
    assert paired.name == "interleaved+overlap"
    for rank, steps in enumerate(paired.steps):
        lone = 2 * (3 - rank) + 4 + 1
        assert [len(step) for step in steps] == [1] * lone + [2] * (16 - lone) + [1] * lone
        assert sorted(op for step in steps for op in step) == sorted(
            op for step in schedule.steps[rank] for op in step
        )
    assert paired.steps[3][5] == (Op("F", 1, 1), Op("B", 1, 0))


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize("ranks", [2, 4, 8])
def test_pairs_cost_interleaved_one_activation_and_no_time(ranks, chunks):
    schedule = make_schedule("interleaved", ranks, 3 * ranks, chunks_per_rank=chunks)
    plain, paired = analyse(schedule), analyse(overlap_pairs(schedule))
    assert paired.bubble == plain.bubble
    assert paired.activations == tuple(kept + 1 for kept in plain.activations)
    cheap = analyse(overlap_pairs(schedule), overlapped=2)
    pairs = sum(len(step) == 2 for step in paired.schedule.steps[0])
    assert cheap.makespan <= plain.makespan - pairs


def test_plain_1f1b_waits_in_every_pair():
    schedule = make_schedule("1f1b", 4, 8)
    assert analyse(overlap_pairs(schedule)).makespan > analyse(schedule).makespan + 8


def test_without_pairs_only_the_name_changes():
    for name in ("gpipe", "zb1p"):
        schedule = make_schedule(name, 4, 8)
        assert overlap_pairs(schedule) == dataclasses.replace(schedule, name=f"{name}+overlap")


def test_pairs_that_cannot_run_are_refused():
    # rank 0 needs B0 of rank 1 for B0, and with the pair rank 1 needs F1 of rank 0 for it
    schedule = make_schedule("1f1b", 2, 2)
    eager = [(Op(kind, 0, m),) for m in (0, 1) for kind in "FB"]
    schedule = dataclasses.replace(schedule, steps=(tuple(eager), tuple(eager)))
    assert analyse(schedule).makespan == 12
    with pytest.raises(ValueError, match=r"1f1b\+overlap: deadlock: rank 0 at step 1"):
        overlap_pairs(schedule)
