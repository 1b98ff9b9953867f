import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.model.config import ModelConfig
from whalejax.model.decoder import REMATERIALISATION, Decoder, Execution, forward, logits
from whalejax.model.linear import PRECISIONS
from whalejax.model.mtp import predict_further


@pytest.fixture(scope="module")
def model(v3_config):
    return Decoder(v3_config, rngs=nnx.Rngs(2))


run = nnx.jit(forward, static_argnames="execution")  # compiled once for tests of one shape
further = nnx.jit(predict_further)


def tokens(config, batch=2, length=11, seed=0):
    return jax.random.randint(jax.random.key(seed), (batch, length), 0, config.vocab_size)


def test_the_past_does_not_see_the_future(model):
    first = tokens(model.config)
    second = first.at[:, 6].set((first[:, 6] + 1) % model.config.vocab_size)
    a, b = (np.asarray(logits(model, run(model, x).hidden)) for x in (first, second))
    # rows of one expert move within their tile, so sums may round differently: not bitwise
    np.testing.assert_allclose(a[:, :6], b[:, :6], atol=1e-5)
    assert np.abs(a[:, 6:] - b[:, 6:]).max() > 1e-2


@pytest.fixture(scope="module")
def gradients(model):
    """A loss and its gradient by rematerialisation policy."""
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    x = tokens(model.config)

    @functools.cache
    def of_policy(policy):
        execution = Execution(rematerialise=policy)

        def value(params):
            out = forward(nnx.merge(graphdef, params, rest), x, execution)
            return jnp.sum(jnp.sin(out.hidden))

        return jax.jit(jax.value_and_grad(value))(params)

    return of_policy


@pytest.mark.parametrize("policy", [p for p in REMATERIALISATION if p != "none"])
def test_rematerialisation_changes_no_number(gradients, policy):
    one, other = gradients("none"), gradients(policy)
    np.testing.assert_allclose(one[0], other[0], rtol=1e-5)
    for a, b in zip(jax.tree.leaves(one[1]), jax.tree.leaves(other[1]), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_mtp_knows_one_token_more_and_not_two(model):
    config = model.config
    first = tokens(config)
    hidden = run(model, first).hidden
    out = np.asarray(further(model, hidden, first).hidden)[0]
    assert out.shape == (2, 11, config.hidden_size)
    changed = first.at[:, 7].set((first[:, 7] + 1) % config.vocab_size)
    # the representation is held fixed: only the embedding of the token ahead is read
    other = np.asarray(further(model, hidden, changed).hidden)[0]
    moved = np.abs(out - other).max(-1)
    assert (moved[:, 6] > 1e-3).all() and (moved[:, :6] < 1e-5).all()


def test_mtp_needs_its_modules(v3_config):
    plain = Decoder(dataclasses.replace(v3_config, num_nextn_predict_layers=0), rngs=nnx.Rngs(0))
    x = tokens(v3_config)
    with pytest.raises(ValueError, match="num_nextn_predict_layers=0"):
        predict_further(plain, forward(plain, x).hidden, x)


def test_bfloat16_activations_stay_near_float32(model):
    x = tokens(model.config)
    exact = np.asarray(logits(model, run(model, x).hidden))
    rough = run(model, x, execution=Execution(precision=PRECISIONS["bf16"]))
    assert rough.hidden.dtype == jnp.bfloat16
    got = np.asarray(logits(model, rough.hidden))
    assert 0 < np.median(np.abs(got - exact)) < 0.05 * exact.std()


def test_latents_are_what_decode_will_read(model):
    out = run(model, tokens(model.config))
    assert out.latents.shape == (3, 2, 11, model.config.mla.cache_dim)


def test_positions_shift_the_rotation(model):
    x = tokens(model.config)
    at = jnp.arange(11, dtype=jnp.int32)[None]
    same = run(model, x, positions=at).hidden
    np.testing.assert_allclose(same, run(model, x).hidden, atol=1e-5)  # two programs, two roundings
    # attention sees distances alone: a shift changes nothing but rounding
    shifted = run(model, x, positions=at + 3).hidden
    np.testing.assert_allclose(shifted, same, atol=1e-4)
    assert np.abs(run(model, x, positions=at * 2).hidden - same).max() > 1e-3


def test_an_unknown_policy_lists_those_there_are():
    with pytest.raises(ValueError, match="'some' is unknown; there are none, full, dots"):
        Execution(rematerialise="some")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"vocab_size": 0}, "vocab_size=0"),
        ({"hidden_size": -4, "vocab_size": 2.5}, "vocab_size=2.5, hidden_size=-4"),
        ({"moe": None}, "leaves MoE layers"),
        ({"moe": None, "first_k_dense_replace": 9}, "needs moe"),
        ({"num_nextn_predict_layers": -1}, "num_nextn_predict_layers=-1"),
    ],
)
def test_impossible_models_are_refused(v3_config, change, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(v3_config, **change)


def test_a_model_of_dense_layers_alone(v3_config):
    config = dataclasses.replace(
        v3_config, moe=None, first_k_dense_replace=3, num_nextn_predict_layers=0
    )
    assert isinstance(config, ModelConfig) and config.num_moe_layers == 0
    model = Decoder(config, rngs=nnx.Rngs(0))
    out = forward(model, tokens(config))
    assert out.load.size == 0 and float(out.balance_loss) == 0
    assert model(tokens(config)).shape == (2, 11, config.vocab_size)
