"""Choosing which implementation of an op runs.

An op has a table `BACKENDS` from name to module path, best first. Such a module defines

- the op's functions, under the names that its front door calls;
- `why_not(*arguments) -> str | None`: why these arguments cannot run here, None if they can;
- optionally `unusable() -> str | None`: the part of that answer that no argument changes.

The question is asked before the call, because under `jit` a Mosaic error only comes at lowering,
where no `try` can catch it. Modules are imported on demand and must import on every machine: what
needs Mosaic is imported after `mosaic_unusable` has been asked. For which platform an op is lowered
is not decided here but by the op, with `jax.lax.platform_dependent`.
"""

import importlib
from collections.abc import Mapping
from types import ModuleType
from typing import Any

import jax

MIN_JAX_FOR_MOSAIC = (0, 11, 2)  # older versions lack parts of the Mosaic GPU API used here
HOPPER = "9.0"  # compute capability of wgmma; Blackwell has other instructions


def choose(
    op: str, backends: Mapping[str, str], implementation: str | None, *arguments: Any
) -> ModuleType:
    """Chooses the module that runs an op on these arguments.

    Args:
      op: name of the op, for messages.
      backends: from name to module path, best first.
      implementation: a name of `backends`, or None for the first that can run the arguments.
      *arguments: what every backend's `why_not` is asked about, in its order.

    Returns:
      The backend's module.

    Raises:
      ValueError: `implementation` is not a name of `backends`; lists them.
      NotImplementedError: the backend that was named, or every one, cannot run; says why.
    """
    if implementation is not None and implementation not in backends:
        raise ValueError(
            f"{op}: implementation={implementation!r} is unknown; choose from {sorted(backends)}"
        )
    reasons = []
    for name in backends if implementation is None else [implementation]:
        backend = importlib.import_module(backends[name])
        reason = backend.why_not(*arguments)
        if reason is None:
            return backend
        reasons.append(f"{name!r} cannot run: {reason}")
    raise NotImplementedError(f"{op}: implementation={implementation!r}: {'; '.join(reasons)}")


def unusable(path: str) -> str | None:
    """Says why a backend cannot run here whatever the arguments, None if some can.

    Args:
      path: module path of the backend, as in a `BACKENDS` table.
    """
    reason = getattr(importlib.import_module(path), "unusable", None)
    return None if reason is None else reason()


def mosaic_unusable() -> str | None:
    """Says why Mosaic GPU kernels cannot be used, None if they can.

    On a machine without a GPU they can still be lowered for one, so that is no reason.
    """
    if jax.__version_info__ < MIN_JAX_FOR_MOSAIC:
        needed = ".".join(map(str, MIN_JAX_FOR_MOSAIC))
        return f"Mosaic GPU kernels need jax>={needed}, this is {jax.__version__}"
    if jax.default_backend() == "gpu":
        capability = getattr(jax.devices()[0], "compute_capability", "unknown")
        if capability != HOPPER:
            return f"the kernels need compute capability {HOPPER}, this GPU has {capability}"
    return None
