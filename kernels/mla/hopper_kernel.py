"""The paged MLA decode kernel for Hopper.

A worker is a CTA for each 64 rows of queries (a row is a head of a new token); it takes the blocks
of 64 keys that its plan lists, one after another, with the queries of a piece in front of its keys:

```
         queries      block 0          block 1                block 2                 next piece
score    registers    S = QK, softmax  S = QK,     softmax    S = QK,     softmax     registers
both sides                                         O += PV of 0           O += PV of 1 ...  store
```

One warpgroup scores; two hold half of the output's columns each, and load that half of the keys.
Scoring is what all wait for, so the tensor core is its own while keys are scored; products with
the values of one block run while the softmax of the next is computed.

Everything passes through one ring of three slots, each a block's values: queries have a block's
shape. A slot is refilled by the warpgroup that has read it last. Rotary parts have two places of
their own, in which a block's weights follow them: both are a 64 by 64 operand.

A cache in FP8 has a ring of two slots, and two blocks in FP8 on their way to it. Accumulators fill
a slot that they have read by converting what comes next, and have no time to spare: the scorer
loads, and products do not wait for scores.

Scores are kept in powers of two, a factor that the exponential does not have to apply.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.converting import ConvertingAccumulator, LoadingScorer
from whalejax.kernels.mla.loading import LoadingAccumulator
from whalejax.kernels.mla.scorer import Scorer
from whalejax.kernels.mla.sizes import BLOCK, ROPE, ROWS
from whalejax.kernels.mla.worker import F32, Keys, Problem, Refs
from whalejax.kernels.mosaic import transforms

ACCUMULATOR_REGISTERS, SCORER_REGISTERS = 160, 184


def build(p: Problem):
    """The kernel as a function of a plan's bounds, lengths, the table of pages, q and keys.

    q is `[b, rows, d]`, keys are `[blocks, 64, d]`, or in FP8 values `e4m3[blocks, 64, v_dim]`,
    `f32[blocks, 64, v_dim / 128]` and rotary parts `[blocks, 64, 64]`.

    Returns:
      `out [b, rows, columns]` and `lse f32[b, padded rows]` of sequences that are not cut; of the
      pieces of others (see `Piece.part`) the bits of `parts f16[2 * workers, rows, columns]` in
      units of `f32[2 * workers, 2, tiles * 64]`, which are the largest of each half of a row, and
      `f32[2 * workers, tiles * 64]`, base-2 logarithms or `NEVER` where a row sees no key.
    """

    scorer = LoadingScorer if p.fp8 else Scorer
    accumulator = ConvertingAccumulator if p.fp8 else LoadingAccumulator

    def body(bounds, lengths, table, q, *refs, **scratch):
        keys = Keys(*refs[:3]) if p.fp8 else Keys(refs[0], None, refs[0])
        refs = refs[3 if p.fp8 else 1 :]
        refs = Refs(bounds, lengths, table, q, keys, *refs, **scratch)
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        worker, tile = lax.div(cta, p.tiles), lax.rem(cta, p.tiles)

        @pl.when(wg == 2)
        def _score():
            plgpu.set_max_registers(SCORER_REGISTERS, action="increase")
            scorer(p, refs, worker, tile).run()

        @pl.when(wg < 2)
        def _accumulate():
            plgpu.set_max_registers(ACCUMULATOR_REGISTERS, action="decrease")
            accumulator(p, refs, worker, tile, wg).run()

    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((p.batch, p.rows, p.columns), p.dtype),
            jax.ShapeDtypeStruct((p.batch, p.padded_rows), F32),
            jax.ShapeDtypeStruct((2 * p.workers, p.rows, p.columns), p.dtype),
            jax.ShapeDtypeStruct((2 * p.workers, 2, p.tiles * ROWS), F32),
            jax.ShapeDtypeStruct((2 * p.workers, p.tiles * ROWS), F32),
        ],
        scratch_types=scratch(p),
        grid=(p.workers * p.tiles,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        kernel_name=f"mla_decode_{p.v_dim}" + ("_fp8" if p.fp8 else ""),
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


def scratch(p: Problem) -> dict[str, Any]:
    """SMEM and barriers of a CTA, by the names that `Refs` explains."""
    barrier = plgpu.Barrier

    def smem(*shape, columns=64, dtype=p.dtype):
        return plgpu.SMEM(shape, dtype, transforms=transforms(columns, dtype))

    found = {
        "RING": smem(2, p.slots, BLOCK, p.half),
        "TAILS": smem(2, BLOCK, ROPE),
        "Q": smem(2, ROWS, 64),
        "FACTORS": plgpu.SMEM((2 * p.slots + 2, ROWS), F32),
        "full": barrier(num_arrivals=2, num_barriers=p.slots),
        "tail_full": barrier(num_arrivals=1, num_barriers=2),
        "scored": barrier(num_arrivals=1, num_barriers=p.slots),
        "taken": barrier(num_arrivals=2 if p.fp8 else 1, num_barriers=2),
        "finished": barrier(num_arrivals=1, num_barriers=p.slots),
    }
    if p.fp8:
        stage = smem(2, p.slots, BLOCK, p.half, columns=128, dtype=jnp.float8_e4m3fn)
        staged = barrier(num_arrivals=1, num_barriers=2 * p.slots)
        return found | {"STAGE": stage, "staged": staged}
    return found | {"read": barrier(num_arrivals=1, num_barriers=p.slots)}
