"""What this machine has: versions, devices, storage, and which backend of each op can run."""

import importlib
import importlib.metadata
import importlib.util
import os
import pkgutil
import platform
import shutil
from collections.abc import Iterator
from pathlib import Path

import whalejax
from whalejax import kernels, storage
from whalejax.checkpoint.planning import EXTENT_BYTES
from whalejax.kernels.backend import unusable
from whalejax.storage import threefs
from whalejax.storage.files import Files
from whalejax.storage.mounts import holding, mount_points
from whalejax.storage.opening import KNOWN_SCHEMES

# settings of a 3FS client that decide what a checkpoint may expect
SHOWN_SETTINGS = ("usr.readonly", "usr.attr_timeout")
PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "tensorstore", "numpy")


def info(path: Path | str = ".") -> None:
    """Prints versions, devices, storage, and ops and backends with the reasons against them.

    Args:
      path: a place that `storage.open` takes.
    """
    import jax
    from rich.console import Console
    from rich.table import Table

    described = list(storage_lines(path))  # whose errors come before anything is printed
    console = Console(highlight=False)
    versions = [f"whalejax {whalejax.__version__}", f"Python {platform.python_version()}"]
    versions += [f"{name} {importlib.metadata.version(name)}" for name in PACKAGES]
    console.print(", ".join(versions), soft_wrap=True)
    for device in jax.devices():
        stats = device.memory_stats() or {}
        memory = f", {stats['bytes_limit'] / 2**30:.0f} GiB" if "bytes_limit" in stats else ""
        console.print(f"device {device.id}: {device.platform}, {device.device_kind}{memory}")
    for line in described:
        console.print(line, soft_wrap=True)
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


def storage_lines(path: Path | str) -> Iterator[str]:
    """What kind of place a path or a URL is, what it can do, and which URLs there are."""
    place = storage.open(path)
    yield f"storage: {place.url}: {place.kind}"
    if isinstance(place, Files):
        yield f"  {_file_system(place.root)}, {_free_bytes(place.root) / 2**30:.1f} GiB free"
        if place.mount is not None:
            yield f"  {_abilities(place.mount)}"
            yield from _advice(place)
    yield f"  opens paths, {', '.join(f'{scheme}://' for scheme in KNOWN_SCHEMES)}"


def _file_system(path: Path) -> str:
    point = holding(Path(os.path.realpath(path)), mount_points())
    if point is None:
        return "file system unknown: no table of mounts"
    return f"{point.fstype} at {point.path} ({point.source})"


def _free_bytes(path: Path) -> int:
    """For who asks, on the file system of a folder that need not exist."""
    return shutil.disk_usage(next(p for p in (path, *path.parents) if p.exists())).free


def _advice(place: Files) -> Iterator[str]:
    commands = threefs.advice(place.mount, place.root, EXTENT_BYTES)
    if commands:
        yield "  lay it out for checkpoints with"
    for command in commands:
        yield f"    {command}"


def _abilities(mount: threefs.Mount) -> str:
    known = threefs.settings(mount)
    abilities = [f"deletes trees on the servers (rm-rf): {'yes' if mount.rm_rf else 'no'}"]
    abilities += [f"USRBIO: {'yes' if mount.usrbio else 'no'}"]
    abilities += [f"{name}={known[name]}" for name in SHOWN_SETTINGS if name in known]
    return ", ".join(abilities)
