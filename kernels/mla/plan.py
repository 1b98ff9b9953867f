"""Who attends to what in paged decode: sequences of different lengths, shared out evenly.

Sequences are laid end to end, each as many cells long as it has blocks, behind a few cells for what
a piece costs beside its blocks. This line is cut into equal stretches, one for each worker. A
sequence that is cut becomes several pieces, whose results are merged afterwards. FlashMLA's
scheduler does the same one sequence after another; here everything follows from sums.
"""

import dataclasses

import jax
import jax.numpy as jnp

BLOCK = 64  # keys that a worker takes at a time; a page is one or two blocks
PIECE_CELLS = 2  # what a piece costs beside its blocks, in their time


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """The pieces of a batch, in the order of sequences and, in each, of keys.

    Attributes:
      pieces: `i32[pieces, 5]`: its sequence, first block of 64 keys, blocks (none where a sequence
        has no keys), the sequence's keys from there on, and whether the sequence is cut. Pieces
        past the last one have no worker.
      starts: `i32[workers + 1]`, each worker's first piece; it has those up to the next one's.
      first_piece: `i32[b + 1]`, each sequence's first piece.
      cut: `i32[min(b, workers - 1)]`, or one: the sequences that are cut, then -1.
    """

    pieces: jax.Array
    starts: jax.Array
    first_piece: jax.Array
    cut: jax.Array


SEQUENCE, FIRST, BLOCKS, KEYS, CUT = range(5)


def plan_mla_decode(lengths: jax.Array, *, workers: int) -> Plan:
    """Shares out the keys of a batch among workers, inside of `jax.jit`.

    Made once for a step of decoding, it serves all layers.

    Args:
      lengths: `i32[b]`, keys of each sequence.
      workers: that attend at the same time.

    Returns:
      `Plan` of `b + workers - 1` pieces at most.

    Raises:
      ValueError: sizes or dtypes do not fit; prints them.

    Source: FlashMLA's `get_mla_metadata`, as sums instead of a loop.
    """
    if lengths.ndim != 1 or not lengths.size or lengths.dtype != jnp.int32:
        raise ValueError(
            f"plan_mla_decode: lengths is {lengths.dtype}{list(lengths.shape)}, must be int32[b]"
        )
    if workers < 1:
        raise ValueError(f"plan_mla_decode: workers={workers} must be at least 1")
    batch, lengths = lengths.shape[0], jnp.maximum(lengths, 0)
    blocks = (lengths + BLOCK - 1) // BLOCK
    ends = jnp.cumsum(blocks + PIECE_CELLS, dtype=jnp.int32)
    stretch = (ends[-1] + workers - 1) // workers
    begin = ends - blocks  # of a sequence's blocks: no cut falls in the cells before them
    # cuts inside of a sequence: multiples of the stretch strictly between its blocks
    first_cut = begin // stretch + 1
    cuts = jnp.maximum((ends + stretch - 1) // stretch - first_cut, 0)
    last_piece = jnp.cumsum(cuts + 1, dtype=jnp.int32)
    first_piece = last_piece - cuts - 1

    piece = jnp.arange(batch + workers - 1, dtype=jnp.int32)
    sequence = jnp.sum(piece[:, None] >= last_piece[None], axis=1, dtype=jnp.int32)
    real, sequence = sequence < batch, jnp.minimum(sequence, batch - 1)
    number = piece - first_piece[sequence]
    cut = first_cut[sequence] + number  # that ends the piece
    head = jnp.where(number == 0, 0, (cut - 1) * stretch - begin[sequence])
    tail = jnp.where(number == cuts[sequence], blocks[sequence], cut * stretch - begin[sequence])
    worker = jnp.where(number == 0, jnp.minimum(begin[sequence] // stretch, workers - 1), cut - 1)
    worker = jnp.where(real, worker, workers)
    starts = jnp.sum(
        worker[None] < jnp.arange(workers + 1, dtype=jnp.int32)[:, None], axis=1, dtype=jnp.int32
    )
    size = jnp.where(real, tail - head, 0)
    split = (cuts[sequence] > 0).astype(jnp.int32)
    keys = lengths[sequence] - head * BLOCK
    pieces = jnp.stack([sequence, head, size, keys, split], axis=1)
    return Plan(
        pieces=pieces,
        starts=starts,
        first_piece=jnp.append(first_piece, last_piece[-1:]),
        cut=_cut(cuts > 0, max(min(batch, workers - 1), 1)),
    )


def _cut(is_cut, most):
    """The numbers of those that are, then -1."""
    up_to = jnp.cumsum(is_cut, dtype=jnp.int32)
    number = jnp.arange(most, dtype=jnp.int32)
    found = jnp.sum(up_to[None] <= number[:, None], axis=1, dtype=jnp.int32)
    return jnp.where(number < up_to[-1], found, -1)
