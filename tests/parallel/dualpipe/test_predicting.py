import dataclasses

import pytest

from whalejax.parallel.dualpipe import (
    SCHEDULES,
    StageTimes,
    analyse,
    make_schedule,
    overlap_pairs,
    predict,
)

TIMES = StageTimes(forward=1e-3, backward=2e-3, weight=1e-3, overlapped=2.5e-3, transfer=0.0)


def test_every_schedule_is_simulated_with_its_share_of_the_stage():
    times = dataclasses.replace(TIMES, transfer=2e-4)
    found = predict(times, num_ranks=4, num_microbatches=16, chunks_per_rank=4)
    assert list(found.seconds) == [*SCHEDULES[:3], "interleaved+overlap", *SCHEDULES[3:]]
    assert not found.refused

    def seconds(schedule, parts):
        shares = {
            field: getattr(times, field) / parts
            for field in ("forward", "backward", "weight", "overlapped")
        }
        return analyse(schedule, transfer=2e-4, **shares).makespan

    for name in ("gpipe", "1f1b", "zb1p", "dualpipe"):
        assert found.seconds[name] == seconds(make_schedule(name, 4, 16), 1)
    assert found.seconds["dualpipev"] == seconds(make_schedule("dualpipev", 4, 16), 2)
    loop = make_schedule("interleaved", 4, 16, chunks_per_rank=4)
    assert found.seconds["interleaved"] == seconds(loop, 4)
    assert found.seconds["interleaved+overlap"] == seconds(overlap_pairs(loop), 4)
    assert found.best == min(found.seconds, key=found.seconds.get)


def test_without_bubbles_all_take_the_work_of_a_rank():
    found = predict(dataclasses.replace(TIMES, overlapped=3e-3), num_ranks=1, num_microbatches=6)
    for name, seconds in found.seconds.items():
        assert seconds == pytest.approx(18e-3, rel=1e-12), name  # sums of 12 floats


def test_more_chunks_beat_dualpipe_unless_transfers_are_slow():
    """The bubbles at equal overlap: DualPipe's is passed by that of four chunks a rank."""

    def best(chunks, transfer=0.0):
        times = dataclasses.replace(TIMES, transfer=transfer)
        return predict(times, num_ranks=8, num_microbatches=24, chunks_per_rank=chunks).best

    assert best(2) == best(3) == "dualpipe"
    assert best(4) == best(8) == "interleaved+overlap"
    assert best(8, transfer=3e-4) == "dualpipe"


def test_schedules_that_cannot_have_these_numbers_are_told():
    found = predict(TIMES, num_ranks=16, num_microbatches=20)
    assert set(found.refused) == {"interleaved", "interleaved+overlap", "dualpipe", "dualpipev"}
    assert "multiple of num_ranks" in found.refused["interleaved+overlap"]
    assert "at least 2 * num_ranks = 32" in found.refused["dualpipe"]
    assert set(found.seconds) == {"gpipe", "1f1b", "zb1p"} and found.best == "zb1p"


@pytest.mark.parametrize(
    ("numbers", "message"),
    [
        ({"num_ranks": 0, "num_microbatches": 4}, "num_ranks=0"),
        ({"num_ranks": 2, "num_microbatches": 0}, "num_microbatches=0"),
        ({"num_ranks": 2, "num_microbatches": 4, "chunks_per_rank": 1}, "chunks_per_rank=1"),
    ],
)
def test_impossible_numbers_are_refused(numbers, message):
    with pytest.raises(ValueError, match=message):
        predict(TIMES, **numbers)


def test_impossible_times_are_refused():
    with pytest.raises(ValueError, match="weight=0.003 .* backward=0.002"):
        dataclasses.replace(TIMES, weight=3e-3)
