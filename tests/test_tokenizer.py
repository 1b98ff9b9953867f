import json

import numpy as np
import pytest
import tokenizers

from whalejax.tokenizer import ByteTokenizer, HuggingFaceTokenizer, load

TEMPLATE = (
    "{% for m in messages %}\n"
    "<{{ m['role'] }}>{{ m['content'] }}{{ eos_token }}\n"
    "{% endfor %}\n"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


@pytest.fixture
def folder(tmp_path):
    words = {w: i for i, w in enumerate(["<eos>", "<unk>", "the", "whale", "swims"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<unk>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token": {"content": "<eos>"}, "chat_template": TEMPLATE}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    return tmp_path


@pytest.mark.parametrize("text", ["", "plain", "wäl 鯨 🐋", "a\x00b"])
def test_bytes_there_and_back(text):
    tokenizer = ByteTokenizer()
    assert tokenizer.decode(tokenizer.encode(text)) == text
    np.testing.assert_array_equal(tokenizer.encode(text), tokenizer.encode(text.encode()))
    assert tokenizer.encode(text).dtype == np.int32


def test_broken_utf8_is_shown_as_such():
    assert ByteTokenizer().decode([0xE9, 65]) == "\ufffdA"


def test_bytes_have_no_chat():
    with pytest.raises(ValueError, match="no chat template"):
        ByteTokenizer().apply_chat_template([])


def test_a_tokenizer_json_is_read(folder):
    for path in (folder, folder / "tokenizer.json"):
        tokenizer = load(path)
        assert tokenizer.encode("the whale flies").tolist() == [2, 3, 1]
        assert (tokenizer.vocab_size, tokenizer.eos_id) == (5, 0)
        assert tokenizer.decode([2, 3, 4]) == "the whale swims"


def test_the_chat_template_is_rendered(folder):
    text = load(folder).apply_chat_template([{"role": "user", "content": "hi"}])
    assert text == "<user>hi<eos>\n<assistant>"


def test_a_template_file_comes_first(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert load(folder).apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"


@pytest.mark.parametrize(
    ("template", "says"),
    [("{{ raise_exception('no system') }}", "refuses: no system"),
     ("{% if %}", "bad chat template"),
     (None, "has no chat template")],
)  # fmt: skip
def test_templates_that_fail(folder, template, says):
    config = {"eos_token": "<eos>", "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match=says):
        load(folder).apply_chat_template([{"role": "user", "content": "hi"}])


def test_saved_files_are_read_back(folder, tmp_path):
    copy = tmp_path / "copy"
    copy.mkdir()
    load(folder).save(copy)
    assert load(copy).apply_chat_template([]) == load(folder).apply_chat_template([])
    assert isinstance(load(copy), HuggingFaceTokenizer)
    empty = tmp_path / "empty"
    empty.mkdir()
    ByteTokenizer().save(empty)
    assert isinstance(load(empty), ByteTokenizer)


def test_what_is_no_tokenizer(folder):
    with pytest.raises(FileNotFoundError, match="missing"):
        load(folder / "missing")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load(folder)


def test_an_end_of_text_is_needed(folder):
    words = {"a": 0}
    tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="a")).save(
        str(folder / "tokenizer.json")
    )
    with pytest.raises(ValueError, match="no end-of-text token"):
        load(folder)
