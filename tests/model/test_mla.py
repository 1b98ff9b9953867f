import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.model.config import MLAConfig, YarnConfig
from whalejax.model.decoder import Decoder, decode, logits
from whalejax.model.rope import inverse_frequencies, rotary, rotate

PAGE = 4


@pytest.mark.parametrize("new", [1, 3])
def test_absorbed_equals_expanded_at_every_position(config, new):
    model = Decoder(config, rngs=nnx.Rngs(1))
    lengths, total = np.array([12, 9]), 12
    tokens = jax.random.randint(jax.random.key(0), (2, total), 0, config.vocab_size)
    full = np.asarray(model(tokens))
    # unused slots hold NaN, unused entries of the table garbage
    pages = jnp.full((config.num_hidden_layers, 8, PAGE, config.mla.cache_dim), jnp.nan)
    table = jnp.array([[5, 0, 3, 2**30], [1, 7, 2, -(2**30)]], jnp.int32)
    step = jax.jit(lambda t, p, n: decode(model, t, p, table, n))
    for end in range(new, total + 1, new):
        active = end <= lengths
        hidden, pages = step(
            tokens[:, end - new : end], pages, jnp.asarray(np.where(active, end, 0), jnp.int32)
        )
        got = np.asarray(logits(model, hidden))
        assert np.isfinite(got[active]).all()
        np.testing.assert_allclose(
            got[active], full[active, end - new : end], atol=2e-5 * np.abs(full).max()
        )


def test_decode_writes_the_cache_where_it_lies(config):
    graphdef, state = nnx.split(jax.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))
    shape = (config.num_hidden_layers, 4096, 64, config.mla.cache_dim)
    pages = jax.ShapeDtypeStruct(shape, jnp.float32)
    tokens, table, lengths = (jax.ShapeDtypeStruct(s, jnp.int32) for s in ((2, 1), (2, 4), (2,)))

    @functools.partial(jax.jit, donate_argnums=1)
    def step(state, pages, tokens, table, lengths):
        return decode(nnx.merge(graphdef, state), tokens, pages, table, lengths)

    memory = step.lower(state, pages, tokens, table, lengths).compile().memory_analysis()
    assert memory.temp_size_in_bytes < pages.size * 4 / 10


def test_rotation_depends_on_the_distance_alone():
    config = MLAConfig(num_attention_heads=1, qk_rope_head_dim=8)
    q, k = jax.random.normal(jax.random.key(0), (2, 1, 1, 1, 8))

    def score(i, j):
        at = [rotary(jnp.array([[n]], jnp.int32), config) for n in (i, j)]
        return float(jnp.sum(rotate(q, at[0]) * rotate(k, at[1])))

    assert score(7, 3) == pytest.approx(score(104, 100), abs=1e-4)
    assert abs(score(7, 3) - score(8, 3)) > 1e-3


def test_rotation_keeps_lengths_and_pairs():
    config = MLAConfig(num_attention_heads=1, qk_rope_head_dim=6)
    x = jax.random.normal(jax.random.key(1), (1, 5, 2, 6))
    turned = rotate(x, rotary(jnp.arange(5, dtype=jnp.int32)[None], config))
    np.testing.assert_allclose(turned[:, 0], x[:, 0], atol=1e-7)
    pairs = np.asarray(x).reshape(1, 5, 2, 3, 2)
    np.testing.assert_allclose(
        np.linalg.norm(np.asarray(turned).reshape(pairs.shape), axis=-1),
        np.linalg.norm(pairs, axis=-1), rtol=1e-5,
    )  # fmt: skip


def test_yarn_keeps_fast_pairs_and_stretches_slow_ones():
    yarn = YarnConfig(factor=40, original_max_position_embeddings=4096)
    plain = MLAConfig(num_attention_heads=1)
    stretched = MLAConfig(num_attention_heads=1, yarn=yarn)
    ratio = inverse_frequencies(plain) / inverse_frequencies(stretched)
    assert ratio[0] == 1 and ratio[-1] == pytest.approx(40)
    assert (np.diff(ratio) >= -1e-9).all()


def test_the_attention_scale_is_the_published_one():
    plain = MLAConfig(num_attention_heads=1)
    assert plain.softmax_scale == 192**-0.5
    yarn = YarnConfig(factor=40, mscale=0.707, mscale_all_dim=0.707)
    v2 = MLAConfig(num_attention_heads=1, yarn=yarn)
    assert v2.softmax_scale == pytest.approx(192**-0.5 * (0.1 * 0.707 * np.log(40) + 1) ** 2)


def test_the_cache_of_v3_is_576_numbers_a_token():
    assert MLAConfig(num_attention_heads=128).cache_dim == 576


@pytest.mark.parametrize(
    ("change", "says"),
    [({"qk_rope_head_dim": 5}, "qk_rope_head_dim=5 must be even"),
     ({"kv_lora_rank": 0}, "kv_lora_rank=0"),
     ({"q_lora_rank": -1}, "q_lora_rank=-1"), ({"v_head_dim": 1.5}, "v_head_dim=1.5")],
)  # fmt: skip
def test_impossible_sizes_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        MLAConfig(num_attention_heads=1, **change)


def test_impossible_yarn_is_refused():
    with pytest.raises(ValueError, match=r"factor=0\.5"):
        YarnConfig(factor=0.5)
    with pytest.raises(ValueError, match="beta_fast=1"):
        YarnConfig(factor=2, beta_fast=1.0, beta_slow=2.0)
