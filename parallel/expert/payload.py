"""What of a token travels: its row as it is, or in FP8 with what brings the gradient back."""

from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from whalejax.kernels.backend import vary_like
from whalejax.kernels.quantization import quantize

ROW_TILE = (1, 128)  # of an FP8 row's scales


class Payload(NamedTuple):
    """Rows of tokens.

    Attributes:
      tokens: `[rows, H]`; e4m3 in FP8, which no gradient passes.
      scales: in FP8 `f32[rows, ceil(H / 128)]`, else None.
      carrier: in FP8 `[rows, H]` of the dtype before: its gradient is that of the rows, its value
        is not used; else None.
    """

    tokens: jax.Array
    scales: jax.Array | None = None
    carrier: jax.Array | None = None

    def sent(self) -> list[jax.Array]:
        """The arrays that are sent."""
        return [self.tokens] if self.scales is None else [self.tokens, self.scales]

    def arrived(self, sent: list[jax.Array]) -> "Payload":
        """What those arrays are when they have arrived."""
        if self.carrier is None:
            return Payload(*sent)
        zeros = jnp.zeros(sent[0].shape, self.carrier.dtype)
        return Payload(*sent, vary_like(zeros, sent))


def rows_of_gradient(cotangent: Payload) -> jax.Array:
    """What of a payload's cotangent is sent back."""
    return cotangent.tokens if cotangent.carrier is None else cotangent.carrier


def gradient_of_rows(rows: jax.Array, quantized: bool) -> Payload:
    """The inverse, for the payload that was sent."""
    return Payload(None, None, rows) if quantized else Payload(rows)


def payload_of(x: jax.Array, quantized: str | None) -> Payload:
    """The rows of `[T, H]` tokens, in FP8 if `quantized` is `"fp8"`."""
    if quantized is None:
        return Payload(x)
    rows = quantize(lax.stop_gradient(x), ROW_TILE)
    return Payload(rows.values, rows.scales, x)


def guard(payload: Payload) -> Payload:
    """Refuses gradients of FP8 rows themselves, which would be lost: the carrier takes them."""
    return payload if payload.carrier is None else Payload(*_guard(*payload))


@jax.custom_vjp
def _guard(tokens, scales, carrier):
    return tokens, scales, carrier


def _guard_forward(tokens, scales, carrier):
    return (tokens.value, scales.value, carrier.value), None


def _guard_backward(_, cotangents):
    if not all(isinstance(d, SymbolicZero) for d in cotangents[:2]):
        raise NotImplementedError(
            "dispatch: a gradient of FP8 tokens or scales would be lost; use the carrier, as "
            "fp8_grouped_linear(sent.rows(), ..., carrier=sent.carrier) does"
        )
    return None, None, cotangents[2]


_guard.defvjp(_guard_forward, _guard_backward, symbolic_zeros=True)
