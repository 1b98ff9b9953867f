"""The FP8 matmul kernel for Hopper: 1 x 128 scales times 128 x 128 scales.

Persistent: one CTA for each SM works through its items. A ring of slots, each a block of 128 of K,
runs on across items, so that an item's first loads start before the last item's epilogue.

```
             k=0       k=1             k=2             next item
TMA  wg 2    load 0    load 1          load 2          load 0'     waits only for a free slot
math wg 0              mma 0, scale 0  mma 1, scale 1  mma 2 ...   store rows 0-63
math wg 1              mma 0, scale 0  mma 1, scale 1  mma 2 ...   store rows 64-127
```

The tensor core sums FP8 products in about 14 bits, so the product of each K block goes to a fresh
accumulator and is added, scaled, to float32 registers ("promotion"). While one math warpgroup
promotes, the tensor core has the other's product.

What bounds it, by counters of an H100 (256 x 128 tiles, K = 7168): the tensor core is busy 87 to 90
% of the cycles, of which power leaves it 1.6 a nanosecond. SMEM is written once and read for each
product, 1152 cycles a block where the tensor core needs 1024. And what a loader issues, promotion
waits for.

Partial last tiles need no care: TMA fills what lies outside with zeros and stores only what lies
inside.
"""

import dataclasses
import functools
import itertools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.fp8_gemm import tensor_core
from whalejax.kernels.fp8_gemm.tuning import (
    BLOCK_K,
    PANEL_ROWS,
    WALK_WORDS,
    WARPGROUP_ROWS,
    Tuning,
)
from whalejax.kernels.fp8_gemm.walk import COUNT, FIELDS, Item, walk
from whalejax.kernels.mosaic import (
    LOADER_REGISTERS,
    MATH_REGISTERS,
    compiler_params,
    for_tma,
    next_slot,
    panel_columns,
    transforms,
)

F32, E4M3 = jnp.float32, jnp.float8_e4m3fn
COPIES = 4  # that fill a slot: x, w, and the scales of both
SCALES_AT_ONCE = 32  # of w, along K: TMA writes multiples of 128 bytes to multiples of 128


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes: x `[x_groups, m, k]` times w `[groups, n, k]`.

    Attributes:
      layout: `"dense"`, one group. `"contiguous"`: groups of x's rows follow on one another, each
        from a multiple of 128 on. `"masked"`: each has an `[m, k]` of its own. With groups, rows
        that do not count are stored as zeros.
    """

    x_groups: int
    groups: int
    m: int
    n: int
    k: int
    out_dtype: Any
    layout: str

    @property
    def masked(self) -> bool:
        """Whether some rows do not count."""
        return self.layout != "dense"

    @property
    def num_k(self) -> int:
        """Blocks of K."""
        return -(-self.k // BLOCK_K)


class Segment(NamedTuple):
    """Columns `first` to `last` of a tile, promoted with one scale of w: the tile's `block`-th."""

    first: int
    last: int
    block: int


class Refs(NamedTuple):
    """GMEM (lower case) and SMEM of the kernel, in the order of its arguments."""

    x: Any
    x_scales: Any
    w: Any
    w_scales: Any
    sizes: Any  # of groups, or None
    out: Any
    X: Any
    W: Any
    XS: Any
    WS: Any
    OUT: Any
    WALK: Any
    full: Any
    empty: Any


