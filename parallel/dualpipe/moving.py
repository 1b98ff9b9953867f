"""Parameters from where they are stored to the ranks of their stages, and gradients back.

Stages are stored in order, so many on each rank; a schedule may want them elsewhere, and DualPipe
wants each on two ranks.
"""

from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax


class Move(NamedTuple):
    """One stage on its way.

    Attributes:
      source, slot: the rank that stores it, and its place there.
      destination, chunk: the rank that runs it, and its place there.
    """

    source: int
    slot: int
    destination: int
    chunk: int


def plan_moves(stages: np.ndarray) -> tuple[tuple[Move, ...], ...]:
    """Rounds in which every rank sends and receives at most one stage; the first are no transfers.

    Args:
      stages: `int[ranks, chunks]`, the stage that each chunk is.
    """
    stored = (int(stages.max()) + 1) // len(stages)
    moves = [
        Move(int(stage) // stored, int(stage) % stored, rank, chunk)
        for (rank, chunk), stage in np.ndenumerate(stages)
    ]
    rounds: list[list[Move]] = []
    for move in sorted(moves, key=_travels):
        room = next((others for others in rounds if _has_room(others, move)), None)
        if room is None:
            rounds.append(room := [])
        room.append(move)
    return tuple(map(tuple, rounds))


def _travels(move):
    return move.source != move.destination


def _has_room(others, move):
    """Whether a round is of the same kind, and none of its moves has the same source or goal."""
    return all(
        _travels(other) == _travels(move)
        and other.source != move.source
        and other.destination != move.destination
        for other in others
    )


def to_chunks(
    leaves: Sequence[jax.Array], rounds: Sequence[Sequence[Move]], axis: str, chunks: int
) -> tuple[list[jax.Array], ...]:
    """The parameters of a rank's chunks, from `[stored, ...]` of every rank."""
    found = [[jnp.zeros(leaf.shape[1:], leaf.dtype) for leaf in leaves] for _ in range(chunks)]
    rank = lax.axis_index(axis)
    for moves in rounds:
        slots, places = _tables(moves, lax.axis_size(axis))
        sent = [lax.dynamic_index_in_dim(leaf, slots[rank], keepdims=False) for leaf in leaves]
        arrived = _permute(sent, moves, axis)
        for chunk in sorted({move.chunk for move in moves}):
            here = places[rank] == chunk
            found[chunk] = [
                jnp.where(here, new, old) for new, old in zip(arrived, found[chunk], strict=True)
            ]
    return tuple(found)


def from_chunks(
    chunks: Sequence[Sequence[jax.Array]],
    rounds: Sequence[Sequence[Move]],
    axis: str,
    stored: int,
) -> list[jax.Array]:
    """The sums of the gradients of every stage where it is stored, `[stored, ...]`."""
    back = [[Move(m.destination, m.chunk, m.source, m.slot) for m in moves] for moves in rounds]
    rank = lax.axis_index(axis)
    sums = [jnp.zeros((stored, *leaf.shape), leaf.dtype) for leaf in chunks[0]]
    for moves in back:
        slots, places = _tables(moves, lax.axis_size(axis))
        sent = [pick(leaf, slots[rank]) for leaf in zip(*chunks, strict=True)]
        arrived = _permute(sent, moves, axis)
        own = jnp.maximum(places[rank], 0)
        sums = [
            total.at[own].add(jnp.where(places[rank] >= 0, new, jnp.zeros_like(new)))
            for total, new in zip(sums, arrived, strict=True)
        ]
    return sums


def pick(choices: Sequence[jax.Array], index: jax.Array | int) -> jax.Array:
    """One of some arrays, by a number that may be traced."""
    if isinstance(index, int):
        return choices[index]
    found = choices[0]
    for number, choice in enumerate(choices[1:], 1):
        found = jnp.where(index == number, choice, found)
    return found


def _tables(moves, ranks):
    """Of each rank what it sends, 0 if nothing, and where what it gets belongs, or -1."""
    slots, places = np.zeros(ranks, np.int32), np.full(ranks, -1, np.int32)
    for move in moves:
        slots[move.source], places[move.destination] = move.slot, move.chunk
    return jnp.asarray(slots), jnp.asarray(places)


def _permute(arrays, moves, axis):
    if not any(map(_travels, moves)):
        return arrays
    pairs = [(move.source, move.destination) for move in moves]
    return [lax.ppermute(array, axis, pairs) for array in arrays]
