"""The engine: prefill a prompt, then decode all slots together, one compiled step for any mix."""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from whalejax.generation.cache import CacheConfig, PageAllocator, make_pages
from whalejax.generation.sampling import SamplingConfig, request_keys, sample
from whalejax.kernels.mla import append
from whalejax.model.decoder import Decoder, Execution, decode, forward, logits
from whalejax.model.linear import Precision


class Completion(NamedTuple):
    """What a request got.

    Attributes:
      tokens: generated ones, the stop token not included.
      finish_reason: `"stop"` or `"length"`.
    """

    tokens: list[int]
    finish_reason: str


class NewToken(NamedTuple):
    """One step of a request: its token, and why it ended if it did."""

    request: int
    token: int
    finish_reason: str | None


class Engine:
    """Generates text with a model.

    Args:
      model: its parameters stay where they are.
      config: sizes of the cache; `max_length` is cut to the model's context before any page is
        made.
      precision: of the computation; that of the parameters by default.
    """

    def __init__(
        self,
        model: Decoder,
        config: CacheConfig = CacheConfig(),
        *,
        precision: Precision = Precision(),
    ):
        context = min(config.max_length, model.config.max_position_embeddings)
        config = dataclasses.replace(config, max_length=context)
        self.config, self.model_config = config, model.config
        self._streaming = False
        self._graphdef, self._state = nnx.split(model)
        execution = Execution(precision=precision)
        fixed = (self._graphdef, execution)
        self._prefill = jax.jit(functools.partial(_prefill, *fixed), donate_argnums=1)
        self._decode = jax.jit(functools.partial(_decode, *fixed), donate_argnums=1)
        token = jnp.zeros((1, 1), jnp.int32)
        dtype = jax.eval_shape(lambda: forward(model, token, execution)).hidden.dtype
        self._pages = make_pages(model.config, config, dtype)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig = SamplingConfig(),
        max_new_tokens: int = 128,
        stop_tokens: Sequence[int] = (),
    ) -> list[Completion]:
        """Completes prompts of any lengths; see `stream` for the arguments and errors."""
        tokens: list[list[int]] = [[] for _ in prompts]
        reasons = [""] * len(prompts)
        steps = self.stream(
            prompts, sampling=sampling, max_new_tokens=max_new_tokens, stop_tokens=stop_tokens
        )
        for new in steps:
            if new.finish_reason != "stop":
                tokens[new.request].append(new.token)
            reasons[new.request] = new.finish_reason or ""
        return [Completion(*pair) for pair in zip(tokens, reasons, strict=True)]

    def stream(
        self,
        prompts: Sequence[Sequence[int]],
        *,
        sampling: SamplingConfig = SamplingConfig(),
        max_new_tokens: int = 128,
        stop_tokens: Sequence[int] = (),
    ) -> Iterator[NewToken]:
        """Yields tokens as they come, of all requests in turn.

        Args:
          prompts: tokens of each request; more than there are slots wait for a free one.
          sampling: how tokens are chosen.
          max_new_tokens: most tokens of an answer.
          stop_tokens: tokens that end an answer.

        Raises:
          ValueError: a prompt is empty, holds what is not a token, or does not fit.
          RuntimeError: at the first token, if another stream of this engine has not ended.
        """
        prompts = [np.asarray(prompt, np.int32) for prompt in prompts]
        self._check(prompts, max_new_tokens)
        return self._run(prompts, sampling, max_new_tokens, frozenset(map(int, stop_tokens)))

    def _check(self, prompts: list[np.ndarray], max_new_tokens: int) -> None:
        if max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={max_new_tokens} must be positive")
        room = min(self.config.max_length, self.config.total_pages * self.config.page_size)
        for i, prompt in enumerate(prompts):
            if prompt.ndim != 1 or not prompt.size:
                raise ValueError(f"prompt {i} is empty")
            if prompt.min() < 0 or prompt.max() >= self.model_config.vocab_size:
                wrong = prompt.min() if prompt.min() < 0 else prompt.max()
                raise ValueError(
                    f"prompt {i} holds token {wrong}, vocab_size={self.model_config.vocab_size}"
                )
            if len(prompt) + max_new_tokens > room:
                raise ValueError(
                    f"prompt {i} has {len(prompt)} tokens, with max_new_tokens={max_new_tokens} "
                    f"more than the {room} that fit"
                )

    def _run(self, prompts, sampling, max_new_tokens, stop) -> Iterator[NewToken]:
        if self._streaming:  # both would write the same pages
            raise RuntimeError("another stream of this engine has not ended: finish or close it")
        self._streaming = True
        try:
            yield from self._serve(prompts, sampling, max_new_tokens, stop)
        finally:
            self._streaming = False

    def _serve(self, prompts, sampling, max_new_tokens, stop) -> Iterator[NewToken]:
        slots = _Slots(self.config, sampling)
        waiting = deque(enumerate(prompts))
        while waiting or slots.running:
            while waiting and slots.admits(len(waiting[0][1]) + max_new_tokens):
                request, prompt = waiting.popleft()
                slot = slots.start(request, prompt, max_new_tokens)
                token = self._first_token(prompt, slots, slot)
                yield slots.accept(slot, token, stop, max_new_tokens)
            if not slots.running:
                continue
            tokens, self._pages = self._decode(self._state, self._pages, *slots.arrays())
            for slot in slots.running:
                slots.lengths[slot] += 1
            for slot, token in zip(slots.running, np.asarray(tokens)[slots.running], strict=True):
                yield slots.accept(slot, int(token), stop, max_new_tokens)

    def _first_token(self, prompt: np.ndarray, slots: "_Slots", slot: int) -> int:
        """Runs the prompt through the model, padded to a power of two to compile few sizes."""
        bucket = max(self.config.page_size, 1 << (len(prompt) - 1).bit_length())
        padded = np.zeros((1, bucket), np.int32)
        padded[0, : len(prompt)] = prompt
        only = slice(slot, slot + 1)
        token, self._pages = self._prefill(
            self._state,
            self._pages,
            padded,
            slots.page_table[only],
            slots.lengths[only],
            slots.requests[only],
            *slots.sampling(1),
        )
        return int(token[0])


