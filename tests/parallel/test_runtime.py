import jax.numpy as jnp
import pytest

from whalejax.parallel.runtime import JobConfig, is_first, join, on_first, whole


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"num_processes": 2}, "num_processes=2, .*need a coordinator"),
        ({"coordinator": "auto", "process_id": 0}, "coordinator=auto, .*process_id=0"),
        ({"coordinator": "host", "num_processes": 2, "process_id": 0}, "coordinator=host,.*port"),
        ({"coordinator": "host:x", "num_processes": 2, "process_id": 0}, "host:port"),
        ({"coordinator": "host:80", "num_processes": 2}, "process_id=None"),
        ({"coordinator": "host:80", "num_processes": 2, "process_id": 2}, "process_id=2"),
    ],
)
def test_a_job_that_cannot_be_is_refused(fields, says):
    with pytest.raises(ValueError, match=says):
        JobConfig(**fields)


def test_a_job_of_one_process_needs_nothing():
    join(JobConfig())
    assert is_first()
    done = []
    on_first(done.append, 3)
    assert done == [3]
    with pytest.raises(ZeroDivisionError):
        on_first(lambda: 1 / 0)
    tree = {"a": jnp.ones(3)}
    assert whole(tree) is tree
