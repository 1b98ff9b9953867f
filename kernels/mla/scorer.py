"""The warpgroup of the decode kernel that scores keys and turns scores into weights."""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.sizes import BLOCK, ROWS
from whalejax.kernels.mla.worker import F32, NEVER, REAL, Warpgroup, by_row, natural
from whalejax.kernels.mosaic import interpreted


class Scorer(Warpgroup):
    """Scores blocks of keys, and turns scores into weights."""

    def run(self) -> None:
        """Works through all pieces."""
        lax.fori_loop(self.begin[0], self.stop, self.score_piece, 0)
        plgpu.wait_smem_to_gmem(0)

    def score_piece(self, sequence, g):
        """Scores all blocks of the worker's piece of a sequence."""
        refs, piece = self.refs, self.piece(sequence)
        plgpu.barrier_wait(refs.full.at[lax.rem(g, self.p.slots)])
        plgpu.barrier_wait(refs.tail_full.at[lax.rem(g, 2)])
        queries = self.take_queries(g)
        plgpu.barrier_arrive(refs.scored.at[lax.rem(g, self.p.slots)])
        self.await_keys(g + 1, piece.first < piece.last)
        start = g + 1, by_row(NEVER), by_row(0)
        body = self.block(piece, queries)
        g, top, total = lax.fori_loop(piece.first, piece.last, body, start)
        seen = total > 0
        place = lax.rem(sequence - self.begin[0], self.p.slots)
        refs.FACTORS.at[self.p.slots + place][...] = jnp.where(seen, 1 / total, 0.0)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.finished.at[place])

        @pl.when(~piece.cut)
        def _whole():
            staged = refs.FACTORS.at[2 * self.p.slots]
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)
            staged[...] = natural(top, total)
            plgpu.commit_smem()
            if self.p.padded_rows < ROWS:  # fewer than TMA moves

                def store(row, _):
                    refs.lse[sequence, row] = staged[row]

                lax.fori_loop(0, self.p.padded_rows, store, None)
            else:
                rows = pl.ds(self.tile * ROWS, ROWS)
                plgpu.copy_smem_to_gmem(staged, refs.lse.at[sequence, rows])

        @pl.when(piece.cut)
        def _part():
            sums = jnp.where(seen, top + jnp.log2(total), NEVER)
            refs.part_lse.at[piece.part, pl.ds(self.tile * ROWS, ROWS)][...] = sums

        return g

    def await_keys(self, g, condition):
        """Waits, under a condition, for the keys of the g-th step but their rotary part."""
        full = self.refs.full.at[lax.rem(g, self.p.slots)]
        pl.when(condition)(lambda: plgpu.barrier_wait(full))

    def take_queries(self, g):
        """Queries: in registers as far as they fit, the last 128 columns in SMEM."""
        refs, slot, wgmma = self.refs, lax.rem(g, self.p.slots), plgpu.Layout.WGMMA
        *early, last = self.parts(slot)
        queries = [plgpu.load(part, layout=wgmma) for part in early]
        refs.Q[0] = plgpu.load(last, layout=wgmma)
        refs.Q[1] = plgpu.load(refs.TAILS.at[lax.rem(g, 2)], layout=wgmma)
        plgpu.commit_smem()
        return queries

    def block(self, piece, queries):
        """The loop's body over the blocks of a piece, for whose keys was waited."""
        p, refs = self.p, self.refs
        factor = p.scale * math.log2(math.e)
        hidden = p.s_q - 1 if p.causal else 0  # from the first new token

        def step(j, carry):
            g, top, total = carry
            slot, left = lax.rem(g, self.p.slots), piece.length - j * BLOCK
            scores = self.scores(g, queries)
            if refs.read is not None:
                plgpu.barrier_arrive(refs.read.at[slot])
            scores = lax.cond(left - hidden < BLOCK, self.mask, lambda s, _: s, scores, left)
            raised = jnp.maximum(top, scores.max(axis=1) * factor)
            # where nothing was seen yet, the largest score is one that counts for nothing
            base = jnp.where(raised > REAL, raised, 0.0)
            weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(base, scores.shape, [0]))
            change = jnp.exp2(top - raised)
            refs.TAILS[lax.rem(g, 2)] = weights.astype(p.dtype)
            refs.FACTORS.at[slot][...] = change
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.scored.at[slot])
            total = total * change + weights.sum(axis=1)
            self.await_keys(g + 1, j + 1 < piece.last)
            return g + 1, raised, total

        return step

    def parts(self, slot):
        """The value columns in a slot: the last 64 apart, and the others in one or two parts."""
        ring, half = self.refs.RING, self.p.half
        before = self.p.v_dim - half - 64
        right = [ring.at[1, slot, :, pl.ds(0, before)]] if before else []
        return [ring.at[0, slot], *right, ring.at[1, slot, :, pl.ds(before, 64)]]

    def scores(self, g, queries):
        """Queries times the keys of a step."""
        refs, tail_slot = self.refs, lax.rem(g, 2)
        queries = *queries, refs.Q.at[0]
        early = list(zip(queries, self.parts(lax.rem(g, self.p.slots)), strict=True))
        tail = refs.Q.at[1], refs.TAILS.at[tail_slot]
        if interpreted():  # which has no products with a left operand in registers
            plgpu.barrier_wait(refs.tail_full.at[tail_slot])
            return sum(
                jnp.dot(x[...].astype(F32), keys[...].astype(F32).T) for x, keys in (*early, tail)
            )

        def multiply(acc):
            for x, keys in early:
                plgpu.wgmma(acc, x, keys.transpose((1, 0)))
            plgpu.barrier_wait(refs.tail_full.at[tail_slot])
            x, keys = tail
            plgpu.wgmma(acc, x, keys.transpose((1, 0)))
            return plgpu.wgmma_accumulator_load(acc)

        return pl.run_scoped(multiply, plgpu.ACC((ROWS, BLOCK), F32))

    def mask(self, scores, left):
        """Takes out the keys of a block that a row does not see; `left` are the sequence's."""
        p, iota = self.p, functools.partial(plgpu.broadcasted_iota, jnp.int32, scores.shape)
        column = iota(1, layout=plgpu.Layout.WGMMA)
        limit = left
        if p.causal and p.s_q > 1:
            row = iota(0, layout=plgpu.Layout.WGMMA) + self.tile * ROWS
            later = sum((row < token * p.heads).astype(jnp.int32) for token in range(1, p.s_q))
            limit = left - later
        return jnp.where(column < limit, scores, NEVER)
