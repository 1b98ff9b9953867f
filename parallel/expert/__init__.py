"""Experts in parallel: where they live, and tokens to them and back, inside `jax.shard_map`."""

from whalejax.parallel.expert.dispatching import (
    METHODS,
    Dispatched,
    Handle,
    Layout,
    Returning,
    combine,
    dispatch,
    finish_combine,
    layout,
    start_combine,
)
from whalejax.parallel.expert.overlapping import Stages, interleave, overlap_microbatches
from whalejax.parallel.expert.placement import Placement
from whalejax.parallel.expert.traffic_model import (
    Topology,
    Traffic,
    predicted_us,
    row_bytes,
    traffic,
)

__all__ = [
    "METHODS",
    "Dispatched",
    "Handle",
    "Layout",
    "Placement",
    "Returning",
    "Stages",
    "Topology",
    "Traffic",
    "combine",
    "dispatch",
    "finish_combine",
    "interleave",
    "layout",
    "overlap_microbatches",
    "predicted_us",
    "row_bytes",
    "start_combine",
    "traffic",
]
