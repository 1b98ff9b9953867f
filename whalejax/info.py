"""What this machine has: versions, devices, and which backend of each op can run."""

import importlib
import importlib.metadata
import importlib.util
import pkgutil
import platform
from collections.abc import Iterator

import whalejax
from whalejax import kernels
from whalejax.kernels.backend import unusable

PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")


def info() -> None:
    """Prints versions, devices, and a table of ops and backends with the reasons against them."""
    import jax
    from rich.console import Console
    from rich.table import Table

    console = Console(highlight=False)
    versions = [f"whalejax {whalejax.__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    console.print(", ".join(versions), soft_wrap=True)
    for device in jax.devices():
        stats = device.memory_stats() or {}
        memory = f", {stats['bytes_limit'] / 2**30:.0f} GiB" if "bytes_limit" in stats else ""
        console.print(f"device {device.id}: {device.platform}, {device.device_kind}{memory}")
    table = Table("op", "backend", "usable here")
    for op, backend, reason in backends():
        table.add_row(op, backend, "yes" if reason is None else f"no: {reason}")
    console.print(table)


def backends() -> Iterator[tuple[str, str, str | None]]:
    """Every op's backends, best first, each with the reason why it cannot run here or None."""
    for module in pkgutil.iter_modules(kernels.__path__):
        if not module.ispkg:
            continue
        for doors in ("api", "fp8"):
            name = f"whalejax.kernels.{module.name}.{doors}"
            if importlib.util.find_spec(name) is None:
                continue
            for backend, path in getattr(importlib.import_module(name), "BACKENDS", {}).items():
                op = module.name if doors == "api" else f"{module.name} ({doors})"
                yield op, backend, unusable(path)
