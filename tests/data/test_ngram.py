from collections import Counter

import numpy as np
import pytest

from whalejax.data.ngram import evaluate


def slow(train, heldout, vocab_size):
    """The definition, one token at a time."""
    counts = [
        Counter(tuple(train[i : i + n]) for i in range(len(train) - n + 1)) for n in (1, 2, 3)
    ]
    # a context counts only where a token follows it
    contexts = [Counter(tuple(train[i : i + n]) for i in range(len(train) - n)) for n in (1, 2)]

    def p(order, context, token):
        if order == 1:
            return (counts[0][(token,)] + 1) / (len(train) + vocab_size)
        context = context[-(order - 1) :]
        lower = p(order - 1, context, token)
        both = counts[order - 1][(*context, token)]
        return (both + 5 * lower) / (contexts[order - 2][context] + 5)

    losses = []
    for order in (1, 2, 3):
        total = 0.0
        for i, token in enumerate(heldout):
            n = min(order, i + 1)
            total -= np.log(p(n, tuple(heldout[max(i - 2, 0) : i]), token))
        losses.append(total / len(heldout))
    return losses


@pytest.mark.parametrize("seed", range(4))
def test_equals_the_definition(seed):
    rng = np.random.default_rng(seed)
    train, heldout = rng.integers(0, 5, 300), rng.integers(0, 6, 80)
    np.testing.assert_allclose(evaluate(train, heldout, vocab_size=6), slow(
        train.tolist(), heldout.tolist(), 6), rtol=1e-12)  # fmt: skip


@pytest.mark.parametrize("vocab_size", [400, 100_000], ids=["sorted trigrams", "sorted bigrams"])
def test_large_vocabularies_equal_the_definition(vocab_size):
    rng = np.random.default_rng(0)
    words = np.sort(rng.integers(0, vocab_size, 6))  # the last, never trained on, has the top id
    train, heldout = words[rng.integers(0, 5, 300)], words[rng.integers(0, 6, 80)]
    np.testing.assert_allclose(
        evaluate(train, heldout, vocab_size=vocab_size),
        slow(train.tolist(), heldout.tolist(), vocab_size),
        rtol=1e-12,
    )


@pytest.mark.parametrize("length", [1, 2])
def test_streams_shorter_than_the_order(length):
    train, heldout = np.array([2, 1, 2])[:length], np.array([1, 2])[:length]
    for vocab_size in (3, 1000):
        np.testing.assert_allclose(
            evaluate(train, heldout, vocab_size=vocab_size),
            slow(train.tolist(), heldout.tolist(), vocab_size),
            rtol=1e-12,
        )


def test_longer_contexts_help_on_a_cycle():
    text = np.tile([1, 2, 1, 3], 500)
    losses = evaluate(text, text, vocab_size=4)
    assert losses.unigram > losses.bigram > losses.trigram
    assert losses.trigram < 0.05


def test_probabilities_sum_to_one():
    rng = np.random.default_rng(0)
    train = rng.integers(0, 4, 100)
    context = [2, 1]
    total = sum(
        np.exp(-3 * evaluate(train, np.array([*context, t]), vocab_size=4).trigram
               + 2 * evaluate(train, np.array(context), vocab_size=4).trigram)
        for t in range(4)
    )  # fmt: skip
    assert total == pytest.approx(1)


def test_what_cannot_be_fitted_is_refused():
    with pytest.raises(ValueError, match="held out 0 tokens"):
        evaluate(np.arange(4), np.array([], int))
    with pytest.raises(ValueError, match="vocab_size=2097152 below 2097152"):
        evaluate(np.arange(4), np.arange(4), vocab_size=2**21)
    for token in (4, -1):
        with pytest.raises(ValueError, match="do not fit vocab_size=4"):
            evaluate(np.arange(4), np.array([0, token]), vocab_size=4)
