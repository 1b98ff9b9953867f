"""How the CTAs of a kernel share tokens out, reach peers, and leave together."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

INDEX_LANES = 32  # int32 that TMA moves at least: 128 bytes

copy_in = functools.partial(
    plgpu.copy_gmem_to_smem, oob_mode=plgpu.OOBFillMode.PROMISE_IN_BOUNDS
)  # in one piece: rows are longer than a box of TMA


@dataclasses.dataclass(frozen=True, kw_only=True)
class Share:
    """The tokens of all ranks among the CTAs of one.

    At each moment a rank's CTAs work for all other ranks alike, so that no link waits for another;
    and each begins with another rank.

    Attributes:
      ranks: of the axis.
      tokens: of a rank.
      ctas: a multiple of `ranks`.
      axis: of the mesh. None if other ranks' arrays are parts of this one's, along a first axis
        of their own: for interpreters, and for tests on one GPU.
      rank: then, this one.
    """

    ranks: int
    tokens: int
    ctas: int
    axis: str | None
    rank: int = 0

    @property
    def chunk(self) -> int:
        """Tokens of a CTA."""
        return -(-self.ranks * self.tokens // self.ctas)

    def me(self) -> jax.Array:
        """This rank."""
        return jnp.int32(self.rank) if self.axis is None else lax.axis_index(self.axis)

    def token(self, cta: Any, i: Any) -> tuple[Any, Any]:
        """The rank, and the number there, of a CTA's i-th token; there may be no such number."""
        owner = lax.rem(cta + i + self.me(), jnp.int32(self.ranks))
        return owner, lax.div(i * self.ctas + cta, jnp.int32(self.ranks))

    def spread(self, array: jax.Array, fill: Any) -> jax.Array:
        """An array `[ranks * T, ...]` by CTA, `[ctas, INDEX_LANES * n]`."""
        cta = lax.broadcasted_iota(jnp.int32, (self.ctas, self.chunk), 0)
        i = lax.broadcasted_iota(jnp.int32, (self.ctas, self.chunk), 1)
        owner, number = self.token(cta, i)
        past = self.ranks * self.tokens
        at = jnp.where(number < self.tokens, owner * self.tokens + number, past)
        found = array.at[at].get(mode="fill", fill_value=fill)
        return padded(found.reshape(self.ctas, -1), fill)

    def peer(self, ref: Any, rank: jax.Array) -> Any:
        """The same array on another rank."""
        return ref.at[rank] if self.axis is None else plgpu.remote_ref(ref, {self.axis: rank})

    def leave(self) -> None:
        """Ends a kernel when no rank touches another's memory any more."""
        if self.axis is None:
            return
        here, there = (pl.get_global(plgpu.SemaphoreType.REGULAR) for _ in range(2))
        cta = lax.axis_index("cta")
        pl.semaphore_signal(here)

        @pl.when(cta < self.ranks)  # one of them tells each rank
        def _():
            pl.semaphore_wait(here, value=self.ctas, decrement=False)
            pl.semaphore_signal(there, device_id={self.axis: cta})

        @pl.when(cta == 0)
        def _():
            pl.semaphore_wait(there, value=self.ranks, decrement=False)


def padded(array: jax.Array, fill: Any) -> jax.Array:
    """Rows as long as TMA wants them."""
    return jnp.pad(array, ((0, 0), (0, -array.shape[1] % INDEX_LANES)), constant_values=fill)


def lanes(count: int) -> int:
    """How long such a row is."""
    return -(-count // INDEX_LANES) * INDEX_LANES
