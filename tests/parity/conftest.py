"""The parity with PyTorch is collected only where the `torch` extra is installed."""

import importlib.util

collect_ignore_glob = []
if any(importlib.util.find_spec(name) is None for name in ("torch", "transformers")):
    collect_ignore_glob = ["test_*.py"]
