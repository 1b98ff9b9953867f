"""The warpgroup of the decode kernel that scores keys and turns scores into weights."""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.sizes import BLOCK, ROWS
from whalejax.kernels.mla.worker import F32, NEVER, REAL, SLACK, Warpgroup, by_row, natural
from whalejax.kernels.mosaic import interpreted


class Scorer(Warpgroup):
    """Scores blocks of keys, and turns scores into weights."""

    def run(self) -> None:
        """Works through all pieces."""
        start = 0, False, self.start()
        g, after_block, _ = lax.fori_loop(self.begin[0], self.stop, self.score_piece, start)
        self.feed(g + 1, after_block)
        plgpu.wait_smem_to_gmem(0)

    def score_piece(self, sequence, carry):
        """Scores all blocks of the worker's piece of a sequence."""
        (g, after_block, ahead), refs, piece = carry, self.refs, self.piece(sequence)
        some = piece.first < piece.last
        self.await_keys(g)
        plgpu.barrier_wait(refs.tail_full.at[lax.rem(g, 2)])
        ahead = self.look_ahead(ahead, g)
        queries = self.take_queries(g)
        plgpu.barrier_arrive(refs.scored.at[self.slot(g)])
        self.feed(g + 1, after_block)
        pl.when(some)(lambda: self.await_keys(g + 1))
        start = g + 1, ahead, by_row(NEVER), by_row(0)
        body = self.block(piece, queries)
        g, ahead, top, total = lax.fori_loop(piece.first, piece.last, body, start)
        self.finish(sequence, piece, top, total)
        return g, some, ahead

    def finish(self, sequence, piece, top, total):
        """Passes on and stores the sums of a piece."""
        refs, seen = self.refs, total > 0
        place = self.slot(sequence - self.begin[0])
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

    def start(self):
        """What `look_ahead` begins with: nothing, as accumulators load."""
        return ()

    def look_ahead(self, ahead, g):
        """Nothing, as accumulators load."""
        return ahead

    def feed(self, g, after_block):
        """Nothing, as accumulators load."""

    def await_keys(self, g):
        """Waits for the g-th step but its rotary part."""
        plgpu.barrier_wait(self.refs.full.at[self.slot(g)])

    def take_queries(self, g):
        """Queries: in registers as far as they fit, the last 128 columns in SMEM."""
        refs, slot, wgmma = self.refs, self.slot(g), plgpu.Layout.WGMMA
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
            g, ahead, top, total = carry
            slot, left = self.slot(g), piece.length - j * BLOCK
            scores = self.scores(g, queries)
            if refs.read is not None:
                plgpu.barrier_arrive(refs.read.at[slot])

            scores = lax.cond(left - hidden < BLOCK, self.mask, lambda s, _: s, scores, left)
            largest = scores.max(axis=1) * factor
            raised = jnp.where(largest > top + SLACK, largest, top)
            # where nothing was seen yet, the largest score is one that counts for nothing
            base = jnp.where(raised > REAL, raised, 0.0)
            weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(base, scores.shape, [0]))
            change = jnp.exp2(top - raised)
            refs.TAILS[lax.rem(g, 2)] = weights.astype(p.dtype)
            refs.FACTORS.at[slot][...] = change
            ahead = self.look_ahead(ahead, g)
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.scored.at[slot])
            total = total * change + weights.sum(axis=1)
            self.feed(g + 1, j > piece.first)
            pl.when(j + 1 < piece.last)(lambda: self.await_keys(g + 1))
            return g + 1, ahead, raised, total

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
        early = list(zip(queries, self.parts(self.slot(g)), strict=True))
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
