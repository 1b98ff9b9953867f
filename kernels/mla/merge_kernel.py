"""Merges the pieces of sequences that the plan of a paged decode cuts.

A warpgroup adds up the pieces of a few rows of queries; like the decode among blocks, it rescales
what it has when a larger score turns up. Loads are all that this waits for, so several rows are
loaded at once, and where rows are few, warpgroups share the pieces of one.
"""

import dataclasses
import functools
from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.plan import CUTS, FIRST, SEQUENCE, WORKER
from whalejax.kernels.mla.worker import F32, NEVER, REAL, Problem, natural
from whalejax.kernels.mosaic import compiler_params

SHARED_BY = 4  # warpgroups, where rows are few
AT_ONCE = 12  # pieces of a row whose loads are under way together
FEW_ROWS = 512  # one warpgroup for each would leave multiprocessors idle
CTAS = 640  # that run at once; more would mostly find out that there is nothing to do


@dataclasses.dataclass(frozen=True)
class Shares:
    """How the work is shared out.

    Attributes:
      warpgroups: that share the pieces of a row.
      rows: that a warpgroup takes at once.
      pieces: of each of them whose loads are under way together.
      by_worker: whether sequences are found by their first cut, one of a worker's bounds each,
        where there are more sequences than workers.
      grid: sequences, and the CTAs that take turns with the rows of one.
    """

    warpgroups: int
    rows: int
    pieces: int
    by_worker: bool
    grid: tuple[int, int]

    @classmethod
    def of(cls, p: Problem) -> "Shares":
        """For as many pieces as sequences of equal lengths have."""
        pieces = -(-p.workers // p.batch) + 1
        warpgroups = SHARED_BY if p.batch * p.rows <= FEW_ROWS and pieces > AT_ONCE else 1
        at_once = min(-(-pieces // warpgroups), AT_ONCE)
        rows = {2: 4, 3: 2, 4: 2}.get(at_once, 1) if warpgroups == 1 else 1
        by_worker = p.batch > p.workers
        count = p.workers - 1 if by_worker else p.batch
        each = -(-p.rows // rows // max(CTAS // count, 1))
        return cls(warpgroups, rows, at_once, by_worker, (count, -(-p.rows // rows // each)))


def build(p: Problem) -> Any:
    """The kernel as a function of a plan's pieces and bounds, parts, their units and sums.

    Two more arguments, mutable arrays, are the output and its sums, of which it writes what belongs
    to sequences that are cut.
    """
    shares = Shares.of(p)
    rows, warpgroups, (_, turns) = shares.rows, shares.warpgroups, shares.grid

    def body(pieces, bounds, parts, part_tops, part_lse, out, lse, TOP, TOTAL, ACC, done):
        wg, turn = lax.axis_index("wg"), lax.axis_index("turn")
        sequence, there = cut_sequence(bounds, lax.axis_index("number"), shares)
        worker, cuts = pieces[sequence, WORKER], pieces[sequence, CUTS]
        load = functools.partial(load_row, p, parts, part_tops, part_lse, worker, cuts)
        each = shares.pieces * warpgroups
        rounds = lax.div(cuts + each, each)

        def merge_rows(i, _):
            first_row = (turn + i * turns) * rows

            def step(i, states):
                numbers = [(i * shares.pieces + j) * warpgroups + wg for j in range(shares.pieces)]
                loaded = [[load(n, first_row + row) for row in range(rows)] for n in numbers]
                for found in loaded:
                    states = [merge(*both) for both in zip(states, found, strict=True)]
                return states

            nothing = jnp.float32(2 * REAL), jnp.float32(0), spread(p, 0)
            states = lax.fori_loop(0, rounds, step, [nothing] * rows)
            if warpgroups > 1:
                states = [together(p, states[0], wg, TOP, TOTAL, ACC, done)]

            @pl.when(wg == 0)
            def _store():
                for row, (top, total, acc) in enumerate(states):
                    inverse = jnp.where(total > 0, 1 / total, 0.0)
                    at = sequence, first_row + row
                    out.at[at][...] = (acc * inverse).astype(p.dtype)
                    lse[at] = natural(top, total)

        @pl.when(there & (cuts > 0))
        def _merge():
            turns_left = lax.div(p.rows // rows - turn + turns - 1, turns)
            lax.fori_loop(0, turns_left, merge_rows, None)

    return plgpu.kernel(
        body,
        out_type=(),
        scratch_types=[
            plgpu.SMEM((warpgroups,), F32),
            plgpu.SMEM((warpgroups,), F32),
            plgpu.SMEM((warpgroups, p.columns), F32),
            plgpu.Barrier(num_arrivals=warpgroups),
        ],
        grid=shares.grid,
        grid_names=("number", "turn"),
        num_threads=warpgroups,
        thread_name="wg",
        kernel_name="mla_merge",
        compiler_params=compiler_params(),
    )


def together(p, state, wg, TOP, TOTAL, ACC, done):
    """The sum of a row over warpgroups, each of which has its own pieces."""
    TOP[wg], TOTAL[wg], acc = state
    ACC[wg] = acc
    plgpu.commit_smem()
    plgpu.barrier_arrive(done)
    plgpu.barrier_wait(done)
    states = [
        (TOP[other], TOTAL[other], plgpu.load(ACC.at[other], layout=layout(p)))
        for other in range(SHARED_BY)
    ]
    return functools.reduce(merge, states)


def cut_sequence(bounds, number, shares):
    """The sequence that a number stands for, and whether it stands for any."""
    if not shares.by_worker:
        return number, True
    (before, begun), (sequence, first) = (
        (bounds[number + i, SEQUENCE], bounds[number + i, FIRST]) for i in range(2)
    )
    first_cut = (first > 0) & ((before < sequence) | (begun == 0))
    return jnp.where(first_cut, sequence, 0), first_cut


def layout(p):
    """How the columns of a row lie in a warpgroup's registers."""
    return plgpu.Layout.WG_STRIDED((p.columns,), p.columns // 128)


def spread(p, number):
    """A row of one number."""
    return plgpu.layout_cast(jnp.full((p.columns,), number, F32), layout(p))


def load_row(p, parts, part_tops, part_lse, worker, cuts, number, row):
    """A row of a sequence's `number`-th piece: its largest score, sum and columns, see `merge`.

    As what was scaled by the sum before, its sum is one. There may be no such piece.
    """
    real = number <= cuts
    number = jnp.minimum(number, cuts)
    part = 2 * (worker + number) + (number == 0).astype(jnp.int32)  # see `Piece.part`
    sums = jnp.where(real, part_lse[part, row], NEVER)
    values = plgpu.load(parts.at[part, row], layout=layout(p))
    if values.dtype != jnp.float16:
        values = lax.bitcast_convert_type(values, jnp.float16)
    column = plgpu.broadcasted_iota(jnp.int32, (p.columns,), 0, layout=layout(p))
    left, right = (spread(p, part_tops[part, side, row]) for side in range(2))
    unit = jnp.where(column < p.half, left, right)
    return sums, jnp.float32(1), values.astype(F32) * unit


def merge(one, other):
    """The sum of two rows, each in units of two to the power of its largest score."""
    top = jnp.maximum(one[0], other[0])
    base = jnp.where(top > REAL, top, 0.0)
    factors = [jnp.exp2(state[0] - base) for state in (one, other)]
    total, acc = (one[i] * factors[0] + other[i] * factors[1] for i in (1, 2))
    return top, total, acc
