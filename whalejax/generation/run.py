"""The `generate` command: text after a prompt, or an answer in a chat."""

import dataclasses
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Literal

from whalejax.generation.cache import CacheConfig
from whalejax.generation.engine import Engine, NewToken
from whalejax.generation.sampling import SamplingConfig
from whalejax.model.linear import PRECISIONS, Precision
from whalejax.tokenizer import ByteTokenizer, Tokenizer, load
from whalejax.weights import check_pretrained, from_pretrained
from whalejax.weights.runs import is_run, load_model, read_model_config


@dataclasses.dataclass(frozen=True, kw_only=True)
class GenerateConfig:
    """Generation from a training run or a Hugging Face directory.

    Attributes:
      model: a run's folder, whose newest checkpoint is taken, or a Hugging Face directory.
      prompt: text to continue, or the question with `chat`.
      prompt_file: a file that holds the prompt instead.
      chat: put the prompt into the tokenizer's chat template.
      max_new_tokens: most tokens to write.
      temperature: 0 takes the likeliest token each time.
      top_p: draw from the likeliest tokens of this total probability.
      seed: of the draws.
      precision: f32 and bf16 convert the weights; fp8 multiplies in FP8 and takes weights, FP8 or
        not, as they are stored; None for all as stored.
    """

    model: Path = Path("runs/demo")
    prompt: str = ""
    prompt_file: Path | None = None
    chat: bool = False
    max_new_tokens: int = 256
    temperature: float = 0.7
    top_p: float = 0.95
    seed: int = 0
    precision: Literal["f32", "bf16", "fp8"] | None = None

    def __post_init__(self):
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be positive")


def generate(config: GenerateConfig) -> None:
    """Streams the text to standard output.

    Raises:
      FileNotFoundError: the model or the prompt file does not exist.
      ValueError: there is no prompt, no chat template, the prompt is too long, or the tokenizer is
        not the model's.
    """
    sampling = SamplingConfig(temperature=config.temperature, top_p=config.top_p, seed=config.seed)
    prompt = read_prompt(config)
    if not config.model.is_dir():
        raise FileNotFoundError(f"{config.model} is not a directory with a model")
    tokenizer = load(config.model)
    from_run = is_run(config.model)
    check = read_model_config if from_run else check_pretrained
    vocab_size = check(config.model).vocab_size
    if tokenizer.vocab_size > vocab_size or (
        isinstance(tokenizer, ByteTokenizer) and tokenizer.vocab_size != vocab_size
    ):
        raise ValueError(
            f"{config.model}: the model has vocab_size={vocab_size}, the tokenizer "
            f"{tokenizer.vocab_size} (bytes, where there is no tokenizer.json)"
        )
    if config.chat:
        prompt = tokenizer.apply_chat_template([{"role": "user", "content": prompt}])
    tokens = tokenizer.encode(prompt)
    precision = PRECISIONS.get(config.precision, Precision())
    load_weights = load_model if from_run else from_pretrained
    model = load_weights(config.model, dtype=None if precision.fp8 else precision.dtype)
    length = len(tokens) + config.max_new_tokens
    cache = CacheConfig(num_slots=1, max_length=length)
    engine = Engine(model, cache, precision=precision)
    steps = engine.stream(
        [tokens],
        sampling=sampling,
        max_new_tokens=config.max_new_tokens,
        stop_tokens=(tokenizer.eos_id,),
    )
    if not config.chat:
        sys.stdout.write(prompt)
    for text in pieces(steps, tokenizer):
        sys.stdout.write(text)
        sys.stdout.flush()
    sys.stdout.write("\n")


def pieces(steps: Iterable[NewToken], tokenizer: Tokenizer) -> Iterator[str]:
    """The text of one request's tokens as it grows; half a character waits for its rest."""
    shown, new = "", []
    for step in steps:
        if step.finish_reason != "stop":
            new.append(step.token)
        text = tokenizer.decode(new)
        if step.finish_reason or not text.endswith("\ufffd"):
            yield text[len(shown) :]
            shown = text


def read_prompt(config: GenerateConfig) -> str:
    """The prompt, from the flag or the file.

    Raises:
      FileNotFoundError: the prompt file does not exist.
      ValueError: there is no prompt, or there are two.
    """
    if config.prompt and config.prompt_file is not None:
        raise ValueError("give --prompt or --prompt-file, not both")
    prompt = config.prompt
    if config.prompt_file is not None:
        if not config.prompt_file.is_file():
            raise FileNotFoundError(f"{config.prompt_file} does not exist")
        prompt = config.prompt_file.read_text(encoding="utf-8")
    if not prompt:
        raise ValueError("the prompt is empty: give --prompt or --prompt-file")
    return prompt
