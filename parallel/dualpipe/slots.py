"""Slots that arrays wait in, `[slots, ...]`, and sums that they are added to, changed in place."""

import functools
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.parallel.dualpipe.segments import Lane
from whalejax.parallel.dualpipe.table import NONE


def zeros_like(tree: Any) -> Any:
    """Zeros of the shapes of a pytree."""
    return jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), tree)


def at(tree: Any, index: jax.Array) -> Any:
    """One element along the leading axis of all arrays; the first for -1."""
    index = jnp.maximum(index, 0)
    return jax.tree.map(lambda a: lax.dynamic_index_in_dim(a, index, keepdims=False), tree)


def read(buffers: Any, slot: jax.Array) -> Any:
    """What lies in a slot; zeros where there are no slots."""
    if not all(leaf.shape[0] for leaf in jax.tree.leaves(buffers)):
        return jax.tree.map(lambda a: jnp.zeros(a.shape[1:], a.dtype), buffers)
    return at(buffers, slot)


def put(buffers: Any, slot: jax.Array, values: Any, wanted: jax.Array | bool = True) -> Any:
    """Buffers with values in a slot, if wanted."""

    def put_one(buffer, value):
        if not buffer.shape[0]:
            return buffer
        place = jnp.maximum(slot, 0)
        if wanted is not True:
            old = lax.dynamic_index_in_dim(buffer, place, keepdims=False)
            value = jnp.where(wanted, value, old)
        return lax.dynamic_update_index_in_dim(buffer, value, place, 0)

    return jax.tree.map(put_one, buffers, values)


def exchange(
    buffers: Any, tree: Any, lanes: Sequence[Lane], slots: Sequence[jax.Array], axis: str
) -> Any:
    """Buffers with what arrives when every rank of `axis` sends a pytree."""
    for lane, slot in zip(lanes, slots, strict=True):
        buffers = put(buffers, slot, _travel(tree, lane.permutation, axis), slot != NONE)
    return buffers


def _travel(tree, permutation, axis):
    if permutation is None:
        return tree
    with jax.named_scope("transfer"):
        return jax.tree.map(lambda a: lax.ppermute(a, axis, permutation), tree)


def added(sums: Any, values: Any) -> Any:
    """Sums with values added in their dtype; None adds nothing."""

    def add(value, total):
        return total if value is None else total + value.astype(total.dtype)

    return jax.tree.map(add, values, sums, is_leaf=lambda value: value is None)


def add_to_chunk(sums: tuple, chunk: jax.Array | int, values: Any) -> tuple:
    """The sums of all chunks, with values added to one's, in place."""

    def add_to(chosen, sums):
        return *sums[:chosen], added(sums[chosen], values), *sums[chosen + 1 :]

    if isinstance(chunk, int):
        return add_to(chunk, sums)
    return lax.switch(chunk, [functools.partial(add_to, c) for c in range(len(sums))], sums)