def offsets(n: int, t: Tuning) -> list[int]:
    """Where tiles start in a block of w's scales: those of an array of `n` columns, until again."""
    period = BLOCK_K // math.gcd(t.tile_n, BLOCK_K)
    return [i * t.tile_n % BLOCK_K for i in range(min(-(-n // t.tile_n), period))]


def segments(offset: int, t: Tuning) -> list[Segment]:
    """The segments of a tile that starts at `offset`, cut where blocks of scales end."""
    cuts = sorted({0, t.tile_n, *range(-offset % BLOCK_K, t.tile_n, BLOCK_K)})
    return [
        Segment(first, last, (offset + first) // BLOCK_K)
        for first, last in itertools.pairwise(cuts)
    ]


def num_scales(n: int, t: Tuning) -> int:
    """Blocks of w's scales, along N, that a tile can touch."""
    return max(segments(offset, t)[-1].block for offset in offsets(n, t)) + 1


def build(p: Problem, t: Tuning, ctas: int):
    """The kernel as a function of x, its scales, w, its scales and, if there are, groups' sizes."""

    def body(*refs):
        operands, rest = refs[:4], refs[4:]
        refs = Refs(*operands, *(rest if p.masked else (None, *rest)))
        wg = lax.axis_index("wg")

        @pl.when(wg == t.warpgroups)
        def _loads():
            if t.warpgroups == 2:
                plgpu.set_max_registers(LOADER_REGISTERS, action="decrease")
            one_warp(functools.partial(load_items, p, t, refs))

        @pl.when(wg < t.warpgroups)
        def _multiplies():
            if t.warpgroups == 2:
                plgpu.set_max_registers(MATH_REGISTERS, action="increase")
            multiply_items(p, t, refs, wg)

    empty = (
        plgpu.Barrier(num_arrivals=t.warpgroups, num_barriers=t.stages)
        if t.cluster == 1
        else plgpu.ClusterBarrier(
            collective_axes=("peer",), num_arrivals=t.warpgroups, num_barriers=t.stages
        )
    )
    ends = [s.last for offset in offsets(p.n, t) for s in segments(offset, t)]
    panel = panel_columns(t.tile_n, functools.reduce(math.gcd, ends), p.out_dtype)
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((p.x_groups, p.m, p.n), p.out_dtype),
        scratch_types=[
            plgpu.SMEM((t.stages, t.tile_m, BLOCK_K), E4M3, transforms=transforms(BLOCK_K, E4M3)),
            plgpu.SMEM((t.stages, t.tile_n, BLOCK_K), E4M3, transforms=transforms(BLOCK_K, E4M3)),
            plgpu.SMEM((t.stages, t.tile_m), F32),
            plgpu.SMEM((t.stages, num_scales(p.n, t), SCALES_AT_ONCE), F32),
            plgpu.SMEM(
                (t.waves, t.warpgroups, t.tile_n // panel, WARPGROUP_ROWS, panel),
                p.out_dtype,
                transforms=transforms(panel, p.out_dtype),
            ),
            plgpu.SMEM((t.stages + p.groups + 1, WALK_WORDS), jnp.int32),
            plgpu.Barrier(num_arrivals=COPIES, num_barriers=t.stages),
            empty,
        ],
        grid=(ctas // t.cluster,),
        grid_names=("cluster",),
        cluster=(t.cluster,),
        cluster_names=("peer",),
        num_threads=t.warpgroups + 1,
        thread_name="wg",
        kernel_name=f"fp8_matmul_{t.tile_m}x{t.tile_n}",
        compiler_params=compiler_params(),
    )


def one_warp(load):
    """Runs `load` in one warp of four: the others' instructions would be issued in math's stead."""

    @plgpu.warp_map
    def _warps(warp):
        pl.when(warp == 0)(load)


def is_real(t, filled):
    """Whether an item, or another of its cluster along M, has rows that count."""
    return filled > -(t.group[0] - 1) * t.tile_m


def load_items(p: Problem, t: Tuning, refs: Refs) -> None:
    """Fills slots with K blocks of x, of w and of both scales, item after item.

    An item's first slot says which it is.
    """
    X, W = for_tma(refs.X, p.m, p.k), for_tma(refs.W, p.n, p.k)
    loaded = rows_loaded(p, t, PANEL_ROWS * t.cluster)
    loaded_scales = rows_loaded(p, t, SCALES_AT_ONCE)
    count, item_at = walk(p, t, refs)
    refs.WALK[0, COUNT] = count

    def real(share, item, g):
        peers = "peer" if t.cluster > 1 else None
        x_peers, w_peers = (peers, None) if share == "x" else (None, peers)
        rows = pl.ds(item.row * WARPGROUP_ROWS, loaded)
        scale_rows = pl.ds(item.row * WARPGROUP_ROWS, loaded_scales)
        first_column = item.column * t.tile_n
        columns = pl.ds(first_column, t.tile_n)
        blocks = pl.ds(lax.div(first_column, BLOCK_K), num_scales(p.n, t))
        group = item.group if p.groups > 1 else 0
        x_group = item.group if p.x_groups > 1 else 0

        def block(j, g):
            slot = lax.rem(g, t.stages)  # carrying the slot itself is 5 % slower, here alone
            plgpu.barrier_wait(refs.empty.at[slot])
            pl.when(j == 0)(functools.partial(announce, refs, item, slot))
            k, full = pl.ds(j * BLOCK_K, BLOCK_K), refs.full.at[slot]
            x, w = refs.x.at[x_group, rows, k], refs.w.at[group, columns, k]
            x_slot = X.at[slot, pl.ds(0, loaded)]
            plgpu.copy_gmem_to_smem(x, x_slot, full, collective_axes=x_peers)
            plgpu.copy_gmem_to_smem(w, W.at[slot], full, collective_axes=w_peers)
            x_scales = refs.x_scales.at[x_group, j, scale_rows]
            scales_slot = refs.XS.at[slot, pl.ds(0, loaded_scales)]
            plgpu.copy_gmem_to_smem(x_scales, scales_slot, full)
            at_once = pl.ds(lax.div(j, SCALES_AT_ONCE) * SCALES_AT_ONCE, SCALES_AT_ONCE)
            w_scales = refs.w_scales.at[group, blocks, at_once]
            plgpu.copy_gmem_to_smem(w_scales, refs.WS.at[slot], full)
            return g + 1

        return lax.fori_loop(0, p.num_k, block, g)

    def padding(item, g):
        load_nothing(t, refs, item, g)
        return g + 1

    def load_item(i, g):
        item, beside = item_at(i)
        load = functools.partial(real, t.share)
        if p.masked and t.group[0] > 1:
            load = functools.partial(lax.cond, beside, functools.partial(real, "x"), load)
        if p.masked:
            return lax.cond(is_real(t, item.filled), load, padding, item, g)
        return load(item, g)

    drain(t, refs, lax.fori_loop(0, count, load_item, 0))


def rows_loaded(p: Problem, t: Tuning, multiple: int) -> int:
    """Rows of x that a tile loads.

    TMA takes longer for rows that lie outside than for none. What is left in SMEM there is
    multiplied, and not stored.
    """
    return min(t.tile_m, -(-p.m // multiple) * multiple)


def announce(refs: Any, item: tuple, slot: jax.Array) -> None:
    """Leaves an item in SMEM for those who await this slot."""
    for field, value in enumerate(item):
        refs.WALK[slot, field] = value


def load_nothing(t: Tuning, refs: Any, item: tuple, g: jax.Array) -> None:
    """Fills the g-th slot with an item that has no K blocks."""
    slot = lax.rem(g, t.stages)
    plgpu.barrier_wait(refs.empty.at[slot])
    announce(refs, item, slot)
    for _ in range(COPIES):
        plgpu.barrier_arrive(refs.full.at[slot])


def drain(t: Tuning, refs: Any, g: jax.Array) -> None:
    """Fills one more slot with nothing, for which the last block's step waits, and awaits the rest.

    A peer's last arrivals must find this CTA still there.
    """
    load_nothing(t, refs, (), g)
    for s in range(1, t.stages):
        plgpu.barrier_wait(refs.empty.at[lax.rem(g + s, t.stages)])


def multiply_items(p: Problem, t: Tuning, refs: Refs, wg: jax.Array) -> None:
    """Multiplies a warpgroup's rows of each item, block after block, and stores them.

    The loop over K is compiled once for each offset that a tile can have in a block of w's scales:
    choosing scales inside the loop costs registers and instructions.
    """
    for s in range(t.stages):
        plgpu.barrier_arrive(refs.empty.at[s])
    starts = offsets(p.n, t)
    plgpu.barrier_wait(refs.full.at[0])

    def item(_, slot):
        tile = Item(*(refs.WALK[slot, field] for field in range(FIELDS)))
        branches = [
            functools.partial(multiply_item, p, t, refs, wg, segments(offset, t), tile, slot)
            for offset in starts
        ]
        which = lax.rem(tile.column, len(starts)) if len(starts) > 1 else 0
        if not p.masked:
            switch(which, branches)
            return lax.rem(slot + p.num_k, t.stages)

        slots = jnp.where(is_real(t, tile.filled), p.num_k, 1)
        mine = tile.filled > first_row(t, wg, 0)  # the tensor core is the other's alone, else

        @pl.when(mine)
        def _real():
            switch(which, branches)

        @pl.when(~mine)
        def _padding():
            parts = segments(0, t)
            lax.fori_loop(0, slots, functools.partial(pass_by, t, refs), slot)
            store(p, t, refs, wg, tile, parts, [zeros(parts)] * t.waves)

        return lax.rem(slot + slots, t.stages)

    lax.fori_loop(0, refs.WALK[0, COUNT], item, 0)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def pass_by(t: Tuning, refs: Refs, _, slot: jax.Array) -> jax.Array:
    """Lets go of a slot, and awaits the next.

    At a cluster's barrier one thread arrives for its warpgroup. The others must have seen that the
    slot was full: it may be filled again, and again, before they look, and they would wait for
    ever. Where products are multiplied, these keep the four warps together.
    """
    plgpu.commit_smem()  # the barrier of a warpgroup that Pallas has
    plgpu.barrier_arrive(refs.empty.at[slot])
    following = next_slot(t.stages, slot)
    plgpu.barrier_wait(refs.full.at[following])
    return following


def switch(which, branches):
    """Runs one of the branches."""
    if len(branches) == 1:
        branches[0]()
    else:
        lax.switch(which, branches)


def zeros(parts):
    """Float32 accumulators of a warpgroup's rows, one a segment."""
    return [tensor_core.zeros(s.last - s.first) for s in parts]


def multiply_item(p, t, refs, wg, parts, tile, slot):
    """Multiplies a warpgroup's rows of an item, whose first K block is in `slot`, awaited already.

    A step multiplies a wave of 64 rows by a K block. While a block's last step is in the tensor
    core, the next block is awaited and its scales are loaded: between two products lies nothing but
    the promotion, and what lies there decides the speed. The last block awaits the next item's
    first; the scales that it loads are not used.
    """

    def load_scales(slot, j):
        of_rows = (
            plgpu.load(
                refs.XS.at[slot, pl.ds(first_row(t, wg, wave), WARPGROUP_ROWS)],
                layout=plgpu.Layout.WGMMA.reduce(1),
            )
            for wave in range(t.waves)
        )
        return list(of_rows), [refs.WS[slot, s.block, lax.rem(j, SCALES_AT_ONCE)] for s in parts]

    def block(j, carry):
        slot, (x_scales, w_scales), product, accs = carry
        following, accs = next_slot(t.stages, slot), list(accs)
        for wave in range(t.waves):
            last = wave == t.waves - 1
            product = tensor_core.start(product, refs.X, refs.W, slot, first_row(t, wg, wave))
            if last:
                plgpu.barrier_wait(refs.full.at[following])
                next_scales = load_scales(following, j + 1)
            product = tensor_core.wait(product)
            if last:
                plgpu.barrier_arrive(refs.empty.at[slot])
            accs[wave] = [
                promote(acc, columns_of(product, s), x_scales[wave] * w)
                for acc, w, s in zip(accs[wave], w_scales, parts, strict=True)
            ]
        return following, next_scales, product, accs

    nothing = [[None] * len(parts)] * t.waves
    first = block(0, (slot, load_scales(slot, 0), None, nothing))
    *_, accs = lax.fori_loop(1, p.num_k, block, first)
    store(p, t, refs, wg, tile, parts, accs)


def promote(acc, product, scales):
    """Adds a product, scaled by row, to what was summed before it, if anything was."""
    scaled = product * lax.broadcast_in_dim(scales, product.shape, [0])
    return scaled if acc is None else acc + scaled


def first_row(t, wg, wave):
    """The first row of a tile that a warpgroup multiplies in a wave."""
    return (wave * t.warpgroups + wg) * WARPGROUP_ROWS


def columns_of(product, segment):
    """A segment of a tile's product."""
    first, last = segment.first, segment.last
    return product if last - first == product.shape[1] else product[:, first:last]


def clear_rows(acc, real):
    """The first `real` rows, and zeros."""
    row = plgpu.broadcasted_iota(jnp.int32, acc.shape, 0, layout=plgpu.Layout.WGMMA)
    return jnp.where(row < real, acc, 0.0)


def store(p, t, refs, wg, tile, parts, accs):
    """Rounds an item's rows to the output's dtype and sends them off through SMEM."""
    *_, num_panels, _, panel = refs.OUT.shape
    row, column, group, filled = tile
    x_group = group if p.x_groups > 1 else 0
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)
    for wave, of_wave in enumerate(accs):
        for s, acc in zip(parts, of_wave, strict=True):
            if p.masked:
                real = filled - first_row(t, wg, wave)
                acc = lax.cond(real < WARPGROUP_ROWS, clear_rows, lambda acc, _: acc, acc, real)
            acc = acc.astype(p.out_dtype)
            for first in range(s.first, s.last, panel):
                last = min(first + panel, s.last)
                at = pl.ds(first % panel, last - first)
                refs.OUT[wave, wg, first // panel, :, at] = acc[:, first - s.first : last - s.first]
    plgpu.commit_smem()
    staged = for_tma(refs.OUT, p.m, p.n)
    for wave in range(t.waves):
        first = row * WARPGROUP_ROWS + first_row(t, wg, wave)

        def send(wave=wave, rows=pl.ds(first, WARPGROUP_ROWS)):
            for number in range(num_panels):
                columns = pl.ds(column * t.tile_n + number * panel, panel)
                target = refs.out.at[x_group, rows, columns]
                plgpu.copy_smem_to_gmem(staged.at[wave, wg, number], target, commit_group=False)

        if p.masked and wave:
            # the rows of a later wave may be another group's, where this one ends before
            pl.when((filled <= 0) | (filled > first_row(t, 0, wave)))(send)
        else:
            send()
    plgpu.commit_smem_to_gmem_group()
