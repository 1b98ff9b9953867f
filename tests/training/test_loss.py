import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from whalejax.model.decoder import Decoder, Execution, forward
from whalejax.model.mtp import predict_further
from whalejax.training import loss as losses
from whalejax.training.loss import LossConfig, chunk_length, cross_entropy, training_loss


def log_softmax(scores):
    scores = scores - scores.max(-1, keepdims=True)
    return scores - np.log(np.exp(scores).sum(-1, keepdims=True))


@pytest.fixture(scope="module")
def model(micro):
    return Decoder(micro, rngs=nnx.Rngs(3))


def test_cross_entropy_equals_numpy_float64(model, micro):
    keys = jax.random.split(jax.random.key(0), 3)
    hidden = jax.random.normal(keys[0], (3, 12, micro.hidden_size)) * 4
    labels = jax.random.randint(keys[1], (3, 12), 0, micro.vocab_size)
    weights = jax.random.uniform(keys[2], (3, 12))
    scores = np.asarray(hidden, np.float64) @ np.asarray(model.lm_head[...], np.float64).T
    chosen = np.take_along_axis(log_softmax(scores), np.asarray(labels)[..., None], -1)[..., 0]
    truth = -(chosen * np.asarray(weights, np.float64)).sum()
    got = cross_entropy(model, hidden, labels, weights)
    np.testing.assert_allclose(got, truth, rtol=2e-6)  # 36 float32 terms


def test_chunks_change_neither_value_nor_gradient(model, micro, monkeypatch):
    hidden = jax.random.normal(jax.random.key(0), (2, 12, micro.hidden_size))
    labels = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)

    def value(hidden):
        return cross_entropy(model, hidden, labels, jnp.ones((2, 12)))

    whole = jax.value_and_grad(value)(hidden)
    monkeypatch.setattr(losses, "MAX_LOGITS", 2 * micro.vocab_size * 3)
    assert chunk_length(2, 12, micro.vocab_size) == 3
    pieces = jax.value_and_grad(value)(hidden)
    np.testing.assert_allclose(whole[0], pieces[0], rtol=1e-6)
    np.testing.assert_allclose(whole[1], pieces[1], atol=1e-6)


def test_chunk_length_divides_and_fits():
    for length in (1, 7, 12, 4096):
        for vocab in (256, 129280):
            chunk = chunk_length(4, length, vocab)
            assert length % chunk == 0
            assert chunk == 1 or 4 * chunk * vocab <= losses.MAX_LOGITS


def test_total_is_the_weighted_sum_of_its_parts(model):
    tokens = jax.random.randint(jax.random.key(1), (2, 17), 0, 256)
    config = LossConfig(mtp_weight=0.7, balance_weight=0.2)
    total, parts = training_loss(model, tokens, config, Execution())
    expected = parts.main + 0.7 * parts.mtp + 0.2 * parts.balance
    np.testing.assert_allclose(total, expected, rtol=1e-6)
    assert parts.load.sum() == parts.mtp_load.sum() == 2 * 16 * 2


def test_mtp_predicts_the_token_after_next(model):
    tokens = jax.random.randint(jax.random.key(1), (2, 9), 0, 256)
    got = training_loss(model, tokens, LossConfig(), Execution())[1].mtp
    inputs = tokens[:, :-1]
    hidden = predict_further(model, forward(model, inputs).hidden, inputs).hidden[0]
    scores = np.asarray(hidden, np.float64) @ np.asarray(model.lm_head[...], np.float64).T
    labels = np.asarray(tokens)[:, 2:]  # of positions 0 to 6; position 7 has none
    chosen = np.take_along_axis(log_softmax(scores[:, :7]), labels[..., None], -1)
    np.testing.assert_allclose(got, -chosen.mean(), rtol=2e-6)


def test_negative_weight_is_refused():
    with pytest.raises(ValueError, match=r"mtp_weight=-0\.1"):
        LossConfig(mtp_weight=-0.1)


def test_loss_config_is_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        LossConfig().mtp_weight = 1.0
