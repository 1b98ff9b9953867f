import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.kernels.mla import plan
from whalejax.kernels.mla.plan import PIECE_CELLS, cumsum, plan_mla_decode
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
    """The bounds of a plan, and each worker's pieces as (sequence, first block, last)."""
    bounds = np.asarray(compiled(jnp.array(lengths, jnp.int32), workers).bounds)
    blocks, pieces = [-(-n // BLOCK) for n in lengths], []
    for (s0, b0, _), (s1, b1, _) in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True):
        own = [(s, b0 if s == s0 else 0, blocks[s]) for s in range(s0, s1)]
        if b1:
            own.append((s1, b0 if s1 == s0 else 0, b1))
        pieces.append(own)
    return bounds, pieces


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
    for own in make(lengths, workers)[1]:
        # one piece's own cells may lie in the stretch before
        blocks = sum(last - first for _, first, last in own)
        assert blocks + PIECE_CELLS * (len(own) - 1) <= share


@settings(max_examples=100, derandomize=True, deadline=None)
@given(lengths=LENGTHS, workers=WORKERS)
def test_cuts_are_counted(lengths, workers):
    bounds, pieces = make(lengths, workers)
    parts = np.bincount([s for own in pieces for s, *_ in own], minlength=len(lengths))
    for sequence, first, cuts in bounds:
        assert cuts == (parts[sequence] - 1 if first else 0)


def test_few_and_many_are_summed_alike(monkeypatch):
    x = jnp.array([3, 0, 5, 1], jnp.int32)
    few = cumsum(x)
    monkeypatch.setattr(plan, "FEW", 2)
    for sums in (few, cumsum(x)):
        assert sums.tolist() == [3, 3, 8, 9] and sums.dtype == jnp.int32


def test_equal_sequences_that_fill_the_workers_are_not_cut():
    bounds, _ = make([4096] * 66, 66)
    assert bounds.tolist() == [[s, 0, 0] for s in range(67)]


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
