"""Reads each token that this rank's experts need from its rank, once, and writes all its rows.

```
load   token i+5 from its rank ........  i+6
wait   token i                           i+1
store      its rows, and some padding ..     its rows ..
```
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mosaic import compiler_params
from whalejax.kernels.peers.sharing import Share, copy_in, lanes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gather:
    """What to gather, and by how many.

    Attributes:
      share: of tokens among CTAs.
      choices: of a token.
      rows: of the outputs.
      kinds: width and dtype of each array's rows.
      zero_padding: write zeros to the rows that no token fills.
      stages: tokens in a CTA's ring.
      storing: of them, those whose rows are being written.
    """

    share: Share
    choices: int
    rows: int
    kinds: tuple[tuple[int, Any], ...]
    zero_padding: bool
    stages: int
    storing: int

    @property
    def row_chunk(self) -> int:
        """Rows whose padding is a CTA's affair."""
        return -(-self.rows // self.share.ctas)


class Refs(NamedTuple):
    """GMEM (lower case) and SMEM of the kernel, but for what is read once at its start."""

    sources: list
    outs: list
    RING: list
    ZERO: list
    ROW_OF: Any
    EMPTY: Any
    full: Any


def build(p: Gather):
    """The kernel as a function of the plan's rows by CTA, and the arrays.

    Where padding is zero also of the empty rows by CTA, and a row of zeros for each array.
    """
    parts, padded = len(p.kinds), int(p.zero_padding)

    def body(*refs):
        refs = iter(refs)

        def some(count):
            return [next(refs) for _ in range(count)]

        plans, sources = some(1), some(parts)
        plans, zeros = plans + some(padded), some(parts * padded)
        outs, RING, PLANS, ZERO = some(parts), some(parts), some(1 + padded), some(parts * padded)
        full, ready = refs
        cta = lax.axis_index("cta")
        for plan, target in zip(plans, PLANS, strict=True):
            copy_in(plan.at[cta], target, ready)
        for row, target in zip(zeros, ZERO, strict=True):
            copy_in(row, target, ready)
        plgpu.barrier_wait(ready)
        work(p, Refs(sources, outs, RING, ZERO, PLANS[0], PLANS[-1], full), cta)
        p.share.leave()

    rows = [plgpu.SMEM((width,), dtype) for width, dtype in p.kinds]
    return plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct((p.rows, width), dtype) for width, dtype in p.kinds],
        scratch_types=[
            *(plgpu.SMEM((p.stages, width), dtype) for width, dtype in p.kinds),
            plgpu.SMEM((lanes(p.share.chunk * p.choices),), jnp.int32),
            *[plgpu.SMEM((lanes(p.row_chunk),), jnp.int32)] * padded,
            *rows * padded,
            plgpu.Barrier(num_arrivals=parts, num_barriers=p.stages),
            plgpu.Barrier(num_arrivals=1 + (1 + parts) * padded),
        ],
        grid=(p.share.ctas,),
        grid_names=("cta",),
        num_threads=1,
        thread_name="wg",
        kernel_name="gather_from_peers",
        compiler_params=compiler_params(),
    )


def work(p: Gather, refs: Refs, cta: jax.Array) -> None:
    """Moves a CTA's tokens, and clears its share of the empty rows meanwhile."""

    def slot_of(i):
        return lax.rem(i, jnp.int32(p.stages))

    def load(i):
        @pl.when(needed(p, refs, i))
        def _():
            owner, number = p.share.token(cta, i)
            for source, ring in zip(refs.sources, refs.RING, strict=True):
                row = p.share.peer(source, owner).at[number]
                copy_in(row, ring.at[slot_of(i)], refs.full.at[slot_of(i)])

    def step(i, _):
        @pl.when(needed(p, refs, i))
        def _():
            plgpu.barrier_wait(refs.full.at[slot_of(i)])
            for row in rows_of(p, refs, i):
                store(p, [ring.at[slot_of(i)] for ring in refs.RING], refs, row)

        if p.zero_padding:
            some = -(-p.row_chunk // p.share.chunk)
            last = jnp.minimum((i + 1) * some, p.row_chunk)
            lax.fori_loop(
                i * some, last, lambda j, _: store(p, refs.ZERO, refs, refs.EMPTY[j]), None
            )
        plgpu.commit_smem_to_gmem_group()

        @pl.when((i >= p.storing) & (i - p.storing + p.stages < p.share.chunk))
        def _():
            plgpu.wait_smem_to_gmem(p.storing, wait_read_only=True)
            load(i - p.storing + p.stages)

    for i in range(min(p.stages, p.share.chunk)):
        load(jnp.int32(i))
    lax.fori_loop(0, p.share.chunk, step, None)
    plgpu.wait_smem_to_gmem(0)


def rows_of(p, refs, i):
    """The rows of a CTA's i-th token; `p.rows` where it has none."""
    return [refs.ROW_OF[i * p.choices + j] for j in range(p.choices)]


def needed(p, refs, i):
    """Whether the i-th token has a row."""
    return functools.reduce(jnp.minimum, rows_of(p, refs, i)) < p.rows


def store(p, sources, refs, row):
    """Begins to write a row of each array, if there is such a row."""

    @pl.when(row < p.rows)
    def _():
        for source, out in zip(sources, refs.outs, strict=True):
            plgpu.copy_smem_to_gmem(source, out.at[row], commit_group=False)
