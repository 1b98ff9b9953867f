"""Uni-, bi- and trigram models of byte streams, the baselines that a model has to beat."""

from typing import NamedTuple

import numpy as np

CONTEXT_WEIGHT = 5.0  # pseudo-counts that the lower order spreads over the next token


class NgramLosses(NamedTuple):
    """Held-out nats per token of each order."""

    unigram: float
    bigram: float
    trigram: float


def evaluate(train: np.ndarray, heldout: np.ndarray, *, vocab_size: int = 256) -> NgramLosses:
    """Fits on one stream, measures on another.

    The unigram adds one to every count; order o interpolates:
    `p = (count(context, token) + 5 * p of order o - 1) / (count(context) + 5)`. The first tokens
    of the stream, which have no full context, use the order that they have context for.

    Args:
      train, heldout: integers below `vocab_size`.
      vocab_size: V; V^3 counts are held, so bytes rather than words.

    Raises:
      ValueError: a stream is empty, or V is over 256.
    """
    if not len(train) or not len(heldout) or vocab_size > 256:
        raise ValueError(
            f"n-grams need two streams (train {len(train)}, held out {len(heldout)} tokens) and "
            f"vocab_size={vocab_size} up to 256"
        )
    train, heldout = train.astype(np.int64), heldout.astype(np.int64)
    counts = np.bincount(train, minlength=vocab_size)
    p = ((counts + 1) / (len(train) + vocab_size))[heldout]
    losses = [-np.log(p).mean()]
    for order in (2, 3):
        context = _codes(heldout, order - 1, vocab_size)[:-1]
        seen = _counts(train[:-1], order - 1, vocab_size)[context]
        both = _counts(train, order, vocab_size)[_codes(heldout, order, vocab_size)]
        start = order - 1
        p = p.copy()
        p[start:] = (both + CONTEXT_WEIGHT * p[start:]) / (seen + CONTEXT_WEIGHT)
        losses.append(-np.log(p).mean())
    return NgramLosses(*(float(loss) for loss in losses))


def _codes(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """Each run of `order` tokens as one number."""
    codes = np.zeros(max(len(tokens) - order + 1, 0), np.int64)
    for i in range(order):
        codes = codes * vocab_size + tokens[i : len(tokens) - order + 1 + i]
    return codes


def _counts(tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    return np.bincount(_codes(tokens, order, vocab_size), minlength=vocab_size**order)
