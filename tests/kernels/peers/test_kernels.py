"""The kernels with other ranks' arrays as parts of one, run as `tests/kernels/conftest.py` says.

Interpret mode knows no peers. On several GPUs `tests/parallel/expert/on_ranks.py` runs them.
"""

import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.backend import mosaic_unusable
from whalejax.kernels.permutation import permute, plan_permutation, unpermute

pytestmark = pytest.mark.skipif(mosaic_unusable() is not None, reason=str(mosaic_unusable()))

RANKS, SLOTS = 3, 2  # experts of a rank
DTYPES = [jnp.bfloat16, jnp.float32, jnp.float16]


def choose(rank, tokens, seed, **limits):
    """Plan of the tokens of all ranks on one, and the slots that they chose there."""
    rng = np.random.default_rng(seed)
    scores = rng.random((RANKS * tokens, RANKS * SLOTS))
    slots = np.argsort(scores, axis=1)[:, :3].astype(np.int32)
    slots[rng.random(slots.shape) < 0.2] = -1
    here = jnp.where((slots >= 0) & (slots // SLOTS == rank), slots % SLOTS, -1)
    return plan_permutation(here, SLOTS, **(limits or {"alignment": 8})), here


def draw(seed, *shape, dtype):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def shared(tokens, rank, ctas=6):
    from whalejax.kernels.peers.sharing import Share

    return Share(ranks=RANKS, tokens=tokens, ctas=ctas, axis=None, rank=rank)


@pytest.mark.parametrize(
    ("rank", "tokens", "limits", "stages"),
    [(0, 11, {}, 6), (2, 4, {"capacity": 16}, 2), (1, 16, {"max_rows": 24, "alignment": 8}, 3)],
)
@pytest.mark.parametrize("zero_padding", [True, False])
def test_tokens_of_all_ranks_go_to_the_rows_of_experts(
    run, rank, tokens, limits, stages, zero_padding
):
    from whalejax.kernels.peers.gather_kernel import Gather, build
    from whalejax.kernels.peers.hopper import padding

    plan, _ = choose(rank, tokens, tokens, **limits)
    arrays = [draw(0, RANKS, tokens, 64, dtype=jnp.bfloat16)]
    arrays.append(draw(1, RANKS, tokens, 128, dtype=jnp.float32).astype(jnp.float8_e4m3fn))
    rows = plan.source.shape[0]
    problem = Gather(
        share=shared(tokens, rank),
        choices=3,
        rows=rows,
        kinds=tuple((a.shape[2], a.dtype) for a in arrays),
        zero_padding=zero_padding,
        stages=stages,
        storing=stages // 2,
    )
    arguments = [problem.share.spread(plan.row_of, rows), *arrays]
    if zero_padding:
        zeros = [jnp.zeros(a.shape[2:], a.dtype) for a in arrays]
        arguments += [padding(plan, problem), *zeros]
    outs = run(build(problem), *arguments)
    filled = np.asarray(plan.source) < plan.row_of.size
    assert 0 < filled.sum() < filled.size
    for array, out in zip(arrays, outs, strict=True):
        whole = permute(array.reshape(-1, array.shape[2]), plan)
        wanted, found = (np.asarray(a).astype(np.float32) for a in (whole, out))
        if not zero_padding:
            wanted, found = wanted[filled], found[filled]
        np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("weighted", [True, False])
@pytest.mark.parametrize(("rank", "tokens", "stages"), [(0, 11, 4), (2, 5, 2)])
def test_sums_of_rows_go_to_the_rank_of_the_token(run, rank, tokens, stages, weighted):
    from whalejax.kernels.peers.sum_kernel import Sum, build

    dtype = DTYPES[(rank + weighted) % 3]
    plan, here = choose(rank, tokens, tokens, max_rows=8, alignment=8)
    assert plan.overflow > 0  # some are guests without a row
    rows = draw(0, plan.source.shape[0], 256, dtype=dtype)
    weights = draw(1, *here.shape, dtype=jnp.float32) if weighted else None
    guests = np.asarray(here >= 0).any(axis=1)
    assert 0 < guests.sum() < guests.size
    problem = Sum(
        share=shared(tokens, rank),
        choices=3,
        rows=rows.shape[0],
        width=256,
        dtype=dtype,
        weighted=weighted,
        stages=stages,
    )
    spread = problem.share.spread
    arguments = [spread(plan.row_of, rows.shape[0]), spread(jnp.asarray(guests, jnp.int32), 0)]
    arguments += [spread(weights, 0)] if weighted else []
    sums = np.asarray(run(build(problem), rows, *arguments), np.float32)  # of the ranks' results
    wanted = np.asarray(unpermute(rows, weights, plan), np.float32).reshape(RANKS, tokens, -1)
    guests = guests.reshape(RANKS, tokens)
    tolerance = float(jnp.finfo(dtype).eps)
    np.testing.assert_allclose(sums[:, rank][guests], wanted[guests], tolerance, tolerance)


def test_every_token_is_of_one_cta():
    share = shared(7, 1, ctas=6)
    cta, i = np.meshgrid(range(6), range(share.chunk), indexing="ij")
    owner, number = share.token(jnp.asarray(cta, jnp.int32), jnp.asarray(i, jnp.int32))
    found = np.stack([owner, number], axis=-1)[np.asarray(number) < 7]
    assert {tuple(pair) for pair in found.tolist()} == {(r, t) for r in range(3) for t in range(7)}
    assert len(found) == 21
    for step in range(share.chunk):  # every rank as often as others
        assert np.bincount(np.asarray(owner)[:, step]).tolist() == [2, 2, 2]
