"""A warpgroup of the decode kernel that sums half of the output's columns, of a cache in FP8."""

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.accumulator import Accumulator
from whalejax.kernels.mla.sizes import BLOCK
from whalejax.kernels.mla.worker import BY_ROW, F32

TILE = 128  # columns that share a scale
CHUNK = 64  # columns that are converted at once


class StagedAccumulator(Accumulator):
    """Also converts its half of the keys: a block's FP8 is loaded two steps before its turn."""

    def start(self):
        """Starts to load the first steps, and converts the first block."""
        queries = self.queries()
        self.load_queries(queries, self.columns, self.ring.at[0], self.refs.full.at[0])
        self.load_tail(queries, 0)
        first, *steps = self.first_blocks(4)
        self.stage(first, 1)
        self.load_tail(first, 1)
        self.stage(steps[0], 0)
        self.convert(first, 1, self.scales(first))
        self.stage(steps[1], 1)
        return tuple(steps)

    def look_ahead(self, steps):
        """Also the scales of the block that is converted next."""
        return self.next_step(steps[-1]), self.scales(steps[0])

    def supply(self, g, steps, found):
        """Fills the g-th step's slot with the step two further on; loads what comes after."""
        (following, scales), slot = found, self.slot(g)
        target, full = self.ring.at[slot], self.refs.full.at[slot]
        self.load_queries(steps[0], self.columns, target, full)
        self.convert(steps[0], slot, scales)
        self.stage(steps[2], slot)
        return *steps[1:], following

    def stage(self, step, slot):
        """Starts to load a block's FP8."""
        staged = self.refs.staged.at[2 * self.side + slot]
        self.load_values(step, self.refs.STAGE.at[self.side, slot], staged)

    def scales(self, step):
        """Scales of a block's keys, for each tile of columns."""
        first, tiles = self.side * (self.p.half // TILE), self.p.half // TILE
        scales = self.refs.keys.scales.at[jnp.where(self.has_keys(step), step.place, 0)]
        return [
            plgpu.load(scales.at[:, first + tile], layout=BY_ROW, optimized=False)
            for tile in range(tiles)
        ]

    def convert(self, step, slot, scales):
        """Turns a block's FP8 into what the tensor core multiplies, if a step has a block."""

        @pl.when(self.has_keys(step))
        def _convert():
            plgpu.barrier_wait(self.refs.staged.at[2 * self.side + slot])
            for column in range(0, self.p.half, CHUNK):
                part = self.refs.STAGE.at[self.side, slot, :, pl.ds(column, CHUNK)]
                values = plgpu.load(part, layout=plgpu.Layout.WGMMA)
                values = values.astype(jnp.float16).astype(F32)
                scale = lax.broadcast_in_dim(scales[column // TILE], (BLOCK, CHUNK), [0])
                target = self.ring.at[slot, :, pl.ds(column, CHUNK)]
                target[...] = (values * scale).astype(self.p.dtype)
            plgpu.commit_smem()
            plgpu.barrier_arrive(self.refs.full.at[slot])
