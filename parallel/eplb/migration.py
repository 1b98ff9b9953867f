"""Arrays of experts in the slots of a placement: into them, out of them, and from one to another.

Arrays are `[layers, slots, ...]`, cut over the ranks of a mesh axis along their slots, and over
other axes as it may be. All that belongs to an expert (weights, moments of an optimiser) goes in
one tree, and so in one collective a layer.
"""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from whalejax.parallel.expert.packing import pack, unpack
from whalejax.parallel.expert.placement import Placement


def to_physical(tree: Any, placement: Placement) -> Any:
    """Gives each slot what its expert has, bit by bit.

    Args:
      tree: of arrays `[layers, E, ...]`.
      placement: of as many layers.

    Returns:
      The same tree of `[layers, slots, ...]`.
    """
    return _pick(tree, placement.physical_to_logical)


def to_logical(tree: Any, placement: Placement) -> Any:
    """Gives each expert what its first slot has: the inverse of `to_physical`."""
    return _pick(tree, placement.logical_to_physical[..., 0])


def _pick(tree, index):
    """Rows of every array, one layer after another so that no more is gathered from other ranks."""

    def of_layer(xs):
        leaves, index = xs
        return [leaf.at[index].get(mode="promise_in_bounds") for leaf in leaves]

    leaves, treedef = jax.tree.flatten(_bits(tree))
    return _from_bits(treedef.unflatten(lax.map(of_layer, (leaves, index))), tree)


def _bits(tree, widest=8):
    """As integers what has at most so many bytes: sums with zeros change no bit of those."""
    return jax.tree.map(
        lambda a: (
            lax.bitcast_convert_type(a, jnp.dtype(f"uint{8 * a.dtype.itemsize}"))
            if a.dtype.itemsize <= widest
            else a
        ),
        tree,
    )


def _from_bits(tree, like):
    return jax.tree.map(lambda a, b: lax.bitcast_convert_type(a, b.dtype), tree, like)


def reachable(old: Placement, new: Placement, max_moves: int) -> Placement:
    """`new`, but `old` in layers where more than `max_moves` slots would change.

    `old` may be of any placement of the same sizes, both stacked.
    """
    moves = jnp.sum(old.physical_to_logical != new.physical_to_logical, axis=-1)

    def choose(a, b):
        few = jnp.expand_dims(moves <= max_moves, tuple(range(1, a.ndim)))
        return jnp.where(few, b, a)

    return jax.tree.map(choose, old, new)


def migrate(
    tree: Any,
    old: Placement,
    new: Placement,
    *,
    mesh: Mesh,
    axis: str,
    max_moves: int,
    specs: Any = None,
) -> Any:
    """Moves what slots hold to where a new placement has it, bit by bit, for any dtype.

    Layer by layer, the rows that slots lack go to all ranks of the axis, all arrays in one sum of
    words to which one rank contributes each row, and slots take theirs. Arrays change in place if
    they are donated; beside them it needs `max_moves` rows.

    Args:
      tree: of arrays `[layers, slots, ...]` in the placement `old`.
      old: of as many layers.
      new: to go to. Layers where it is not `reachable` stay as they are.
      mesh: with the axis.
      axis: over which slots are spread.
      max_moves: slots of a layer that may change.
      specs: how the arrays are cut over the mesh, a tree of PartitionSpec that has `axis` at place
        1; by default over nothing else.

    Raises:
      ValueError: shapes, specs or placements do not fit; prints them.
    """
    specs = _specs(tree, specs, axis)
    _check(tree, specs, old, mesh, axis)
    new = reachable(old, new, max_moves)

    def local(tree, old, new):
        move = functools.partial(_move, axis, max_moves)
        # a CPU moves narrow floats as float32; the wide ones would be copied for nothing
        return _from_bits(_over_layers(move, _bits(tree, 2), old, new), tree)

    return _on_ranks(local, mesh, specs)(tree, old, new)


def _move(axis, max_moves, leaves, old, new):
    """New rows of a layer: the slots of this rank that change, and what they get."""
    slots = new.slots_per_rank
    first = lax.axis_index(axis) * slots
    size = new.physical_to_logical.shape[0]
    changed = new.physical_to_logical != old.physical_to_logical
    slot = jnp.nonzero(changed, size=min(max_moves, size), fill_value=size)[0].astype(jnp.int32)
    expert = new.physical_to_logical.at[slot].get(mode="fill", fill_value=0)
    source = old.logical_to_physical[expert, 0] - first
    here = (slot < size) & (source >= 0) & (source < slots)
    rows = pack([leaf[jnp.clip(source, 0, slots - 1)] for leaf in leaves])
    rows = lax.psum(jnp.where(here[:, None], rows, 0), axis)
    target = jnp.where((slot >= first) & (slot < first + slots), slot - first, slots)
    return target, unpack(rows, leaves)


