import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.mla import FP8Pages, append, mla_decode
from whalejax.kernels.testing import assert_rows_close

PAGE, V, D = 8, 160, 176  # a whole tile of 128 values, and part of one


def fill(seed=0, lengths=(3, 17)):
    """An FP8 cache filled token by token, the tokens, and where they lie."""
    table = jnp.array([[2, 2147480000, -5], [0, 3, 1]], jnp.int32)
    tokens = jax.random.normal(jax.random.key(seed), (2, max(lengths), D))
    tokens = tokens * jnp.exp2(jnp.arange(max(lengths)) % 9 - 4)[None, :, None]
    place = jnp.arange(max(lengths), dtype=jnp.int32)[None]
    positions = jnp.where(place < jnp.array(lengths)[:, None], place, -1)
    empty = jax.tree.map(
        lambda a: jnp.full(a.shape, jnp.nan, a.dtype), FP8Pages.zeros((4, PAGE, D), V, jnp.float32)
    )
    return append(empty, tokens, table, positions), tokens, table, jnp.array(lengths, jnp.int32)


def test_tokens_are_quantised_as_they_are_appended():
    pages, tokens, table, lengths = fill()
    kept, written = np.asarray(pages.dequantize()), np.zeros((4, PAGE), bool)
    for b, t in np.ndindex(*tokens.shape[:2]):
        if t < lengths[b]:
            token, page = kept[table[b, t // PAGE], t % PAGE], (int(table[b, t // PAGE]), t % PAGE)
            written[page] = True
            assert_rows_close(token[:V], tokens[b, t, :V], tolerance=2**-4)
            np.testing.assert_array_equal(token[V:], tokens[b, t, V:])
    assert written.sum() == 20 and np.isnan(kept[~written]).all()
    assert pages.latent.dtype == jnp.float8_e4m3fn and pages.scales.shape == (4, PAGE, 2)


def test_decodes_as_the_cache_that_it_stands_for():
    pages, _, table, lengths = fill()
    q = jax.random.normal(jax.random.key(1), (2, 2, 3, D))
    got = mla_decode(q, pages, table, lengths, v_dim=V, scale=0.1)
    wanted = mla_decode(q, pages.dequantize(), table, lengths, v_dim=V, scale=0.1)
    for a, b in zip(got, wanted, strict=True):
        np.testing.assert_allclose(a, b, rtol=2e-6, atol=1e-6)


def test_takes_57_percent_of_a_bfloat16_cache():
    pages = jax.eval_shape(lambda: FP8Pages.zeros((10, 64, 576), 512))
    size = sum(a.size * a.dtype.itemsize for a in jax.tree.leaves(pages))
    assert size == 10 * 64 * 656 and pages.shape == (10, 64, 576)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"scales": lambda a: a[:3]}, r"scales float32\[3, 8, 2\]"),
        ({"scales": lambda a: a[..., :1]}, r"scales float32\[4, 8, 1\]"),
        ({"scales": lambda a: a.astype(jnp.bfloat16)}, r"scales bfloat16\[4, 8, 2\]"),
        ({"rope": lambda a: a[:2]}, r"rope \[2, 8, 16\]"),
        ({"latent": lambda a: a.astype(jnp.float32)}, r"latent float32\[4, 8, 160\]"),
    ],
    ids=["pages", "tiles", "dtype", "rotary parts", "values"],
)
def test_arrays_that_do_not_fit_together_are_refused(wrong, says):
    pages, _, table, lengths = fill()
    pages = dataclasses.replace(pages, **{k: f(getattr(pages, k)) for k, f in wrong.items()})
    with pytest.raises(ValueError, match=f"mla_decode: FP8Pages of .*{says}"):
        mla_decode(jnp.zeros((2, 1, 3, D)), pages, table, lengths, v_dim=V, scale=1.0)
    with pytest.raises(ValueError, match=f"append: FP8Pages of .*{says}"):
        append(pages, jnp.zeros((2, 1, D)), table, jnp.zeros((2, 1), jnp.int32))


def test_another_width_of_values_is_refused():
    pages, _, table, lengths = fill()
    q = jnp.zeros((2, 1, 3, D))
    with pytest.raises(ValueError, match=r"v_dim=128 must be the width of kv_pages.latent.shape"):
        mla_decode(q, pages, table, lengths, v_dim=128, scale=1.0)
    with pytest.raises(NotImplementedError, match=r"v_dim \(256, 512\), not 160|jax>="):
        mla_decode(q, pages, table, lengths, v_dim=V, scale=1.0, implementation="mosaic_gpu")
