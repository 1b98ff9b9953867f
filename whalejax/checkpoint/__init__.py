"""Checkpoints of pytrees: saved while training goes on, verified when they are restored."""

from whalejax.checkpoint.comparing import Difference
from whalejax.checkpoint.faults import DamagedError, Fault, Flip
from whalejax.checkpoint.processes import MissingProcessError
from whalejax.checkpoint.store import CheckpointStore
from whalejax.checkpoint.verifying import Report

__all__ = [
    "CheckpointStore",
    "DamagedError",
    "Difference",
    "Fault",
    "Flip",
    "MissingProcessError",
    "Report",
]
