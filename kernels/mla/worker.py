"""What the warpgroups of a decode kernel's CTA share: sizes, memory, and what is loaded when."""

import dataclasses
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels.mla.plan import FIRST, LENGTH, SEQUENCE, num_blocks
from whalejax.kernels.mla.sizes import ROPE, ROWS, num_tiles
from whalejax.kernels.mosaic import interpreted

F32 = jnp.float32
NEVER = -1e30  # a score that counts for nothing: an infinity would leave NaN behind
REAL = -1e20  # every score that counts is larger, and every other smaller
# Powers of two by which weights may exceed 1 before a row's sums are scaled anew, which is seldom
# then (FlashAttention-4's rule).
SLACK = 8
NONE = -(2**31)  # a step past a worker's last piece
BY_ROW = plgpu.Layout.WGMMA.reduce(1)


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
      dtype: of queries, output and keys, the rotary parts alone if `fp8`.
      fp8: whether values are in FP8, with scales.
    """

    batch: int
    s_q: int
    heads: int
    v_dim: int
    workers: int
    page_blocks: int
    scale: float
    causal: bool
    dtype: Any
    fp8: bool

    @property
    def slots(self) -> int:
        """Blocks of keys in `dtype` under way; two more are in FP8, where that is."""
        return 2 if self.fp8 else 3

    @property
    def tail(self) -> Any:
        """Columns of queries' rotary parts."""
        return pl.ds(self.v_dim, ROPE)

    @property
    def key_tail(self) -> Any:
        """Columns of keys' rotary parts, which lie apart in FP8."""
        return pl.ds(0, ROPE) if self.fp8 else self.tail

    @property
    def tiles(self) -> int:
        """Tiles of 64 rows of queries."""
        return num_tiles(self.s_q, self.heads)

    @property
    def rows(self) -> int:
        """Rows of queries and output of a sequence: TMA moves eight at a time."""
        return -(-self.s_q * self.heads // 8) * 8

    @property
    def padded_rows(self) -> int:
        """Rows of its sums: those of a vector TMA does not clip."""
        return self.rows if self.rows < ROWS else self.tiles * ROWS

    @property
    def columns(self) -> int:
        """Columns of the output as the kernels leave it: as many as four warps store at once."""
        return -(-self.v_dim // 128) * 128

    @property
    def half(self) -> int:
        """Columns of values of each accumulating warpgroup, some of which may be rotary."""
        return self.columns // 2


class Keys(NamedTuple):
    """Blocks of keys in GMEM: values, scales in FP8, and rotary parts, which may be one array."""

    values: Any
    scales: Any
    rotary: Any


class Refs(NamedTuple):
    """GMEM (lower case) and SMEM of the kernel.

    Attributes:
      RING: the halves of blocks' values.
      TAILS: the rotary parts of two steps; once a block is scored, its weights take the place of
        its rotary part, a left operand.
      Q: queries that find no room in registers: the last 64 columns of values, the rotary part.
      FACTORS: of rows: what each block scales the output with, by slot; of pieces, 1 / sum, each
        for as long as a slot; a logarithm on its way out; and in FP8 in the last row steps
        that the scorer tells.
    """

    bounds: Any
    lengths: Any
    table: Any
    q: Any
    keys: Keys
    out: Any
    lse: Any
    parts: Any
    part_tops: Any
    part_lse: Any
    RING: Any
    TAILS: Any
    Q: Any
    FACTORS: Any
    full: Any  # a slot is loaded
    tail_full: Any
    scored: Any  # by the scorer: weights are there, or queries are taken
    taken: Any  # by the right accumulator, in FP8 by both: weights are
    finished: Any  # by the scorer: a piece's sums are written
    read: Any = None  # by the scorer: a slot's keys are; not in FP8
    STAGE: Any = None  # FP8 of two blocks' values, in halves
    staged: Any = None  # two of each side: a block's FP8 is loaded


class Cursor(NamedTuple):
    """Where a worker is among what fills slots: queries, where `block` is -1, and blocks of keys.

    `last` is the end of the worker's blocks of the sequence.
    """

    sequence: Any
    block: Any
    last: Any


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
        self.begin = [refs.bounds[worker, i] for i in (SEQUENCE, FIRST, LENGTH)]
        self.end = [refs.bounds[worker + 1, i] for i in (SEQUENCE, FIRST)]
        self.stop = self.end[0] + (self.end[1] > 0).astype(jnp.int32)  # behind its last sequence

    def length(self, sequence: jax.Array) -> jax.Array:
        """Keys of a sequence behind the first, for which the plan says it sooner."""
        return self.refs.lengths[jnp.minimum(sequence, self.p.batch - 1)]

    def last(self, sequence: jax.Array, length: jax.Array) -> jax.Array:
        """The end of the worker's blocks of a sequence."""
        return jnp.where(sequence == self.end[0], self.end[1], num_blocks(length))

    def piece(self, sequence: jax.Array) -> Piece:
        """The worker's piece of a sequence."""
        at_first = sequence == self.begin[0]
        length = lax.cond(at_first, lambda: self.begin[2], lambda: self.length(sequence))
        first, last = jnp.where(at_first, self.begin[1], 0), self.last(sequence, length)
        part = 2 * self.worker + (first == 0).astype(jnp.int32)
        return Piece(first, last, length, part, (first > 0) | (last < num_blocks(length)))

    def first_steps(self, count: int) -> tuple[Cursor, list]:
        """The first steps, queries and blocks; nothing needs to be looked up for the queries.

        A step is a number, kept in few registers for long: the place in the cache of a block of
        keys, or `~sequence` for its queries, or `NONE` past the last piece.
        """
        sequence, first, length = self.begin
        cursor = Cursor(sequence, first - 1, self.last(sequence, length))
        steps = [jnp.where(sequence < self.stop, ~sequence, NONE)]
        for _ in range(count - 1):
            cursor, step = self.next_step(cursor)
            steps.append(step)
        return cursor, steps

    def next_step(self, cursor: Cursor) -> tuple[Cursor, jax.Array]:
        """The step after one, long before its use: what is looked up takes hundreds of cycles."""
        following = cursor.block + 1

        def stay():
            return Cursor(cursor.sequence, following, cursor.last)

        def go_on():
            sequence = cursor.sequence + 1
            return Cursor(sequence, jnp.int32(-1), self.last(sequence, self.length(sequence)))

        cursor = lax.cond(following < cursor.last, stay, go_on)
        sequence, block, _ = cursor
        index = jnp.maximum(block, 0)
        page = self.refs.table[
            jnp.minimum(sequence, self.p.batch - 1), lax.div(index, self.p.page_blocks)
        ]
        place = page * self.p.page_blocks + lax.rem(index, self.p.page_blocks)
        step = jnp.where(block >= 0, place, ~sequence)
        return cursor, jnp.where(sequence < self.stop, step, NONE)

    def columns_of(self, side: Any) -> Any:
        """Columns of values of an accumulator."""
        return pl.ds(side * self.p.half, self.p.half)

    def slot(self, g):
        """The place in the ring of the g-th step."""
        return lax.rem(g, self.p.slots)

    def load_queries(self, step: jax.Array, columns: Any, target: Any, barrier: Any) -> None:
        """Starts to load columns of queries, if a step has some."""

        @pl.when((step < 0) & (step != NONE))
        def _queries():
            rows = pl.ds(self.tile * ROWS, ROWS)
            plgpu.copy_gmem_to_smem(self.refs.q.at[~step, rows, columns], target, barrier)

    def load_values(self, step: jax.Array, columns: Any, target: Any, barrier: Any) -> None:
        """Starts to load columns of a block's values, if a step is a block."""

        @pl.when(step >= 0)
        def _values():
            values = self.refs.keys.values.at[step, :, columns]
            plgpu.copy_gmem_to_smem(values, target, barrier)

    def prefetch_tail(self, step: jax.Array, condition: Any) -> None:
        """Brings a block's rotary part, which is loaded later, and waited for, into the L2."""
        if interpreted():  # which has no L2
            return

        @pl.when(step >= 0)
        def _prefetch():
            tail = self.refs.keys.rotary.at[step, :, self.p.key_tail]
            plgpu.async_prefetch(tail, predicate=condition)

    def load_rotary(self, step: jax.Array, g: jax.Array) -> None:
        """Starts to load the rotary part of a step into the g-th step's place."""
        place = lax.rem(g, 2)
        target, full = self.refs.TAILS.at[place], self.refs.tail_full.at[place]
        self.load_queries(step, self.p.tail, target, full)

        @pl.when(step >= 0)
        def _keys():
            keys = self.refs.keys.rotary.at[step, :, self.p.key_tail]
            plgpu.copy_gmem_to_smem(keys, target, full)


def natural(top, total):
    """The logarithm of a sum of exponentials, `total` times two to the power of `top`."""
    return jnp.where(total > 0, (top + jnp.log2(total)) * math.log(2), jnp.inf)


def by_row(value):
    """A number for each row of queries."""
    return plgpu.layout_cast(jnp.full((ROWS,), value, F32), BY_ROW)
