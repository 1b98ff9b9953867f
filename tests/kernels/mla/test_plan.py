import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.kernels.mla import plan
from whalejax.kernels.mla.plan import CUT_CELLS, CUTS, PIECE_CELLS, cumsum, plan_mla_decode
from whalejax.kernels.mla.sizes import BLOCK

LENGTHS = st.sampled_from([1, 3, 16]).flatmap(
    lambda batch: st.lists(
        st.one_of(st.integers(0, 200), st.sampled_from([0, 64, 4096, 30_000])),
        min_size=batch,
        max_size=batch,
    )
)
WORKERS = st.sampled_from([1, 7, 132])


@functools.partial(jax.jit, static_argnames="workers")
def compiled(lengths, workers):
    return plan_mla_decode(lengths, workers=workers)


def make(lengths, workers):
    """A plan, and each worker's pieces as (sequence, first block, last)."""
    made = jax.tree.map(np.asarray, compiled(jnp.array(lengths, jnp.int32), workers))
    bounds = made.bounds.tolist()
    blocks, pieces = [-(-n // BLOCK) for n in lengths], []
    for (s0, b0, n0), (s1, b1, _) in itertools.pairwise(bounds):
        assert n0 == [*lengths, 0][s0]
        own = [(s, b0 if s == s0 else 0, blocks[s]) for s in range(s0, s1)]
        if b1:
            own.append((s1, b0 if s1 == s0 else 0, b1))
        pieces.append(own)
    return made, pieces


@settings(max_examples=200, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=WORKERS)
def test_every_block_is_in_one_piece_of_one_worker(lengths, workers):
    _, pieces = make(lengths, workers)
    by_sequence = [[] for _ in lengths]
    for sequence, first, last in (piece for own in pieces for piece in own):
        by_sequence[sequence].append((first, last))
    for length, parts in zip(lengths, by_sequence, strict=True):
        # a sequence without keys is a piece of its own, and no other piece is empty
        edges = [0, *(last for _, last in parts)]
        assert [first for first, _ in parts] == edges[:-1] and edges[-1] == -(-length // BLOCK)
        assert len(parts) == 1 or all(first < last for first, last in parts)


@settings(max_examples=200, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=WORKERS)
def test_no_worker_has_more_than_its_share(lengths, workers):
    share = -(-sum(-(-n // BLOCK) + PIECE_CELLS for n in lengths) // workers)
    made, pieces = make(lengths, workers)
    share += 0 if made.pieces[:, CUTS].any() else CUT_CELLS
    for own in pieces:
        # one piece's own cells may lie in the stretch before
        blocks = sum(last - first for _, first, last in own)
        assert blocks + PIECE_CELLS * (len(own) - 1) <= share


@settings(max_examples=100, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=WORKERS)
def test_pieces_are_found(lengths, workers):
    made, pieces = make(lengths, workers)
    for sequence, (worker, cuts) in enumerate(made.pieces.tolist()):
        owners = [w for w, own in enumerate(pieces) if sequence in (s for s, *_ in own)]
        assert cuts == len(owners) - 1
        if cuts:
            assert owners == list(range(worker, worker + cuts + 1))


def test_few_and_many_are_summed_alike(monkeypatch):
    x = jnp.array([3, 0, 5, 1], jnp.int32)
    few = cumsum(x)
    monkeypatch.setattr(plan, "FEW", 2)
    for sums in (few, cumsum(x)):
        assert sums.tolist() == [3, 3, 8, 9] and sums.dtype == jnp.int32


@pytest.mark.parametrize("sequences", [66, 64, 132])
def test_sequences_that_fill_the_workers_are_not_cut(sequences):
    lengths = [4096 - 64 * (s % 3) for s in range(sequences)]
    made, pieces = make(lengths, 66)
    assert not made.pieces[:, CUTS].any()
    assert all(len(own) <= -(-sequences // 66) for own in pieces)


def test_sequences_that_leave_workers_idle_are_cut():
    made, pieces = make([4096] * 40, 66)
    assert made.pieces[:, CUTS].any() and all(pieces)


@pytest.mark.parametrize(
    ("lengths", "workers", "says"),
    [
        (jnp.zeros((2, 2), jnp.int32), 4, r"lengths is int32\[2, 2\]"),
        (jnp.zeros(2), 4, r"lengths is float32\[2\]"),
        (jnp.zeros(0, jnp.int32), 4, r"lengths is int32\[0\]"),
        (jnp.zeros(2, jnp.int32), 0, "workers=0 must be at least 1"),
    ],
)
def test_what_does_not_fit_is_printed(lengths, workers, says):
    with pytest.raises(ValueError, match=f"plan_mla_decode: {says}"):
        plan_mla_decode(lengths, workers=workers)
