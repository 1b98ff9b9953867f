"""Experts in parallel: where they live, and tokens to them and back, inside `jax.shard_map`."""

from whalejax.parallel.expert.dispatching import (
    Dispatched,
    Handle,
    Layout,
    combine,
    dispatch,
    layout,
)
from whalejax.parallel.expert.placement import Placement

__all__ = ["Dispatched", "Handle", "Layout", "Placement", "combine", "dispatch", "layout"]
