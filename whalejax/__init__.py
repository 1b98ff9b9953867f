"""The DeepSeek open-source stack native to JAX.

Public names are loaded on first use, so that importing starts no device and loads no framework.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

__all__ = ["__version__", "from_pretrained", "save_pretrained"]

MODULES = {
    "from_pretrained": "whalejax.weights",
    "save_pretrained": "whalejax.weights",
}


def __getattr__(name: str) -> Any:
    """Loads a public name from its module when it is first asked for."""
    if name not in MODULES:
        raise AttributeError(f"module 'whalejax' has no attribute {name!r}")
    return getattr(importlib.import_module(MODULES[name]), name)
