"""What of a token travels: its row as it is, or in FP8 with what brings the gradient back."""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from whalejax.kernels.backend import vary_like
from whalejax.kernels.permutation import Permutation, carry_gradient, permute
from whalejax.kernels.quantization import quantize
from whalejax.parallel.expert.exchange import Arrays

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


def payload_of(x: jax.Array, quantized: str | None) -> Payload:
    """The rows of `[T, H]` tokens, in FP8 if `quantized` is `"fp8"`."""
    if quantized is None:
        return Payload(x)
    rows = quantize(lax.stop_gradient(x), ROW_TILE)
    return Payload(rows.values, rows.scales, x)


def lay_out(payload: Payload, plan: Permutation) -> Payload:
    """Copies each token to the rows of a plan."""
    if payload.carrier is None:
        return Payload(permute(payload.tokens, plan))
    tokens, scales = permute(payload.tokens, plan), permute(payload.scales, plan)
    return Payload(tokens, scales, carry_gradient(payload.carrier, plan))


def split(payload: Payload) -> tuple[Arrays, Arrays, Arrays]:
    """Arrays with a gradient, arrays without, and carriers, as an exchange takes them."""
    if payload.carrier is None:
        return (payload.tokens,), (), ()
    return (), (payload.tokens, payload.scales), (payload.carrier,)


def joined(floats: Arrays, others: Arrays, carriers: Arrays) -> Payload:
    """The inverse of `split`."""
    return Payload(*floats, *others, *carriers)


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


def gather(payload: Payload, axes: tuple[str, ...]) -> Payload:
    """The rows of all ranks, on all ranks."""

    def gathered(a):
        return lax.all_gather(a, axes, tiled=True)

    if payload.carrier is None:
        return Payload(gathered(payload.tokens))
    return Payload(
        gathered(payload.tokens), gathered(payload.scales), _gather_carrier(payload.carrier, axes)
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _gather_carrier(carrier, axes):
    """Stands for `all_gather` in the backward pass alone."""
    rows = carrier.shape[0] * lax.axis_size(axes)
    return vary_like(jnp.zeros((rows, *carrier.shape[1:]), carrier.dtype), carrier)


def _gather_forward(carrier, axes):
    return _gather_carrier(carrier, axes), None


def _gather_backward(axes, _, d_rows):
    total = lax.psum_scatter(d_rows.astype(jnp.float32), axes, tiled=True)
    return (total.astype(d_rows.dtype),)


_gather_carrier.defvjp(_gather_forward, _gather_backward)
