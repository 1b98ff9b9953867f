"""Rows to the ranks of a mesh axis and back: everything of a row in one collective."""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.permutation import Permutation, plan_permutation

Arrays = tuple[jax.Array, ...]


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


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def exchange(
    floats: Arrays, others: Arrays, carriers: Arrays, axis: str
) -> tuple[Arrays, Arrays, Arrays]:
    """Sends the i-th part of all rows to the i-th rank of an axis, all arrays in one collective.

    A second collective, of few bytes, would hide behind the work that the first one needs. XLA
    cannot differentiate through bytes: gradients go back the same way, packed alike.

    Args:
      floats: `[ranks * capacity, ...]`, differentiable.
      others: `[ranks * capacity, ...]`, not.
      carriers: `[ranks * capacity, ...]`, zeros that are not sent, but their gradients are.
      axis: of the mesh.

    Returns:
      All, each part from the rank of its number.
    """
    arrived = send_packed((*floats, *others), lambda rows: swap(rows, axis))
    return arrived[: len(floats)], arrived[len(floats) :], carriers


def swap(rows: jax.Array, axis: str) -> jax.Array:
    """Exchanges equal parts of an array's rows with all ranks of an axis."""
    return lax.all_to_all(rows, axis, 0, 0, tiled=True)


def send_packed(arrays: Sequence[jax.Array], send: Callable[[jax.Array], jax.Array]) -> Arrays:
    """Sends arrays with equally many rows as the bytes of one.

    Args:
      arrays: `[rows, ...]` each.
      send: takes `u8[rows, bytes]` and gives `u8[others, bytes]`.

    Returns:
      `[others, ...]` each.
    """
    widths = [math.prod(a.shape[1:]) * a.dtype.itemsize for a in arrays]
    packed = send(jnp.concatenate([_bytes(a) for a in arrays], axis=1))
    ends = [sum(widths[: i + 1]) for i in range(len(widths))]
    parts = [packed[:, end - width : end] for end, width in zip(ends, widths, strict=True)]
    return tuple(_array(part, a) for part, a in zip(parts, arrays, strict=True))


def _bytes(a):
    """`[rows, bytes of a row]`."""
    return lax.bitcast_convert_type(a, jnp.uint8).reshape(a.shape[0], -1)


def _array(packed, like):
    """The inverse of `_bytes`."""
    size = like.dtype.itemsize
    shape = (packed.shape[0], *like.shape[1:]) + ((size,) if size > 1 else ())
    return lax.bitcast_convert_type(packed.reshape(shape), like.dtype)


def _forward(floats, others, carriers, axis):
    return exchange(floats, others, carriers, axis), None


def _backward(axis, _, cotangents):
    d_floats, _, d_carriers = cotangents
    returned, _, _ = exchange((*d_floats, *d_carriers), (), (), axis)
    return returned[: len(d_floats)], None, returned[len(d_floats) :]


exchange.defvjp(_forward, _backward)