def sum_replicas(
    grads: Any, placement: Placement, *, mesh: Mesh, axis: str, specs: Any = None
) -> Any:
    """Gives each slot the sum of the gradients of all replicas of its expert.

    All replicas get the same bits. A layer's arrays go in one collective: of a row for each expert
    that can have replicas, `slots - E`, in float32 or, if one of them is, in float64.

    Args:
      grads: a tree of arrays `[layers, slots, ...]`.
      placement: of as many layers.
      mesh: with the axis.
      axis: over which slots are spread.
      specs: how the arrays are cut, as for `migrate`.

    Returns:
      The same tree; where each expert has one slot, `grads` themselves.

    Raises:
      ValueError: shapes or specs do not fit; prints them.
    """
    specs = _specs(grads, specs, axis)
    _check(grads, specs, placement, mesh, axis)
    if placement.logical_to_physical.shape[-1] == 1:
        return grads

    def local(leaves, placement):
        return _over_layers(functools.partial(_sum, axis), leaves, placement)

    return _on_ranks(local, mesh, specs)(grads, placement)


def _sum(axis, leaves, placement):
    """New rows of a layer: the slots of this rank whose experts have replicas, and the sums."""
    slots, size = placement.slots_per_rank, placement.physical_to_logical.shape[0]
    buffers = size - placement.num_experts
    many = placement.counts > 1
    number = jnp.where(many, jnp.cumsum(many) - 1, buffers)[placement.physical_to_logical]
    number = lax.dynamic_slice_in_dim(number, lax.axis_index(axis) * slots, slots)
    wide = jnp.float64 if any(a.dtype == jnp.float64 for a in leaves) else jnp.float32
    sums = [
        jnp.zeros((buffers, *a.shape[1:]), wide).at[number].add(a.astype(wide), mode="drop")
        for a in leaves
    ]
    total = lax.psum(jnp.concatenate([a.reshape(buffers, -1) for a in sums], axis=1), axis)
    ends = [sum(math.prod(a.shape[1:]) for a in sums[: i + 1]) for i in range(len(sums))]
    parts = jnp.split(total, ends[:-1], axis=1)
    rows = [
        part.reshape(a.shape).at[number].get(mode="fill", fill_value=0).astype(leaf.dtype)
        for part, a, leaf in zip(parts, sums, leaves, strict=True)
    ]
    return jnp.where(number < buffers, jnp.arange(slots, dtype=jnp.int32), slots), rows


def _over_layers(change: Callable, tree, *placements):
    """Writes `change(arrays of a layer, placements of it) -> (slots, rows)` into all layers."""
    leaves, treedef = jax.tree.flatten(tree)

    def layer(i, leaves):
        of_layer = [jax.tree.map(lambda a: a[i], placement) for placement in placements]
        slots, rows = change([leaf[i] for leaf in leaves], *of_layer)
        # slots of other ranks are past the end
        return [a.at[i, slots].set(row, mode="drop") for a, row in zip(leaves, rows, strict=True)]

    return treedef.unflatten(lax.fori_loop(0, leaves[0].shape[0], layer, leaves))


def _on_ranks(local, mesh, specs):
    """`local(tree, *placements)` by every rank; it is not differentiated, so nothing is tracked."""

    def call(tree, *placements):
        whole = (PartitionSpec(),) * len(placements)
        run = jax.shard_map(
            local, mesh=mesh, in_specs=(specs, *whole), out_specs=specs, check_vma=False
        )
        return run(tree, *placements)

    return call


def _specs(tree, specs, axis):
    whole = PartitionSpec(None, axis)
    return jax.tree.map(lambda _: whole, tree) if specs is None else specs


def _check(tree, specs, placement, mesh, axis):
    """All arrays are of the placement's layers and slots, and cut over the axis."""
    if mesh.shape.get(axis) != placement.num_ranks:
        raise ValueError(
            f"the placement's num_ranks={placement.num_ranks} must be the size of axis {axis!r} "
            f"of {mesh}"
        )
    shape = placement.physical_to_logical.shape
    is_spec = {"is_leaf": lambda leaf: isinstance(leaf, PartitionSpec)}
    each = zip(jax.tree.leaves(tree), jax.tree.leaves(specs, **is_spec), strict=True)
    wrong = [f"{a.shape} as {s}" for a, s in each if a.shape[:2] != shape or s[1:2] != (axis,)]
    if wrong or len(shape) != 2:
        raise ValueError(
            f"arrays must be [layers, slots, ...] of the placement's {shape}, cut over {axis!r} "
            f"along their slots: {'; '.join(wrong)}"
        )
