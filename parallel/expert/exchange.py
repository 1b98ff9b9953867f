"""Tokens to the ranks of their experts over one mesh axis after another, and their gradients back.

What comes forward is gathered and sent packed, what goes back is summed and sent packed: no pass
over the rows is for packing alone, and no direction scatters.
"""

import dataclasses
import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.peers import gather_rows, sum_rows
from whalejax.kernels.permutation import Permutation, permute, plan_permutation, unpermute
from whalejax.parallel.expert.packing import num_words, pack, unpack
from whalejax.parallel.expert.payload import Payload, gradient_of_rows, rows_of_gradient
from whalejax.parallel.expert.peers import Peers, peers_of


@dataclasses.dataclass(frozen=True)
class Route:
    """Which way tokens go, and the limits on it.

    Attributes:
      axes, sizes: of the mesh, the first one crossed first.
      slots_per_rank: experts of a rank.
      quantized: tokens travel in FP8.
      alignment, max_rows, max_tokens: of the rows of a rank's slots.
      capacity: rows from one rank to another; None for all.
      zero_padding: whether rows of slots that no token fills are zero.
    """

    axes: tuple[str, ...]
    sizes: tuple[int, ...]
    slots_per_rank: int
    quantized: bool
    alignment: int
    capacity: int | None
    max_rows: int | None
    max_tokens: int | None
    zero_padding: bool = True


class Arrival(NamedTuple):
    """What a rank gets.

    Attributes:
      payload: in the rows of the rank's slots.
      weights: `f32[arrived, k]` of the tokens that arrived.
      hops: plans of what each axis was sent; none if all is gathered, or read from peers.
      peers: who visits whom, where tokens are read from peers.
      local: of arrived tokens to the rows of slots.
      left: `u32[rows, words]`, the rows as they left; to be read from peers, what was chosen.
    """

    payload: Payload
    weights: jax.Array
    hops: tuple[Permutation, ...]
    peers: Peers | None
    local: Permutation
    left: jax.Array


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


