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


def no_gpu() -> str | None:
    """Says what the default device is if it is no CUDA GPU, None if it is one."""
    if jax.default_backend() == "gpu":
        return None
    return f"the kernel needs a CUDA GPU, this is {jax.devices()[0].device_kind}"


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


def run(
    op: str,
    backends: Mapping[str, str],
    implementation: str | None,
    arrays: tuple[Any, ...],
    *static: Any,
) -> Any:
    """Runs an op that has a Mosaic GPU kernel and a definition in XLA.

    Args:
      op: name of the op, and of the function in the backends' modules.
      backends: `{"mosaic_gpu": path, "xla": path}`.
      implementation: a name of `backends`, or None: the kernel where CUDA is lowered for and the
        kernel can run the arguments, XLA elsewhere.
      arrays: pytrees of arrays, the function's first arguments.
      *static: the function's other arguments.

    Raises:
      ValueError: `implementation` is unknown.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    if implementation is not None:
        backend = choose(op, backends, implementation, op, arrays, *static)
        if reason := unusable(backends[implementation]):
            raise NotImplementedError(f"{op}: {implementation!r} cannot run: {reason}")
        return vary_like(getattr(backend, op)(*arrays, *static), arrays)
    portable = getattr(importlib.import_module(backends["xla"]), op)
    hopper = importlib.import_module(backends["mosaic_gpu"])
    if hopper.why_not(op, arrays, *static) is not None:
        return vary_like(portable(*arrays, *static), arrays)
    return jax.lax.platform_dependent(
        *arrays,
        cuda=lambda *a: vary_like(getattr(hopper, op)(*a, *static), a),
        default=lambda *a: vary_like(portable(*a, *static), a),
    )


def vary_like(out: Any, arrays: Any) -> Any:
    """Types an op's results as differing between devices where its arguments do.

    Inside of `jax.shard_map` XLA's operations do so by themselves; a kernel's results, and
    constants that a loop starts from, have to be told.

    Args:
      out: pytree of arrays.
      arrays: pytree of arrays.
    """
    varying = [_varying(x) for x in jax.tree.leaves(arrays)]
    axes = frozenset().union(*varying)

    def vary(x):
        missing = tuple(sorted(axes - _varying(x)))
        return jax.lax.pcast(x, missing, to="varying") if missing else x

    return jax.tree.map(vary, out)


def _varying(x):
    return jax.typeof(x).manual_axis_type.varying
