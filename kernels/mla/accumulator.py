"""A warpgroup of the decode kernel that sums half of the columns of the output."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.inline import scaled
from whalejax.kernels.mla.sizes import BLOCK, ROWS
from whalejax.kernels.mla.worker import BY_ROW, F32, Warpgroup
from whalejax.kernels.mosaic import interpreted

SMALLEST = 1e-30  # largest number of a row that is stored in units of it: others are zeros


class Accumulator(Warpgroup):
    """Sums half of the columns of the output.

    How places are filled that it has read, `LoadingAccumulator` and `ConvertingAccumulator` say;
    `steps`, where it is the one that loads, are those that are loaded next.
    """

    def __init__(self, p, refs, worker, tile, side: jax.Array):
        super().__init__(p, refs, worker, tile)
        self.side = side
        self.columns = self.columns_of(side)
        self.ring = refs.RING.at[side]

    def run(self) -> None:
        """Works through all pieces."""

        def piece(sequence, carry):
            (g, steps), own = carry, self.piece(sequence)
            some = own.first < own.last
            plgpu.barrier_wait(self.refs.scored.at[self.slot(g)])  # queries are taken
            self.queries_taken(steps, g)
            steps = self.supply_if(some, g, steps, self.look_ahead(steps, g))
            self.give_way(g + 1, some)
            start = g + 1, steps, self.zeros()
            g, steps, acc = lax.fori_loop(own.first, own.last, self.block(own), start)
            # through the slot that was read last, and is filled again only now
            last = g - 1
            self.store(sequence, own, acc, self.slot(last))
            return g, self.supply(last, steps, self.look_ahead(steps, last))

        lax.fori_loop(self.begin[0], self.stop, piece, (0, self.start()))
        plgpu.wait_smem_to_gmem(0)

    def zeros(self):
        """The output's accumulators."""
        return plgpu.layout_cast(jnp.zeros((ROWS, self.p.half), F32), plgpu.Layout.WGMMA)

    def block(self, piece):
        """The loop's body over the blocks of a piece, of which the last one's slot is kept."""
        refs = self.refs

        def step(j, carry):
            g, steps, acc = carry
            slot, left = self.slot(g), piece.length - j * BLOCK
            found = self.look_ahead(steps, g)
            plgpu.barrier_wait(refs.scored.at[slot])
            factor = plgpu.load(refs.FACTORS.at[slot], layout=BY_ROW)
            acc = scaled(acc, factor)
            pl.when(left < BLOCK)(functools.partial(self.clear, slot, left))
            self.give_way(g + 1, j + 1 < piece.last)
            acc = add_product(acc, refs.TAILS.at[lax.rem(g, 2)], self.ring.at[slot])
            self.weights_taken(steps, g)
            steps = self.supply_if(j + 1 < piece.last, g, steps, found)
            return g + 1, steps, acc

        return step

    def clear(self, slot, keys):
        """Clears values past a sequence's end, which may be NaN: what is 0 times NaN is NaN."""
        for column in range(0, self.p.half, 64):
            part = self.ring.at[slot, :, pl.ds(column, 64)]
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(row < keys, values, jnp.zeros((), values.dtype))
        plgpu.commit_smem()

    def store(self, sequence, piece, acc, slot):
        """Stores a piece: as the output if its sequence is not cut, else as a part of it."""
        place = lax.rem(sequence - self.begin[0], self.p.slots)
        plgpu.barrier_wait(self.refs.finished.at[place])
        inverse = plgpu.load(self.refs.FACTORS.at[self.p.slots + place], layout=BY_ROW)
        rows = pl.ds(self.tile * ROWS, ROWS)  # those past the output's are not stored

        def scaled(factor):
            return acc * lax.broadcast_in_dim(factor, acc.shape, [0])

        @pl.when(~piece.cut)
        def _whole():
            out = scaled(inverse).astype(self.p.dtype)
            self.send(out, slot, self.refs.out.at[sequence, rows, self.columns])

        @pl.when(piece.cut)
        def _part():
            top = jnp.abs(acc).max(axis=1)
            part = scaled(jnp.where(top > SMALLEST, 1 / top, 0.0)).astype(jnp.float16)
            if self.p.dtype != jnp.float16:  # its memory is another dtype's
                part = lax.bitcast_convert_type(part, self.p.dtype)
            tops = self.refs.part_tops.at[piece.part, self.side, rows]
            tops[...] = top * inverse
            self.send(part, slot, self.refs.parts.at[piece.part, rows, self.columns])

    def send(self, values, slot, target):
        """Stores values through a slot."""
        self.ring[slot] = values
        plgpu.commit_smem()
        plgpu.copy_smem_to_gmem(self.ring.at[slot], target)
        plgpu.wait_smem_to_gmem(0, wait_read_only=True)


def add_product(acc, x, w):
    """acc + x @ w, operands in SMEM."""

    def multiply(acc):
        plgpu.wgmma(acc, x, w)
        plgpu.wgmma_wait(0)

    if not interpreted():
        return pl.run_state(multiply)(plgpu.ACC.init(acc))

    def product(acc):
        plgpu.wgmma(acc, x, w)
        return plgpu.wgmma_accumulator_load(acc)

    # the interpreter has no accumulators that start with a value
    acc = acc + pl.run_scoped(product, plgpu.ACC(acc.shape, F32))
    plgpu.commit_smem()  # in its model a read, unlike a product, needs it before a refill
    return acc
