"""Rows to the ranks of a mesh axis and back: everything of a row in one collective."""

import functools
import math

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.permutation import Permutation, plan_permutation


def plan_hop(destination: jax.Array, num_ranks: int, capacity: int) -> Permutation:
    """Lays tokens out by the ranks that they go to, once for each rank.

    Args:
      destination: `i32[T, k]`, the rank of each choice; -1 for none. A rank may come repeatedly.
      num_ranks: of the axis.
      capacity: rows for each rank.

    Returns:
      A plan of `num_ranks * capacity` rows, rank by rank.
    """
    ranks = jnp.sort(destination, axis=1)
    repeated = jnp.pad(ranks[:, 1:] == ranks[:, :-1], ((0, 0), (1, 0)))
    ranks = jnp.sort(jnp.where(repeated, -1, ranks), axis=1, descending=True)
    return plan_permutation(
        ranks[:, : min(num_ranks, ranks.shape[1])], num_ranks, capacity=capacity
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def exchange(
    floats: tuple[jax.Array, ...], others: tuple[jax.Array, ...], axis: str
) -> tuple[tuple[jax.Array, ...], tuple[jax.Array, ...]]:
    """Sends the i-th part of all rows to the i-th rank of an axis, all arrays in one collective.

    A second collective, of few bytes, would hide behind the work that the first one needs. XLA
    cannot differentiate through bytes: gradients go back the same way, packed alike.

    Args:
      floats: `[ranks * capacity, ...]`, differentiable.
      others: `[ranks * capacity, ...]`, not.
      axis: of the mesh.

    Returns:
      Both, each part from the rank of its number.
    """
    leaves = (*floats, *others)
    rows = leaves[0].shape[0]
    widths = [math.prod(a.shape[1:]) * a.dtype.itemsize for a in leaves]
    packed = jnp.concatenate([_bytes(a) for a in leaves], axis=1)
    packed = lax.all_to_all(packed, axis, 0, 0, tiled=True)
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    parts = [packed[:, end - width : end] for end, width in zip(ends, widths, strict=True)]
    arrays = [_array(part, a, rows) for part, a in zip(parts, leaves, strict=True)]
    return tuple(arrays[: len(floats)]), tuple(arrays[len(floats) :])


def _bytes(a):
    """`[rows, bytes of a row]`."""
    return lax.bitcast_convert_type(a, jnp.uint8).reshape(a.shape[0], -1)


def _array(packed, like, rows):
    """The inverse of `_bytes`."""
    size = like.dtype.itemsize
    shape = (rows, *like.shape[1:]) + ((size,) if size > 1 else ())
    return lax.bitcast_convert_type(packed.reshape(shape), like.dtype)


def _forward(floats, others, axis):
    return exchange(floats, others, axis), None


def _backward(axis, _, cotangents):
    returned, _ = exchange(cotangents[0], (), axis)
    return returned, None


exchange.defvjp(_forward, _backward)
