"""Balances experts over GPUs: which get replicas, which GPU holds which, and how they get there."""

from whalejax.parallel.eplb.background import BackgroundPlanner, plan_from
from whalejax.parallel.eplb.estimate import read_estimate, update_estimate
from whalejax.parallel.eplb.migration import (
    migrate,
    reachable,
    sum_replicas,
    to_logical,
    to_physical,
)
from whalejax.parallel.eplb.moves import count_moves
from whalejax.parallel.eplb.planning import gpu_loads, rebalance_experts
from whalejax.parallel.eplb.transition import walk

__all__ = [
    "BackgroundPlanner",
    "count_moves",
    "gpu_loads",
    "migrate",
    "plan_from",
    "reachable",
    "read_estimate",
    "rebalance_experts",
    "sum_replicas",
    "to_logical",
    "to_physical",
    "update_estimate",
    "walk",
]
