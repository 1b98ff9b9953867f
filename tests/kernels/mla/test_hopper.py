"""The MLA decode kernel, run as `tests/kernels/conftest.py` says, and lowered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels import mosaic
from whalejax.kernels.backend import mosaic_unusable, vary_like
from whalejax.kernels.mla import FP8Pages, hopper, mla_decode, plan_mla_decode
from whalejax.kernels.testing import assert_rows_close

pytestmark = pytest.mark.skipif(mosaic_unusable() is not None, reason=str(mosaic_unusable()))


@pytest.fixture
def run(run, monkeypatch):
    """The same, interpreted as for three multiprocessors: enough to cut a sequence twice."""
    if jax.default_backend() != "gpu":
        monkeypatch.setattr(mosaic, "num_sms", lambda: 3)
    return run


def decode(v_dim, causal=True, plan=None):
    scale = (v_dim + 64) ** -0.5
    return lambda *arrays: hopper.mla_decode(*arrays, plan, v_dim, scale, causal)


def draw(lengths, *, s_q=1, heads=16, v_dim=128, page_size=64, dtype=jnp.bfloat16):
    """Queries, pages with NaN in every unused slot, and a table with garbage in unused entries."""
    rng, d = np.random.default_rng(0), v_dim + 64
    batch, most = len(lengths), max(-(-max(lengths) // page_size), 1)
    pages = np.full((batch * most + 1, page_size, d), np.nan, np.float32)
    table = np.full((batch, most), 2147480000, np.int32)
    order = rng.permutation(batch * most + 1)
    for b, length in enumerate(lengths):
        for start in range(0, length, page_size):
            page = order[b * most + start // page_size]
            count = min(page_size, length - start)
            pages[page, :count] = rng.normal(size=(count, d))
            table[b, start // page_size] = page
    q = rng.normal(size=(batch, s_q, heads, d))
    lengths = jnp.asarray(lengths, jnp.int32)
    return jnp.asarray(q, dtype), jnp.asarray(pages, dtype), jnp.asarray(table), lengths


def truth(q, pages, table, lengths, v_dim, scale, causal):
    q, pages = (np.asarray(a, np.float64) for a in (q, pages))
    table, lengths = np.asarray(table), np.asarray(lengths)
    batch, s_q, heads, d = q.shape
    out, lse = np.zeros((batch, s_q, heads, v_dim)), np.full((batch, heads, s_q), np.inf)
    for b, length in enumerate(lengths):
        used = table[b, : -(-length // pages.shape[1])]
        keys = pages[used].reshape(-1, d)[:length]
        for t in range(s_q):
            k = keys[: max(length - (s_q - 1 - t), 0)] if causal else keys
            if len(k):
                scores = q[b, t] @ k.T * scale
                top = scores.max(axis=1, keepdims=True)
                weights = np.exp(scores - top)
                total = weights.sum(axis=1, keepdims=True)
                out[b, t], lse[b, :, t] = (
                    weights / total @ k[:, :v_dim],
                    (top + np.log(total))[:, 0],
                )
    return out, lse


@pytest.mark.parametrize(
    ("lengths", "sizes", "causal"),
    [
        ([70, 0, 1, 192], {}, True),
        ([0, 0, 0, 0, 1, 0, 0, 300, 0], {"s_q": 2}, True),
        ([70, 0, 1, 300], {"s_q": 2, "heads": 3}, True),
        ([600], {}, True),
        ([65, 3], {"s_q": 2, "heads": 5}, True),
        ([65, 3], {"s_q": 2, "heads": 5}, False),
        ([130, 2], {"s_q": 4, "heads": 17, "page_size": 128}, True),
        ([100, 64], {"v_dim": 256, "dtype": jnp.float16}, True),
        ([100, 64], {"v_dim": 512}, True),
        ([64, 90], {"v_dim": 192}, True),
    ],
    ids=str,
)
def test_equals_numpy_float64(run, lengths, sizes, causal):
    q, pages, table, lengths = draw(lengths, **sizes)
    v_dim, scale = q.shape[3] - 64, q.shape[3] ** -0.5
    out, lse = run(decode(v_dim, causal), q, pages, table, lengths)
    expected, expected_lse = truth(q, pages, table, lengths, v_dim, scale, causal)
    # weights are rounded to the cache's dtype, and so is the output
    assert_rows_close(out, expected, tolerance=5e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def test_scores_may_grow_from_block_to_block(run):
    """So much that the sums of some rows, and only theirs, have to be scaled anew."""
    q, pages, table, lengths = draw([400, 300], heads=64)
    q = q * jnp.linspace(0, 40, 64, dtype=q.dtype)[None, None, :, None]
    out, lse = run(decode(128), q, pages, table, lengths)
    expected, expected_lse = truth(q, pages, table, lengths, 128, 192**-0.5, True)
    assert_rows_close(out, expected, tolerance=5e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


FP8_CASES = [
    ([70, 0, 1, 192], {}),
    ([65, 300], {"s_q": 2, "heads": 5, "page_size": 128}),
    ([150], {"v_dim": 512}),
    ([100], {"dtype": jnp.float16}),
    ([100], {"magnitude": 2.0**-60}),
    ([100], {"magnitude": 2.0**40}),
]


def draw_fp8(lengths, v_dim=256, magnitude=1.0, **sizes):
    """The same with a cache in FP8, and the cache that it stands for in place of the exact one."""
    q, pages, *rest = draw(lengths, v_dim=v_dim, **sizes)
    scale = magnitude * 2.0 ** (np.arange(pages.shape[1]) % 5 - 2)  # of each token another
    quantized = FP8Pages.quantize(pages * jnp.asarray(scale, pages.dtype)[None, :, None], v_dim)
    q = q / jnp.asarray(magnitude, q.dtype)  # scores stay what they are
    return (q, quantized, *rest), (q, quantized.dequantize(pages.dtype), *rest)


@pytest.mark.parametrize(("lengths", "sizes"), FP8_CASES, ids=str)
def test_an_fp8_cache_equals_the_one_it_stands_for(run, lengths, sizes):
    arrays, exact = draw_fp8(lengths, **sizes)
    d = arrays[0].shape[3]
    out, lse = run(decode(d - 64), *arrays)
    expected, expected_lse = truth(*exact, d - 64, d**-0.5, True)
    assert_rows_close(out, expected, tolerance=5e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("fp8", [False, True])
def test_a_nan_that_is_seen_spoils_its_sequence_alone(run, fp8):
    q, pages, table, lengths = draw([70, 100], v_dim=256)
    pages = pages.at[table[0, 0], 3, 5].set(jnp.nan)
    pages = FP8Pages.quantize(pages, 256) if fp8 else pages
    out, _ = run(decode(256), q, pages, table, lengths)
    assert np.isnan(out[0]).all() and np.isfinite(out[1]).all()


def test_runs_are_identical(run):
    arguments = draw([70, 300], s_q=2)
    first = run(decode(128), *arguments)
    for _ in range(20 if jax.default_backend() == "gpu" else 1):
        jax.tree.map(np.testing.assert_array_equal, run(decode(128), *arguments), first)


def test_a_plan_that_is_given_is_followed(run):
    q, pages, table, lengths = draw([70, 300])
    plan = plan_mla_decode(lengths, workers=2)
    out, lse = run(decode(128, plan=plan), q, pages, table, lengths)
    expected, expected_lse = truth(q, pages, table, lengths, 128, 192**-0.5, True)
    assert_rows_close(out, expected, tolerance=5e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


def cut(workers):
    """Decodes by a plan for so many workers."""

    def attend(q, pages, table, lengths):
        plan = plan_mla_decode(lengths, workers=workers)
        return decode(128, plan=plan)(q, pages, table, lengths)

    return attend


@pytest.mark.parametrize(
    ("lengths", "workers", "ctas"),
    [([1200], 20, 640), ([1200, 0], 10, 640), ([1200, 70], 10, 4)],
    ids=["warpgroups share", "more than are loaded at once", "several rows a CTA"],
)
def test_many_pieces_are_merged(run, monkeypatch, lengths, workers, ctas):
    monkeypatch.setattr("whalejax.kernels.mla.merge_kernel.CTAS", ctas)
    q, pages, table, lengths = draw(lengths, heads=17)
    out, lse = run(cut(workers), q, pages, table, lengths)
    expected, expected_lse = truth(q, pages, table, lengths, 128, 192**-0.5, True)
    assert_rows_close(out, expected, tolerance=5e-3)
    np.testing.assert_allclose(lse, expected_lse, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(("lengths", "workers"), [([1200], 20), ([1200, 0], 10)], ids=str)
def test_merging_many_pieces_has_no_races(assert_no_races, lengths, workers):
    assert_no_races(cut(workers), *draw(lengths, heads=3))


def test_there_are_no_races(assert_no_races):
    assert_no_races(decode(128), *draw([70, 200, 0], s_q=2, heads=5))


def test_there_are_no_races_with_an_fp8_cache(assert_no_races):
    arrays, _ = draw_fp8([70, 200, 0])
    assert_no_races(decode(256), *arrays)


@pytest.mark.parametrize(
    ("v_dim", "heads", "s_q", "dtype"),
    [(512, 128, 1, "bfloat16"), (512, 16, 8, "float16"), (256, 3, 1, "bfloat16")],
    ids=str,
)
def test_lowers_for_cuda(v_dim, heads, s_q, dtype):
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((4, s_q, heads, v_dim + 64), dtype),
            ((9, 64, v_dim + 64), dtype),
            ((4, 2), jnp.int32),
            ((4,), jnp.int32),
        )
    ]
    lowered = jax.jit(decode(v_dim)).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert len(re.findall(r"custom_call @mosaic_gpu", lowered.as_text())) == 2


def test_an_fp8_cache_lowers_for_cuda():
    pages = jax.eval_shape(lambda: FP8Pages.zeros((9, 64, 576), 512))
    table, lengths = (jax.ShapeDtypeStruct(shape, jnp.int32) for shape in ((4, 2), (4,)))
    q = jax.ShapeDtypeStruct((4, 1, 16, 576), jnp.bfloat16)
    traced = jax.jit(decode(512)).trace(q, pages, table, lengths)
    lowered = traced.lower(lowering_platforms=("cuda",)).as_text()
    assert len(re.findall(r"custom_call @mosaic_gpu", lowered)) == 2


@pytest.mark.parametrize(("platform", "kernels"), [("cuda", 2), ("cpu", 0)])
def test_it_is_chosen_where_cuda_is_lowered_for(platform, kernels):
    arrays = draw([70, 300])
    attend = functools.partial(mla_decode, v_dim=128, scale=1.0)
    lowered = jax.jit(attend).trace(*arrays).lower(lowering_platforms=(platform,))
    assert len(re.findall(r"custom_call @mosaic_gpu", lowered.as_text())) == kernels


def test_lowers_inside_shard_map():
    """Where what a device holds is typed as its own."""
    mesh = jax.make_mesh((2,), ("batch",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("batch")
    shapes = [
        jax.ShapeDtypeStruct(shape, dtype)
        for shape, dtype in (
            ((4, 1, 16, 576), jnp.bfloat16),
            ((8, 64, 576), jnp.bfloat16),
            ((4, 2), jnp.int32),
            ((4,), jnp.int32),
        )
    ]

    def attend(*arguments):
        return vary_like(decode(512)(*arguments), arguments)

    sharded = jax.shard_map(attend, mesh=mesh, in_specs=(spec,) * 4, out_specs=spec)
    lowered = jax.jit(sharded).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert len(re.findall(r"custom_call @mosaic_gpu", lowered.as_text())) == 2
