"""Moves tokens to the rows of their experts and sums them back, with gathers alone.

Rows are sorted by expert and every expert starts on a multiple of `alignment`, the layout that the
grouped matmul wants (DeepGEMM's contiguous layout). Scatters are slow on every backend, so both
directions and both gradients gather: the plan holds the map from tokens to rows and its inverse.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.backend import vary_like
from whalejax.kernels.groups import aligned, exclusive_cumsum, group_of_tiles

FEW_CHOICES = 8192  # a GPU compares all pairs of so many sooner than it sorts them


class Permutation(NamedTuple):
    """Where each choice of each token lies among the experts' rows.

    Attributes:
      row_of: `i32[T, k]`, the row of token t's k-th choice; `rows` where nothing was chosen.
      source: `i32[rows]`, the flat index `t * k_count + k` that fills a row; `T * k_count` for
        padding.
      group_sizes: `i32[E]`, rows of each expert without padding.
      overflow: `i32[]`, choices that found no row.
    """

    row_of: jax.Array
    source: jax.Array
    group_sizes: jax.Array
    overflow: jax.Array


def plan_permutation(
    topk_idx: jax.Array,
    num_experts: int,
    *,
    alignment: int = 128,
    capacity: int | None = None,
    max_rows: int | None = None,
) -> Permutation:
    """Lays the choices of all tokens out by expert.

    Args:
      topk_idx: `i32[T, k]`, the experts that each token chose; -1 for no choice.
      num_experts: E, experts numbered from 0.
      alignment: every expert's rows start on a multiple of this.
      capacity: rows of every expert, no more and no less, in place of an alignment; an expert's
        last choices that are too many have none, and are counted.
      max_rows: at most so many rows in all, rounded up to the alignment; choices past them have
        none, and are counted.

    Returns:
      A `Permutation` whose number of rows is static: enough for any choice without a limit.

    Raises:
      ValueError: `topk_idx` is not of two axes, or a number is not positive.
    """
    limits = [limit for limit in (capacity, max_rows) if limit is not None]
    if topk_idx.ndim != 2 or min(num_experts, alignment, *limits) < 1 or len(limits) > 1:
        raise ValueError(
            f"plan_permutation: topk_idx.shape={topk_idx.shape} must be [tokens, k], "
            f"num_experts={num_experts}, alignment={alignment}, and capacity={capacity} or "
            f"max_rows={max_rows} positive, not both"
        )
    choices = topk_idx.size
    expert = jnp.where(topk_idx < 0, num_experts, topk_idx).reshape(-1).astype(jnp.int32)
    order, rank = _sort(expert, num_experts)
    sizes = jnp.sum(expert[None] == jnp.arange(num_experts, dtype=jnp.int32)[:, None], axis=1)
    sizes = sizes.astype(jnp.int32)
    first = exclusive_cumsum(sizes)
    at = jnp.minimum(expert, num_experts - 1)
    if capacity is None:
        rows = num_rows(choices, num_experts, alignment)
        rows = min(rows, -(-(max_rows or rows) // alignment) * alignment)
        first_row = exclusive_cumsum(aligned(sizes, alignment))
        kept = jnp.clip(rows - first_row, 0, sizes)
        row_expert = group_of_tiles(sizes, rows // alignment, alignment).repeat(alignment)
    else:
        rows, kept = num_experts * capacity, jnp.minimum(sizes, capacity)
        first_row = jnp.arange(num_experts, dtype=jnp.int32) * capacity
        row_expert = jnp.arange(num_experts, dtype=jnp.int32).repeat(capacity)
    place = rank - first[at]
    row_of = jnp.where((expert < num_experts) & (place < kept[at]), first_row[at] + place, rows)
    offset = jnp.arange(rows, dtype=jnp.int32) - first_row[row_expert]
    filled = offset < kept[row_expert]
    source = jnp.where(filled, order[jnp.where(filled, first[row_expert] + offset, 0)], choices)
    overflow = jnp.sum(sizes - kept, dtype=jnp.int32)
    plan = Permutation(row_of.reshape(topk_idx.shape), source, kept, overflow)
    # else XLA works a row's place out again for every element of it
    return jax.lax.optimization_barrier(plan)


def _sort(expert, num_experts):
    """The choices in the order of their experts, and each one's place in it."""
    key = expert.astype(np.min_scalar_type(num_experts))  # a GPU sorts by 8 bits at a time
    if key.size > FEW_CHOICES:
        return _by_sorting(key)
    ways = [lambda key, way=way: vary_like(way(key), key) for way in (_by_counting, _by_sorting)]
    return jax.lax.platform_dependent(key, cuda=ways[0], default=ways[1])


