"""One table of shardings, from parameter path to PartitionSpec.

Training, weights, checkpoints and generation read it. Matrices are cut along their output over
`fsdp`; XLA gathers them where they are used. Experts are shared out over `expert`, and stay where
they are. The optimiser's moments end in the same path as their parameter, so they are cut alike.
"""

import math
import re
from collections.abc import Callable, Sequence
from typing import Any

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from whalejax.parallel.mesh import BATCH_AXES, EXPERT, FSDP

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
      mesh: its `fsdp` and `expert` axes count; others do not cut parameters.
    """
    for pattern, spec in RULES:
        if re.search(pattern, path):
            axes = (None,) * (len(shape) - len(spec)) + spec[-len(shape) :]
            sized = zip(axes, shape, strict=True)
            return PartitionSpec(*(a if a and s % mesh.shape[a] == 0 else None for a, s in sized))
    return PartitionSpec()


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
      mesh: over whose `BATCH_AXES` the batch is cut; None, or of one device, for f itself.
      weights: how those are cut that f has, one PartitionSpec or some for parts of them; whole by
        default.

    Raises:
      ValueError: when it is called with a batch that the mesh does not divide; prints both.
    """
    if mesh is None or mesh.size == 1:
        return f
    batch, whole = PartitionSpec(BATCH_AXES), PartitionSpec()
    parts = math.prod(mesh.shape[axis] for axis in BATCH_AXES)

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
