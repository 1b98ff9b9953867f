import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.mla import append, mla_decode, plan_mla_decode
from whalejax.kernels.testing import assert_rows_close

PAGE, D, V = 8, 20, 16


def draw(lengths, s_q=1, heads=3, seed=0):
    """Queries, pages with NaN in every unused slot, and a table with garbage in unused entries."""
    rng = np.random.default_rng(seed)
    batch, most = len(lengths), max(-(-max(lengths) // PAGE), 1)
    total = batch * most + 3
    pages = np.full((total, PAGE, D), np.nan, np.float32)
    table = np.full((batch, most), 2147480000, np.int32)
    order = rng.permutation(total)
    keys = []
    for b, length in enumerate(lengths):
        tokens = rng.normal(size=(length, D)).astype(np.float32)
        for start in range(0, length, PAGE):
            page = order[b * most + start // PAGE]
            part = tokens[start : start + PAGE]
            pages[page, : len(part)] = part
            table[b, start // PAGE] = page
        keys.append(tokens)
    q = rng.normal(size=(batch, s_q, heads, D)).astype(np.float32)
    return (*map(jnp.asarray, (q, pages, table)), jnp.asarray(lengths, jnp.int32), keys)


def truth(q, keys, scale, causal):
    batch, s_q, heads, _ = q.shape
    out, lse = np.zeros((batch, s_q, heads, V)), np.full((batch, heads, s_q), np.inf)
    for b, t, h in np.ndindex(batch, s_q, heads):
        seen = len(keys[b]) - (s_q - 1 - t if causal else 0)
        if seen > 0:
            k = keys[b][:seen].astype(np.float64)
            scores = k @ np.asarray(q[b, t, h], np.float64) * scale
            lse[b, h, t] = np.log(np.exp(scores - scores.max()).sum()) + scores.max()
            out[b, t, h] = np.exp(scores - lse[b, h, t]) @ k[:, :V]
    return out, lse


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("s_q", [1, 2, 4])
@pytest.mark.parametrize("lengths", [[1, 8, 9, 30], [0, 3, 0, 64]], ids=str)
def test_equals_numpy_float64(lengths, s_q, causal):
    q, pages, table, lengths, keys = draw(lengths, s_q)
    out, lse = mla_decode(q, pages, table, lengths, v_dim=V, scale=0.3, causal=causal)
    expected, expected_lse = truth(q, keys, 0.3, causal)
    assert_rows_close(out, expected, tolerance=2e-6)
    np.testing.assert_allclose(lse, expected_lse, rtol=2e-6, atol=1e-6)


def test_an_empty_sequence_gives_zero_and_infinity():
    q, pages, table, lengths, _ = draw([0, 5])
    out, lse = mla_decode(q, pages, table, lengths, v_dim=V, scale=1.0)
    assert (np.asarray(out[0]) == 0).all() and np.isposinf(lse[0]).all()
    assert np.isfinite(out).all() and np.isfinite(lse[1]).all()


def test_append_writes_only_its_slots():
    pages = jnp.full((4, PAGE, D), jnp.nan)
    table = jnp.array([[2, 0], [3, 2147480000]], jnp.int32)
    latent = jax.random.normal(jax.random.key(0), (2, 3, D))
    positions = jnp.array([[7, 8, 9], [0, -1, 1]], jnp.int32)
    after = np.asarray(append(pages, latent, table, positions))
    written = {(2, 7): (0, 0), (0, 0): (0, 1), (0, 1): (0, 2), (3, 0): (1, 0), (3, 1): (1, 2)}
    for page, slot in np.ndindex(4, PAGE):
        if (page, slot) in written:
            np.testing.assert_array_equal(after[page, slot], latent[written[page, slot]])
        else:
            assert np.isnan(after[page, slot]).all()


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda q, p, t, n: (q[0], p, t, n), r"q.shape=\(1, 3, 20\)"),
        (lambda q, p, t, n: (q, p[..., :-1], t, n), r"kv_pages.shape=\(\d+, 8, 19\)"),
        (lambda q, p, t, n: (q, p, t, n[:-1]), r"lengths.shape=\(1,\)"),
        (lambda q, p, t, n: (q.astype(jnp.bfloat16), p, t, n), "q.dtype=bfloat16"),
        (lambda q, p, t, n: (q, p, t.astype(float), n), "page_table.dtype=float32"),
        (lambda q, p, t, n: (q, p, t, n.astype(float)), "lengths.dtype=float32 must be int32"),
    ],
)
def test_what_does_not_fit_is_printed(change, says):
    with pytest.raises(ValueError, match=says):
        mla_decode(*change(*draw([3, 9])[:4]), v_dim=V, scale=1.0)
    with pytest.raises(ValueError, match="v_dim=21"):
        mla_decode(*draw([3, 9])[:4], v_dim=21, scale=1.0)


def test_a_named_kernel_says_why_it_cannot_run():
    arguments = draw([3, 9])[:4]
    with pytest.raises(NotImplementedError, match="takes bfloat16 and float16, not float32|jax>="):
        mla_decode(*arguments, v_dim=V, scale=1.0, implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"'fast' is unknown; choose from \['mosaic_gpu', 'xla'\]"):
        mla_decode(*arguments, v_dim=V, scale=1.0, implementation="fast")
    q = jnp.zeros((1, 1, 2, 576), jnp.bfloat16)
    arguments = q, jnp.zeros((1, 64, 576), jnp.bfloat16), *map(jnp.asarray, ([[0]], [5]))
    with pytest.raises(NotImplementedError, match="needs a CUDA GPU|jax>="):
        mla_decode(*arguments, scale=1.0, implementation="mosaic_gpu")


def test_a_plan_for_another_batch_is_refused():
    plan = plan_mla_decode(jnp.array([3, 4, 5], jnp.int32), workers=2)
    arrays = jnp.zeros((2, 1, 3, 24)), jnp.zeros((4, 8, 24)), jnp.zeros((2, 2), jnp.int32)
    with pytest.raises(
        ValueError, match=r"the plan is for 3 sequences, q.shape=\(2, 1, 3, 24\) has 2"
    ):
        mla_decode(*arrays, jnp.array([3, 4], jnp.int32), v_dim=16, scale=1.0, plan=plan)


def test_a_gradient_is_refused():
    q, *rest, _ = draw([3, 9])
    with pytest.raises(NotImplementedError, match="mla_decode has no gradient"):
        jax.grad(lambda q: mla_decode(q, *rest, v_dim=V, scale=1.0)[0].sum())(q)
