"""A warpgroup of the decode kernel that sums half of the columns of the output."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.sizes import BLOCK, ROWS
from whalejax.kernels.mla.worker import BY_ROW, F32, Warpgroup
from whalejax.kernels.mosaic import interpreted

SMALLEST = 1e-30  # largest number of a row that is stored in units of it: others are zeros


class Accumulator(Warpgroup):
    """Sums half of the columns of the output, and loads that half of the keys."""

    def __init__(self, p, refs, worker, tile, side: jax.Array):
        super().__init__(p, refs, worker, tile)
        self.side = side
        self.columns = pl.ds(side * p.half, p.half)
        self.ring = refs.RING.at[side]

    def run(self) -> None:
        """Works through all pieces."""

        def piece(sequence, carry):
            (g, steps), own = carry, self.piece(sequence)
            some = own.first < own.last
            plgpu.barrier_wait(self.refs.scored.at[self.slot(g)])  # queries are taken
            self.load_tail(steps[0], g)
            steps = self.supply_if(some, g, steps, self.look_ahead(steps))
            self.await_read(g + 1, some)
            start = g + 1, steps, self.zeros()
            g, steps, acc = lax.fori_loop(own.first, own.last, self.block(own), start)
            # through the slot that was read last, and is filled again only now
            self.store(sequence, own, acc, self.slot(g + self.p.slots - 1))
            return g, self.supply(g + self.p.slots - 1, steps, self.look_ahead(steps))

        lax.fori_loop(self.begin[0], self.stop, piece, (0, self.start()))
        plgpu.wait_smem_to_gmem(0)

    def slot(self, g):
        """The place in the ring of the g-th step."""
        return lax.rem(g, self.p.slots)

    def await_read(self, g, condition):
        """Waits, under a condition, until the keys of the g-th step are scored.

        Until then the tensor core is the scorer's, whom all wait for.
        """
        read = self.refs.read.at[self.slot(g)]
        pl.when(condition)(lambda: plgpu.barrier_wait(read))

    def zeros(self):
        """The output's accumulators."""
        return plgpu.layout_cast(jnp.zeros((ROWS, self.p.half), F32), plgpu.Layout.WGMMA)

    def start(self):
        """Starts to load the first steps; returns those whose parts are loaded next.

        Rotary parts are loaded two steps ahead, all others three.
        """
        queries = self.queries()
        self.refill(queries, 0)
        self.load_tail(queries, 0)
        first, behind, ahead = self.first_blocks(3)
        self.refill(first, 1)
        self.load_tail(first, 1)
        self.refill(behind, 2)
        return behind, ahead

    def look_ahead(self, steps):
        """What `supply` needs to know, whose loads have time until then: the step behind some."""
        return self.next_step(steps[-1])

    def supply(self, g, steps, found):
        """Fills the g-th step's slot with what comes next; returns the steps that follow."""
        self.refill(steps[1], self.slot(g))
        return *steps[1:], found

    def supply_if(self, condition, g, steps, found):
        """Supplies under a condition."""
        return lax.cond(condition, lambda: self.supply(g, steps, found), lambda: tuple(steps))

    def refill(self, step, slot):
        """Loads a step into a slot that was read."""
        target, full = self.ring.at[slot], self.refs.full.at[slot]
        self.load_values(step, target, full)
        self.load_queries(step, self.columns, target, full)

    def load_values(self, step, target, barrier):
        """Loads half of a block's values, if a step is a block.

        One side also brings the rotary part into the L2, which is loaded later, and waited for.
        """

        @pl.when(self.has_keys(step))
        def _load():
            keys = self.refs.keys
            plgpu.copy_gmem_to_smem(keys.values.at[step.place, :, self.columns], target, barrier)
            if not interpreted():  # which has no L2
                tail = keys.rotary.at[step.place, :, self.p.key_tail]
                plgpu.async_prefetch(tail, predicate=self.side == 1)

    def load_tail(self, step, g):
        """Loads the rotary part of a step into the g-th step's place, one side for both."""

        @pl.when(self.side == 0)
        def _load():
            place = lax.rem(g, 2)
            target, full = self.refs.TAILS.at[place], self.refs.tail_full.at[place]
            self.load_queries(step, self.p.tail, target, full)

            @pl.when(self.has_keys(step))
            def _keys():
                keys = self.refs.keys.rotary.at[step.place, :, self.p.key_tail]
                plgpu.copy_gmem_to_smem(keys, target, full)

    def block(self, piece):
        """The loop's body over the blocks of a piece, of which the last one's slot is kept."""
        refs = self.refs

        def step(j, carry):
            g, steps, acc = carry
            slot, left = self.slot(g), piece.length - j * BLOCK
            found = self.look_ahead(steps)
            plgpu.barrier_wait(refs.scored.at[slot])
            factor = plgpu.load(refs.FACTORS.at[slot], layout=BY_ROW)
            acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
            pl.when(left < BLOCK)(functools.partial(self.clear, slot, left))
            self.await_read(g + 1, j + 1 < piece.last)
            acc = add_product(acc, refs.TAILS.at[lax.rem(g, 2)], self.ring.at[slot])
            self.pass_tail(steps[0], g)
            steps = self.supply_if(j + 1 < piece.last, g, steps, found)
            return g + 1, steps, acc

        return step

    def pass_tail(self, step, g):
        """Loads the rotary part of a step when both sides have read the g-th step's weights."""
        taken = self.refs.taken.at[lax.rem(g, 2)]
        plgpu.barrier_arrive(taken, predicate=self.side == 1)

        @pl.when(self.side == 0)
        def _load():
            plgpu.barrier_wait(taken)
            self.load_tail(step, g)

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