def _by_sorting(key):
    order = jnp.argsort(key, stable=True).astype(jnp.int32)
    return order, jnp.argsort(order).astype(jnp.int32)


def _by_counting(key):
    number = jnp.arange(key.size, dtype=jnp.int32)
    earlier = number[None] < number[:, None]
    before = (key[None] < key[:, None]) | ((key[None] == key[:, None]) & earlier)
    rank = jnp.sum(before, axis=1, dtype=jnp.int32)
    return jnp.zeros_like(rank).at[rank].set(number, unique_indices=True), rank


def num_rows(choices: int, num_experts: int, alignment: int) -> int:
    """Rows that hold any distribution of `choices` over the experts, each aligned."""
    return (choices // alignment + min(num_experts, choices)) * alignment


@jax.custom_vjp
def permute(x: jax.Array, permutation: Permutation) -> jax.Array:
    """Copies each token to the rows of its experts.

    Args:
      x: `[T, H]`.
      permutation: from `plan_permutation`.

    Returns:
      `[rows, H]` in x's dtype; padding rows are zero.
    """
    k = permutation.row_of.shape[1]
    return x.at[permutation.source // k].get(mode="fill", fill_value=0)


def _permute_forward(x, permutation):
    return permute(x, permutation), permutation


def _permute_backward(permutation, d_rows):
    picked = d_rows.at[permutation.row_of].get(mode="fill", fill_value=0)
    wide = accumulator(d_rows.dtype)
    return jnp.sum(picked.astype(wide), axis=1).astype(d_rows.dtype), None


permute.defvjp(_permute_forward, _permute_backward)


@jax.custom_vjp
def unpermute(rows: jax.Array, weights: jax.Array | None, permutation: Permutation) -> jax.Array:
    """Sums the experts' rows of each token, weighted, in float32 or, of float64 rows, in float64.

    Args:
      rows: `[rows, H]`, the experts' outputs.
      weights: `f32|f64[T, k]`; None for ones.
      permutation: the one that `permute` used.

    Returns:
      `[T, H]` in the dtype of `rows`.
    """
    wide = accumulator(rows.dtype)
    picked = rows.at[permutation.row_of].get(mode="fill", fill_value=0).astype(wide)
    if weights is None:
        return jnp.sum(picked, axis=1).astype(rows.dtype)
    return jnp.einsum("tkh,tk->th", picked, weights.astype(wide)).astype(rows.dtype)


def _unpermute_forward(rows, weights, permutation):
    # without weights rows are not needed, but their dtype
    kept = jnp.zeros((), rows.dtype) if weights is None else rows
    return unpermute(rows, weights, permutation), (kept, weights, permutation)


def _unpermute_backward(residuals, dy):
    rows, weights, permutation = residuals
    wide = accumulator(rows.dtype)
    k = permutation.row_of.shape[1]
    dy_of_row = dy.at[permutation.source // k].get(mode="fill", fill_value=0)
    if weights is None:
        return dy_of_row.astype(rows.dtype), None, None
    weight_of_row = weights.reshape(-1).at[permutation.source].get(mode="fill", fill_value=0)
    d_rows = dy_of_row.astype(wide) * weight_of_row[:, None].astype(wide)
    picked = rows.at[permutation.row_of].get(mode="fill", fill_value=0)
    d_weights = jnp.einsum("tkh,th->tk", picked.astype(wide), dy.astype(wide))
    return d_rows.astype(rows.dtype), d_weights.astype(weights.dtype), None


unpermute.defvjp(_unpermute_forward, _unpermute_backward)
