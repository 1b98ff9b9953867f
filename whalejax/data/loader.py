"""The training loader: a batch is a pure function of the seed and the step.

There is no state to save: a run that resumes asks for its next step. Each epoch cuts the tokens
into windows at a new offset and visits them in a new order, a keyed permutation computed window by
window (a Feistel network over a power of four, walked until it lands inside).
"""

import numpy as np

ROUNDS = 4


def batch_at(tokens: np.ndarray, *, step: int, batch: int, length: int, seed: int) -> np.ndarray:
    """The sequences of one step.

    Args:
      tokens: integers `[n]`.
      step: from 0.
      batch: sequences a step; data-parallel callers take their own rows of the result.
      length: tokens that a sequence predicts.
      seed: of the order.

    Returns:
      `i32[batch, length + 1]`; inputs are all but the last column, labels all but the first.

    Raises:
      ValueError: the tokens do not fill one window at every offset, or a size is not positive.
    """
    if step < 0 or batch < 1 or length < 1:
        raise ValueError(
            f"step={step} must be at least 0, batch={batch} and length={length} at least 1"
        )
    windows = (len(tokens) - 1) // length - 1  # one fewer, so that every offset has room
    if windows < 1:
        raise ValueError(
            f"{len(tokens)} tokens are too few for sequences of length={length}: "
            f"{2 * length + 1} are needed"
        )
    index = step * batch + np.arange(batch, dtype=np.int64)
    epoch, place = index // windows, index % windows
    window = np.array(
        [permute(int(p), windows, key(seed, int(e))) for p, e in zip(place, epoch, strict=True)]
    )
    offset = np.array([key(seed, int(e)) % length for e in epoch])
    starts = offset + window * length
    return tokens[starts[:, None] + np.arange(length + 1)].astype(np.int32)


def key(seed: int, epoch: int) -> int:
    """A 64-bit key of an epoch."""
    return _mix(_mix(seed & _MASK) ^ (epoch + 1))


def permute(index: int, size: int, key: int) -> int:
    """The place of `index` in a pseudo-random permutation of `range(size)`."""
    half = max((size - 1).bit_length() + 1, 2) // 2
    mask = (1 << half) - 1
    while True:  # at most 4 rounds on average: the network covers under four times the size
        left, right = index >> half, index & mask
        for i in range(ROUNDS):
            left, right = right, left ^ (_mix(right ^ _mix(key + i)) & mask)
        index = left << half | right
        if index < size:
            return index


_MASK = (1 << 64) - 1


def _mix(x: int) -> int:
    """The finaliser of SplitMix64 (Steele et al., OOPSLA 2014)."""
    x = (x + 0x9E3779B97F4A7C15) & _MASK
    x = ((x ^ x >> 30) * 0xBF58476D1CE4E5B9) & _MASK
    x = ((x ^ x >> 27) * 0x94D049BB133111EB) & _MASK
    return x ^ x >> 31
