"""Rows of several arrays as rows of 32-bit words: all of a token in one collective.

A second collective, of few bytes, would hide behind the work that the first one needs. Words, and
not bytes, because a GPU copies an element at a time where rows are cut or joined.
"""

import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax import lax

WORD = 4  # bytes
ALIGNMENT = 4  # words: rows start on 16 bytes, the most that a thread moves at once


def pack(arrays: Sequence[jax.Array]) -> jax.Array:
    """Arrays `[rows, ...]` side by side, `u32[rows, words]`."""
    words = [_words(a) for a in arrays]
    missing = -sum(a.shape[1] for a in words) % ALIGNMENT
    return jnp.pad(jnp.concatenate(words, axis=1), ((0, 0), (0, missing)))


def unpack(packed: jax.Array, like: Sequence[jax.Array], start: int = 0) -> list[jax.Array]:
    """The inverse of `pack`.

    Args:
      packed: `u32[rows, words]`.
      like: arrays `[..., ...]` whose dtypes and shapes of a row are wanted.
      start: the word at which the first of them begins.

    Returns:
      `[rows, ...]` each.
    """
    arrays = []
    for a in like:
        width = num_words(a)
        arrays.append(_array(packed[:, start : start + width], a))
        start += width
    return arrays


def num_words(a: jax.Array) -> int:
    """Words of a row of an array."""
    return -(-math.prod(a.shape[1:]) * a.dtype.itemsize // WORD)


def _words(a):
    rows, size = a.shape[0], a.dtype.itemsize
    flat = a.reshape(rows, -1)
    if size < WORD:
        per_word = WORD // size
        flat = jnp.pad(flat, ((0, 0), (0, -flat.shape[1] % per_word)))
        flat = flat.reshape(rows, -1, per_word)
    return lax.bitcast_convert_type(flat, jnp.uint32).reshape(rows, -1)


def _array(words, like):
    rows, size = words.shape[0], like.dtype.itemsize
    if size > WORD:
        words = words.reshape(rows, -1, size // WORD)
    flat = lax.bitcast_convert_type(words, like.dtype).reshape(rows, -1)
    return flat[:, : math.prod(like.shape[1:])].reshape(rows, *like.shape[1:])
