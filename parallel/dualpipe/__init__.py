"""Pipelines whose microbatches enter at both ends, and the schedules that they are compared to."""

from whalejax.parallel.dualpipe.deferral import deferrable
from whalejax.parallel.dualpipe.gradients import Sharding, value_and_grad
from whalejax.parallel.dualpipe.schedule import Op, Schedule, Step
from whalejax.parallel.dualpipe.schedules import SCHEDULES, make_schedule

__all__ = [
    "SCHEDULES",
    "Op",
    "Schedule",
    "Sharding",
    "Step",
    "deferrable",
    "make_schedule",
    "value_and_grad",
]
