"""What the kernels do, by collectives."""

import jax
from jax import lax

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.permutation import Permutation, permute, unpermute


def why_not(*_) -> str | None:
    """XLA runs everywhere."""
    return None


def gather_rows(
    arrays: list[jax.Array], plan: Permutation, axis: str, zero_padding: bool
) -> list[jax.Array]:
    """See `whalejax.kernels.peers.gather_rows`; padding is zero either way."""
    del zero_padding
    return [permute(lax.all_gather(a, axis, tiled=True), plan) for a in arrays]


def sum_rows(
    rows: jax.Array,
    weights: jax.Array | None,
    plan: Permutation,
    guests: jax.Array,
    hosts: jax.Array,
    axis: str,
) -> jax.Array:
    """See `whalejax.kernels.peers.sum_rows`."""
    del guests, hosts
    sums = unpermute(rows, weights, plan).astype(accumulator(rows.dtype))
    return lax.psum_scatter(sums, axis, tiled=True).astype(rows.dtype)
