"""Multi-token prediction (DeepSeek-V3, arXiv 2412.19437, section 2.2): one module a depth.

Module k sees the representation of token i at depth k-1 and the embedding of token i+k, and
predicts token i+k+1 with the model's own embedding and head. As in the published checkpoint the
embedding stands first in `eh_proj`'s input and the representation comes after the final norm.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from whalejax.model.decoder import (
    Decoder,
    Execution,
    decoder_layer,
    embed,
    positions_angles,
    scan_layers,
)
from whalejax.model.linear import linear
from whalejax.model.parameters import rms_norm
from whalejax.model.sharding import on_own_batch
from whalejax.parallel.expert import Placement


class MTPForward(NamedTuple):
    """The result of the MTP modules.

    Attributes:
      hidden: `[depth, b, t, hidden]`, normed; the last k positions of depth k are meaningless.
      load: `i32[depth, E]`, tokens of each expert.
      balance_loss: `f32|f64[]`, mean over the depths.
      overflow: `i32[]`, as of `Forward`.
    """

    hidden: jax.Array
    load: jax.Array
    balance_loss: jax.Array
    overflow: jax.Array


def predict_further(
    model: Decoder,
    hidden: jax.Array,
    tokens: jax.Array,
    execution: Execution = Execution(),
    *,
    placement: Placement | None = None,
) -> MTPForward:
    """Runs all MTP modules.

    Args:
      model: a model with `num_nextn_predict_layers` of at least 1.
      hidden: `[b, t, hidden]` from `forward`.
      tokens: `i32[b, t]`, the tokens that `forward` saw.
      execution: how to run.
      placement: of the experts of all depths, stacked; `model` then has a weight for each slot.

    Raises:
      ValueError: the model has no MTP modules.
    """
    config = model.config
    depths = config.num_nextn_predict_layers
    if not depths:
        raise ValueError("num_nextn_predict_layers=0: the model has no MTP modules")
    angles = positions_angles(tokens, None, config, hidden.dtype)
    shifted = jnp.stack([jnp.roll(tokens, -depth, axis=1) for depth in range(1, depths + 1)])

    project = on_own_batch(
        lambda w, x: linear(x, w, fp8=execution.precision.fp8), execution.fp8_mesh
    )

    def module(p, x, ahead, placement):
        embedded = rms_norm(embed(model, ahead, x.dtype), p.enorm, config.rms_norm_eps)
        previous = rms_norm(x, p.hnorm, config.rms_norm_eps)
        both = jnp.concatenate([embedded, previous], axis=-1)
        x = project(p.eh_proj, both)
        x, (_, stats) = decoder_layer(p.layer, x, angles, config, execution, placement)
        x = rms_norm(x, p.norm, config.rms_norm_eps)
        return x, (x, stats)

    with jax.named_scope("mtp"):
        layers = module, model.mtp_layers, hidden, shifted, placement
        _, (hidden, stats) = scan_layers(*layers, rematerialise=execution.rematerialise)
    overflow = jnp.sum(stats.overflow, dtype=jnp.int32)
    return MTPForward(hidden, stats.load, jnp.mean(stats.balance_loss), overflow)
