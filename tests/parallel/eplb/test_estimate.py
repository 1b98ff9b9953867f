import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.parallel.eplb import read_estimate, update_estimate

update = jax.jit(update_estimate, static_argnums=2)


@given(
    seed=st.integers(0, 2**32 - 1), steps=st.integers(1, 8), decay=st.sampled_from([0, 0.5, 0.9])
)
@settings(max_examples=20, deadline=None)
def test_it_is_the_mean_of_shares_weighted_by_age(seed, steps, decay):
    counts = np.random.default_rng(seed).integers(1, 1000, (steps, 3, 6))
    estimate = jnp.zeros((3, 6))
    for step in counts:
        estimate = update(estimate, jnp.asarray(step, jnp.int32), decay)
    np.testing.assert_allclose(estimate.sum(-1), 1 - decay**steps, rtol=1e-5)
    weights = np.array([decay ** (steps - 1 - i) for i in range(steps)])
    shares = counts / counts.sum(-1, keepdims=True)
    truth = np.tensordot(weights / weights.sum(), shares, 1)
    np.testing.assert_allclose(read_estimate(estimate), truth, rtol=1e-5)


def test_what_was_never_counted_is_even_and_an_empty_step_changes_nothing():
    estimate = update(jnp.zeros((2, 4)), jnp.array([[3, 1, 0, 0], [0, 0, 0, 0]]), 0.9)
    estimate = update(estimate, jnp.zeros((2, 4), jnp.int32), 0.9)
    np.testing.assert_allclose(read_estimate(estimate), [[0.75, 0.25, 0, 0], [0.25] * 4], rtol=1e-6)


@pytest.mark.parametrize(("decay", "experts"), [(1.0, 4), (-0.1, 4), (0.9, 5)])
def test_what_does_not_fit_is_printed(decay, experts):
    with pytest.raises(ValueError, match=rf"decay={decay}.*\(2, {experts}\)"):
        update_estimate(jnp.zeros((2, 4)), jnp.zeros((2, experts)), decay)
