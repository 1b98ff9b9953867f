"""The training loss: next token, MTP, and balance. Logits are never held for all tokens at once."""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from whalejax.kernels.accumulation import accumulator
from whalejax.model.decoder import Decoder, Execution, forward, logits
from whalejax.model.mtp import predict_further
from whalejax.parallel.expert import Placement

MAX_LOGITS = 2**26  # float32 numbers of one chunk of logits: 256 MiB


@dataclasses.dataclass(frozen=True, kw_only=True)
class LossConfig:
    """Weights of the parts of the loss; defaults are DeepSeek-V3's (section 4.2).

    Attributes:
      mtp_weight: lambda, on the mean loss of the MTP modules.
      balance_weight: alpha, on the sequence-wise balance loss.
    """

    mtp_weight: float = 0.3
    balance_weight: float = 1e-4

    def __post_init__(self):
        for name in ("mtp_weight", "balance_weight"):
            if not getattr(self, name) >= 0:
                raise ValueError(f"{name}={getattr(self, name)} must be 0 or more")


class Losses(NamedTuple):
    """Parts of the loss in nats a token, and what the router reported.

    Attributes:
      main, mtp, balance: `f32|f64[]`.
      load: `i32[moe_layers, E]`, tokens of each expert.
      mtp_load: `i32[depths, E]`, the same in the MTP modules.
      overflow: `i32[]`, choices of experts that were left out, of all layers.
    """

    main: jax.Array
    mtp: jax.Array
    balance: jax.Array
    load: jax.Array
    mtp_load: jax.Array
    overflow: jax.Array


def chunk_length(batch: int, length: int, vocab_size: int) -> int:
    """The largest divisor of `length` whose chunk of logits stays within MAX_LOGITS, or 1."""
    most = max(MAX_LOGITS // (batch * vocab_size), 1)
    return max(d for d in range(1, length + 1) if length % d == 0 and d <= most)


def cross_entropy(
    model: Decoder, hidden: jax.Array, labels: jax.Array, weights: jax.Array
) -> jax.Array:
    """Sum of the weighted negative log likelihoods, in nats.

    Runs over chunks of positions and computes each chunk's logits again in the backward pass.

    Args:
      model: for its head.
      hidden: `bf16|f32|f64[b, t, hidden]`, normed.
      labels: `i32[b, t]`.
      weights: `f32|f64[b, t]`.
    """
    batch, length, width = hidden.shape
    chunk = chunk_length(batch, length, model.config.vocab_size)

    def split(x):
        return jnp.moveaxis(x.reshape(batch, length // chunk, chunk, *x.shape[2:]), 1, 0)

    @jax.checkpoint
    def of_chunk(total, xs):
        hidden, labels, weights = xs
        scores = logits(model, hidden)
        chosen = jnp.take_along_axis(scores, labels[..., None], axis=-1)[..., 0]
        nll = jax.nn.logsumexp(scores, axis=-1) - chosen
        return total + jnp.sum(nll * weights.astype(nll.dtype)), None

    with jax.named_scope("cross_entropy"):
        chunks = (split(hidden), split(labels), split(weights))
        # zeros like it vary over the mesh axes that the sum does, wherever this runs
        zero = jnp.zeros_like(hidden, shape=(), dtype=accumulator(hidden.dtype))
        return jax.lax.scan(of_chunk, zero, chunks)[0]


def training_loss(
    model: Decoder,
    tokens: jax.Array,
    config: LossConfig,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[jax.Array, Losses]:
    """The loss of `i32[b, t + 1]` tokens and its parts.

    A placement is of the experts of the MoE layers and then of the MTP modules, stacked.

    Source: DeepSeek-V3 (arXiv 2412.19437), equations 17 to 25.
    """
    layers = model.config.num_moe_layers
    of_model, of_modules = (_part(placement, s) for s in (slice(layers), slice(layers, None)))
    out = forward(model, tokens[:, :-1], execution, placement=of_model)
    behind = model, out.hidden, out.balance_loss, tokens, config, execution
    total, parts = loss_behind(*behind, of_modules)
    return total, parts._replace(load=out.load, overflow=out.overflow + parts.overflow)


def loss_behind(
    model: Decoder,
    hidden: jax.Array,
    balance: jax.Array,
    tokens: jax.Array,
    config: LossConfig,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[jax.Array, Losses]:
    """The part of the loss behind the final norm.

    Args:
      model: its head and MTP modules are used.
      hidden: `[b, t, hidden]`, normed.
      balance: `f32|f64[]`, mean of the balance losses of the MoE layers.
      tokens: `i32[b, t + 1]`.
      config: weights of the parts.
      execution: how to run.
      placement: of the MTP modules' experts.

    Returns:
      The loss and its parts; load and overflow of the MoE layers are not among them.
    """
    inputs, labels = tokens[:, :-1], tokens[:, 1:]
    ones = jnp.ones(labels.shape, accumulator(hidden.dtype))
    main = cross_entropy(model, hidden, labels, ones) / labels.size
    mtp, overflow = jnp.zeros_like(main), jnp.int32(0)
    load = mtp_load = jnp.zeros((0, 0), jnp.int32)
    depths, layers = model.config.num_nextn_predict_layers, model.config.num_moe_layers
    if depths:
        further = predict_further(model, hidden, inputs, execution, placement=placement)
        place = jnp.arange(labels.shape[1], dtype=jnp.int32)[None]
        for depth in range(1, depths + 1):
            known = jnp.where(place < labels.shape[1] - depth, ones, 0.0)
            ahead = jnp.roll(labels, -depth, axis=1)
            nll = cross_entropy(model, further.hidden[depth - 1], ahead, known)
            mtp = mtp + nll / (labels.shape[0] * max(labels.shape[1] - depth, 1) * depths)
        balance = (balance * layers + further.balance_loss * depths) / (layers + depths)
        mtp_load, overflow = further.load, further.overflow
    total = main + config.mtp_weight * mtp + config.balance_weight * balance
    return total, Losses(main, mtp, balance, load, mtp_load, overflow)


def heldout_loss(
    model: Decoder,
    tokens: jax.Array,
    weights: jax.Array,
    execution: Execution,
    placement: Placement | None = None,
) -> jax.Array:
    """Sum of the next-token losses of `i32[b, t + 1]` tokens, weighted by `[b, t]`, in nats."""
    placed = _part(placement, slice(model.config.num_moe_layers))
    out = forward(model, tokens[:, :-1], execution, placement=placed)
    return cross_entropy(model, out.hidden, tokens[:, 1:], weights)


def _part(placement, layers):
    """Some layers of a stacked placement; of none, none."""
    return jax.tree.map(lambda a: a[layers], placement)
