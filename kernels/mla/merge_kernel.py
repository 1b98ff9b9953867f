"""Merges the pieces of sequences that the plan of a paged decode cuts.

A CTA takes a few rows of queries of one sequence and adds up its pieces; like the decode among
blocks, it rescales what it has when a larger score turns up. Several rows are loaded at once, for
loads are all that this waits for. Where sequences have many pieces, warpgroups share them.
"""

import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.plan import CUTS, WORKER
from whalejax.kernels.mla.worker import F32, NEVER, REAL, Problem, natural
from whalejax.kernels.mosaic import compiler_params

MANY = 8  # pieces of a sequence, from which on warpgroups share them
AT_ONCE = 8  # rows of pieces whose loads are under way together


def build(p: Problem) -> Any:
    """The kernel as a function of a plan's pieces, parts and their sums.

    Two more arguments, mutable arrays, are the output and its sums, of which it writes what belongs
    to sequences that are cut.
    """
    warpgroups, rows = (4, 1) if p.workers >= MANY * p.batch else (1, 4)

    def body(pieces, parts, part_lse, out, lse, TOP, TOTAL, ACC, done):
        sequence, wg = lax.axis_index("sequence"), lax.axis_index("wg")
        first_row = lax.axis_index("chunk") * rows
        worker, cuts = pieces[sequence, WORKER], pieces[sequence, CUTS]

        @pl.when(cuts > 0)
        def _merge():
            load = functools.partial(load_row, p, parts, part_lse, worker, cuts)
            several = AT_ONCE // rows

            def step(i, states):
                numbers = [wg + (i * several + j) * warpgroups for j in range(several)]
                loaded = [[load(n, first_row + row) for row in range(rows)] for n in numbers]
                for found in loaded:
                    states = [merge(*both) for both in zip(states, found, strict=True)]
                return states

            steps = lax.div(cuts + several * warpgroups, several * warpgroups)
            nothing = jnp.float32(2 * REAL), jnp.float32(0), spread(p, 0)
            states = lax.fori_loop(0, steps, step, [nothing] * rows)
            if warpgroups > 1:
                [(TOP[wg], TOTAL[wg], acc)] = states
                ACC[wg] = acc
                plgpu.commit_smem()
                plgpu.barrier_arrive(done)

            @pl.when(wg == 0)
            def _store():
                found = states
                if warpgroups > 1:
                    plgpu.barrier_wait(done)
                    for other in range(1, warpgroups):
                        acc = plgpu.load(ACC.at[other], layout=layout(p))
                        found = [merge(found[0], (TOP[other], TOTAL[other], acc))]
                for row, (top, total, acc) in enumerate(found):
                    inverse = jnp.where(total > 0, 1 / total, 0.0)
                    at = sequence, first_row + row
                    out.at[at][...] = (acc * inverse).astype(p.dtype)
                    lse[at] = natural(top, total)

    return plgpu.kernel(
        body,
        out_type=(),
        scratch_types=[
            plgpu.SMEM((warpgroups,), F32),
            plgpu.SMEM((warpgroups,), F32),
            plgpu.SMEM((warpgroups, p.columns), F32),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        grid=(p.batch, p.rows // rows),
        grid_names=("sequence", "chunk"),
        num_threads=warpgroups,
        thread_name="wg",
        kernel_name="mla_merge",
        compiler_params=compiler_params(),
    )


def layout(p):
    """How the columns of a row lie in a warpgroup's registers."""
    return plgpu.Layout.WG_STRIDED((p.columns,), p.columns // 128)


def spread(p, number):
    """A row of one number."""
    return plgpu.layout_cast(jnp.full((p.columns,), number, F32), layout(p))


def load_row(p, parts, part_lse, worker, cuts, number, row):
    """A row of a sequence's `number`-th piece: its largest score, sum and columns, see `merge`.

    As what was scaled by the sum before, its sum is one. There may be no such piece.
    """
    real = number <= cuts
    number = jnp.minimum(number, cuts)
    part = 2 * (worker + number) + (number == 0).astype(jnp.int32)  # see `Piece.part`
    sums = jnp.where(real, part_lse[part, row], NEVER)
    high, low = (
        plgpu.load(parts.at[part, half, row], layout=layout(p)).astype(F32) for half in range(2)
    )
    return sums, jnp.float32(1), high + low


def merge(one, other):
    """The sum of two rows, each in units of two to the power of its largest score."""
    top = jnp.maximum(one[0], other[0])
    base = jnp.where(top > REAL, top, 0.0)
    factors = [jnp.exp2(state[0] - base) for state in (one, other)]
    total, acc = (one[i] * factors[0] + other[i] * factors[1] for i in (1, 2))
    return top, total, acc
