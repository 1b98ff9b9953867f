"""A warpgroup of the decode kernel that sums half of the columns of the output."""

import functools

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.sizes import BLOCK, ROWS
from whalejax.kernels.mla.worker import BY_ROW, F32, SLOTS, Warpgroup
from whalejax.kernels.mosaic import interpreted

SMALLEST = 1e-30  # largest number of a row that is stored in units of it: others are zeros


class Accumulator(Warpgroup):
    """Sums half of the columns of the output, and loads that half of the keys."""

    def __init__(self, p, refs, worker, tile, side: int):
        super().__init__(p, refs, worker, tile)
        self.side = side
        left, right = p.halves
        self.columns = pl.ds(0, left) if side == 0 else pl.ds(left, right)
        self.ring = (refs.LEFT, refs.RIGHT)[side]
        self.width = (left, right)[side]

    def run(self) -> None:
        """Works through all pieces."""
        *first, ahead = self.first_steps(SLOTS + 1)
        for slot, step in enumerate(first):
            self.refill(step, slot)
        plgpu.barrier_arrive(self.refs.taken)

        def piece(sequence, carry):
            (g, ahead), own = carry, self.piece(sequence)
            plgpu.barrier_wait(self.refs.scored.at[lax.rem(g, SLOTS)])
            ahead = self.refill_if(own.first < own.last, ahead, lax.rem(g, SLOTS), self.next_step)
            if self.p.delayed:
                self.await_read(g + 1, own.first < own.last)
            start = g + 1, ahead, self.zeros()
            g, ahead, acc = lax.fori_loop(own.first, own.last, self.block(own), start)
            # through the slot that was read last, and is refilled only now
            slot = lax.rem(g + SLOTS - 1, SLOTS)
            self.store(sequence, own, acc, slot)
            self.refill(ahead, slot)
            return g, self.next_step(ahead)

        lax.fori_loop(self.begin[0], self.stop, piece, (0, ahead))
        plgpu.wait_smem_to_gmem(0)

    def await_read(self, g, condition):
        """Waits, under a condition, until the keys of the g-th step are scored or all but."""
        read = self.refs.read.at[lax.rem(g, SLOTS)]
        pl.when(condition)(lambda: plgpu.barrier_wait(read))

    def zeros(self):
        """The output's accumulators."""
        return plgpu.layout_cast(jnp.zeros((ROWS, self.width), F32), plgpu.Layout.WGMMA)

    def refill(self, step, slot):
        """Loads a step into a slot that was read."""
        self.load(step, self.columns, self.ring.at[slot], self.refs.full.at[slot])

    def refill_if(self, condition, step, slot, following):
        """Refills a slot under a condition; returns the step that is next."""

        def refill():
            self.refill(step, slot)
            return following(step)

        return lax.cond(condition, refill, lambda: step)

    def block(self, piece):
        """The loop's body over the blocks of a piece, of which the last one's slot is kept."""

        def step(j, carry):
            g, ahead, acc = carry
            slot, left = lax.rem(g, SLOTS), piece.length - j * BLOCK
            following = self.next_step(ahead)  # whose loads have time until the next round
            plgpu.barrier_wait(self.refs.scored.at[slot])
            factor = plgpu.load(self.refs.FACTORS.at[slot], layout=BY_ROW)
            acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
            pl.when(left < BLOCK)(functools.partial(self.clear, slot, left))
            if self.p.delayed:
                self.await_read(g + 1, j + 1 < piece.last)
            acc = add_product(acc, self.refs.P, self.ring.at[slot])
            plgpu.barrier_arrive(self.refs.taken)
            ahead = self.refill_if(j + 1 < piece.last, ahead, slot, lambda _: following)
            return g + 1, ahead, acc

        return step

    def clear(self, slot, keys):
        """Clears values past a sequence's end, which may be NaN: what is 0 times NaN is NaN."""
        for column in range(0, self.width, 64):
            part = self.ring.at[slot, :, pl.ds(column, 64)]
            values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
            row = plgpu.broadcasted_iota(jnp.int32, (BLOCK, 64), 0, layout=plgpu.Layout.WGMMA)
            part[...] = jnp.where(row < keys, values, jnp.zeros((), values.dtype))
        plgpu.commit_smem()

    def store(self, sequence, piece, acc, slot):
        """Stores a piece: as the output if its sequence is not cut, else as a part of it."""
        parity = lax.rem(sequence - self.begin[0], 2)
        plgpu.barrier_wait(self.refs.finished.at[parity])
        inverse = plgpu.load(self.refs.FACTORS.at[SLOTS + parity], layout=BY_ROW)
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
    return acc + pl.run_scoped(product, plgpu.ACC(acc.shape, F32))
