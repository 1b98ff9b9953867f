"""One table of shardings, from parameter path to PartitionSpec.

Training, weights, checkpoints and generation read it. Matrices are cut along their output over
`fsdp`; XLA gathers them where they are used. Experts are shared out over `expert`, and stay where
they are. The optimiser's moments end in the same path as their parameter, so they are cut alike.

Over the ranks of a pipeline the stacked MoE layers are shared out if the ranks divide them. What
else there is the first stage needs, the last, or both: there `stage` cuts what `fsdp` cuts, and the
pipeline gathers it. So it is with MoE layers that do not divide; norms and routers, which `fsdp`
does not cut, are then whole on every rank.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from whalejax.parallel.mesh import BATCH_AXES, EXPERT, FSDP, STAGE, batch_devices

# first match wins; specs count from the last axis, so that stacked layers need no rule of their own
RULES: tuple[tuple[str, tuple[str | None, ...]], ...] = (
    (r"(embed_tokens|lm_head)$", (None, FSDP)),
    (r"(layernorm|norm|enorm|hnorm|e_score_correction_bias)$", ()),
    (r"gate\.weight$", ()),
    (r"\.experts\.\w+_proj(\.values|\.scales)?$", (EXPERT, FSDP, None)),
    (r"_(proj|proj_with_mqa)(\.values|\.scales)?$", (FSDP, None)),
)


def partition_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How the parameter (or moment) at `path` is cut over `mesh`.

    An axis that does not divide its dimension is left out: that dimension is not cut.

    Args:
      path: names joined by dots, `moe_layers.self_attn.o_proj`.
      shape: of the parameter.
      mesh: its `stage`, `fsdp` and `expert` axes count; others do not cut parameters.
    """
    axes, stages = _rule(path, len(shape)), mesh.shape.get(STAGE, 1)
    if stages > 1 and axes and "moe_layers." in path and shape[0] % stages == 0:
        axes = (STAGE, *axes[1:])
    elif stages > 1:
        axes = tuple((STAGE, FSDP) if axis == FSDP else axis for axis in axes)
    return _fitting(axes, shape, mesh)


def stage_spec(path: str, shape: Sequence[int], mesh: Mesh) -> PartitionSpec:
    """How a parameter of one pipeline stage is cut over the axes but `stage`.

    Args:
      path: as of `partition_spec`.
      shape: of the parameter in one stage.
      mesh: its `fsdp` and `expert` axes count.
    """
    return _fitting(_rule(path, len(shape)), shape, mesh)


def _rule(path, ndim):
    """The axes of RULES for an array of so many dimensions; none where no rule matches."""
    spec = next((spec for pattern, spec in RULES if re.search(pattern, path)), None)
    return () if spec is None else (None,) * (ndim - len(spec)) + spec[-ndim:]


def _fitting(axes, shape, mesh):
    """A PartitionSpec of those axes that divide their dimensions."""
    return PartitionSpec(*(_dividing(a, s, mesh) for a, s in zip(axes, shape, strict=False)))


def _dividing(axis, size, mesh):
    """The axis, or of a pair the second, or None: the first that divides `size`."""
    pair = axis if isinstance(axis, tuple) else (axis,)
    for axes in (pair, pair[1:]):
        if axes and axes[0] and size % math.prod(mesh.shape[a] for a in axes) == 0:
            return axes if len(axes) > 1 else axes[0]
    return None


def path_name(path: Sequence[Any]) -> str:
    """A pytree path as names joined by dots, without the wrapping of flax variables."""
    names = [str(getattr(k, "key", getattr(k, "name", getattr(k, "idx", k)))) for k in path]
    return ".".join(name for name in names if name not in ("value", "raw_value"))


def shardings(tree: Any, mesh: Mesh) -> Any:
    """The sharding of every leaf of a pytree of arrays or abstract arrays."""

    def of_leaf(path, leaf):
        return NamedSharding(mesh, partition_spec(path_name(path), leaf.shape, mesh))

    return jax.tree_util.tree_map_with_path(of_leaf, tree)


def batch_sharding(mesh: Mesh, *, leading: int = 0) -> NamedSharding:
    """The sharding of a batch: its axis number `leading` over the batch axes of the mesh."""
    return NamedSharding(mesh, PartitionSpec(*(None,) * leading, BATCH_AXES))


def on_own_batch(f: Callable, mesh: Mesh | None, weights: Any = PartitionSpec()) -> Callable:
    """`f(p, *arrays)`, each device working on its own part of the batch.

    XLA cuts its own operations over a mesh by itself, but no kernel: it would gather all operands
    of one on every device. Here weights are gathered and their gradients summed over the devices.

    Args:
      f: gives arrays `[b, ...]`, from a pytree of weights, one array (or pytree) `[b, ...]`, and
        others `[b, ...]`, or `[1, ...]` and shared by all sequences.
      mesh: over whose `BATCH_AXES` the batch is cut; None, or of one device, for f itself. So it is
        inside of a `jax.shard_map` over these axes, where each device has its own part already.
      weights: how those are cut that f has, one PartitionSpec or some for parts of them; whole by
        default.

    Raises:
      ValueError: when it is called with a batch that the mesh does not divide; prints both.
    """
    manual = jax.sharding.get_abstract_mesh().manual_axes
    if mesh is None or mesh.size == 1 or set(BATCH_AXES) <= set(manual):
        return f
    batch, whole, parts = PartitionSpec(BATCH_AXES), PartitionSpec(), batch_devices(mesh)

    def varying(spec, p):
        return jax.lax.pcast(p, tuple(a for a in BATCH_AXES if a not in spec), to="varying")

    def local(p, *arrays):
        return f(jax.tree.map(varying, weights, p, is_leaf=_is_spec), *arrays)

    def call(p, x, *others):
        size = jax.tree.leaves(x)[0].shape[0]
        if size % parts:
            raise ValueError(f"a batch of {size} must be a multiple of {parts} devices")
        specs = jax.tree.map(lambda a: batch if a.shape[0] > 1 else whole, others)
        placed = jax.shard_map(local, mesh=mesh, in_specs=(weights, batch, *specs), out_specs=batch)
        return placed(p, x, *others)

    return call


def _is_spec(tree):
    return isinstance(tree, PartitionSpec)
