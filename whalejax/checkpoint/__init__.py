"""Checkpoints of pytrees: saved while training goes on, verified when they are restored.

What works with Orbax is loaded on first use, so that the rest does without it.
"""

import importlib
from typing import Any

from whalejax.checkpoint.comparing import Difference
from whalejax.checkpoint.faults import DamagedError, Fault, Flip
from whalejax.checkpoint.processes import MissingProcessError
from whalejax.checkpoint.safetensors_export import export_safetensors
from whalejax.checkpoint.safetensors_import import import_safetensors, read_safetensors
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
    "WhaleHandler",
    "WhaleRestore",
    "WhaleSave",
    "export_safetensors",
    "import_orbax",
    "import_safetensors",
    "read_orbax",
    "read_safetensors",
]

MODULES = {
    "WhaleHandler": "whalejax.checkpoint.orbax_handler",
    "WhaleRestore": "whalejax.checkpoint.orbax_handler",
    "WhaleSave": "whalejax.checkpoint.orbax_handler",
    "import_orbax": "whalejax.checkpoint.orbax_reading",
    "read_orbax": "whalejax.checkpoint.orbax_reading",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from its module when it is first asked for."""
    if name not in MODULES:
        raise AttributeError(f"module 'whalejax.checkpoint' has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
