"""Merges the pieces of sequences that the plan of a paged decode cuts.

A CTA takes 32 columns of 64 rows of queries of one such sequence, and adds up its pieces one after
another; like the decode among blocks, it rescales what it has when a larger score turns up.
"""

from typing import Any

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.plan import CUTS, SEQUENCE
from whalejax.kernels.mla.sizes import ROWS
from whalejax.kernels.mla.worker import BY_ROW, F32, REAL, Problem, by_row, natural
from whalejax.kernels.mosaic import compiler_params, transforms

COLUMNS = 32


def build(p: Problem) -> Any:
    """The kernel as a function of a plan's bounds, parts and their sums.

    Two more arguments, mutable arrays, are the output and its sums, of which it writes what belongs
    to sequences that are cut. A sequence is merged where it is cut for the first time.
    """

    def body(bounds, parts, part_lse, out, lse, staged):
        tile, chunk = lax.axis_index("tile"), lax.axis_index("chunk")
        worker = lax.axis_index("cut")  # in front of the cut
        sequence, cuts = bounds[worker + 1, SEQUENCE], bounds[worker + 1, CUTS]
        again = (bounds[worker, SEQUENCE] == sequence) & (bounds[worker, CUTS] > 0)

        @pl.when((cuts > 0) & ~again)
        def _merge():
            columns = pl.ds(chunk * COLUMNS, COLUMNS)

            def piece(i, carry):
                top, total, acc = carry
                # each worker's piece that does not begin with the first block, see `Piece.part`
                i = 2 * (worker + i) + (i == 0).astype(jnp.int32)
                sums = plgpu.load(part_lse.at[i, tile], layout=BY_ROW, optimized=False)
                raised = jnp.maximum(top, sums)
                base = jnp.where(raised > REAL, raised, 0.0)
                before, here = jnp.exp2(top - base), jnp.exp2(sums - base)
                part = parts.at[i, tile, :, columns]
                part = plgpu.load(part, layout=plgpu.Layout.WGMMA, optimized=False)
                spread = [lax.broadcast_in_dim(f, part.shape, [0]) for f in (before, here)]
                return raised, total * before + here, acc * spread[0] + part * spread[1]

            acc = plgpu.layout_cast(jnp.zeros((ROWS, COLUMNS), F32), plgpu.Layout.WGMMA)
            start = by_row(2 * REAL), by_row(0), acc
            top, total, acc = lax.fori_loop(0, cuts + 1, piece, start)
            inverse = jnp.where(total > 0, 1 / total, 0.0)
            rows = pl.ds(tile * ROWS, ROWS)
            merged = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])
            staged[...] = merged.astype(p.dtype)
            plgpu.commit_smem()
            plgpu.copy_smem_to_gmem(staged, out.at[sequence, rows, columns])
            plgpu.wait_smem_to_gmem(0)

            @pl.when(chunk == 0)
            def _sums():
                lse.at[sequence, tile][...] = natural(top, total)

    return plgpu.kernel(
        body,
        out_type=(),
        scratch_types=[
            plgpu.SMEM((ROWS, COLUMNS), p.dtype, transforms=transforms(COLUMNS, p.dtype))
        ],
        grid=(p.workers - 1, p.tiles, p.v_dim // COLUMNS),
        grid_names=("cut", "tile", "chunk"),
        kernel_name="mla_merge",
        compiler_params=compiler_params(),
    )
