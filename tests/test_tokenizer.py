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


def test_tokens_beyond_the_bytes_are_shown_as_such():
    assert ByteTokenizer().decode([65, 300, 66]) == "A\ufffdB"


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


def test_the_answer_is_begun_only_on_demand(folder):
    messages = [{"role": "user", "content": "hi"}]
    text = load(folder).apply_chat_template(messages, add_generation_prompt=False)
    assert text == "<user>hi<eos>\n"


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{% for m in messages %}{{ m.content }}{% break %}{% endfor %}", "hé<b>"),
        ("{{ messages[0] | tojson }}", '{"role": "user", "content": "hé<b>"}'),
        ("{{ bos_token }}|{{ pad_token }}|{{ eos_token }}", "|<pad>|<eos>"),
        ("{{ strftime_now('%%') }}", "%"),
        ([{"name": "tools", "template": "x"}, {"name": "default", "template": "y"}], "y"),
    ],
    ids=["break", "tojson", "special tokens", "strftime_now", "several"],
)
def test_templates_have_what_transformers_gives_them(folder, template, text):
    config = {"eos_token": "<eos>", "pad_token": {"content": "<pad>"}, "chat_template": template}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    assert load(folder).apply_chat_template([{"role": "user", "content": "hé<b>"}]) == text


def test_a_template_cannot_reach_the_machine(folder):
    config = {"eos_token": "<eos>", "chat_template": "{{ ''.__class__.__mro__ }}"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="bad chat template"):
        load(folder).apply_chat_template([])


def test_a_template_file_comes_first(folder):
    (folder / "chat_template.jinja").write_text("{{ messages[0]['content'] }}!")
    assert load(folder).apply_chat_template([{"role": "user", "content": "hi"}]) == "hi!"


@pytest.mark.parametrize(
    ("template", "says"),
    [
        ("{{ raise_exception('no system') }}", "refuses: no system"),
        ("{% if %}", "bad chat template"),
        ("{{ messages[0].content + 1 }}", "bad chat template"),
        (None, "has no chat template"),
        ([{"name": "tools", "template": "x"}], "has no chat template"),
    ],
)
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


def test_a_template_file_is_saved_too(folder, tmp_path):
    (folder / "chat_template.jinja").write_text("from the file")
    copy = tmp_path / "copy"
    copy.mkdir()
    load(folder).save(copy)
    assert load(copy).apply_chat_template([]) == "from the file"


def test_encoding_adds_no_special_tokens(folder):
    """The chat template writes them itself."""
    tokenizer = tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing(
        single="<eos> $A", special_tokens=[("<eos>", 0)]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    assert load(folder).encode("the whale").tolist() == [2, 3]


def test_saving_where_it_was_read_changes_nothing(folder):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    load(folder).save(folder)
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before


@pytest.mark.parametrize(
    ("content", "says"),
    [(b"\xff", "is not UTF-8"), (b"{", "is not JSON"), (b"[1]", "holds a list")],
    ids=["binary", "cut off", "list"],
)
def test_a_configuration_that_cannot_be_read(folder, content, says):
    (folder / "tokenizer_config.json").write_bytes(content)
    with pytest.raises(ValueError, match=f"tokenizer_config.json {says}"):
        load(folder)


def write_words(folder, words):
    model = tokenizers.models.WordLevel(words, unk_token="<unk>")
    tokenizers.Tokenizer(model).save(str(folder / "tokenizer.json"))
    return folder


def test_the_vocabulary_reaches_to_the_last_id(tmp_path):
    tokenizer = load(write_words(tmp_path, {"</s>": 0, "<unk>": 7}))
    assert tokenizer.vocab_size == 8


@pytest.mark.parametrize(
    "eos", ["<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<|endoftext|>"]
)
def test_the_usual_ends_of_text_are_known(tmp_path, eos):
    assert load(write_words(tmp_path, {"<unk>": 0, eos: 3})).eos_id == 3


def test_a_configured_end_of_text_is_not_guessed(tmp_path):
    write_words(tmp_path, {"</s>": 0, "<unk>": 1})
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<end>"}))
    with pytest.raises(ValueError, match="has no '<end>', the configured eos_token"):
        load(tmp_path)


def test_what_is_no_tokenizer(folder):
    with pytest.raises(FileNotFoundError, match="missing"):
        load(folder / "missing")
    (folder / "tokenizer.json").write_text("{}")
    with pytest.raises(ValueError, match=r"is not a tokenizer\.json"):
        load(folder)


def test_an_end_of_text_is_needed(folder):
    write_words(folder, {"<unk>": 0})
    (folder / "tokenizer_config.json").unlink()
    with pytest.raises(ValueError, match="no end-of-text token"):
        load(folder)
