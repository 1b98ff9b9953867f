"""The FP8 weight gradient kernel for Hopper: 1 x 128 scales times 1 x 128 scales.

`dy_t [N, M]` times `x_t [K, M]`, both scaled every 128 tokens, the axis that is summed over. The
roles and their drawing are those of `hopper_kernel`; what differs:

- a product is scaled by its row and by its column, two operations an element instead of one;
- the output is float32, and TMA adds it to what the output holds, if there is something to add to;
- tokens are cut into groups, each with an output of its own: an item is a tile of one group and
  says which blocks of tokens to sum. A group without tokens becomes zeros.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.fp8_gemm.hopper_kernel import COPIES, drain
from whalejax.kernels.fp8_gemm.tuning import BLOCK_K, WARPGROUP_ROWS, WgradTuning
from whalejax.kernels.mosaic import (
    COUNT,
    LOADER_REGISTERS,
    MATH_REGISTERS,
    compiler_params,
    for_tma,
    next_slot,
    read,
    transforms,
)

F32, E4M3 = jnp.float32, jnp.float8_e4m3fn
ROW, COLUMN, GROUP, FIRST, BLOCKS = range(FIELDS := 5)  # columns of an item
WARPGROUPS = 2
PANEL = 32  # columns of the output that TMA swizzles together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes: dy_t `[n, m]` times x_t `[k, m]`, into `[groups, n, k]`.

    Attributes:
      accumulate: whether the product is added to what the output holds.
    """

    groups: int
    n: int
    k: int
    accumulate: bool


class Refs(NamedTuple):
    """GMEM (lower case) and SMEM of the kernel."""

    dy: Any
    dy_scales: Any
    x: Any
    x_scales: Any
    items: Any
    out: Any
    DY: Any
    X: Any
    DYS: Any
    XS: Any
    OUT: Any
    full: Any
    empty: Any


