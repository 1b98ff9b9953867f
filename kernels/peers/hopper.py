"""The kernels' sizes and arguments, on Hopper GPUs of one host."""

import math
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from whalejax.kernels.backend import mosaic_unusable, no_gpu
from whalejax.kernels.mosaic import SMEM_BYTES, call, num_sms, unvarying
from whalejax.kernels.permutation import Permutation

CTAS_PER_SM = 2  # one's stores run while the other waits for its first loads
ROW_BYTES = 128  # a warpgroup's threads announce a copy's bytes together
STAGES, STORING = 12, 5  # at most
FEWEST_STAGES = 2
SUMS = 2  # on their way to other ranks; gathering needs a row of zeros instead


def unusable() -> str | None:
    """Why the kernels cannot run here, whatever is moved."""
    return no_gpu() or unreachable()


def unreachable() -> str | None:
    """Why no peer can be reached from kernels; a machine without a GPU can lower them."""
    if (processes := jax.process_count()) > 1:
        return f"peers are reached within one process, here are {processes}"
    return mosaic_unusable()


def why_not(op: str, arrays: tuple, axis: str, *_: Any) -> str | None:
    """Why the kernels cannot move these arrays, None if they can."""
    if lax.axis_size(axis) == 1:
        return f"the only rank of axis {axis!r} has no peers"
    moved, plan = (arrays[0], arrays[1]) if op == "gather_rows" else ([arrays[0]], arrays[2])
    return unreachable() or why_not_rows(moved, plan, summed=op == "sum_rows")


def why_not_rows(
    arrays: list[jax.Array], plan: Permutation | None = None, *, summed: bool = False
) -> str | None:
    """The part of that answer that depends on the rows."""
    for a in arrays:
        if a.ndim != 2 or a.dtype.itemsize > 4 or (a.shape[1] % 128 and summed):
            return f"rows of {a.dtype}{list(a.shape)} must have 128 n numbers of at most 32 bits"
    if plan is not None and _stages(arrays, plan, 1 + summed) < FEWEST_STAGES:
        return f"{plan.row_of.size} choices and rows of {_row_bytes(arrays)} bytes fill the SMEM"
    return None


def gather_rows(
    arrays: list[jax.Array], plan: Permutation, axis: str, zero_padding: bool
) -> list[jax.Array]:
    """See `whalejax.kernels.peers.gather_rows`."""
    from whalejax.kernels.peers.gather_kernel import Gather, build

    widths = [a.shape[1] for a in arrays]
    arrays = [_wide(a) for a in arrays]
    rows = plan.source.shape[0]
    share = _share(plan, axis)
    stages = _stages(arrays, plan, 1)
    problem = Gather(
        share=share,
        choices=plan.row_of.shape[1],
        rows=rows,
        kinds=tuple((a.shape[1], a.dtype) for a in arrays),
        zero_padding=zero_padding,
        stages=stages,
        storing=min(STORING, stages // 2),
    )
    arguments = [share.spread(plan.row_of, rows), *arrays]
    if zero_padding:
        arguments += [padding(plan, problem), *(jnp.zeros_like(a[0]) for a in arrays)]
    outs = call(build, problem, arguments=unvarying(tuple(arguments)))
    return [out[:, :width] for out, width in zip(outs, widths, strict=True)]


def sum_rows(
    rows: jax.Array,
    weights: jax.Array | None,
    plan: Permutation,
    guests: jax.Array,
    hosts: jax.Array,
    axis: str,
) -> jax.Array:
    """See `whalejax.kernels.peers.sum_rows`."""
    from whalejax.kernels.peers.sum_kernel import Sum, build

    share = _share(plan, axis)
    problem = Sum(
        share=share,
        choices=plan.row_of.shape[1],
        rows=rows.shape[0],
        width=rows.shape[1],
        dtype=rows.dtype,
        weighted=weights is not None,
        stages=_stages([rows], plan, 2),
    )
    indices = [share.spread(plan.row_of, rows.shape[0]), share.spread(guests.astype(jnp.int32), 0)]
    if weights is not None:
        indices.append(share.spread(weights.astype(jnp.float32), 0))
    sums = call(build, problem, arguments=unvarying((rows, *indices)))
    there = jnp.transpose(hosts)[..., None]
    return jnp.sum(jnp.where(there, sums.astype(jnp.float32), 0.0), axis=0).astype(rows.dtype)


def _share(plan, axis):
    """Tokens among as many CTAs as run at once."""
    from whalejax.kernels.peers.sharing import Share

    ranks = lax.axis_size(axis)
    tokens = plan.row_of.shape[0] // ranks
    ctas = min(num_sms() * CTAS_PER_SM // ranks, tokens) * ranks
    return Share(ranks=ranks, tokens=tokens, ctas=ctas, axis=axis)


def padding(plan, problem):
    """Rows that are empty, by CTA; others as `rows`."""
    from whalejax.kernels.peers.sharing import padded

    row = jnp.arange(problem.rows, dtype=jnp.int32)
    row = jnp.where(plan.source == plan.row_of.size, row, problem.rows)
    missing = problem.share.ctas * problem.row_chunk - problem.rows
    row = jnp.pad(row, (0, missing), constant_values=problem.rows)
    return padded(row.reshape(problem.row_chunk, -1).T, problem.rows)


def _wide(array):
    """An array whose rows are of as many bytes as are announced together."""
    missing = -array.shape[1] * array.dtype.itemsize % ROW_BYTES // array.dtype.itemsize
    return jnp.pad(array, ((0, 0), (0, missing)))


def _row_bytes(arrays):
    return sum(-(-a.shape[1] * a.dtype.itemsize // ROW_BYTES) * ROW_BYTES for a in arrays)


def _stages(arrays, plan, index_kinds):
    """How many rows fit into a CTA's ring."""
    ctas = num_sms() * CTAS_PER_SM
    choices = -(-plan.row_of.size // ctas) + math.prod(plan.row_of.shape[1:])
    indices = 4 * (index_kinds * choices + -(-plan.source.shape[0] // ctas)) + 4 * 1024
    free = SMEM_BYTES // CTAS_PER_SM - indices - SUMS * _row_bytes(arrays)
    return min(STAGES, free // _row_bytes(arrays))
