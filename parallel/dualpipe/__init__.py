"""Pipelines whose microbatches enter at both ends, and the schedules that they are compared to."""

from whalejax.parallel.dualpipe.schedule import Op, Schedule, Step
from whalejax.parallel.dualpipe.schedules import SCHEDULES, make_schedule

__all__ = ["SCHEDULES", "Op", "Schedule", "Step", "make_schedule"]
