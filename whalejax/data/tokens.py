"""Documents as one stream of tokens."""

from collections.abc import Sequence

import numpy as np

from whalejax.tokenizer import Tokenizer


def join(documents: Sequence[bytes], tokenizer: Tokenizer) -> np.ndarray:
    """The tokens of all documents with one separator between two (bytes: a NUL).

    Args:
      documents: UTF-8 text.
      tokenizer: its `eos_id` is the separator.

    Returns:
      `u8|u16|i32[tokens]`, the narrowest dtype that holds the vocabulary.
    """
    dtype = next(
        d for d in (np.uint8, np.uint16, np.int32) if tokenizer.vocab_size - 1 <= np.iinfo(d).max
    )
    separator = np.array([tokenizer.eos_id], dtype)
    parts = [separator] * max(2 * len(documents) - 1, 0)
    parts[::2] = [np.asarray(tokenizer.encode(document), dtype) for document in documents]
    return np.concatenate(parts) if parts else np.zeros(0, dtype)
