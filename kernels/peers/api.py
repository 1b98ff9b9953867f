"""Rows of all ranks of a mesh axis, moved by kernels that read and write peers' memory.

A collective moves blocks: what it sends is first laid out by rank, and what arrives is laid out
again. These kernels move each row from where it lies to where it is needed, in one pass, and a row
that several experts of a rank need crosses NVLink once. The idea is DeepEP's
(github.com/deepseek-ai/DeepEP); reading, and not writing, is what lets a receiver sort by itself.

All ranks of the mesh must call them together, as a collective over the whole mesh.
"""

from collections.abc import Sequence

import jax

from whalejax.kernels.backend import run
from whalejax.kernels.permutation import Permutation

BACKENDS = {
    "mosaic_gpu": "whalejax.kernels.peers.hopper",
    "xla": "whalejax.kernels.peers.reference",
}


def gather_rows(
    arrays: Sequence[jax.Array],
    plan: Permutation,
    axis: str,
    *,
    zero_padding: bool = True,
    implementation: str | None = None,
) -> list[jax.Array]:
    """Copies tokens of all ranks to the rows of this rank's experts.

    `permute(lax.all_gather(x, axis, tiled=True), plan)` of each array, without the arrays between.

    Args:
      arrays: `[T, ...]` of two axes each, this rank's tokens.
      plan: of the `ranks * T` tokens of all ranks, rank by rank.
      axis: of the mesh, inside `jax.shard_map`.
      zero_padding: whether rows that the plan leaves empty are zero; else they may hold anything.
      implementation: `"mosaic_gpu"` or `"xla"`; None for the kernel where it can run.

    Returns:
      `[rows, ...]` each.

    Raises:
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    return run("gather_rows", BACKENDS, implementation, (list(arrays), plan), axis, zero_padding)


def sum_rows(
    rows: jax.Array,
    weights: jax.Array | None,
    plan: Permutation,
    guests: jax.Array,
    hosts: jax.Array,
    axis: str,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """Sums the experts' rows of each token, weighted, where the token came from.

    `lax.psum_scatter(unpermute(rows, weights, plan), axis, tiled=True)`: each rank sums its own
    rows in float32, sends what it got in the rows' dtype, and the token's rank sums in float32.

    Args:
      rows: `[rows, H]`, outputs of this rank's experts.
      weights: `f32[ranks * T, k]` of the tokens of all ranks; None for ones.
      plan: of these tokens.
      guests: `bool[ranks * T]`, tokens that chose an expert of this rank.
      hosts: `bool[T, ranks]`, ranks of the experts that this rank's tokens chose.
      axis: of the mesh, inside `jax.shard_map`.
      implementation: as in `gather_rows`.

    Returns:
      `[T, H]` in the dtype of `rows`.

    Raises:
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    arrays = rows, weights, plan, guests, hosts
    return run("sum_rows", BACKENDS, implementation, arrays, axis)


def why_not(array: jax.Array) -> str | None:
    """Why the kernels cannot move rows like an array's there and back, None if they can.

    That there is no GPU is no reason: they can be lowered for one.
    """
    from whalejax.kernels.peers import hopper

    return hopper.unreachable() or hopper.why_not_rows([array], summed=True)
