import numpy as np
import pytest
import tokenizers

from whalejax.data.tokens import join
from whalejax.tokenizer import ByteTokenizer, load


def test_one_nul_stands_between_two_documents():
    tokens = join([b"ab", b"", b"c"], ByteTokenizer())
    assert tokens.tolist() == [97, 98, 0, 0, 99] and tokens.dtype == np.uint8


def test_no_documents_are_no_tokens():
    assert join([], ByteTokenizer()).size == 0
    assert join([b"x"], ByteTokenizer()).tolist() == [120]


def test_words_are_joined_by_the_end_of_text(tmp_path):
    words = {"<unk>": 0, "a": 1, "b": 2, "<eos>": 3, "far": 300}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    tokens = join([b"a b", b"far"], load(tmp_path))
    assert tokens.tolist() == [1, 2, 3, 300]
    assert tokens.dtype == np.uint16


@pytest.mark.parametrize(("size", "dtype"), [(256, np.uint8), (257, np.uint16), (70000, np.int32)])
def test_the_narrowest_dtype_holds_the_vocabulary(size, dtype):
    tokenizer = ByteTokenizer()
    tokenizer.vocab_size = size
    assert join([b"x"], tokenizer).dtype == dtype
