"""The warpgroup of the decode kernel that scores keys and turns scores into weights."""

import functools
import math

import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.sizes import BLOCK, ROPE, ROWS
from whalejax.kernels.mla.worker import F32, NEVER, REAL, SLOTS, Warpgroup, by_row, natural
from whalejax.kernels.mosaic import interpreted


class Scorer(Warpgroup):
    """Scores blocks of keys, and turns scores into weights."""

    def run(self) -> None:
        """Works through all pieces."""
        queries, ahead = self.first_steps(2)
        self.load_tail(queries)
        start = 0, ahead
        lax.fori_loop(self.begin[0], self.stop, self.score_piece, start)
        plgpu.barrier_wait(self.refs.taken)  # by the last block
        plgpu.wait_smem_to_gmem(0)

    def load_tail(self, step):
        """Loads the rotary part of a step."""
        columns = pl.ds(self.p.v_dim, ROPE)
        self.load(step, columns, self.refs.TAIL, self.refs.tail_full)

    def score_piece(self, sequence, carry):
        """Scores all blocks of the worker's piece of a sequence."""
        refs, (g, ahead), piece = self.refs, carry, self.piece(sequence)
        slot = lax.rem(g, SLOTS)
        plgpu.barrier_wait(refs.full.at[slot])
        plgpu.barrier_wait(refs.tail_full)
        queries = self.take_queries(slot)
        plgpu.barrier_arrive(refs.scored.at[slot])
        self.load_tail(ahead)

        following = refs.full.at[lax.rem(g + 1, SLOTS)]
        pl.when(piece.first < piece.last)(lambda: plgpu.barrier_wait(following))
        start = g + 1, self.next_step(ahead), by_row(NEVER), by_row(0)
        body = self.block(piece, queries)
        g, ahead, top, total = lax.fori_loop(piece.first, piece.last, body, start)
        seen = total > 0
        parity = lax.rem(sequence - self.begin[0], 2)
        refs.FACTORS.at[SLOTS + parity][...] = jnp.where(seen, 1 / total, 0.0)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.finished.at[parity])

        @pl.when(~piece.cut)
        def _whole():
            staged = refs.FACTORS.at[SLOTS + 2]
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

        return g, ahead

    def take_queries(self, slot):
        """Queries: in registers as far as they fit, the last 128 columns in SMEM."""
        refs, (_, right) = self.refs, self.p.halves
        wgmma = plgpu.Layout.WGMMA
        queries = [plgpu.load(refs.LEFT.at[slot], layout=wgmma)]
        if right > 64:
            queries.append(plgpu.load(refs.RIGHT.at[slot, :, pl.ds(0, right - 64)], layout=wgmma))
        refs.Q[:, pl.ds(0, 64)] = plgpu.load(
            refs.RIGHT.at[slot, :, pl.ds(right - 64, 64)], layout=wgmma
        )
        refs.Q[:, pl.ds(64, 64)] = plgpu.load(refs.TAIL, layout=wgmma)
        plgpu.commit_smem()
        return queries

    def block(self, piece, queries):
        """The loop's body over the blocks of a piece, whose keys are there.

        All that need not wait until accumulators have read the weights before is done while they
        do, for then they wait for this.
        """
        p, refs = self.p, self.refs
        factor = p.scale * math.log2(math.e)
        hidden = p.s_q - 1 if p.causal else 0  # from the first new token

        def step(j, carry):
            g, ahead, top, total = carry
            slot, left = lax.rem(g, SLOTS), piece.length - j * BLOCK
            scores = self.scores(slot, queries)
            self.load_tail(ahead)

            scores = lax.cond(left - hidden < BLOCK, self.mask, lambda s, _: s, scores, left)
            raised = jnp.maximum(top, scores.max(axis=1) * factor)
            # where nothing was seen yet, the largest score is one that counts for nothing
            base = jnp.where(raised > REAL, raised, 0.0)
            weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(base, scores.shape, [0]))
            change = jnp.exp2(top - raised)
            total = total * change + weights.sum(axis=1)
            ahead = self.next_step(ahead)
            following = refs.full.at[lax.rem(g + 1, SLOTS)]
            pl.when(j + 1 < piece.last)(lambda: plgpu.barrier_wait(following))
            plgpu.barrier_wait(refs.taken)
            refs.P[...] = weights.astype(p.dtype)
            refs.FACTORS.at[slot][...] = change
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.scored.at[slot])
            return g + 1, ahead, raised, total

        return step

    def scores(self, slot, queries):
        """Queries times the keys in a slot."""
        refs, (_, right) = self.refs, self.p.halves
        early = [(queries[0], refs.LEFT.at[slot])]
        if right > 64:
            early.append((queries[1], refs.RIGHT.at[slot, :, pl.ds(0, right - 64)]))
        early.append((refs.Q.at[:, pl.ds(0, 64)], refs.RIGHT.at[slot, :, pl.ds(right - 64, 64)]))
        tail = refs.Q.at[:, pl.ds(64, 64)], refs.TAIL
        if interpreted():  # which has no products with a left operand in registers
            plgpu.barrier_wait(refs.tail_full)
            scores = sum(
                jnp.dot(x[...].astype(F32), keys[...].astype(F32).T) for x, keys in (*early, tail)
            )
            plgpu.commit_smem()  # in its model a read, unlike a product, needs it before a refill
            if self.p.delayed:
                plgpu.barrier_arrive(refs.read.at[slot])
            return scores

        def multiply(acc):
            for x, keys in early:
                plgpu.wgmma(acc, x, keys.transpose((1, 0)))
            plgpu.barrier_wait(refs.tail_full)
            x, keys = tail
            plgpu.wgmma(acc, x, keys.transpose((1, 0)))
            if self.p.delayed:  # soon it is, and others are slow to hear of it
                plgpu.barrier_arrive(refs.read.at[slot])
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
