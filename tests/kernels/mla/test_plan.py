import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.kernels.mla.plan import (
    BLOCK,
    BLOCKS,
    CUT,
    FIRST,
    KEYS,
    PIECE_CELLS,
    SEQUENCE,
    plan_mla_decode,
)

MOST = 100  # blocks of a sequence

LENGTHS = st.sampled_from([1, 3, 16]).flatmap(
    lambda batch: st.lists(
        st.one_of(st.integers(0, 200), st.sampled_from([0, 64, 4096, 6400])),
        min_size=batch,
        max_size=batch,
    )
)


@functools.partial(jax.jit, static_argnames=("page_size", "workers"))
def compiled(lengths, table, page_size, workers):
    return plan_mla_decode(lengths, table, page_size=page_size, workers=workers)


def make(lengths, workers, page_size=64):
    """A plan, and a table whose unused entries are garbage."""
    rng = np.random.default_rng(0)
    most = MOST * 64 // page_size
    table = rng.permutation(len(lengths) * most).reshape(len(lengths), most).astype(np.int32)
    used = np.arange(most) < -(-np.array(lengths)[:, None] // page_size)
    table = np.where(used, table, 2147480000).astype(np.int32)
    plan = compiled(jnp.array(lengths, jnp.int32), jnp.asarray(table), page_size, workers)
    return jax.tree.map(np.asarray, plan), table


def pieces_of(plan, worker):
    first, last, _ = plan.starts[worker]
    return plan.pieces[first:last]


@settings(max_examples=100, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=st.sampled_from([1, 7, 132]))
def test_every_block_is_in_one_piece_of_one_worker(lengths, workers):
    plan, _ = make(lengths, workers)
    first, last, _ = plan.starts.T
    assert first[0] == 0 and (first[1:] == last[:-1]).all() and (last >= first).all()
    assert last[-1] == plan.first_piece[-1] <= len(lengths) + workers - 1
    for s, length in enumerate(lengths):
        pieces = plan.pieces[plan.first_piece[s] : plan.first_piece[s + 1]]
        assert (pieces[:, SEQUENCE] == s).all() and (pieces[:, CUT] == (len(pieces) > 1)).all()
        ends = np.cumsum(pieces[:, BLOCKS])
        assert pieces[:, FIRST].tolist() == [0, *ends[:-1]] and ends[-1] == -(-length // BLOCK)
        assert (pieces[:, KEYS] == length - pieces[:, FIRST] * BLOCK).all()
        assert (s in plan.cut) == (len(pieces) > 1)
        # a sequence without keys is a piece of its own, and no other piece is empty
        assert len(pieces) == 1 or pieces[:, BLOCKS].min() > 0


@settings(max_examples=50, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=st.sampled_from([1, 7, 132]))
def test_sequences_that_are_cut_come_first(lengths, workers):
    cut = make(lengths, workers)[0].cut
    count = (cut >= 0).sum()
    assert (np.diff(cut[:count]) > 0).all() and (cut[count:] == -1).all()


@settings(max_examples=100, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=st.sampled_from([1, 7, 132]))
def test_no_worker_has_more_than_its_share(lengths, workers):
    plan, _ = make(lengths, workers)
    share = -(-sum(-(-n // BLOCK) + PIECE_CELLS for n in lengths) // workers)
    for worker in range(workers):
        blocks = pieces_of(plan, worker)[:, BLOCKS]
        # one piece's own cells may lie in the stretch before
        assert blocks.sum() + PIECE_CELLS * (len(blocks) - 1) <= share


@settings(max_examples=100, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=st.sampled_from([1, 7, 132]), page_size=st.sampled_from([64, 128]))
def test_steps_are_the_pieces_queries_and_blocks(lengths, workers, page_size):
    plan, table = make(lengths, workers, page_size)
    in_page = page_size // BLOCK
    for worker in range(workers):
        wanted = []
        for sequence, first, blocks, *_ in pieces_of(plan, worker):
            wanted.append(-1 - sequence)
            for block in range(first, first + blocks):
                wanted.append(table[sequence, block // in_page] * in_page + block % in_page)
        assert plan.steps[worker, : len(wanted)].tolist() == wanted
        assert plan.starts[worker, 2] == len(wanted)
        assert not plan.steps[worker, len(wanted) :].any()


def test_equal_sequences_that_fill_the_workers_are_not_cut():
    plan, _ = make([4096] * 66, 66)
    assert plan.starts[:, 0].tolist() == list(range(66)) and not plan.pieces[:66, CUT].any()


LENGTH, TABLE = jnp.zeros(2, jnp.int32), jnp.zeros((2, 3), jnp.int32)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((jnp.zeros((2, 2), jnp.int32), TABLE, 64, 4), r"lengths is int32\[2, 2\]"),
        ((jnp.zeros(2), TABLE, 64, 4), r"lengths is float32\[2\]"),
        ((jnp.zeros(0, jnp.int32), TABLE, 64, 4), r"lengths is int32\[0\]"),
        ((LENGTH, TABLE[:1], 64, 4), r"page_table is int32\[1, 3\], must be int32\[2,"),
        ((LENGTH, TABLE, 32, 4), "page_size=32 must be 64 or 128"),
        ((LENGTH, TABLE, 64, 0), "workers=0 at least 1"),
    ],
)
def test_what_does_not_fit_is_printed(arguments, says):
    lengths, table, page_size, workers = arguments
    with pytest.raises(ValueError, match=f"plan_mla_decode: .*{says}"):
        plan_mla_decode(lengths, table, page_size=page_size, workers=workers)
