"""Sums the rows of each token that visits this rank, and writes the sum to the token's rank.

```
loader     row of token i, row of token i+1, row of token i+1, ...    into the ring
adder      weighs and adds the rows of token i | ... of token i+1
store                                          | sum of token i to its rank
```
"""

import dataclasses
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mosaic import compiler_params
from whalejax.kernels.peers.hopper import SUMS
from whalejax.kernels.peers.sharing import Share, copy_in, lanes

F32 = jnp.float32
ADDER, LOADER = range(2)  # warpgroups


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sum:
    """What to sum, and by how many.

    Attributes:
      share: of tokens among CTAs.
      choices: of a token.
      rows: of the experts.
      width, dtype: of a row.
      weighted: rows have weights.
      stages: rows in a CTA's ring.
    """

    share: Share
    choices: int
    rows: int
    width: int
    dtype: Any
    weighted: bool
    stages: int

    @property
    def layout(self) -> Any:
        """How a row lies in a warpgroup's registers."""
        most = 16 // jnp.dtype(self.dtype).itemsize
        vector = next(v for v in (most, most // 2, most // 4, 1) if self.width % (128 * v) == 0)
        return plgpu.Layout.WG_STRIDED((self.width,), vector)


class Refs(NamedTuple):
    """GMEM (lower case) and SMEM of the kernel, but for what is read once at its start."""

    rows: Any
    out: Any
    RING: Any
    OUT: Any
    ROW_OF: Any
    GUESTS: Any
    WEIGHTS: Any
    full: Any
    free: Any


def build(p: Sum):
    """The kernel as a function of rows, and by CTA of the plan, the guests and the weights.

    Its result, `[ranks, T, H]`, holds what other ranks wrote: for each of this rank's tokens the
    sums of its hosts, and nothing in other places.
    """
    plans = 2 + p.weighted

    def body(rows, *refs):
        sources, (out, RING, OUT), targets = (
            refs[:plans],
            refs[plans : plans + 3],
            refs[plans + 3 :],
        )
        *PLANS, full, free, ready = targets
        cta, wg = lax.axis_index("cta"), lax.axis_index("wg")
        refs = Refs(rows, out, RING, OUT, PLANS[0], PLANS[1], PLANS[-1], full, free)

        @pl.when(wg == LOADER)
        def _():
            for source, target in zip(sources, PLANS, strict=True):
                copy_in(source.at[cta], target, ready)
            plgpu.barrier_wait(ready)
            load(p, refs)

        @pl.when(wg == ADDER)
        def _():
            plgpu.barrier_wait(ready)
            add(p, refs, cta)
            p.share.leave()

    share = p.share
    shape = (share.ranks, share.tokens, p.width)
    lengths = [lanes(share.chunk * p.choices), lanes(share.chunk)]
    return plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct(
            shape if share.axis is not None else (share.ranks, *shape), p.dtype
        ),
        scratch_types=[
            plgpu.SMEM((p.stages, p.width), p.dtype),
            plgpu.SMEM((SUMS, p.width), p.dtype),
            *(plgpu.SMEM((length,), jnp.int32) for length in lengths),
            *[plgpu.SMEM((lengths[0],), F32)] * p.weighted,
            plgpu.Barrier(num_arrivals=1, num_barriers=p.stages),
            plgpu.Barrier(num_arrivals=1, num_barriers=p.stages),
            plgpu.Barrier(num_arrivals=plans),
        ],
        grid=(share.ctas,),
        grid_names=("cta",),
        num_threads=2,
        thread_name="wg",
        kernel_name="sums_to_peers",
        compiler_params=compiler_params(),
    )


def load(p: Sum, refs: Refs) -> None:
    """The loader: brings the rows of a CTA's tokens, one after another."""

    def slot_of(number):
        return lax.rem(number, jnp.int32(p.stages))

    def step(i, loaded):
        row, slot = refs.ROW_OF[i], slot_of(loaded)

        @pl.when(row < p.rows)
        def _():
            @pl.when(loaded >= p.stages)
            def _():
                plgpu.barrier_wait(refs.free.at[slot])

            copy_in(refs.rows.at[row], refs.RING.at[slot], refs.full.at[slot])

        return loaded + (row < p.rows).astype(jnp.int32)

    loaded = lax.fori_loop(0, p.share.chunk * p.choices, step, jnp.int32(0))

    def drain(number, _):
        plgpu.barrier_wait(refs.free.at[slot_of(number)])

    lax.fori_loop(jnp.maximum(loaded - p.stages, 0), loaded, drain, None)


def add(p: Sum, refs: Refs, cta: jax.Array) -> None:
    """The adder: weighs and sums the rows of a token, and sends the sum to the token's rank."""

    def step(i, state):
        def added(acc, number):
            slot = lax.rem(number, jnp.int32(p.stages))
            plgpu.barrier_wait(refs.full.at[slot])
            row = plgpu.load(refs.RING.at[slot], layout=p.layout).astype(F32)
            plgpu.barrier_arrive(refs.free.at[slot])
            return acc + (row * refs.WEIGHTS[i] if p.weighted else row), number + 1

        return lax.cond(refs.ROW_OF[i] < p.rows, added, lambda *same: same, *state)

    def token(i, state):
        number, sent = state
        nothing = plgpu.layout_cast(jnp.zeros((p.width,), F32), p.layout)
        first = i * p.choices
        acc, number = lax.fori_loop(first, first + p.choices, step, (nothing, number))
        guest = refs.GUESTS[i] > 0

        @pl.when(guest)
        def _():
            owner, at = p.share.token(cta, i)
            slot = lax.rem(sent, jnp.int32(SUMS))
            plgpu.wait_smem_to_gmem(SUMS - 1, wait_read_only=True)
            refs.OUT[slot] = acc.astype(p.dtype)
            plgpu.commit_smem()
            target = p.share.peer(refs.out, owner).at[p.share.me(), at]
            plgpu.copy_smem_to_gmem(refs.OUT.at[slot], target)

        return number, sent + guest.astype(jnp.int32)

    lax.fori_loop(0, p.share.chunk, token, (jnp.int32(0), jnp.int32(0)))
    plgpu.wait_smem_to_gmem(0)
