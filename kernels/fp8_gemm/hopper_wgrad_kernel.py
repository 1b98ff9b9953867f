"""The FP8 weight gradient kernel for Hopper: 1 x 128 scales times 1 x 128 scales.

`dy_t [N, M]` times `x_t [K, M]`, both scaled every 128 tokens, the axis that is summed over. The
roles and their drawing are those of `hopper_kernel`; what differs:

- a product is scaled by its row and by its column, two operations an element instead of one;
- the output is float32, and TMA adds it to what the output holds, if there is something to add to;
- tokens are cut into groups, each with an output of its own: an item is a tile of one group and
  says which blocks of tokens to sum. A group without tokens becomes zeros. A group's tiles stand
  together: all of them read the same tokens.
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
from whalejax.kernels.fp8_gemm.hopper_kernel import (
    COPIES,
    announce,
    drain,
    first_row,
    load_nothing,
    one_warp,
)
from whalejax.kernels.fp8_gemm.tuning import (
    BLOCK_K,
    WALK_WORDS,
    WARPGROUP_ROWS,
    WgradTuning,
)
from whalejax.kernels.fp8_gemm.walk import COUNT, PACKED, SIZE, fill, table_of_groups
from whalejax.kernels.groups import ALIGNMENT, aligned
from whalejax.kernels.mosaic import (
    LOADER_REGISTERS,
    MATH_REGISTERS,
    compiler_params,
    for_tma,
    next_slot,
    place,
    transforms,
    turns,
)

F32, E4M3 = jnp.float32, jnp.float8_e4m3fn
WARPGROUPS = 2
PANEL = 32  # columns of the output that TMA swizzles together


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes: dy_t `[n, m]` times x_t `[k, m]`, into `[groups, n, k]`.

    Attributes:
      grouped: whether there are sizes of groups; without, all tokens are of one.
      accumulate: whether the product is added to what the output holds.
    """

    groups: int
    n: int
    k: int
    m: int
    grouped: bool
    accumulate: bool


class Item(NamedTuple):
    """A tile of a group, and the blocks of tokens that it sums."""

    row: Any
    column: Any
    group: Any
    first: Any
    blocks: Any


class Refs(NamedTuple):
    """GMEM (lower case) and SMEM of the kernel."""

    dy: Any
    dy_scales: Any
    x: Any
    x_scales: Any
    sizes: Any  # of groups, or None
    out: Any
    DY: Any
    X: Any
    DYS: Any
    XS: Any
    OUT: Any
    WALK: Any
    full: Any
    empty: Any


def build(p: Problem, t: WgradTuning, ctas: int):
    """The kernel as a function of dy, its scales, x, its scales and, if there are, groups' sizes.

    Where `p.accumulate`, the output is one more argument, a mutable array.
    """

    def body(*refs):
        operands, rest = refs[:4], refs[4:]
        refs = Refs(*operands, *(rest if p.grouped else (None, *rest)))
        wg = lax.axis_index("wg")

        @pl.when(wg == WARPGROUPS)
        def _loads():
            plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            one_warp(functools.partial(load_items, p, t, refs))

        @pl.when(wg < WARPGROUPS)
        def _multiplies():
            plgpu.set_max_registers(MATH_REGISTERS, action="increase")
            multiply_items(p, t, refs, wg)

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
            plgpu.SMEM((t.stages + p.groups + 1, WALK_WORDS), jnp.int32),
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


