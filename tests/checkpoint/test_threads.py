"""Calls in threads: as many at once as told, each once, none after one that failed."""

import threading
from functools import partial

import pytest

from whalejax.checkpoint.threads import run_all


@pytest.mark.parametrize("count", [0, 1, 3, 50])
def test_each_call_is_made_and_told_once(count):
    told = []
    run_all([partial(int, i) for i in range(count)], 4, told.append)
    assert sorted(told) == list(range(count))


def test_as_many_calls_run_at_once_as_there_are_threads():
    meeting = threading.Barrier(3)
    told = []
    run_all([partial(meeting.wait, 30)] * 6, 3, told.append)  # breaks unless three come together
    assert sorted(told) == [0, 0, 1, 1, 2, 2]
    alone = threading.Barrier(2)
    with pytest.raises(threading.BrokenBarrierError):
        run_all([partial(alone.wait, 0.1)] * 2, 1, told.append)


def test_results_are_told_by_one_thread_at_a_time():
    inside, seen = threading.Lock(), []

    def tell(number):
        assert inside.acquire(blocking=False)
        threading.Event().wait(0.002)
        seen.append(number)
        inside.release()

    run_all([partial(int, i) for i in range(20)], 8, tell)
    assert len(seen) == 20


@pytest.mark.parametrize("where", ["call", "done"])
def test_no_call_begins_after_one_that_failed(where):
    begun = []

    def call(number):
        begun.append(number)
        if where == "call" and number == 2:
            raise OSError(28, "No space left on device")
        return number

    def done(number):
        if where == "done" and number == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        run_all([partial(call, i) for i in range(9)], 1, done)
    assert begun == [0, 1, 2]


def test_all_calls_have_ended_when_the_error_is_raised():
    slow = threading.Event()

    def late():
        threading.Event().wait(0.1)
        slow.set()

    def fail():
        raise ValueError("at once")

    with pytest.raises(ValueError, match="at once"):
        run_all([late, fail], 2, lambda _: None)
    assert slow.is_set()
