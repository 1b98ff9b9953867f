"""Tokenizers: plain bytes, or a Hugging Face `tokenizer.json` with its chat template."""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Protocol

import numpy as np


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

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> str:
        """The prompt that asks for the answer to `messages`."""

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
        return bytes(int(token) for token in tokens).decode(errors="replace")

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> str:
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
      ValueError: it cannot be read, or no end-of-text token is known.
    """

    def __init__(self, path: Path):
        import tokenizers

        self.path = path
        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises bare exceptions
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from None
        self.config = _read_json(path.parent / "tokenizer_config.json")
        self.vocab_size = self._tokenizer.get_vocab_size()
        self.eos_token = _token_text(self.config.get("eos_token"))
        self.bos_token = _token_text(self.config.get("bos_token"))
        candidates = [self.eos_token, "<｜end▁of▁sentence｜>", "</s>", "<|endoftext|>", "<eos>"]
        ids = [self._tokenizer.token_to_id(token) for token in candidates if token]
        known = [i for i in ids if i is not None]
        if not known:
            raise ValueError(
                f"{path}: no end-of-text token; name it as eos_token in tokenizer_config.json"
            )
        self.eos_id = known[0]

    def encode(self, text: str | bytes) -> np.ndarray:
        """Tokens `i32[n]` of a text, without special tokens."""
        text = text.decode(errors="replace") if isinstance(text, bytes) else text
        return np.asarray(self._tokenizer.encode(text, add_special_tokens=False).ids, np.int32)

    def decode(self, tokens: Sequence[int]) -> str:
        """Text of tokens, special ones left out."""
        return self._tokenizer.decode([int(token) for token in tokens])

    def apply_chat_template(self, messages: Sequence[dict[str, str]]) -> str:
        """Renders the model's own chat template, with the answer's beginning.

        Args:
          messages: dictionaries with `role` and `content`.

        Raises:
          ValueError: there is no template, or it refuses the messages.
        """
        import jinja2
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        def refuse(message: str) -> None:
            raise ValueError(f"the chat template refuses: {message}")

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        environment.globals["raise_exception"] = refuse
        try:
            return environment.from_string(self._template()).render(
                messages=list(messages),
                add_generation_prompt=True,
                bos_token=self.bos_token or "",
                eos_token=self.eos_token or "",
            )
        except jinja2.TemplateError as error:
            raise ValueError(f"{self.path.parent}: bad chat template: {error}") from None

    def _template(self) -> str:
        file = self.path.parent / "chat_template.jinja"
        template = file.read_text() if file.exists() else self.config.get("chat_template")
        if not isinstance(template, str):
            raise ValueError(f"{self.path.parent} has no chat template")
        return template

    def save(self, folder: Path) -> None:
        """Copies the tokenizer's files."""
        for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
            source = self.path if name == "tokenizer.json" else self.path.parent / name
            if source.exists():
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


def _read_json(path: Path) -> dict[str, Any]:
    if not path.exists():
        return {}
    try:
        return json.loads(path.read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON: {error}") from None


def _token_text(token: Any) -> str | None:
    return token.get("content") if isinstance(token, dict) else token
