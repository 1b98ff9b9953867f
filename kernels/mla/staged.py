"""A warpgroup of the decode kernel that sums half of the output's columns, of a cache in FP8."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.dequantize import convert, load_scales
from whalejax.kernels.mla.loading import LoadingAccumulator

TILE = 128  # columns that share a scale


class StagedAccumulator(LoadingAccumulator):
    """Also converts its half of the keys: a block's FP8 is loaded two steps before its turn."""

    def start(self):
        """Starts to load the first steps, and converts the first block."""
        cursor, (queries, first, *steps) = self.first_steps(5)
        self.load_queries(queries, self.columns, self.ring.at[0], self.refs.full.at[0])
        self.load_tail(queries, 0)
        self.stage(first, 1)
        self.load_tail(first, 1)
        self.stage(steps[0], 0)
        self.fill(first, 1, self.scales(first))
        self.stage(steps[1], 1)
        return cursor, steps

    def give_way(self, g, condition):
        """Nothing: the next keys to be converted wait for this one's products."""

    def look_ahead(self, steps):
        """Also the scales of the block that is converted next."""
        cursor, queue = steps
        return self.next_step(cursor), self.scales(queue[0])

    def supply(self, g, steps, found):
        """Fills the g-th step's slot with the step two further on; loads what comes after."""
        (_, queue), ((cursor, step), scales), slot = steps, found, self.slot(g)
        self.load_queries(queue[0], self.columns, self.ring.at[slot], self.refs.full.at[slot])
        self.fill(queue[0], slot, scales)
        self.stage(queue[2], slot)
        return cursor, [*queue[1:], step]

    def stage(self, step, slot):
        """Starts to load a block's FP8."""
        staged = self.refs.staged.at[2 * self.side + slot]
        self.load_values(step, self.columns, self.refs.STAGE.at[self.side, slot], staged)
        self.prefetch_tail(step, self.side == 1)

    def scales(self, step):
        """The scale of each thread's columns of a block."""
        scales = self.refs.keys.scales.at[jnp.maximum(step, 0)]
        first = self.side * self.p.half
        tiles = [lax.div(first + column, TILE) for column in (0, self.p.half // 2)]
        return load_scales(scales, tiles)

    def fill(self, step, slot, scales):
        """Fills a slot with what the tensor core multiplies, if a step is a block."""

        @pl.when(step >= 0)
        def _convert():
            plgpu.barrier_wait(self.refs.staged.at[2 * self.side + slot])
            convert(self.refs.STAGE.at[self.side, slot], self.ring.at[slot], scales)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.refs.full.at[slot])
