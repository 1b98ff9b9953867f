"""The paged MLA decode kernel for Hopper.

A worker is a CTA for each 64 rows of queries (a row is a head of a new token); it takes the blocks
of 64 keys that its plan lists, one after another, with the queries of a piece in front of its keys:

```
             queries       block 0           block 1                  next piece
score        to registers  S = QK, softmax   S = QK, softmax  ...     to registers
left         load          load              O += P V[:, :256]  ...   store
right        load          load              O += P V[:, 256:]  ...   store
```

One warpgroup scores; two hold half of the output's columns each, and load that half of the keys.
Everything passes through one ring of three slots, each a block's latent part: queries have a
block's shape. A slot is refilled by the warpgroup that has read it last.

Scores are kept in powers of two, a factor that the exponential does not have to apply.
"""

import dataclasses
import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.plan import BLOCK, FIRST, SEQUENCE, num_blocks
from whalejax.kernels.mosaic import interpreted, transforms

F32 = jnp.float32
ROWS = 64  # of queries in a tile
SLOTS = 3  # blocks under way
ROPE = 64  # columns of keys behind the values
ACCUMULATOR_REGISTERS, SCORER_REGISTERS = 160, 184
NEVER = -1e30  # a score that counts for nothing: an infinity would leave NaN behind
REAL = -1e20  # every score that counts is larger, and every other smaller
BY_ROW, BY_COLUMN = plgpu.Layout.WGMMA.reduce(1), plgpu.Layout.WGMMA.reduce(0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Problem:
    """Sizes.

    Attributes:
      batch: sequences.
      s_q, heads: new tokens of each, and heads of each token.
      v_dim: width of the values; keys have `ROPE` columns more.
      workers: that a plan is for.
      page_blocks: blocks of 64 keys in a page.
      scale: on the scores.
      causal: whether a new token sees no later one.
      delayed: whether a block's product with the values waits until the next block is scored, to
        run while its softmax is computed: for many queries. Without, slots are free earlier.
      dtype: of queries, keys and output.
    """

    batch: int
    s_q: int
    heads: int
    v_dim: int
    workers: int
    page_blocks: int
    scale: float
    causal: bool
    delayed: bool
    dtype: Any

    @property
    def tiles(self) -> int:
        """Tiles of 64 rows of queries."""
        return -(-self.s_q * self.heads // ROWS)

    @property
    def rows(self) -> int:
        """Rows of queries and output of a sequence: TMA moves eight at a time."""
        return -(-self.s_q * self.heads // 8) * 8

    @property
    def halves(self) -> tuple[int, int]:
        """Columns of values of the two accumulating warpgroups: multiples of 64."""
        left = -(-self.v_dim // 128) * 64
        return left, self.v_dim - left


class Refs(NamedTuple):
    """GMEM (lower case) and SMEM of the kernel.

    Attributes:
      LEFT, RIGHT, TAIL: the ring: a block's values in halves, and, in one slot, its rotary part.
      P: softmax of the block under way, a left operand.
      Q: queries that find no room in registers: the last 64 columns of values, the rotary part.
      FACTORS: of rows: what each block scales the output with; at last, of a piece, 1 / sum.
    """

    bounds: Any
    lengths: Any
    table: Any
    q: Any
    kv: Any
    out: Any
    lse: Any
    parts: Any
    part_lse: Any
    LEFT: Any
    RIGHT: Any
    TAIL: Any
    P: Any
    Q: Any
    FACTORS: Any
    full: Any  # a slot is loaded
    tail_full: Any
    scored: Any  # by the scorer: P is written, or queries are taken
    taken: Any  # by accumulators: P is read
    finished: Any  # by the scorer: a piece's sums are written
    read: Any  # by the scorer: a slot's keys are


def build(p: Problem):
    """The kernel as a function of a plan's bounds, lengths, the table of pages, q and keys.

    q is `[b, rows, d]`, keys are `[blocks, 64, d]`.

    Returns:
      `out [b, rows, v_dim]` and `lse f32[b, tiles, 64]` of sequences that are not cut; of the
      pieces of others `f32[2 * workers, tiles, 64, v_dim]` and, as base-2 logarithms, `NEVER` where
      a row sees no key, `f32[2 * workers, tiles, 64]`; see `Piece.part`.
    """

    def body(*refs):
        refs = Refs(*refs)
        wg, cta = lax.axis_index("wg"), lax.axis_index("cta")
        worker, tile = lax.div(cta, p.tiles), lax.rem(cta, p.tiles)

        @pl.when(wg == 2)
        def _score():
            plgpu.set_max_registers(SCORER_REGISTERS, action="increase")
            Scorer(p, refs, worker, tile).run()

        for side in range(2):

            @pl.when(wg == side)
            def _accumulate(side=side):
                plgpu.set_max_registers(ACCUMULATOR_REGISTERS, action="decrease")
                Accumulator(p, refs, worker, tile, side).run()

    left, right = p.halves
    in_ring = functools.partial(plgpu.SMEM, dtype=p.dtype, transforms=transforms(64, p.dtype))
    barrier = plgpu.Barrier
    return plgpu.kernel(
        body,
        out_type=[
            jax.ShapeDtypeStruct((p.batch, p.rows, p.v_dim), p.dtype),
            jax.ShapeDtypeStruct((p.batch, p.tiles, ROWS), F32),
            jax.ShapeDtypeStruct((2 * p.workers, p.tiles, ROWS, p.v_dim), F32),
            jax.ShapeDtypeStruct((2 * p.workers, p.tiles, ROWS), F32),
        ],
        scratch_types=[
            in_ring((SLOTS, BLOCK, left)),
            in_ring((SLOTS, BLOCK, right)),
            in_ring((BLOCK, ROPE)),
            in_ring((ROWS, BLOCK)),
            in_ring((ROWS, 128)),
            plgpu.SMEM((SLOTS + 2, ROWS), F32),
            barrier(num_arrivals=2, num_barriers=SLOTS),
            barrier(num_arrivals=1),
            barrier(num_arrivals=1, num_barriers=SLOTS),
            barrier(num_arrivals=2),
            barrier(num_arrivals=1, num_barriers=2),
            barrier(num_arrivals=1, num_barriers=SLOTS),
        ],
        grid=(p.workers * p.tiles,),
        grid_names=("cta",),
        num_threads=3,
        thread_name="wg",
        kernel_name=f"mla_decode_{p.v_dim}",
        compiler_params=plgpu.CompilerParams(
            approx_math=True,
            unsafe_no_auto_barriers=True,
            reduction_scratch_bytes=0,
            lowering_semantics=plgpu.LoweringSemantics.Lane,
        ),
    )


class Step(NamedTuple):
    """What fills a slot: a sequence's queries, where `block` is -1, or a block of its keys."""

    sequence: Any
    block: Any


class Piece(NamedTuple):
    """What a worker has of a sequence: blocks `first` to `last` of its `length` keys.

    Attributes:
      part: where it leaves its result if the sequence is cut: a worker has one piece at most that
        does not begin with the first block, and one that does and does not end with the last.
      cut: whether it is.
    """

    first: Any
    last: Any
    length: Any
    part: Any
    cut: Any


class Warpgroup:
    """What scorer and accumulators share: a worker's steps, and how a step is loaded."""

    def __init__(self, p: Problem, refs: Refs, worker: jax.Array, tile: jax.Array):
        self.p, self.refs, self.worker, self.tile = p, refs, worker, tile
        self.begin = refs.bounds[worker, SEQUENCE], refs.bounds[worker, FIRST]
        self.end = refs.bounds[worker + 1, SEQUENCE], refs.bounds[worker + 1, FIRST]
        self.stop = self.end[0] + (self.end[1] > 0).astype(jnp.int32)  # behind its last sequence

    def piece(self, sequence: jax.Array) -> Piece:
        """The worker's piece of a sequence."""
        length = self.refs.lengths[jnp.minimum(sequence, self.p.batch - 1)]
        blocks = num_blocks(length)
        first = jnp.where(sequence == self.begin[0], self.begin[1], 0)
        last = jnp.where(sequence == self.end[0], self.end[1], blocks)
        part = 2 * self.worker + (first == 0).astype(jnp.int32)
        return Piece(first, last, length, part, (first > 0) | (last < blocks))

    def first_step(self) -> Step:
        """The first sequence's queries."""
        return Step(self.begin[0], jnp.int32(-1))

    def next_step(self, step: Step) -> Step:
        """The step after one; past the last piece, those of no piece."""
        piece = self.piece(step.sequence)
        block = jnp.where(step.block < 0, piece.first, step.block + 1)
        more = block < piece.last
        return Step(jnp.where(more, step.sequence, step.sequence + 1), jnp.where(more, block, -1))

    def load(self, step: Step, columns: Any, target: Any, barrier: Any) -> None:
        """Starts to load columns of a step's keys or queries, if there is such a step."""
        p, (sequence, block) = self.p, step
        real = sequence < self.stop

        @pl.when(real & (step.block >= 0))
        def _keys():
            page = self.refs.table[sequence, lax.div(block, p.page_blocks)]
            number = page * p.page_blocks + lax.rem(block, p.page_blocks)
            plgpu.copy_gmem_to_smem(self.refs.kv.at[number, :, columns], target, barrier)

        @pl.when(real & (step.block < 0))
        def _queries():
            rows = pl.ds(self.tile * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(self.refs.q.at[sequence, rows, columns], target, barrier)


class Accumulator(Warpgroup):
    """Sums half of the columns of the output, and loads that half of the keys."""

    def __init__(self, p, refs, worker, tile, side: int):
        super().__init__(p, refs, worker, tile)
        left, right = p.halves
        self.columns = pl.ds(0, left) if side == 0 else pl.ds(left, right)
        self.ring = (refs.LEFT, refs.RIGHT)[side]
        self.width = (left, right)[side]

    def run(self) -> None:
        """Works through all pieces."""
        ahead = self.first_step()
        for slot in range(SLOTS):
            self.refill(ahead, slot)
            ahead = self.next_step(ahead)
        plgpu.barrier_arrive(self.refs.taken)

        def piece(sequence, carry):
            (g, ahead), own = carry, self.piece(sequence)
            plgpu.barrier_wait(self.refs.scored.at[lax.rem(g, SLOTS)])
            ahead = self.refill_if(own.first < own.last, ahead, lax.rem(g, SLOTS))
            self.await_queries(g)
            start = g + 1, ahead, self.zeros()
            g, ahead, acc = lax.fori_loop(own.first, own.last, self.block(own), start)
            # through the slot that was read last, and is refilled only now
            slot = lax.rem(g + SLOTS - 1, SLOTS)
            self.store(sequence, own, acc, slot)
            self.refill(ahead, slot)
            return g, self.next_step(ahead)

        g, _ = lax.fori_loop(self.begin[0], self.stop, piece, (0, ahead))
        if not self.p.delayed:  # the scorer's last word
            plgpu.barrier_wait(self.refs.read.at[lax.rem(g, SLOTS)])
        plgpu.wait_smem_to_gmem(0)

    def await_queries(self, g):
        """Before the blocks of a piece whose queries are the g-th step.

        Nobody reads the first slot's queries before they are there; of each other step the scorer
        says so, and each must be heard once.
        """
        if self.p.delayed:
            plgpu.barrier_wait(self.refs.read.at[lax.rem(g + 1, SLOTS)])
        else:
            pl.when(g > 0)(lambda: plgpu.barrier_wait(self.refs.read.at[lax.rem(g, SLOTS)]))

    def zeros(self):
        """The output's accumulators."""
        return plgpu.layout_cast(jnp.zeros((ROWS, self.width), F32), plgpu.Layout.WGMMA)

    def refill(self, step, slot):
        """Loads a step into a slot that was read."""
        self.load(step, self.columns, self.ring.at[slot], self.refs.full.at[slot])

    def refill_if(self, condition, step, slot):
        """Refills a slot under a condition; returns the step that is next."""
        pl.when(condition)(functools.partial(self.refill, step, slot))
        following = self.next_step(step)
        return Step(*(jnp.where(condition, a, b) for a, b in zip(following, step, strict=True)))

    def block(self, piece):
        """The loop's body over the blocks of a piece, of which the last one's slot is kept."""

        def step(j, carry):
            g, ahead, acc = carry
            slot, left = lax.rem(g, SLOTS), piece.length - j * BLOCK
            plgpu.barrier_wait(self.refs.scored.at[slot])
            factor = plgpu.load(self.refs.FACTORS.at[slot], layout=BY_ROW)
            acc = acc * lax.broadcast_in_dim(factor, acc.shape, [0])
            pl.when(left < BLOCK)(functools.partial(self.clear, slot, left))
            plgpu.barrier_wait(self.refs.read.at[lax.rem(g + int(self.p.delayed), SLOTS)])
            acc = add_product(acc, self.refs.P, self.ring.at[slot])
            plgpu.barrier_arrive(self.refs.taken)
            return g + 1, self.refill_if(j + 1 < piece.last, ahead, slot), acc

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
        acc = acc * lax.broadcast_in_dim(inverse, acc.shape, [0])

        @pl.when(~piece.cut)
        def _whole():
            self.ring[slot] = acc.astype(self.p.dtype)
            plgpu.commit_smem()
            rows = pl.ds(self.tile * ROWS, ROWS)  # those past the output's are not stored
            out = self.refs.out.at[sequence, rows, self.columns]
            plgpu.copy_smem_to_gmem(self.ring.at[slot], out)
            plgpu.wait_smem_to_gmem(0, wait_read_only=True)

        @pl.when(piece.cut)
        def _part():
            self.refs.parts.at[piece.part, self.tile, :, self.columns][...] = acc


def add_product(acc, x, w):
    """acc + x @ w, operands in SMEM."""

    def multiply(acc):
        plgpu.wgmma(acc, x, w)
        if interpreted():
            return plgpu.wgmma_accumulator_load(acc)
        plgpu.wgmma_wait(0)
        return None

    if interpreted():  # which has no accumulators that start with a value
        return acc + pl.run_scoped(multiply, plgpu.ACC(acc.shape, F32))
    return pl.run_state(multiply)(plgpu.ACC.init(acc))


class Scorer(Warpgroup):
    """Scores blocks of keys, and turns scores into weights."""

    def run(self) -> None:
        """Works through all pieces."""
        ahead = self.first_step()
        self.load_tail(ahead)
        start = 0, self.next_step(ahead)
        g, _ = lax.fori_loop(self.begin[0], self.stop, self.score_piece, start)
        plgpu.barrier_arrive(self.refs.read.at[lax.rem(g, SLOTS)])
        plgpu.barrier_wait(self.refs.taken)  # by the last block

    def load_tail(self, step):
        """Loads the rotary part of a step."""
        columns = pl.ds(self.p.v_dim, ROPE)
        self.load(step, columns, self.refs.TAIL, self.refs.tail_full)

    def score_piece(self, sequence, carry):
        """Scores all blocks of the worker's piece of a sequence."""
        refs, (g, ahead), piece = self.refs, carry, self.piece(sequence)
        slot = lax.rem(g, SLOTS)
        plgpu.barrier_arrive(refs.read.at[slot], predicate=g > 0)
        plgpu.barrier_wait(refs.full.at[slot])
        plgpu.barrier_wait(refs.tail_full)
        queries = self.take_queries(slot)
        plgpu.barrier_arrive(refs.scored.at[slot])
        self.load_tail(ahead)

        start = g + 1, self.next_step(ahead), by_row(NEVER), by_row(0)
        body = self.block(piece.length, queries)
        g, ahead, top, total = lax.fori_loop(piece.first, piece.last, body, start)
        seen = total > 0
        parity = lax.rem(sequence - self.begin[0], 2)
        refs.FACTORS.at[SLOTS + parity][...] = jnp.where(seen, 1 / total, 0.0)
        plgpu.commit_smem()
        plgpu.barrier_arrive(refs.finished.at[parity])

        @pl.when(~piece.cut)
        def _whole():
            refs.lse.at[sequence, self.tile][...] = natural(top, total)

        @pl.when(piece.cut)
        def _part():
            sums = jnp.where(seen, top + jnp.log2(total), NEVER)
            refs.part_lse.at[piece.part, self.tile][...] = sums

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

    def block(self, length, queries):
        """The loop's body over the blocks of a sequence of so many keys."""
        p, refs = self.p, self.refs
        factor = p.scale * math.log2(math.e)
        hidden = p.s_q - 1 if p.causal else 0  # from the first new token

        def step(j, carry):
            g, ahead, top, total = carry
            slot, left = lax.rem(g, SLOTS), length - j * BLOCK
            plgpu.barrier_wait(refs.full.at[slot])
            scores = self.scores(slot, queries)
            plgpu.barrier_arrive(refs.read.at[slot])
            self.load_tail(ahead)

            scores = lax.cond(left - hidden < BLOCK, self.mask, lambda s, _: s, scores, left)
            raised = jnp.maximum(top, scores.max(axis=1) * factor)
            # where nothing was seen yet, the largest score is one that counts for nothing
            base = jnp.where(raised > REAL, raised, 0.0)
            weights = jnp.exp2(scores * factor - lax.broadcast_in_dim(base, scores.shape, [0]))
            change = jnp.exp2(top - raised)
            plgpu.barrier_wait(refs.taken)
            refs.P[...] = weights.astype(p.dtype)
            refs.FACTORS.at[slot][...] = change
            plgpu.commit_smem()
            plgpu.barrier_arrive(refs.scored.at[slot])
            total = total * change + weights.sum(axis=1)
            return g + 1, self.next_step(ahead), raised, total

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
            return sum(
                jnp.dot(x[...].astype(F32), keys[...].astype(F32).T) for x, keys in (*early, tail)
            )

        def multiply(acc):
            for x, keys in early:
                plgpu.wgmma(acc, x, keys.transpose((1, 0)))
            plgpu.barrier_wait(refs.tail_full)
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


def natural(top, total):
    """The logarithm of a sum of exponentials, `total` times two to the power of `top`."""
    return jnp.where(total > 0, (top + jnp.log2(total)) * math.log(2), jnp.inf)


def by_row(value):
    """A number for each row of queries."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, F32), BY_ROW)