def walk(p: Problem, t: WgradTuning, refs: Refs) -> tuple[jax.Array, Any]:
    """How many items a CTA has, and the function that computes its i-th; see `walk.walk`."""
    if p.grouped:
        fill(table_of_groups(p, t, refs), p.groups, refs.sizes, lambda size: 0)
    rows, columns = -(-p.n // t.tile_m), -(-p.k // t.tile_n)
    cta, ctas = lax.axis_index("cta"), lax.axis_size("cta")

    def item(i):
        row, column = place(cta + i * ctas, p.groups * rows, columns, t.width)
        if not p.grouped:
            return Item(row, column, 0, 0, -(-p.m // BLOCK_K))
        group = lax.div(row, rows)
        table = table_of_groups(p, t, refs)
        first, size = table[group, PACKED], table[group, SIZE]
        blocks = lax.div(aligned(size, ALIGNMENT), BLOCK_K)
        return Item(lax.rem(row, rows), column, group, lax.div(first, BLOCK_K), blocks)

    return turns(p.groups * rows * columns, cta, ctas), item


def load_items(p: Problem, t: WgradTuning, refs: Refs) -> None:
    """Fills slots with blocks of tokens of both operands and their scales, item after item."""
    DY, X = for_tma(refs.DY, p.n, p.m), for_tma(refs.X, p.k, p.m)
    count, item_at = walk(p, t, refs)
    refs.WALK[0, COUNT] = count

    def load_item(i, g):
        item = item_at(i)
        rows = pl.ds(item.row * t.tile_m, t.tile_m)
        columns = pl.ds(item.column * t.tile_n, t.tile_n)

        def block(j, g):
            slot = lax.rem(g, t.stages)  # carrying the slot itself is slower, here alone
            plgpu.barrier_wait(refs.empty.at[slot])
            pl.when(j == 0)(functools.partial(announce, refs, item, slot))
            number, full = item.first + j, refs.full.at[slot]
            tokens = pl.ds(number * BLOCK_K, BLOCK_K)
            plgpu.copy_gmem_to_smem(refs.dy.at[rows, tokens], DY.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.x.at[columns, tokens], X.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.dy_scales.at[number, rows], refs.DYS.at[slot], full)
            plgpu.copy_gmem_to_smem(refs.x_scales.at[number, columns], refs.XS.at[slot], full)
            return g + 1

        def nothing(g):
            load_nothing(t, refs, item, g)
            return g + 1

        if not p.grouped:
            return lax.fori_loop(0, item.blocks, block, g)
        blocks = functools.partial(lax.fori_loop, 0, item.blocks, block)
        return lax.cond(item.blocks > 0, blocks, nothing, g)

    drain(t, refs, lax.fori_loop(0, count, load_item, 0))


def multiply_items(p, t: WgradTuning, refs: Refs, wg: jax.Array) -> None:
    """Multiplies a warpgroup's rows of each item, block after block, and stores them."""
    for s in range(t.stages):
        plgpu.barrier_arrive(refs.empty.at[s])
    plgpu.barrier_wait(refs.full.at[0])

    def item(_, slot):
        tile = Item(*(refs.WALK[slot, field] for field in range(len(Item._fields))))
        store_item = functools.partial(store, p, t, refs, wg, tile)
        if not p.grouped:
            store_item(multiply_item(t, refs, wg, slot, tile.blocks))
            return lax.rem(slot + tile.blocks, t.stages)

        @pl.when(tile.blocks > 0)
        def _product():
            store_item(multiply_item(t, refs, wg, slot, tile.blocks))

        @pl.when(tile.blocks <= 0)
        def _nothing():
            plgpu.barrier_arrive(refs.empty.at[slot])
            if not p.accumulate:
                store_item([[tensor_core.zeros(PANEL)] * (t.tile_n // PANEL)] * t.waves)
            plgpu.barrier_wait(refs.full.at[next_slot(t.stages, slot)])

        return lax.rem(slot + jnp.maximum(tile.blocks, 1), t.stages)

    lax.fori_loop(0, refs.WALK[0, COUNT], item, 0)
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


def store(p, t, refs, wg, item, waves):
    """Sends a warpgroup's rows of an item off through SMEM, a wave after the other."""
    staged = for_tma(refs.OUT, p.n, p.k)
    for wave, panels in enumerate(waves):
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        for i, panel in enumerate(panels):
            refs.OUT[wg, i] = panel
        plgpu.commit_smem()
        rows = pl.ds(item.row * t.tile_m + first_row(t, wg, wave), WARPGROUP_ROWS)
        for i in range(len(panels)):
            columns = pl.ds(item.column * t.tile_n + i * PANEL, PANEL)
            plgpu.copy_smem_to_gmem(
                staged.at[wg, i],
                refs.out.at[item.group, rows, columns],
                commit_group=False,
                reduction_op="add" if p.accumulate else None,
            )
        plgpu.commit_smem_to_gmem_group()
