"""Who attends to what in paged decode: sequences of different lengths, shared out evenly.

Sequences are laid end to end, each as many cells long as it has blocks of keys, behind a few cells
for what a piece costs beside its blocks. This line is cut into equal stretches, one for each
worker. A sequence that is cut becomes several pieces, whose results are merged afterwards.
FlashMLA's scheduler does the same, one sequence after another. Where sequences are about equal and
about as many as workers, nothing is cut: merging would take longer than some workers' idleness.
"""

import dataclasses

import jax
import jax.numpy as jnp

from whalejax.kernels.mla.sizes import BLOCK

PIECE_CELLS = 2  # what a piece costs beside its blocks, in their time
CUT_CELLS = 8  # what it costs that there is something to merge
FEW = 1024  # sequences whose cells one kernel sums
SEQUENCE, FIRST, LENGTH = range(3)  # columns of `Plan.bounds`
WORKER, CUTS = range(2)  # of `Plan.pieces`


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Plan:
    """Where a batch is cut.

    Attributes:
      bounds: `i32[workers + 1, 3]`. Worker w has what lies between row w and row w + 1, each a
        sequence, a block of 64 keys in it, and the sequence's length, 0 behind the last.
      pieces: `i32[b, 2]`: of each sequence the worker that has its first block, and how often it is
        cut; the workers that follow have one piece each.
    """

    bounds: jax.Array
    pieces: jax.Array


def plan_mla_decode(lengths: jax.Array, *, workers: int) -> Plan:
    """Shares out the keys of a batch among workers, inside of `jax.jit`.

    Made once for a step of decoding, it serves all layers.

    Args:
      lengths: `i32[b]`, keys of each sequence.
      workers: that attend at the same time.

    Returns:
      `Plan`.

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
    batch, cells = lengths.shape[0], num_blocks(lengths) + PIECE_CELLS
    ends = cumsum(cells)
    stretch = jax.lax.div(ends[-1] + workers - 1, workers)
    share = -(-batch // workers)
    whole = share * jnp.max(cells) <= stretch + CUT_CELLS
    worker = jnp.arange(workers + 1, dtype=jnp.int32)
    cell = worker * stretch
    passed = ends[None] <= cell[:, None]
    sequence = jnp.sum(passed, axis=1, dtype=jnp.int32)
    before = jnp.max(jnp.where(passed, ends[None], 0), axis=1)
    # no cut falls into the cells in front of a sequence's blocks
    first = jnp.where(sequence < batch, jnp.maximum(cell - before - PIECE_CELLS, 0), 0)
    sequence = jnp.where(whole, jnp.minimum(worker * share, batch), sequence)
    length = jnp.where(sequence < batch, lengths[jnp.minimum(sequence, batch - 1)], 0)
    bounds = sequence, jnp.where(whole, 0, first), length
    starts = jax.lax.div(ends - cells + PIECE_CELLS, stretch)
    cuts = jax.lax.div(ends + stretch - 1, stretch) - (starts + 1)
    pieces = starts, jnp.where(whole, 0, jnp.maximum(cuts, 0))  # of no keys: less than no cut
    return Plan(jnp.stack(bounds, axis=1), jnp.stack(pieces, axis=1))


def cumsum(x: jax.Array) -> jax.Array:
    """Sums up to each number; for few of them in one kernel, where XLA takes two."""
    if x.shape[0] > FEW:
        return jnp.cumsum(x, dtype=x.dtype)
    number = jnp.arange(x.shape[0], dtype=jnp.int32)
    return jnp.sum(jnp.where(number[None] <= number[:, None], x[None], 0), axis=1, dtype=x.dtype)


def num_blocks(lengths: jax.Array) -> jax.Array:
    """Blocks of sequences of these lengths."""
    return jax.lax.div(jnp.maximum(lengths, 0) + BLOCK - 1, BLOCK)