def build(p: Problem, t: WgradTuning, ctas: int):
    """The kernel as a function of dy, its scales, x, its scales and items.

    Where `p.accumulate`, the output is one more argument, a mutable array.
    """

    def body(*refs):
        refs = Refs(*refs)
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")

        @pl.when(wg == WARPGROUPS)
        def _loads():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            load_items(p, t, refs, cta)

        @pl.when(wg < WARPGROUPS)
        def _multiplies():
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")
            multiply_items(p, t, refs, cta, wg)

    operand = transforms(BLOCK_K, E4M3)
    out = jax.ShapeDtypeStruct((p.groups, p.n, p.k), F32)
    return plgpu.kernel(
        body,
        out_type=() if p.accumulate else out,
        scratch_types=[
            plgpu.SMEM((t.stages, t.tile_m, BLOCK_K), E4M3, transforms=operand),
            plgpu.SMEM((t.stages, t.tile_n, BLOCK_K), E4M3, transforms=operand),
            plgpu.SMEM((t.stages, t.tile_m), F32),
            plgpu.SMEM((t.stages, t.tile_n), F32),
            plgpu.SMEM(
                (WARPGROUPS, t.tile_n // PANEL, WARPGROUP_ROWS, PANEL),
                F32,
                transforms=transforms(PANEL, F32),
            ),
            plgpu.Barrier(num_arrivals=COPIES, num_barriers=t.stages),
            plgpu.Barrier(num_arrivals=WARPGROUPS, num_barriers=t.stages),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=WARPGROUPS + 1,
        thread_name="wg",
        kernel_name=f"fp8_wgrad_{t.tile_m}x{t.tile_n}",
        compiler_params=compiler_params(),
    )


def load_items(p: Problem, t: WgradTuning, refs: Refs, cta: jax.Array) -> None:
    """Fills slots with blocks of tokens of both operands and their scales, item after item."""
    m = refs.dy.shape[1]
    DY, X = for_tma(refs.DY, p.n, m), for_tma(refs.X, p.k, m)

    def item(i, carry):
        g, (row, column, _, first, blocks) = carry
        following = read(refs.items, cta, i + 1, FIELDS)  # known when it is needed
        rows, columns = pl.ds(row * t.tile_m, t.tile_m), pl.ds(column * t.tile_n, t.tile_n)

        def block(j, g):
            slot = lax.rem(g, t.stages)  # carrying the slot itself is slower, here alone
            plgpu.barrier_wait(refs.empty.at[slot])
            tokens, full = pl.ds((first + j) * BLOCK_K, BLOCK_K), refs.full.at[slot]
            plgpu.copy_gmem_to_smem(refs.dy.at[rows, tokens], DY.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.x.at[columns, tokens], X.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.dy_scales.at[first + j, rows], refs.DYS.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.x_scales.at[first + j, columns], refs.XS.at[slot], full)
            return g + 1

        return lax.fori_loop(0, blocks, block, g), following

    start = 0, read(refs.items, cta, 0, FIELDS)
    g, _ = lax.fori_loop(0, refs.items[cta, 0, COUNT], item, start)
    drain(t, refs, g)


def multiply_items(p, t: WgradTuning, refs: Refs, cta: jax.Array, wg: jax.Array) -> None:
    """Multiplies 64 rows of each item, block after block, and stores them."""
    for s in range(t.stages):
        plgpu.barrier_arrive(refs.empty.at[s])
    plgpu.barrier_wait(refs.full.at[0])

    def item(i, slot):
        blocks = refs.items[cta, i, BLOCKS]

        @pl.when(blocks > 0)
        def _product():
            store(p, t, refs, cta, wg, i, multiply_item(t, refs, wg, slot, blocks))

        if not p.accumulate:

            @pl.when(blocks <= 0)
            def _nothing():
                store(p, t, refs, cta, wg, i, zeros(t))

        return lax.rem(slot + blocks, t.stages)

    lax.fori_loop(0, refs.items[cta, 0, COUNT], item, 0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def zeros(t):
    """A warpgroup's accumulators."""
    return plgpu.layout_cast(jnp.zeros((WARPGROUP_ROWS, t.tile_n), F32), plgpu.Layout.WGMMA)


def multiply_item(t, refs, wg, slot, blocks):
    """The product of a warpgroup's rows, over the blocks from `slot` on, awaited already."""
    rows = pl.ds(wg * WARPGROUP_ROWS, WARPGROUP_ROWS)

    def block(_, carry):
        slot, total = carry
        following = next_slot(t.stages, slot)

        def multiply(acc):
            plgpu.wgmma(acc, refs.DY.at[slot, rows], refs.X.at[slot].transpose((1, 0)))
            # while this block is in the tensor core; after the last one, the next item's first
            plgpu.barrier_wait(refs.full.at[following])
            by_row = plgpu.load(refs.DYS.at[slot, rows], layout=plgpu.Layout.WGMMA.reduce(1))
            by_column = plgpu.load(refs.XS.at[slot], layout=plgpu.Layout.WGMMA.reduce(0))
            scales = lax.broadcast_in_dim(by_row, total.shape, [0])
            scales = scales * lax.broadcast_in_dim(by_column, total.shape, [1])
            return scales, plgpu.wgmma_accumulator_load(acc)

        scales, product = pl.run_scoped(multiply, plgpu.ACC((WARPGROUP_ROWS, t.tile_n), F32))
        plgpu.barrier_arrive(refs.empty.at[slot])
        return following, total + product * scales

    return lax.fori_loop(0, blocks, block, (slot, zeros(t)))[1]


def store(p, t, refs, cta, wg, i, total):
    """Sends a warpgroup's rows of item i off through SMEM."""
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    panels = range(0, t.tile_n, PANEL)
    for column in panels:
        refs.OUT[wg, column // PANEL] = total[:, column : column + PANEL]
    plgpu.commit_smem()
    group = refs.items[cta, i, GROUP]
    rows = pl.ds(refs.items[cta, i, ROW] * t.tile_m + wg * WARPGROUP_ROWS, WARPGROUP_ROWS)
    staged = for_tma(refs.OUT, p.n, p.k)
    for column in panels:
        columns = pl.ds(refs.items[cta, i, COLUMN] * t.tile_n + column, PANEL)
        plgpu.copy_smem_to_gmem(
            staged.at[wg, column // PANEL],
            refs.out.at[group, rows, columns],
            commit_group=False,
            reduction_op="add" if p.accumulate else None,
        )
    plgpu.commit_smem_to_gmem_group()
