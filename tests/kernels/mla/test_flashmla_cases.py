"""FlashMLA's own test cases for dense decode, its traps and tolerances, against float64.

On a GPU at its sizes; elsewhere the kernel is interpreted, with fewer and narrower ones.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels import mosaic
from whalejax.kernels.backend import mosaic_unusable
from whalejax.kernels.mla import hopper

pytestmark = pytest.mark.skipif(mosaic_unusable() is not None, reason=str(mosaic_unusable()))

ON_GPU = mosaic_unusable() is None and jax.default_backend() == "gpu"
PAGE, ROPE, V_DIM = 64, 64, 512 if ON_GPU else 128
KEYS = (20, 140, 4096) if ON_GPU else (20, 140)
CASES = (
    [(b, s_q, h) for b in (1, 2, 6, 64) for s_q in (1, 2, 4) for h in (1, 3, 9, 63, 64, 126, 128)]
    if ON_GPU
    else [(1, 4, 3), (2, 1, 9), (2, 2, 66)]
)


def lengths_of(batch, keys, varied, rng):
    """Keys of each sequence: all alike, or normally distributed as in FlashMLA's tests."""
    if not varied:
        return np.full(batch, keys, np.int32)
    return np.maximum(rng.normal(keys, keys / 2, batch), 1).clip(max=max(KEYS)).astype(np.int32)


def numbers(rng, shape):
    """Random numbers of a tenth, which the absolute tolerance is made for."""
    key = jax.random.key(int(rng.integers(2**31)))
    return (jax.random.normal(key, shape) / 10).clip(-1, 1).astype(jnp.bfloat16)


def draw(lengths, s_q, heads, rng):
    """Queries, a cache whose unused slots are NaN, and a shuffled table with garbage in it."""
    batch, most = len(lengths), -(-max(KEYS) // PAGE)
    d = V_DIM + ROPE
    used = np.arange(most * PAGE)[None] < lengths[:, None]
    keys = jnp.where(used[..., None], numbers(rng, (batch, most * PAGE, d)), jnp.nan)
    order = rng.permutation(batch * most).astype(np.int32)
    pages = keys.reshape(-1, PAGE, d)[np.argsort(order)]
    table = np.where(used[:, ::PAGE], order.reshape(batch, most), 2147480000).astype(np.int32)
    q = numbers(rng, (batch, s_q, heads, d))
    return (q, pages, jnp.asarray(table), jnp.asarray(lengths)), keys


@functools.partial(jax.jit, static_argnames="causal")
def truth(q, keys, lengths, causal):
    """Output and logarithms of sums in float64, and where a query sees a key."""
    s_q, d = q.shape[1], q.shape[3]
    keys = jnp.where(jnp.isnan(keys), 0, keys)
    back = jnp.arange(s_q - 1, -1, -1, dtype=lengths.dtype) * int(causal)
    limit = lengths[:, None] - back[None]
    place = jnp.arange(keys.shape[1], dtype=lengths.dtype)
    visible = (place[None, None] < limit[:, :, None])[:, None]
    scores = jnp.where(visible, jnp.einsum("bqhd,bkd->bhqk", q, keys) * d**-0.5, -jnp.inf)
    lse = jax.nn.logsumexp(scores, axis=-1)
    seen = jnp.isfinite(lse)
    weights = jnp.where(seen[..., None], jnp.exp(scores - lse[..., None]), 0)
    out = jnp.einsum("bhqk,bkv->bqhv", weights, keys[..., :V_DIM])
    return out, jnp.where(seen, lse, jnp.inf)


def check(decode, lengths, s_q, heads, causal, rng):
    """Compares a run of the kernel with float64, by FlashMLA's tolerances."""
    (q, pages, table, lengths), keys = draw(lengths, s_q, heads, rng)
    out, lse = (np.asarray(a, np.float64) for a in decode(q, pages, table, lengths))
    with jax.enable_x64(True):
        exact = (a.astype(jnp.float64) for a in (q, keys))
        expected, expected_lse = map(np.asarray, truth(*exact, lengths, causal))
    close = np.abs(out - expected) <= np.maximum(8e-4, np.abs(expected) * 2.01 / 128)
    assert close.all(), f"{(~close).sum()} of {close.size} elements differ"
    empty = np.isposinf(expected_lse)
    assert (np.isposinf(lse) == empty).all()
    error = np.abs(lse[~empty] - expected_lse[~empty])
    assert (error <= np.maximum(1e-6, np.abs(expected_lse[~empty]) * 8.01 / 65536)).all()
    distance = 1 - 2 * (out * expected).sum() / np.maximum((out**2 + expected**2).sum(), 1e-12)
    assert distance < 5e-6 or not expected.any()


@pytest.mark.parametrize("causal", [True, False], ids=["causal", "full"])
@pytest.mark.parametrize(("batch", "s_q", "heads"), CASES, ids=str)
def test_cases(run, monkeypatch, batch, s_q, heads, causal):
    if not ON_GPU:
        monkeypatch.setattr(mosaic, "num_sms", lambda: 3)
    rng = np.random.default_rng(batch + 7 * s_q + 31 * heads)

    def attend(*arrays):
        return hopper.mla_decode(*arrays, None, V_DIM, (V_DIM + ROPE) ** -0.5, causal)

    # compiled once on a GPU; a function that was traced before cannot be interpreted
    decode = jax.jit(attend) if ON_GPU else functools.partial(run, attend)
    for keys in KEYS:
        for varied in (False, True):
            check(decode, lengths_of(batch, keys, varied, rng), s_q, heads, causal, rng)


def test_half_of_the_sequences_are_empty(run, monkeypatch):
    if not ON_GPU:
        monkeypatch.setattr(mosaic, "num_sms", lambda: 3)
    batch, heads, s_q = (128, 128, 2) if ON_GPU else (6, 9, 2)
    rng = np.random.default_rng(0)
    lengths = lengths_of(batch, max(KEYS), False, rng)
    lengths[rng.permutation(batch)[: batch // 2]] = 0

    def attend(*arrays):
        return hopper.mla_decode(*arrays, None, V_DIM, (V_DIM + ROPE) ** -0.5, True)

    check(functools.partial(run, attend), lengths, s_q, heads, True, rng)
