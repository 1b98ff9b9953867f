"""Tokens read from the ranks that they are on, and sums written there, without a layout between.

Only what tokens chose is gathered from all ranks; then every rank knows which tokens it needs, and
its kernel reads them. Both kernels are in `whalejax.kernels.peers`.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import no_gpu
from whalejax.kernels.peers import gather_rows, sum_rows, why_not
from whalejax.kernels.permutation import Permutation, unpermute


class Peers(NamedTuple):
    """Whose tokens visit whom.

    Attributes:
      guests: `bool[ranks * T]`, tokens of all ranks that chose an expert of this rank.
      hosts: `bool[T, ranks]`, ranks of the experts that this rank's tokens chose.
    """

    guests: jax.Array
    hosts: jax.Array


def peers_of(here: jax.Array, slots: jax.Array, slots_per_rank: int, ranks: int) -> Peers:
    """Who visits whom.

    Args:
      here: `i32[ranks * T, k]`, slots of this rank that tokens of all ranks chose; -1 for none.
      slots: `i32[T, k]`, slots of all ranks that this rank's tokens chose; -1 for none.
      slots_per_rank, ranks: of the placement.
    """
    rank = jnp.arange(ranks, dtype=jnp.int32)[None, None]
    chosen = jnp.where(slots < 0, -1, slots // slots_per_rank)[..., None] == rank
    return Peers(jnp.any(here >= 0, axis=1), jnp.any(chosen, axis=1))


def check_peers(x: jax.Array) -> None:
    """Raises NotImplementedError where there are GPUs, but not for kernels that read peers."""
    if no_gpu() is None and (reason := why_not(x)) is not None:
        raise NotImplementedError(f"dispatch: method='peer' cannot run: {reason}")


@functools.partial(jax.custom_vjp, nondiff_argnums=(4,))
def sum_at_home(
    rows: jax.Array, weights: jax.Array | None, plan: Permutation, peers: Peers, axis: str
) -> jax.Array:
    """`sum_rows`, with its gradient: each rank reads those of the tokens that it summed."""
    return sum_rows(rows, weights, plan, *peers, axis)


def _sum_forward(rows, weights, plan, peers, axis):
    return sum_at_home(rows, weights, plan, peers, axis), (rows, weights, plan, peers)


def _sum_backward(axis, residuals, d_sums):
    rows, weights, plan, peers = residuals
    past = peers.guests.shape[0]
    token = jnp.arange(past, dtype=jnp.int32)
    itself = jnp.where(peers.guests, token, past)
    as_they_are = Permutation(itself[:, None], itself, plan.group_sizes, plan.overflow)
    (arrived,) = gather_rows([d_sums], as_they_are, axis)
    if weights is None:
        _, transpose = jax.vjp(lambda rows: unpermute(rows, None, plan), rows)
        return *transpose(arrived), None, None, None
    _, transpose = jax.vjp(lambda rows, weights: unpermute(rows, weights, plan), rows, weights)
    return *transpose(arrived), None, None


sum_at_home.defvjp(_sum_forward, _sum_backward)
