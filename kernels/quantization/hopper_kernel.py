"""The quantising kernel for Hopper: bound by memory, one pass over its input.

Every warpgroup works alone, block after block, with a ring of its own; there are enough of them
that some always wait for memory while others compute.

```
warpgroup   load n+1 ........................   load n+2
            wait n, read, scale, round          wait n+1 ...
                                    store n ..........
```

A block is 128 columns of 64 or 128 rows. For scales along the rows it is read as it lies, for
scales along the tokens through a transposed view of the same SMEM: either way a row of 128 numbers
that share a scale lies in the registers of four neighbouring threads. Where a whole block of 128 by
128 shares one, the rows' largest magnitudes meet in SMEM. Partial last blocks need no care: TMA
fills what lies outside with zeros and stores only what lies inside.
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mosaic import compiler_params, flat, transforms
from whalejax.kernels.quantization.reference import BLOCK, MANTISSA, MIN_AMAX

F32, E4M3 = jnp.float32, jnp.float8_e4m3fn
LIMIT = float(jnp.finfo(E4M3).max)
HALF = 64  # rows of a register tile


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What to quantise, and by how many.

    Attributes:
      groups, m, k: the quantised array is `[groups, m, k]`.
      dtype: of the input.
      swiglu: the input is `[groups, m, 2 k]`, and SwiGLU of it is quantised.
      along: whether there is an output with scales along k.
      transposed: whether there is an output `[k, padded m]` with scales along m; one group then.
      square: a block of 128 x 128 shares a scale instead; transposed, outputs are
        `[groups, k, m]`.
      masked: rows past a block's count are zero in the transposed output.
      power_of_two: scales are powers of two.
      warpgroups, depth: of a CTA; blocks in a warpgroup's ring.
    """

    groups: int
    m: int
    k: int
    dtype: Any
    swiglu: bool = False
    along: bool = True
    transposed: bool = False
    square: bool = False
    masked: bool = False
    power_of_two: bool = False
    warpgroups: int = 4
    depth: int = 2

    @property
    def rows(self) -> int:
        """Rows of a block."""
        return BLOCK if self.transposed or self.square else HALF

    @property
    def panel(self) -> int:
        """Columns of the input that TMA swizzles together."""
        return 128 // jnp.dtype(self.dtype).itemsize

    @property
    def grid(self) -> tuple[int, int]:
        """Blocks along m and k."""
        return -(-self.m // self.rows), -(-self.k // BLOCK)

    @property
    def outputs(self) -> list[jax.ShapeDtypeStruct]:
        """Values and scales along k, then values and scales along m, as far as they are wanted."""
        blocks_m, blocks_k = -(-self.m // BLOCK), -(-self.k // BLOCK)
        values, values_t = (self.groups, self.m, self.k), (self.k, blocks_m * BLOCK)
        scales, scales_t = (self.groups, blocks_k, blocks_m * BLOCK), (blocks_m, blocks_k * BLOCK)
        if self.square:
            values_t = (self.groups, self.k, self.m)
            scales, scales_t = (self.groups, blocks_m, blocks_k), (self.groups, blocks_k, blocks_m)
        along, transposed = [(values, E4M3), (scales, F32)], [(values_t, E4M3), (scales_t, F32)]
        wanted = along * self.along + transposed * self.transposed
        return [jax.ShapeDtypeStruct(shape, dtype) for shape, dtype in wanted]


class Refs(NamedTuple):
    """GMEM (lower case) and SMEM of the kernel; SMEM is indexed by warpgroup first."""

    x: Any
    filled: Any
    out: Any
    scales: Any
    out_t: Any
    scales_t: Any
    X: Any
    OUT: Any
    SCALES: Any
    OUT_T: Any
    SCALES_T: Any
    full: Any


def build(p: Plan, ctas: int):
    """The kernel as a function of x and, where masked, of the rows of each 128 that are real."""
    parts = 2 if p.swiglu else 1

    def body(*refs):
        refs = list(refs)
        absent = [None, None]
        x, filled = refs.pop(0), refs.pop(0) if p.masked else None
        out = [refs.pop(0), refs.pop(0)] if p.along else absent
        out_t = [refs.pop(0), refs.pop(0)] if p.transposed else absent
        buffer = refs.pop(0)
        smem = [refs.pop(0), refs.pop(0)] if p.along else absent
        smem_t = [refs.pop(0), refs.pop(0)] if p.transposed else absent
        work(p, Refs(x, filled, *out, *out_t, buffer, *smem, *smem_t, refs.pop(0)), ctas)

    def staged(rows):
        values = plgpu.SMEM((p.warpgroups, rows, BLOCK), E4M3, transforms=transforms(BLOCK, E4M3))
        return [values, plgpu.SMEM((p.warpgroups, rows), F32)]

    return plgpu.kernel(
        body,
        out_type=p.outputs,
        scratch_types=[
            plgpu.SMEM(
                (p.warpgroups, p.depth, parts, BLOCK // p.panel, p.rows, p.panel),
                p.dtype,
                transforms=transforms(p.panel, p.dtype),
            ),
            *staged(p.rows) * p.along,
            *staged(BLOCK) * p.transposed,
            plgpu.Barrier(
                num_arrivals=parts * BLOCK // p.panel, num_barriers=p.warpgroups * p.depth
            ),
        ],
        grid=(ctas,),
        grid_names=("cta",),
        num_threads=p.warpgroups,
        thread_name="wg",
        kernel_name="fp8_quantize",
        compiler_params=compiler_params(),
    )


def work(p: Plan, refs: Refs, ctas: int) -> None:
    """Quantises every block whose number is this warpgroup's, modulo the number of warpgroups."""
    wg = lax.axis_index("wg")
    first = lax.axis_index("cta") * p.warpgroups + wg
    step = ctas * p.warpgroups
    blocks_m, blocks_k = p.grid
    total = p.groups * blocks_m * blocks_k
    count = lax.div(total - first + step - 1, step)

    def block_at(i):
        """Group, first row and block of columns of this warpgroup's i-th block."""
        number = first + i * step
        of_group = lax.rem(number, blocks_m * blocks_k)
        row = lax.div(of_group, blocks_k) * p.rows
        return lax.div(number, blocks_m * blocks_k), row, lax.rem(of_group, blocks_k)

    def load(i, slot):
        group, row, column = block_at(i)
        for part in range(2 if p.swiglu else 1):
            for panel in range(BLOCK // p.panel):
                at = column * BLOCK + part * p.k + panel * p.panel
                source = refs.x.at[group, pl.ds(row, p.rows), pl.ds(at, p.panel)]
                target = flat(refs.X).at[wg, slot, part, panel]
                plgpu.copy_gmem_to_smem(source, target, refs.full.at[wg * p.depth + slot])

    for i in range(p.depth):

        @pl.when(i < count)
        def _(i=i):
            load(i, i)

    def block(i, _):
        slot = lax.rem(i, p.depth)
        plgpu.barrier_wait(refs.full.at[wg * p.depth + slot])
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)
        if p.square:
            quantise_square(p, refs, wg, slot, *block_at(i))
        else:
            quantise_block(p, refs, wg, slot, *block_at(i))
        plgpu.commit_smem()  # the block has been read, too
        store_block(p, refs, wg, *block_at(i))

        @pl.when(i + p.depth < count)
        def _():
            load(i + p.depth, slot)

    lax.fori_loop(0, count, block, None)
    plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def quantise_block(p, refs, wg, slot, group, row, column):
    """From the ring to SMEM's copies of the outputs, 64 rows of registers at a time."""
    X = refs.X.at[wg, slot]
    if p.along:
        for half in range(p.rows // HALF):
            rows = pl.ds(half * HALF, HALF)
            values = _read_rows(p, X.at[0], rows)
            if p.swiglu:
                values = values * (1 / (1 + jnp.exp(-values))) * _read_rows(p, X.at[1], rows)
            _round(p, values, refs.OUT.at[wg, rows], refs.SCALES.at[wg, rows])
    if p.transposed:
        for half in range(BLOCK // HALF):
            columns = pl.ds(half * HALF, HALF)  # bfloat16's panels have as many
            values = _read(X.at[0, half].transpose((1, 0)))
            if p.masked:
                token = plgpu.broadcasted_iota(
                    jnp.int32, values.shape, 1, layout=plgpu.Layout.WGMMA
                )
                values = jnp.where(token < refs.filled[lax.div(row, BLOCK)], values, 0.0)
            _round(p, values, refs.OUT_T.at[wg, columns], refs.SCALES_T.at[wg, columns])


def quantise_square(p, refs, wg, slot, group, row, column):
    """From the ring to SMEM's copies of the outputs, one scale for all of the block.

    The block is read twice from SMEM: as float32 it would fill half of the registers.
    """
    X = refs.X.at[wg, slot, 0]
    halves = [pl.ds(half * HALF, HALF) for half in range(BLOCK // HALF)]
    largest = [jnp.max(jnp.abs(_read_rows(p, X, rows)), axis=1) for rows in halves]
    # each thread of a row holds its largest: through SMEM every thread gets those of all rows
    meeting = refs.SCALES.at[wg, halves[0]]
    meeting[...] = jnp.maximum(*largest)
    plgpu.commit_smem()
    scale = _scale(p, jnp.max(plgpu.load(meeting, layout=plgpu.Layout.WGMMA.reduce(0))))
    for rows in halves:
        refs.OUT[wg, rows] = (_read_rows(p, X, rows) * (1 / scale)).astype(E4M3)
    refs.scales[group, lax.div(row, BLOCK), column] = scale
    if p.transposed:
        for half, columns in enumerate(halves):
            values = _read(X.at[half].transpose((1, 0)))
            refs.OUT_T[wg, columns] = (values * (1 / scale)).astype(E4M3)
        refs.scales_t[group, column, lax.div(row, BLOCK)] = scale


def _read_rows(p, panels, rows):
    """64 rows of 128 numbers."""
    pieces = [_read(panels.at[panel, rows]) for panel in range(BLOCK // p.panel)]
    return jnp.concatenate(pieces, axis=1)


def _read(ref):
    return plgpu.load(ref, layout=plgpu.Layout.WGMMA).astype(F32)


def _round(p, values, out, scales):
    """Rounds 64 rows of 128 numbers, each with a scale of its own."""
    scale = _scale(p, jnp.max(jnp.abs(values), axis=1))
    out[...] = (values * lax.broadcast_in_dim(1 / scale, values.shape, [0])).astype(E4M3)
    scales[...] = scale


def _scale(p, largest):
    """The scale of numbers whose largest magnitude is given."""
    scale = jnp.maximum(largest, MIN_AMAX) / LIMIT
    if not p.power_of_two:
        return scale
    bits = lax.bitcast_convert_type(scale, jnp.int32)
    up = lax.bitcast_convert_type((bits + MANTISSA) & ~MANTISSA, F32)
    return jnp.where(scale < jnp.inf, up, scale)


def store_block(p, refs, wg, group, row, column):
    """Sends a block's outputs off."""
    columns = pl.ds(column * BLOCK, BLOCK)
    if p.along:
        rows = pl.ds(row, p.rows)
        plgpu.copy_smem_to_gmem(flat(refs.OUT).at[wg], refs.out.at[group, rows, columns])
        if not p.square:
            plgpu.copy_smem_to_gmem(refs.SCALES.at[wg], refs.scales.at[group, column, rows])
    if p.transposed:
        out_t = refs.out_t.at[group] if p.square else refs.out_t
        plgpu.copy_smem_to_gmem(flat(refs.OUT_T).at[wg], out_t.at[columns, pl.ds(row, BLOCK)])
    if p.transposed and not p.square:
        scales = refs.scales_t.at[lax.div(row, BLOCK), columns]
        plgpu.copy_smem_to_gmem(refs.SCALES_T.at[wg], scales)
