import numpy as np
import pytest

from whalejax.data.tokens import join
from whalejax.tokenizer import ByteTokenizer


def test_one_nul_stands_between_two_documents():
    tokens = join([b"ab", b"", b"c"], ByteTokenizer())
    assert tokens.tolist() == [97, 98, 0, 0, 99] and tokens.dtype == np.uint8


def test_no_documents_are_no_tokens():
    assert join([], ByteTokenizer()).size == 0
    assert join([b"x"], ByteTokenizer()).tolist() == [120]


@pytest.mark.parametrize(("size", "dtype"), [(256, np.uint8), (257, np.uint16), (70000, np.int32)])
def test_the_narrowest_dtype_holds_the_vocabulary(size, dtype):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = size
    assert join([b"x"], tokenizer).dtype == dtype
