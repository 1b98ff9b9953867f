"""The FP8 weight gradient kernel for Hopper: 1 x 128 scales times 1 x 128 scales.

`dy_t [N, M]` times `x_t [K, M]`, both scaled every 128 tokens, the axis that is summed over. The
roles and their drawing are those of `hopper_kernel`; what differs:

- a product is scaled by its row and by its column, two operations an element instead of one;
- the output is float32, and TMA adds it to what the output holds, if there is something to add to;
- tokens are cut into groups, each with an output of its own: an item is a tile of one group and
  says which blocks of tokens to sum. A group without tokens becomes zeros.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.fp8_gemm import tensor_core
from whalejax.kernels.fp8_gemm.hopper_kernel import COPIES, drain, first_row, one_warp
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
            one_warp(functools.partial(load_items, p, t, refs, cta))

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
    """Multiplies a warpgroup's rows of each item, block after block, and stores them."""
    for s in range(t.stages):
        plgpu.barrier_arrive(refs.empty.at[s])
    plgpu.barrier_wait(refs.full.at[0])

    def item(i, carry):
        slot, (row, column, group, _, blocks) = carry
        following = read(refs.items, cta, i + 1, FIELDS)  # known when it is needed
        store_item = functools.partial(store, p, t, refs, wg, (row, column, group))

        @pl.when(blocks > 0)
        def _product():
            store_item(multiply_item(t, refs, wg, slot, blocks))

        if not p.accumulate:

            @pl.when(blocks <= 0)
            def _nothing():
                store_item([[tensor_core.zeros(PANEL)] * (t.tile_n // PANEL)] * t.waves)

        return lax.rem(slot + blocks, t.stages), following

    start = 0, read(refs.items, cta, 0, FIELDS)
    lax.fori_loop(0, refs.items[cta, 0, COUNT], item, start)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def multiply_item(t, refs, wg, slot, blocks):
    """The product of a warpgroup's rows, over the blocks from `slot` on, awaited already.

    Waves share what they load of the scales by column: a product's take a fifth of the SMEM's time.

    Returns:
      Its panels, of each wave.
    """
    panels = [pl.ds(first, PANEL) for first in range(0, t.tile_n, PANEL)]

    def load(ref, slot, window, reduced):
        scales = plgpu.load(ref.at[slot, window], layout=plgpu.Layout.WGMMA.reduce(reduced))
        return lax.broadcast_in_dim(scales, (WARPGROUP_ROWS, PANEL), [1 - reduced])

    def block(_, carry):
        slot, product, totals = carry
        following, totals = next_slot(t.stages, slot), list(totals)
        for wave in range(t.waves):
            first = first_row(t, wg, wave)
            product = tensor_core.start(product, refs.DY, refs.X, slot, first)
            if wave == 0:
                by_column = [load(refs.XS, slot, panel, 0) for panel in panels]
            by_row = load(refs.DYS, slot, pl.ds(first, WARPGROUP_ROWS), 1)
            last = wave == t.waves - 1
            if last:  # after the last block, this awaits the next item's first
                plgpu.barrier_wait(refs.full.at[following])
            product = tensor_core.wait(product)
            if last:
                plgpu.barrier_arrive(refs.empty.at[slot])
            totals[wave] = [
                promote(total, product[:, panel.start : panel.start + PANEL], by_row * scales)
                for total, panel, scales in zip(totals[wave], panels, by_column, strict=True)
            ]
        return following, product, totals

    first = block(0, (slot, None, [[None] * len(panels)] * t.waves))
    return lax.fori_loop(1, blocks, block, first)[-1]


def promote(total, product, scales):
    """Adds a scaled product to what was summed before it, if anything was."""
    return product * scales if total is None else total + product * scales


def store(p, t, refs, wg, place, waves):
    """Sends a warpgroup's rows of an item off through SMEM, a wave after the other."""
    row, column, group = place
    staged = for_tma(refs.OUT, p.n, p.k)
    for wave, panels in enumerate(waves):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, panel in enumerate(panels):
            refs.OUT[wg, i] = panel
        plgpu.commit_smem()
        rows = pl.ds(row * t.tile_m + first_row(t, wg, wave), WARPGROUP_ROWS)
        for i in range(len(panels)):
            columns = pl.ds(column * t.tile_n + i * PANEL, PANEL)
            plgpu.copy_smem_to_gmem(
                staged.at[wg, i],
                refs.out.at[group, rows, columns],
                commit_group=False,
                reduction_op="add" if p.accumulate else None,
            )
        plgpu.commit_smem_to_gmem_group()
