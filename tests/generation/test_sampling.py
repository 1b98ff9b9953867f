import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from whalejax.generation.sampling import SamplingConfig, nucleus, request_keys, sample

VOCAB = 17


def kept_tokens(logits, top_p):
    """The definition: the smallest set of likeliest tokens whose probabilities reach top_p."""
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max())
    p /= p.sum()
    kept, total = set(), 0.0
    for token in np.argsort(-p):
        if kept and total >= top_p:
            break
        kept.add(int(token))
        total += p[token]
        # float32 sums err by less than 1e-5: a threshold that close could go either way
        assume(top_p == 1 or abs(total - top_p) > 1e-5)
    return kept


@given(seed=st.integers(0, 2**32 - 1), top_p=st.floats(1e-4, 1.0), spread=st.floats(0.1, 5.0))
@settings(max_examples=100, deadline=None)
def test_nucleus_is_the_smallest_set_that_reaches_top_p(seed, top_p, spread):
    rng = np.random.default_rng(seed)
    logits = rng.normal(0, spread, (2, VOCAB)).astype(np.float32)
    both = np.array([top_p, 1.0], np.float32)
    got = np.asarray(nucleus(jnp.asarray(logits), jnp.asarray(both)))
    for row in range(2):
        expected = kept_tokens(logits[row], float(both[row]))
        assert set(np.flatnonzero(np.isfinite(got[row]))) == expected
        np.testing.assert_array_equal(got[row, sorted(expected)], logits[row, sorted(expected)])


def test_top_p_of_one_keeps_every_token_of_a_large_vocabulary():
    logits = jax.random.normal(jax.random.key(0), (1, 129280))
    # in float32 the sum passes 1 before the tail ends: found on this very vocabulary
    assert np.isfinite(nucleus(logits, jnp.ones(1))).all()


def test_equal_logits_keep_as_many_as_needed():
    got = nucleus(jnp.zeros((1, 10)), jnp.array([0.35]))
    assert int(np.isfinite(got).sum()) == 4
    exactly = nucleus(jnp.zeros((1, 4)), jnp.array([0.5]))  # quarters are exact in float32
    assert int(np.isfinite(exactly).sum()) == 2


def keys(n, seed=0):
    requests = jnp.arange(n, dtype=jnp.int32)
    return request_keys(jnp.full(n, seed, jnp.int32), requests, jnp.zeros(n, jnp.int32))


def test_each_row_has_its_own_parameters():
    logits = jax.random.normal(jax.random.key(3), (1, VOCAB))
    rows = 300
    temperature = jnp.where(jnp.arange(rows) % 3 == 0, 0.0, jnp.where(
        jnp.arange(rows) % 3 == 1, 1.0, 5.0))  # fmt: skip
    top_p = jnp.where(jnp.arange(rows) % 3 == 1, 1e-6, 1.0)
    tokens = np.asarray(sample(jnp.tile(logits, (rows, 1)), temperature, top_p, keys(rows)))
    best = int(jnp.argmax(logits))
    assert tokens.dtype == np.int32
    assert (tokens[0::3] == best).all()  # temperature 0
    assert (tokens[1::3] == best).all()  # a nucleus of one
    assert len(set(tokens[2::3])) > VOCAB // 2  # hot: nearly all tokens come up in 100 draws


@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_follow_the_tempered_distribution(temperature):
    logits, draws = np.array([0.0, 1.0, 2.0, -1.0, 0.5], np.float32), 20_000
    p = np.exp(logits.astype(np.float64) / temperature)
    p[3] = 0  # the least likely one falls out of the nucleus
    p_all = np.exp(logits.astype(np.float64) / temperature)
    top_p = (p.sum() - p.min(where=p > 0, initial=9) / 2) / p_all.sum()
    p /= p.sum()
    tokens = sample(
        jnp.tile(jnp.asarray(logits)[None], (draws, 1)),
        jnp.full(draws, temperature), jnp.full(draws, top_p, jnp.float32), keys(draws),
    )  # fmt: skip
    share = np.bincount(np.asarray(tokens), minlength=5) / draws
    # five standard deviations of a binomial share
    assert (np.abs(share - p) <= 5 * np.sqrt(p * (1 - p) / draws)).all(), (share, p)


def test_a_key_depends_on_seed_request_and_position_and_not_on_the_row():
    triples = [(s, r, p) for s in (0, 1) for r in (0, 1, 2) for p in (0, 1, 2)]
    columns = [jnp.array(column, jnp.int32) for column in zip(*triples, strict=True)]
    data = np.asarray(jax.random.key_data(request_keys(*columns)))
    assert len({tuple(row) for row in data}) == len(triples)
    reversed_data = jax.random.key_data(request_keys(*(column[::-1] for column in columns)))
    np.testing.assert_array_equal(reversed_data[::-1], data)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"temperature": -0.1}, r"temperature=-0\.1"),
        ({"temperature": float("nan")}, "temperature=nan"),
        ({"temperature": float("inf")}, "temperature=inf"),
        ({"top_p": 0.0}, r"top_p=0\.0"),
        ({"top_p": 1.01}, r"top_p=1\.01"),
        ({"seed": 2**31}, "seed=2147483648"),
    ],
)
def test_impossible_settings_are_refused(change, says):
    with pytest.raises(ValueError, match=says):
        SamplingConfig(**change)
