"""Rows straight to their places among another rank's experts, as many as there are.

`lax.ragged_all_to_all` with an update for each expert of each rank: senders read the rows of an
expert in place, receivers find them sorted by expert, and nothing is laid out again on arrival.
Each update is cut into pieces, because a GPU copies every piece by a block of threads of its own:
few large ones use a few per cent of NVLink (found by marin, github.com/marin-community/marin,
issues 8077 and 8317). A token is sent once for each of its experts, not of its ranks.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.backend import vary_like
from whalejax.kernels.groups import aligned, exclusive_cumsum
from whalejax.kernels.permutation import Permutation, permute, unpermute
from whalejax.parallel.expert.packing import pack, unpack
from whalejax.parallel.expert.payload import Payload, gradient_of_rows, rows_of_gradient

UPDATES = 32  # for each peer at least


class Updates(NamedTuple):
    """Where the rows lie that a rank sends, and how many it receives.

    Attributes:
      input_offsets, send_sizes, output_offsets, recv_sizes: `i32[ranks * updates]`, as
        `lax.ragged_all_to_all` takes them.
    """

    input_offsets: jax.Array
    send_sizes: jax.Array
    output_offsets: jax.Array
    recv_sizes: jax.Array


class RaggedPlan(NamedTuple):
    """How rows go to the ranks of their experts and come back.

    Attributes:
      there, back: from the rows that tokens are laid out in to those of the experts, and
        the reverse.
      group_sizes: `i32[slots_per_rank]`, rows of each slot of this rank.
      overflow: `i32[]`, rows of this rank that are not sent, because a limit is reached.
    """

    there: Updates
    back: Updates
    group_sizes: jax.Array
    overflow: jax.Array


class Limits(NamedTuple):
    """How the rows of a rank's experts lie, and how many there may be.

    Attributes:
      rows: of all slots of a rank.
      alignment: every slot's rows start on a multiple of this.
      max_tokens: instead, rows of each slot.
      capacity: rows from one rank to another.
    """

    rows: int
    alignment: int
    max_tokens: int | None
    capacity: int | None


def plan_ragged(counts: jax.Array, rank: jax.Array | int, limits: Limits) -> RaggedPlan:
    """Works out, on every rank alike, where all rows of all ranks go.

    Args:
      counts: `i32[ranks, ranks, slots_per_rank]`, rows from each rank for each slot of each rank;
        a sender's rows are sorted by slot without gaps.
      rank: whose plan this is.
      limits: of receivers' rows.

    Returns:
      The plan of `rank`.
    """
    ranks, _, slots = counts.shape
    start = exclusive_cumsum(counts.reshape(ranks, -1), axis=1).reshape(counts.shape)
    sent = counts
    if limits.capacity is not None:
        sent = jnp.clip(limits.capacity - exclusive_cumsum(counts, axis=2), 0, counts)
    earlier = exclusive_cumsum(sent, axis=0)  # rows of ranks before, in the same slot
    if limits.max_tokens is None:
        first = exclusive_cumsum(aligned(jnp.sum(sent, axis=0), limits.alignment), axis=1)
        room = limits.rows - first
    else:
        first = jnp.broadcast_to(
            jnp.arange(slots, dtype=jnp.int32) * limits.max_tokens, counts.shape[1:]
        )
        room = jnp.full_like(first, limits.max_tokens)
    kept = jnp.clip(room[None] - earlier, 0, sent)
    place = first[None] + earlier
    out, into = kept[rank], kept[:, rank]
    pieces = -(-UPDATES // slots)
    there = _cut(start[rank], out, place[rank], into, pieces)
    back = _cut(place[:, rank], into, start[:, rank], out, pieces)
    overflow = jnp.sum(counts[rank] - out, dtype=jnp.int32)
    return RaggedPlan(there, back, jnp.sum(into, axis=0, dtype=jnp.int32), overflow)


def _cut(input_offsets, send_sizes, output_offsets, recv_sizes, pieces):
    """Updates cut into pieces, those of a peer one after another."""
    piece = jnp.arange(pieces + 1, dtype=jnp.int32)

    def begin(sizes):
        return sizes[..., None] * piece[None, None] // pieces

    sent, received = begin(send_sizes), begin(recv_sizes)
    updates = (
        input_offsets[..., None] + sent[..., :-1],
        jnp.diff(sent, axis=-1),
        output_offsets[..., None] + sent[..., :-1],
        jnp.diff(received, axis=-1),
    )
    return Updates(*(a.reshape(-1) for a in updates))


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def send_ragged(
    payload: Payload, hop: Permutation, plan: RaggedPlan, rows: int, axis: str, quantized: bool
) -> Payload:
    """Sends tokens to the rows of their experts.

    Args:
      payload: of `[T, H]` tokens.
      hop: to the rows that are sent, sorted by slot.
      plan: of those rows.
      rows: of this rank's experts; those that nobody sends are zero.
      axis: of the mesh.
      quantized: tokens travel in FP8.
    """
    packed = _exchange(permute(pack(payload.sent()), hop), plan.there, rows, axis)
    return payload.arrived(unpack(packed, payload.sent()))


def _send_forward(payload, hop, plan, rows, axis, quantized):
    return send_ragged(payload, hop, plan, rows, axis, quantized), (hop, plan)


def _send_backward(rows, axis, quantized, residuals, d_payload):
    hop, plan = residuals
    returned = _exchange(rows_of_gradient(d_payload), plan.back, hop.source.shape[0], axis)
    return gradient_of_rows(unpermute(returned, None, hop), quantized), None, None


send_ragged.defvjp(_send_forward, _send_backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def return_ragged(y: jax.Array, plan: RaggedPlan, rows: int, axis: str) -> jax.Array:
    """Sends the rows `[..., H]` of experts back to the `rows` that their tokens were sent in."""
    return _exchange(y, plan.back, rows, axis)


def _return_forward(y, plan, rows, axis):
    return return_ragged(y, plan, rows, axis), (plan, jnp.zeros((y.shape[0], 0), y.dtype))


def _return_backward(rows, axis, residuals, d_rows):
    plan, like = residuals
    return _exchange(d_rows, plan.there, like.shape[0], axis), None


return_ragged.defvjp(_return_forward, _return_backward)


def _exchange(operand, updates, rows, axis):
    # a constant would be hoisted out of a loop over layers, and copied in each of them
    zero = jnp.minimum(updates.send_sizes[0], 0).astype(operand.dtype)
    output = jnp.broadcast_to(zero, (rows, operand.shape[1]))
    return lax.platform_dependent(
        operand,
        vary_like(output, (operand, updates)),
        *updates,
        cuda=functools.partial(lax.ragged_all_to_all, axis_name=axis),
        default=functools.partial(ragged_all_to_all, axis=axis),
    )


def ragged_all_to_all(
    operand: jax.Array,
    output: jax.Array,
    input_offsets: jax.Array,
    send_sizes: jax.Array,
    output_offsets: jax.Array,
    recv_sizes: jax.Array,
    *,
    axis: str,
) -> jax.Array:
    """The definition of `lax.ragged_all_to_all`, which XLA has for GPUs and TPUs alone.

    All ranks gather everything and pick what is theirs: for tests on CPUs.

    Args:
      operand: `[rows, width]`.
      output: `[others, width]`, what receives.
      input_offsets, send_sizes, output_offsets, recv_sizes: `i32[ranks * updates]`.
      axis: of the mesh.

    Returns:
      `output` with what was received.
    """
    del recv_sizes
    rank, ranks = lax.axis_index(axis), lax.axis_size(axis)
    rows = lax.all_gather(operand, axis)
    ours = [
        lax.all_gather(a, axis).reshape(ranks, ranks, -1)[:, rank]
        for a in (input_offsets, send_sizes, output_offsets)
    ]
    source, sizes, target = (a[..., None] for a in ours)  # [ranks, updates, 1]
    place = jnp.arange(output.shape[0], dtype=jnp.int32)[None, None]
    covers = (place >= target) & (place < target + sizes)
    peer = jnp.arange(ranks, dtype=jnp.int32)[:, None, None]
    flat = peer * operand.shape[0] + source + place - target
    flat = jnp.sum(jnp.where(covers, flat, 0), axis=(0, 1))
    picked = rows.reshape(-1, operand.shape[1])[flat]
    return jnp.where(jnp.any(covers, axis=(0, 1))[:, None], picked, output)
