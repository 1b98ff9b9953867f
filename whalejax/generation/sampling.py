"""Choosing the next token: greedy, by temperature, or from the nucleus (top-p)."""

import dataclasses
import math

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class SamplingConfig:
    """How tokens are chosen.

    Attributes:
      temperature: divides the logits; 0 is greedy.
      top_p: only the likeliest tokens whose probabilities reach this sum are drawn
        (arXiv 1904.09751).
      seed: of the draws. A request's text depends on its own seed and number alone, not on what
        decodes beside it.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self):
        if not 0 <= self.temperature < math.inf:
            raise ValueError(f"temperature={self.temperature} must be 0 or more, and finite")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"top_p={self.top_p} must lie in (0, 1]")
        if not -(2**31) <= self.seed < 2**31:
            raise ValueError(f"seed={self.seed} must fit 32 bits with a sign")


def sample(
    logits: jax.Array, temperature: jax.Array, top_p: jax.Array, keys: jax.Array
) -> jax.Array:
    """Chooses a token for each row.

    Args:
      logits: `f32[b, vocab]`.
      temperature: `f32[b]`; 0 for the likeliest token.
      top_p: `f32[b]`.
      keys: `key[b]`, one a row.

    Returns:
      `i32[b]`.
    """
    greedy = jnp.argmax(logits, axis=-1)
    scaled = logits / jnp.maximum(temperature, 1e-6)[:, None]
    drawn = jax.vmap(jax.random.categorical)(keys, nucleus(scaled, top_p))
    return jnp.where(temperature > 0, drawn, greedy).astype(jnp.int32)


def nucleus(logits: jax.Array, top_p: jax.Array) -> jax.Array:
    """Sets to -inf all tokens but the fewest likeliest whose probabilities reach `top_p`.

    Args:
      logits: `f32[b, vocab]`.
      top_p: `f32[b]`; the likeliest token always stays, and at 1 every token.
    """
    order = jnp.argsort(-logits, axis=-1)
    probabilities = jax.nn.softmax(jnp.take_along_axis(logits, order, axis=-1), axis=-1)
    before = jnp.cumsum(probabilities, axis=-1) - probabilities
    # the float32 sum of a long tail may round to 1 before its end
    enough = jnp.where(top_p < 1, top_p, jnp.inf)
    kept_in_order = (before < enough[:, None]).at[:, 0].set(True)
    kept = jnp.take_along_axis(kept_in_order, jnp.argsort(order, axis=-1), axis=-1)
    return jnp.where(kept, logits, -jnp.inf)


def request_keys(seeds: jax.Array, requests: jax.Array, positions: jax.Array) -> jax.Array:
    """A key a row from its seed, request number and position, `i32[b]` each."""

    def fold(seed, request, position):
        key = jax.random.fold_in(jax.random.key(seed), request)
        return jax.random.fold_in(key, position)

    return jax.vmap(fold)(seeds, requests, positions)
