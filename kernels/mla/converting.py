"""Warpgroups of the decode kernel for a cache in FP8.

Accumulators have much to do, and convert their halves of the keys besides; so the scorer, which
mostly waits for that, is the one that loads, and tells them what.
"""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.accumulator import Accumulator
from whalejax.kernels.mla.dequantize import convert, load_scales
from whalejax.kernels.mla.scorer import Scorer
from whalejax.kernels.mla.worker import F32

TILE = 128  # columns that share a scale
AT_A_TIME = 4  # steps that accumulators are told


def place_of(refs, g):
    """Where the g-th step is told: in the last row of `FACTORS`, as bits of a float."""
    return refs.FACTORS.shape[0] - 1, lax.rem(g, AT_A_TIME)


def told(refs, g):
    """The g-th step, as the scorer told it."""
    return lax.bitcast_convert_type(refs.FACTORS[place_of(refs, g)], jnp.int32)


class LoadingScorer(Scorer):
    """Loads FP8 two steps before its turn, and a rotary part when its place is free."""

    def start(self):
        """Starts to load the first steps; returns where the one behind the third is."""
        cursor, steps = self.first_steps(3)
        for g in (0, 1):
            self.load_rotary(steps[g], g)
            self.stage(steps[1 + g], 1 - g)
        self.tell(2, steps[2])  # the first two are known without
        return self.next_step(cursor)

    def look_ahead(self, ahead, g):
        """Tells accumulators the step three further on, before the g-th is told to be scored."""
        cursor, step = ahead
        self.tell(g + 3, step)
        return self.next_step(cursor)

    def tell(self, g, step):
        """Tells accumulators the g-th step."""
        self.refs.FACTORS[place_of(self.refs, g)] = lax.bitcast_convert_type(step, F32)

    def feed(self, g, after_block):
        """Loads the g-th step's rotary part, in whose place are weights of the step before last."""

        @pl.when(g > 1)
        def _load():
            taken = self.refs.taken.at[lax.rem(g, 2)]
            pl.when(after_block)(lambda: plgpu.barrier_wait(taken))
            self.load_rotary(told(self.refs, g), g)

    def await_keys(self, g):
        """Also loads the step two further on, where the g-th was converted from."""
        super().await_keys(g)
        pl.when(g > 0)(lambda: self.stage(told(self.refs, g + 2), self.slot(g)))

    def stage(self, step, slot):
        """Starts to load a block's FP8."""
        for side in range(2):
            columns, staged = self.columns_of(side), self.refs.staged.at[2 * side + slot]
            self.load_values(step, columns, self.refs.STAGE.at[side, slot], staged)
        self.prefetch_tail(step, True)


class ConvertingAccumulator(Accumulator):
    """Fills the slots that it has read: converts keys, as the scorer tells, or loads queries."""

    def start(self):
        """Fills the first slots."""
        _, (queries, first) = self.first_steps(2)
        self.load_queries(queries, self.columns, self.ring.at[0], self.refs.full.at[0])
        self.fill(first, 1, self.scales(first))
        return ()

    def queries_taken(self, steps, g):
        """Nothing: the scorer knows."""

    def give_way(self, g, condition):
        """Nothing: the next keys to be converted wait for this one's products."""

    def weights_taken(self, steps, g):
        """Tells the scorer that their place is free."""
        plgpu.barrier_arrive(self.refs.taken.at[lax.rem(g, 2)])

    def look_ahead(self, steps, g):
        """The step two further on, and the scales of its keys."""
        step = told(self.refs, g + 2)
        return step, self.scales(step)

    def supply(self, g, steps, found):
        """Fills the g-th step's slot with the step two further on."""
        return self.supply_if(True, g, steps, found)

    def supply_if(self, condition, g, steps, found):
        """Supplies under a condition."""
        step, scales = found
        pl.when(condition)(lambda: self.fill(step, self.slot(g), scales))
        return steps

    def scales(self, step):
        """The scale of each thread's columns of a block."""
        scales = self.refs.keys.scales.at[lax.max(step, 0)]
        first = self.side * self.p.half
        tiles = [lax.div(first + column, TILE) for column in (0, self.p.half // 2)]
        return load_scales(scales, tiles)

    def fill(self, step, slot, scales):
        """Fills a slot with queries, or with keys as the tensor core multiplies them."""
        target, full = self.ring.at[slot], self.refs.full.at[slot]
        self.load_queries(step, self.columns, target, full)

        @pl.when(step >= 0)
        def _convert():
            plgpu.barrier_wait(self.refs.staged.at[2 * self.side + slot])
            convert(self.refs.STAGE.at[self.side, slot], target, scales)
            plgpu.commit_smem()
            plgpu.barrier_arrive(full)