def swap(rows: jax.Array, axis: str) -> jax.Array:
    """Exchanges equal parts of an array's rows with all ranks of an axis."""
    return lax.all_to_all(rows, axis, 0, 0, tiled=True)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def send(
    payload: Payload, weights: jax.Array, slots: jax.Array, route: Route, method: str
) -> Arrival:
    """Sends tokens to the ranks of their slots and sorts what arrives.

    Args:
      payload: of `[T, H]` tokens.
      weights: `f32[T, k]`.
      slots: `i32[T, k]`, of all ranks together; -1 for none.
      route: the way.
      method: `"all_to_all"`, `"all_gather"` or `"peer"`, see `dispatch`.
    """
    by_collective = [] if method == "peer" else payload.sent()
    parts, chosen = [*by_collective, weights, slots], slots
    at = sum(map(num_words, parts[:-1]))

    def slots_on(packed, depth):
        """The slots of what arrived that lie behind this rank of the first axes."""
        (found,) = unpack(packed, [slots], at)
        behind = route.slots_per_rank * math.prod(route.sizes[depth:])
        here = (found > 0) & ((found - 1) // behind == lax.axis_index(route.axes[:depth]))
        return jnp.where(here, found - 1, -1)

    packed, hops = pack([*parts[:-1], slots + 1]), []  # rows that nobody fills have slot 0
    left = packed
    if method != "all_to_all":
        packed = lax.all_gather(packed, route.axes, tiled=True)
    else:
        for depth, (axis, size) in enumerate(zip(route.axes, route.sizes, strict=True), 1):
            behind = route.slots_per_rank * math.prod(route.sizes[depth:])
            destination = jnp.where(slots < 0, -1, slots // behind % size)
            hop = plan_hop(destination, size, route.capacity or slots.shape[0])
            packed = permute(packed, hop)
            left = packed if depth == 1 else left
            packed = swap(packed, axis)
            slots = slots_on(packed, depth)
            hops.append(hop)
    slots = slots_on(packed, len(route.axes))
    local = plan_permutation(
        jnp.where(slots < 0, -1, slots % route.slots_per_rank),
        route.slots_per_rank,
        alignment=route.alignment,
        capacity=route.max_tokens,
        max_rows=route.max_rows,
    )
    peers = None
    if method == "peer":
        peers = peers_of(slots, chosen, route.slots_per_rank, *route.sizes)
    (arrived_weights,) = unpack(packed, [weights], sum(map(num_words, parts[:-2])))
    if method == "peer":
        payload = _read(payload, local, *route.axes, route.zero_padding)
    else:
        payload = _sorted(payload, packed, local)
    return Arrival(payload, arrived_weights, tuple(hops), peers, local, left)


def _read(payload, local, axis, zero_padding=True):
    """What is read from peers, in the rows of slots."""
    rows = gather_rows(payload.sent(), local, axis, zero_padding=zero_padding)
    return payload.arrived(rows)


def _sorted(payload, packed, local):
    """What arrived, in the rows of slots."""
    arrived, start = [], 0
    for like in payload.sent():
        end = start + num_words(like)
        rows = permute(packed[:, start:end], local)  # cut before it is gathered, not after
        arrived += unpack(rows, [like])
        start = end
    return payload.arrived(arrived)


def _send_forward(payload, weights, slots, route, method):
    arrival = send(payload, weights, slots, route, method)
    return arrival, (arrival.hops, arrival.peers, arrival.local)


def _send_backward(route, method, residuals, d_arrival):
    hops, peers, local = residuals
    rows = rows_of_gradient(d_arrival.payload)
    if method == "peer":
        rows = sum_rows(rows, None, local, *peers, *route.axes)
        weights = send_back(d_arrival.weights, hops, route.axes)
    else:
        arrays = [unpermute(rows, None, local), d_arrival.weights]
        rows, weights = _back(arrays, hops, route.axes)
    return gradient_of_rows(rows, route.quantized), weights, None


send.defvjp(_send_forward, _send_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(4, 5))
def send_again(
    payload: Payload,
    hops: tuple[Permutation, ...],
    peers: Peers | None,
    local: Permutation,
    axes: tuple[str, ...],
    quantized: bool,
) -> Payload:
    """Sends other tokens as earlier ones went; arguments are as in `Arrival` and `Route`."""
    if peers is not None:
        return _read(payload, local, *axes)
    packed = pack(payload.sent())
    if not hops:
        packed = lax.all_gather(packed, axes, tiled=True)
    for axis, hop in zip(axes if hops else (), hops, strict=True):
        packed = swap(permute(packed, hop), axis)
    return _sorted(payload, packed, local)


def _again_forward(payload, hops, peers, local, axes, quantized):
    return send_again(payload, hops, peers, local, axes, quantized), (hops, peers, local)


def _again_backward(axes, quantized, residuals, d_payload):
    hops, peers, local = residuals
    rows = rows_of_gradient(d_payload)
    if peers is not None:
        rows = sum_rows(rows, None, local, *peers, *axes)
    else:
        rows = send_back(unpermute(rows, None, local), hops, axes)
    return gradient_of_rows(rows, quantized), None, None, None


send_again.defvjp(_again_forward, _again_backward)


def send_back(rows: jax.Array, hops: tuple[Permutation, ...], axes: tuple[str, ...]) -> jax.Array:
    """Sums `[arrived, H]` rows where their tokens came from, in float32 or wider."""
    if not hops:
        total = lax.psum_scatter(rows.astype(accumulator(rows.dtype)), axes, tiled=True)
        return total.astype(rows.dtype)
    for axis, hop in zip(reversed(axes), reversed(hops), strict=True):
        rows = unpermute(swap(rows, axis), None, hop)
    return rows


def _back(arrays, hops, axes):
    """`send_back` of several arrays in one collective for each axis."""
    if not hops:
        return [send_back(a, hops, axes) for a in arrays]
    for axis, hop in zip(reversed(axes), reversed(hops), strict=True):
        arrived = unpack(swap(pack(arrays), axis), arrays)
        arrays = [unpermute(a, None, hop) for a in arrived]
    return arrays
