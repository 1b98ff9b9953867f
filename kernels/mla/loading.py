"""An accumulating warpgroup that loads its half of the keys, as the tensor core takes them."""

from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.accumulator import Accumulator


class LoadingAccumulator(Accumulator):
    """Refills what it has read: rotary parts two steps ahead, all others three."""

    def start(self):
        """Starts to load the first steps; returns those whose parts are loaded next."""
        cursor, (queries, first, *steps) = self.first_steps(4)
        self.refill(queries, 0)
        self.load_tail(queries, 0)
        self.refill(first, 1)
        self.load_tail(first, 1)
        self.refill(steps[0], 2)
        return cursor, steps

    def queries_taken(self, steps, g):
        """Loads what follows into the place of queries' rotary part."""
        self.load_tail(steps[1][0], g)

    def weights_taken(self, steps, g):
        """Loads what follows into the place of weights that both sides have read."""
        taken = self.refs.taken.at[lax.rem(g, 2)]
        plgpu.barrier_arrive(taken, predicate=self.side == 1)

        @pl.when(self.side == 0)
        def _load():
            plgpu.barrier_wait(taken)
            self.load_tail(steps[1][0], g)

    def give_way(self, g, condition):
        """Waits, under a condition, until the keys of the g-th step are scored.

        Until then the tensor core is the scorer's, whom all wait for.
        """
        read = self.refs.read.at[self.slot(g)]
        pl.when(condition)(lambda: plgpu.barrier_wait(read))

    def look_ahead(self, steps, g):
        """What `supply` needs to know, whose loads have time until then: the step behind some."""
        return self.next_step(steps[0])

    def supply(self, g, steps, found):
        """Fills the g-th step's slot with what comes next; returns the steps that follow."""
        (_, queue), (cursor, step) = steps, found
        self.refill(queue[1], self.slot(g))
        return cursor, [*queue[1:], step]

    def supply_if(self, condition, g, steps, found):
        """Supplies under a condition."""
        return lax.cond(condition, lambda: self.supply(g, steps, found), lambda: steps)

    def refill(self, step, slot):
        """Loads a step into a slot that was read; one side prefetches the rotary part as well."""
        target, full = self.ring.at[slot], self.refs.full.at[slot]
        self.load_queries(step, self.columns, target, full)
        self.load_values(step, self.columns, target, full)
        self.prefetch_tail(step, self.side == 1)

    def load_tail(self, step, g):
        """Loads the rotary part of a step into the g-th step's place, one side for both."""
        pl.when(self.side == 0)(lambda: self.load_rotary(step, g))
