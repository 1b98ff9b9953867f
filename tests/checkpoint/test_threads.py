"""Calls in threads: as many at once as told, each once, none after one that failed."""

import subprocess
import sys
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


INTERRUPTED = """
import os, signal, sys, threading, time
import numpy as np
from whalejax.checkpoint import CheckpointStore
from whalejax.checkpoint.threads import run_all

signal.signal(signal.SIGINT, signal.default_int_handler)


def interrupted(call):
    threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGINT)).start()
    try:
        call()
    except KeyboardInterrupt:
        return
    raise SystemExit("was not interrupted")


ended = []
interrupted(lambda: run_all([lambda: time.sleep(1) or ended.append(1)], 1, lambda _: None))
print(len(ended))  # no call goes on behind the back of who was interrupted
store = CheckpointStore(sys.argv[1])
write = store.place.write
store.place.write = lambda *args: time.sleep(1) or write(*args)
store.save(1, {"w": np.ones(3)})
interrupted(store.wait)
store.wait()
print(store.steps())
store.save(2, {"w": np.ones(3)})
interrupted(store.wait)
store.__exit__(KeyboardInterrupt)
print(store.steps())
"""


def test_what_is_under_way_when_ctrl_c_comes_is_waited_for_again(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", INTERRUPTED, tmp_path], capture_output=True, text=True, timeout=100
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:3] == ["1", "[1]", "[1, 2]"]
