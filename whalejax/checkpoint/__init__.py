"""Checkpoints of pytrees: saved while training goes on, verified when they are restored."""

from whalejax.checkpoint.faults import DamagedError, Fault
from whalejax.checkpoint.processes import MissingProcessError
from whalejax.checkpoint.store import CheckpointStore

__all__ = ["CheckpointStore", "DamagedError", "Fault", "MissingProcessError"]
