import threading

import numpy as np
import pytest

from whalejax.parallel.eplb import BackgroundPlanner, count_moves, gpu_loads, plan_from

LOAD = np.array([[90.0, 1, 1, 1, 30, 30, 1, 1], [5, 5, 5, 5, 5, 5, 5, 60]])
UNIFORM = np.array([[0, 1, 2, 3, 4, 5, 6, 7, 0, 1, 2, 3]] * 2)


@pytest.mark.parametrize("method", ["whale", "published"])
def test_the_last_of_its_steps_is_the_plan(method):
    with BackgroundPlanner(num_gpus=4, max_moves=3, method=method) as planner:
        steps = planner.request(LOAD, UNIFORM).result()
        again = planner.request(LOAD, UNIFORM).result()
    before = UNIFORM
    for plan in steps:
        assert count_moves(plan, before).max() <= 3
        before = plan
    np.testing.assert_array_equal(steps, again)
    target = plan_from(LOAD, 12, 4, method=method, current=UNIFORM)
    np.testing.assert_array_equal(steps[-1], target)
    assert (gpu_loads(LOAD, target, 4).max(1) < gpu_loads(LOAD, UNIFORM, 4).max(1)).all()


@pytest.mark.parametrize("method", ["whale", "published"])
def test_a_plan_keeps_what_it_can_of_the_one_in_use(method):
    plan = plan_from(LOAD, 12, 4, method=method)
    shuffled = plan.reshape(2, 4, 3)[:, ::-1, ::-1].reshape(2, 12)
    np.testing.assert_array_equal(plan_from(LOAD, 12, 4, method=method, current=shuffled), shuffled)


def test_nothing_counted_plans_for_equal_loads():
    plan = plan_from(np.zeros((2, 8)), 8, 4)
    assert (np.sort(plan, axis=1) == np.arange(8)).all()


class _Slow:
    """An estimate that a device has not computed yet."""

    def __init__(self):
        self.ready = threading.Event()

    def __array__(self, dtype=None, copy=None):
        self.ready.wait(20)
        return LOAD


def test_a_request_does_not_wait_for_the_estimate():
    slow = _Slow()
    with BackgroundPlanner(num_gpus=4, max_moves=3) as planner:
        future = planner.request(slow, UNIFORM)
        assert not future.done()
        slow.ready.set()
        assert future.result()


def test_what_is_wrong_reaches_the_one_who_asked():
    with BackgroundPlanner(num_gpus=5, max_moves=3) as planner:
        future = planner.request(LOAD, UNIFORM)
        with pytest.raises(ValueError, match="num_replicas=12 must be a multiple of num_gpus=5"):
            future.result()