class _Slots:
    """What the host knows of the slots, in arrays that go to the device each step."""

    def __init__(self, config: CacheConfig, sampling: SamplingConfig):
        self._sampling, self._count = sampling, config.num_slots
        self._pages = PageAllocator(config.total_pages, config.page_size)
        self.page_table = np.zeros((config.num_slots, config.pages_per_slot), np.int32)
        self.lengths = np.zeros(config.num_slots, np.int32)  # tokens in the cache
        self.requests = np.zeros(config.num_slots, np.int32)
        self._last = np.zeros((config.num_slots, 1), np.int32)
        self._answered = np.zeros(config.num_slots, np.int32)

    @property
    def running(self) -> list[int]:
        """Slots with a request."""
        return [slot for slot in range(self._count) if self.lengths[slot]]

    def admits(self, tokens: int) -> bool:
        """Whether a request of so many tokens could begin now."""
        return len(self.running) < self._count and self._pages.fits(tokens)

    def start(self, request: int, prompt: np.ndarray, max_new_tokens: int) -> int:
        """Gives a request a slot and its pages."""
        slot = next(s for s in range(self._count) if not self.lengths[s])
        pages = self._pages.allocate(slot, len(prompt) + max_new_tokens)
        self.page_table[slot, : len(pages)] = pages
        self.lengths[slot], self.requests[slot] = len(prompt), request
        self._answered[slot] = 0
        return slot

    def accept(self, slot: int, token: int, stop: frozenset[int], most: int) -> NewToken:
        """Takes a request's new token; frees the slot if that was the last."""
        self._answered[slot] += 1
        self._last[slot] = token
        reason = "stop" if token in stop else "length" if self._answered[slot] == most else None
        if reason is not None:
            self._pages.free(slot)
            self.lengths[slot] = 0
        return NewToken(int(self.requests[slot]), token, reason)

    def sampling(self, rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Seed, temperature and top_p, one a row."""
        config = self._sampling
        return (
            np.full(rows, config.seed, np.int32),
            np.full(rows, config.temperature, np.float32),
            np.full(rows, config.top_p, np.float32),
        )

    def arrays(self) -> tuple[np.ndarray, ...]:
        """The arguments of the decode step: lengths count the token that goes in."""
        lengths = np.where(self.lengths > 0, self.lengths + 1, 0).astype(np.int32)
        return (
            self._last.copy(),
            self.page_table.copy(),
            lengths,
            self.requests.copy(),
            *self.sampling(self._count),
        )


def _prefill(graphdef, execution, state, pages, tokens, page_table, lengths, requests, *sampling):
    """The token after each prompt, and the pages with the prompts' latents."""
    model = nnx.merge(graphdef, state)
    out = forward(model, tokens, execution)
    place = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    positions = jnp.where(place < lengths[:, None], place, -1)

    def write(layer_pages, latents):
        return append(layer_pages, latents, page_table, positions)

    pages = jax.vmap(write)(pages, out.latents)
    last = jnp.take_along_axis(out.hidden, lengths[:, None, None] - 1, axis=1)[:, 0]
    return _choose(model, last, lengths, requests, sampling), pages


def _decode(graphdef, execution, state, pages, tokens, page_table, lengths, requests, *sampling):
    """The next token of every slot, and the pages with the last tokens' latents."""
    model = nnx.merge(graphdef, state)
    hidden, pages = decode(model, tokens, pages, page_table, lengths, execution)
    return _choose(model, hidden[:, -1], lengths, requests, sampling), pages


def _choose(model, hidden, lengths, requests, sampling):
    seeds, temperature, top_p = sampling
    keys = request_keys(seeds, requests, lengths)
    return sample(logits(model, hidden), temperature, top_p, keys)
