"""Tokenizers: plain bytes, or a Hugging Face `tokenizer.json` with its chat template."""

import datetime
import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np

# what ends a text where no eos_token is configured; the first is DeepSeek's, with U+FF5C and U+2581
END_OF_TEXT = ("<\uff5cend\u2581of\u2581sentence\uff5c>", "</s>", "<|endoftext|>", "<eos>")


class Tokenizer(Protocol):
    """What the rest of the library asks of a tokenizer.

    Attributes:
      vocab_size: tokens are numbered below it.
      eos_id: ends a document.
    """

    vocab_size: int
    eos_id: int

    def encode(self, text: str | bytes) -> np.ndarray:
        """Tokens `i32[n]` of a text, without special tokens."""

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens."""

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """The text of `messages`, by default with the beginning of the answer."""

    def save(self, folder: Path) -> None:
        """Writes what `load` reads."""


class ByteTokenizer:
    """UTF-8 bytes as tokens; NUL, which text does not hold, ends a document."""

    vocab_size = 256
    eos_id = 0

    def encode(self, text: str | bytes) -> np.ndarray:
        """Bytes `i32[n]` of a text."""
        content = text.encode() if isinstance(text, str) else text
        return np.frombuffer(content, np.uint8).astype(np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of bytes; what is not UTF-8 becomes the replacement character."""
        # a model's vocabulary may be larger than ours; 0xFF is in no UTF-8 text
        return bytes(min(int(token), 0xFF) for token in tokens).decode(errors="replace")

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Bytes have no chat template.

        Raises:
          ValueError: always.
        """
        raise ValueError("the byte tokenizer has no chat template: chat needs a tokenizer.json")

    def save(self, folder: Path) -> None:
        """Writes nothing: a folder without `tokenizer.json` is read as bytes."""


class HuggingFaceTokenizer:
    """A `tokenizer.json`, with `eos_token` and chat template from the files beside it.

    Args:
      path: of `tokenizer.json`.

    Raises:
      ValueError: it cannot be read, or the end-of-text token is not known.
    """

    def __init__(self, path: Path):
        import tokenizers

        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        self.config = _read_json(path.parent / "tokenizer_config.json")
        self.vocab_size = 1 + max(self._tokenizer.get_vocab().values())  # ids may have gaps
        self.special_tokens = {
            name: _token_text(value)
            for name, value in self.config.items()
            if name.endswith("_token") and _token_text(value) is not None
        }
        self.eos_id = self._eos_id()

    def _eos_id(self) -> int:
        eos_token = self.special_tokens.get("eos_token")
        for token in END_OF_TEXT if eos_token is None else [eos_token]:
            index = self._tokenizer.token_to_id(token)
            if index is not None:
                return index
        if eos_token is not None:
            raise ValueError(f"{self.path} has no {eos_token!r}, the configured eos_token")
        raise ValueError(
            f"{self.path}: no end-of-text token; name it as eos_token in tokenizer_config.json"
        )

    def encode(self, text: str | bytes) -> np.ndarray:
        """Tokens `i32[n]` of a text, without special tokens."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self._tokenizer.decode([int(token) for token in tokens])

    def apply_chat_template(
        self, messages: Sequence[dict[str, str]], *, add_generation_prompt: bool = True
    ) -> str:
        """Renders the model's own chat template, as transformers does.

        Args:
          messages: dictionaries with `role` and `content`.
          add_generation_prompt: end with the beginning of the answer.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        import jinja2

        try:
            return (
                _template_environment()
                .from_string(self._template())
                .render(
                    messages=list(messages),
                    add_generation_prompt=add_generation_prompt,
                    **self.special_tokens,
                )
            )
        except (jinja2.TemplateError, TypeError) as error:
            raise ValueError(f"{self.path.parent}: bad chat template: {error}") from None

    def _template(self) -> str:
        file = self.path.parent / "chat_template.jinja"
        template = _read_text(file) if file.exists() else self.config.get("chat_template")
        if isinstance(template, list):  # several, by name
            template = {entry["name"]: entry["template"] for entry in template}.get("default")
        if not isinstance(template, str):
            raise ValueError(f"{self.path.parent} has no chat template")
        return template

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's files."""
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            source = self.path if name == "tokenizer.json" else self.path.parent / name
            if source.exists() and source.resolve() != (folder / name).resolve():
                shutil.copyfile(source, folder / name)


def load(path: Path) -> Tokenizer:
    """Reads the tokenizer at a `tokenizer.json` or in a folder; bytes where a folder has none.

    Raises:
      FileNotFoundError: there is nothing at `path`.
      ValueError: the file is not a tokenizer.
    """
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist")
    if path.is_dir():
        path = path / "tokenizer.json"
        if not path.exists():
            return ByteTokenizer()
    return HuggingFaceTokenizer(path)


def _template_environment() -> Any:
    """What transformers gives a chat template to work with."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    def refuse(message: str) -> None:
        raise ValueError(f"the chat template refuses: {message}")

    def to_json(value: Any, **options: Any) -> str:  # jinja2's own escapes HTML
        return json.dumps(value, **{"ensure_ascii": False, **options})

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = to_json
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda form: datetime.datetime.now().strftime(form)
    return environment


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"{path} is not UTF-8 text") from None


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        config = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None
    if not isinstance(config, dict):
        raise ValueError(f"{path} holds a {type(config).__name__}, not a JSON object")
    return config


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
