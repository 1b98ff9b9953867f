import dataclasses
import json

import pytest
import tokenizers
from flax import nnx

from whalejax.generation import run
from whalejax.generation.engine import NewToken
from whalejax.generation.run import GenerateConfig, generate, pieces, read_prompt
from whalejax.model.decoder import Decoder
from whalejax.tokenizer import ByteTokenizer
from whalejax.training.checkpoints import Checkpoints
from whalejax.training.step import StepConfig, state_of
from whalejax.weights import save_pretrained


@pytest.fixture(scope="module")
def folder(v3_model, tmp_path_factory):
    path = tmp_path_factory.mktemp("weights") / "model"
    save_pretrained(v3_model, path)
    return path


@pytest.fixture
def chat_folder(folder, tmp_path):
    """The same weights behind a tokenizer with a chat template."""
    path = tmp_path / "chat"
    path.mkdir()
    for file in folder.iterdir():
        (path / file.name).symlink_to(file)
    words = ["<unk>", "<user>", "<assistant>", "</s>", "hello", "world"]
    model = tokenizers.models.WordLevel({w: i for i, w in enumerate(words)}, unk_token="<unk>")
    tokenizer = tokenizers.Tokenizer(model)
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.save(str(path / "tokenizer.json"))
    template = "<user> {{ messages[0]['content'] }} <assistant>"
    (path / "tokenizer_config.json").write_text(
        json.dumps({"eos_token": "</s>", "chat_template": template})
    )
    return path


def test_writes_the_prompt_and_what_the_engine_gives(folder, monkeypatch, capsys):
    given, stream = [], run.Engine.stream

    def spy(self, *args, **options):
        for step in stream(self, *args, **options):
            given.append(step)
            yield step

    monkeypatch.setattr(run.Engine, "stream", spy)
    generate(GenerateConfig(model=folder, prompt="def f", max_new_tokens=9, temperature=0))
    assert len(given) == 9 or given[-1].finish_reason == "stop"
    text = ByteTokenizer().decode([s.token for s in given if s.finish_reason != "stop"])
    assert capsys.readouterr().out == f"def f{text}\n"


def test_a_run_writes_what_its_export_does(v3_model, folder, tmp_path, capsys):
    with Checkpoints(tmp_path, v3_model.config) as checkpoints:
        checkpoints.save(3, state_of(v3_model, StepConfig(steps=10)))
    for path in (folder, tmp_path):
        generate(GenerateConfig(model=path, prompt="def f", max_new_tokens=9, temperature=0))
    first, second = capsys.readouterr().out.rstrip("\n").split("\ndef f")
    assert first == f"def f{second}"


def test_the_prompt_comes_from_a_file(tmp_path):
    (tmp_path / "p.txt").write_text("naïve", encoding="utf-8")
    assert read_prompt(GenerateConfig(prompt_file=tmp_path / "p.txt")) == "naïve"
    with pytest.raises(ValueError, match="not both"):
        read_prompt(GenerateConfig(prompt="a", prompt_file=tmp_path / "p.txt"))
    with pytest.raises(FileNotFoundError, match=r"none\.txt does not exist"):
        read_prompt(GenerateConfig(prompt_file=tmp_path / "none.txt"))


def steps(content, reason="length"):
    last = len(content) - 1
    return [NewToken(0, b, reason if i == last else None) for i, b in enumerate(content)]


def test_half_a_character_waits_for_its_rest():
    got = list(pieces(steps("aé€".encode()), ByteTokenizer()))
    assert [text for text in got if text] == ["a", "é", "€"]


def test_what_never_becomes_a_character_is_shown_at_the_end():
    assert "".join(pieces(steps("a€".encode()[:-1]), ByteTokenizer())) == "a\ufffd"
    assert "".join(pieces(steps(b"ab\0", reason="stop"), ByteTokenizer())) == "ab"


def test_chat_applies_the_template_and_stops_at_its_end(chat_folder, monkeypatch, capsys):
    asked = {}

    def stream(self, prompts, **options):
        asked.update(prompts=[list(map(int, p)) for p in prompts], **options)
        return iter([NewToken(0, 5, None), NewToken(0, 3, "stop")])

    monkeypatch.setattr(run.Engine, "stream", stream)
    generate(GenerateConfig(model=chat_folder, prompt="hello world", chat=True, top_p=0.5, seed=3))
    assert asked["prompts"] == [[1, 4, 5, 2]] and asked["stop_tokens"] == (3,)
    assert asked["sampling"].top_p == 0.5 and asked["sampling"].seed == 3
    assert capsys.readouterr().out == "world\n"  # the question is not repeated


@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ({"chat": True}, "no chat template"),
        ({"prompt": ""}, "the prompt is empty"),
        ({"prompt": "a" * 60}, "60 tokens, with max_new_tokens=5 more than the 64"),
        ({"max_new_tokens": 10**9}, "more than the 64 that fit"),
        ({"seed": 2**40}, "seed=1099511627776"),
    ],
    ids=str,
)
def test_a_mistake_is_one_line_and_writes_nothing(folder, flags, says, capsys):
    with pytest.raises(ValueError, match=says) as error:
        generate(GenerateConfig(**{"model": folder, "prompt": "a", "max_new_tokens": 5, **flags}))
    assert "\n" not in str(error.value) and capsys.readouterr().out == ""


def test_an_answer_has_at_least_one_token():
    with pytest.raises(ValueError, match="max_new_tokens=-3"):
        GenerateConfig(max_new_tokens=-3)


def test_a_vocabulary_of_another_size_is_not_read_as_bytes(v3_model, tmp_path):
    config = dataclasses.replace(v3_model.config, vocab_size=300)
    save_pretrained(Decoder(config, rngs=nnx.Rngs(0)), tmp_path / "words")
    with pytest.raises(ValueError, match=r"vocab_size=300, the tokenizer 256 \(bytes"):
        generate(GenerateConfig(model=tmp_path / "words", prompt="a"))
