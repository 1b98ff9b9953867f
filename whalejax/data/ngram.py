"""Uni-, bi- and trigram models of token streams, the baselines that a model has to beat."""

from typing import NamedTuple

import numpy as np

CONTEXT_WEIGHT = 5.0  # pseudo-counts that the lower order spreads over the next token
MAX_TABLE = 1 << 25  # counts in one table, 256 MiB; rarer runs of more are sorted instead


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
      vocab_size: V. Bytes are counted in a table of V^3, larger vocabularies by sorting.

    Raises:
      ValueError: a stream is empty, a token is outside the vocabulary, or V^3 is over 63 bits.
    """
    if not len(train) or not len(heldout) or vocab_size >= 2**21:
        raise ValueError(
            f"n-grams need two streams (train {len(train)}, held out {len(heldout)} tokens) and "
            f"vocab_size={vocab_size} below {2**21}"
        )
    train, heldout = train.astype(np.int64), heldout.astype(np.int64)
    low, high = min(train.min(), heldout.min()), max(train.max(), heldout.max())
    if low < 0 or high >= vocab_size:
        raise ValueError(f"tokens from {low} to {high} do not fit vocab_size={vocab_size}")
    counts = np.bincount(train, minlength=vocab_size)
    p = ((counts + 1) / (len(train) + vocab_size))[heldout]
    losses = [-np.log(p).mean()]
    for order in (2, 3):
        context = _codes(heldout, order - 1, vocab_size)[:-1]
        # the last run of the training stream is no context: no token follows it
        seen = _occurrences(context, train[:-1], order - 1, vocab_size)
        both = _occurrences(_codes(heldout, order, vocab_size), train, order, vocab_size)
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


def _occurrences(codes: np.ndarray, tokens: np.ndarray, order: int, vocab_size: int) -> np.ndarray:
    """How often each of the runs `codes` occurs in `tokens`."""
    runs = _codes(tokens, order, vocab_size)
    if vocab_size**order <= MAX_TABLE:
        return np.bincount(runs, minlength=vocab_size**order)[codes]
    known, counts = np.unique(runs, return_counts=True)
    # a last entry above every code, so that each search lands on an entry
    known, counts = np.append(known, np.iinfo(np.int64).max), np.append(counts, 0)
    at = np.searchsorted(known, codes)
    return np.where(known[at] == codes, counts[at], 0)
