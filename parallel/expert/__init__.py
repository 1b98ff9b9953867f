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
from whalejax.parallel.expert.traffic_model import (
    Topology,
    Traffic,
    predicted_us,
    row_bytes,
    traffic,
)

__all__ = [
    "Dispatched",
    "Handle",
    "Layout",
    "Placement",
    "Topology",
    "Traffic",
    "combine",
    "dispatch",
    "layout",
    "predicted_us",
    "row_bytes",
    "traffic",
]
