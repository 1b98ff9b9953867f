"""A warpgroup of the decode kernel that sums half of the columns of the output."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.sizes import BLOCK, ROPE, ROWS
from whalejax.kernels.mla.worker import BY_ROW, F32, SLOTS, Warpgroup
from whalejax.kernels.mosaic import interpreted

SMALLEST = 1e-30  # largest number of a row that is stored in units of it: others are zeros


class Accumulator(Warpgroup):
    """Sums half of the columns of the output, and loads that half of the keys."""

    def __init__(self, p, refs, worker, tile, side: jax.Array):
        super().__init__(p, refs, worker, tile)
        self.side = side
        self.columns = pl.ds(side * p.half, p.half)
        self.ring = refs.RING.at[side]
        self.tail = pl.ds(p.v_dim, ROPE)

    def run(self) -> None:
        """Works through all pieces."""
        queries = self.queries()
        self.refill(queries, 0)
        self.load_tail(queries, 0)
        first, behind, ahead = self.first_blocks(SLOTS)
        self.refill(first, 1)
        self.load_tail(first, 1)
        self.refill(behind, 2)

        def piece(sequence, carry):
            (g, steps), own = carry, self.piece(sequence)
            some, slot = own.first < own.last, lax.rem(g, SLOTS)
            plgpu.barrier_wait(self.refs.scored.at[slot])  # queries are taken
            self.load_tail(steps[0], lax.rem(g, 2))
            steps = self.refill_if(some, steps, slot, self.next_step)
            self.await_read(g + 1, some)
            start = g + 1, steps, self.zeros()
            g, steps, acc = lax.fori_loop(own.first, own.last, self.block(own), start)
            # through the slot that was read last, and is refilled only now
            slot = lax.rem(g + SLOTS - 1, SLOTS)
            self.store(sequence, own, acc, slot)
            self.refill(steps[1], slot)
            return g, (steps[1], self.next_step(steps[1]))

        # rotary parts are loaded two steps ahead, all others three
        lax.fori_loop(self.begin[0], self.stop, piece, (0, (behind, ahead)))
        plgpu.wait_smem_to_gmem(0)

    def await_read(self, g, condition):
        """Waits, under a condition, until the keys of the g-th step are scored.

        Until then the tensor core is the scorer's, whom all wait for.
        """
        read = self.refs.read.at[lax.rem(g, SLOTS)]
        pl.when(condition)(lambda: plgpu.barrier_wait(read))

    def zeros(self):
        """The output's accumulators."""
        return plgpu.layout_cast(jnp.zeros((ROWS, self.p.half), F32), plgpu.Layout.WGMMA)

    def refill(self, step, slot):
        """Loads a step into a slot that was read."""
        self.load(step, self.columns, self.ring.at[slot], self.refs.full.at[slot])
        if interpreted():  # which has no L2
            return

        @pl.when((self.side == 1) & (step.block >= 0) & (step.sequence < self.stop))
        def _prefetch():  # what is loaded later, and waited for
            plgpu.async_prefetch(self.refs.kv.at[step.place, :, self.tail])

    def load_tail(self, step, slot):
        """Loads the rotary part of a step, one side for both."""
        slots, full = self.refs.TAILS, self.refs.tail_full

        @pl.when(self.side == 0)
        def _load():
            self.load(step, self.tail, slots.at[slot], full.at[slot])

    def refill_if(self, condition, steps, slot, following):
        """Refills a slot under a condition; returns the steps whose parts are loaded next."""
        behind, ahead = steps

        def refill():
            self.refill(ahead, slot)
            return ahead, following(ahead)

        return lax.cond(condition, refill, lambda: (behind, ahead))

    def block(self, piece):
        """The loop's body over the blocks of a piece, of which the last one's slot is kept."""
        refs = self.refs

        def step(j, carry):
            g, steps, acc = carry
            slot, tail, left = lax.rem(g, SLOTS), lax.rem(g, 2), piece.length - j * BLOCK
            following = self.next_step(steps[1])  # whose loads have time until the next round
            plgpu.barrier_wait(refs.scored.at[slot])
            factor = plgpu.load(refs.FACTORS.at[slot], layout=BY_ROW)
            acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
            pl.when(left < BLOCK)(functools.partial(self.clear, slot, left))
            self.await_read(g + 1, j + 1 < piece.last)
            acc = add_product(acc, refs.TAILS.at[tail], self.ring.at[slot])
            self.pass_tail(steps[0], tail)
            steps = self.refill_if(j + 1 < piece.last, steps, slot, lambda _: following)
            return g + 1, steps, acc

        return step

    def pass_tail(self, step, slot):
        """Loads the rotary part of a step, where both sides have read the weights."""
        taken = self.refs.taken.at[slot]
        plgpu.barrier_arrive(taken, predicate=self.side == 1)

        @pl.when(self.side == 0)
        def _load():
            plgpu.barrier_wait(taken)
            self.load_tail(step, slot)

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
        place = lax.rem(sequence - self.begin[0], SLOTS)
        plgpu.barrier_wait(self.refs.finished.at[place])
        inverse = plgpu.load(self.refs.FACTORS.at[SLOTS + place], layout=BY_ROW)
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
