"""Pipelines whose microbatches enter at both ends, and the schedules that they are compared to."""

from whalejax.parallel.dualpipe.analysis import Analysis, Costs, Span, analyse, simulate
from whalejax.parallel.dualpipe.checking import check
from whalejax.parallel.dualpipe.deferral import deferrable
from whalejax.parallel.dualpipe.gradients import Sharding, value_and_grad
from whalejax.parallel.dualpipe.pairing import overlap_pairs
from whalejax.parallel.dualpipe.plotting import plot
from whalejax.parallel.dualpipe.predicting import Prediction, StageTimes, predict
from whalejax.parallel.dualpipe.schedule import Op, Schedule, Step
from whalejax.parallel.dualpipe.schedules import SCHEDULES, make_schedule

__all__ = [
    "SCHEDULES",
    "Analysis",
    "Costs",
    "Op",
    "Prediction",
    "Schedule",
    "Sharding",
    "Span",
    "StageTimes",
    "Step",
    "analyse",
    "check",
    "deferrable",
    "make_schedule",
    "overlap_pairs",
    "plot",
    "predict",
    "simulate",
    "value_and_grad",
]
