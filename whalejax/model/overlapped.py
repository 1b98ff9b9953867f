"""MoE layers on two halves of each device's sequences: see `parallel.expert.overlapping`."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from whalejax.model.config import ModelConfig
from whalejax.model.moe import MoEStats, receive_outputs, run_experts, send_tokens
from whalejax.model.parameters import rms_norm
from whalejax.model.sharding import on_own_batch
from whalejax.parallel.expert import Placement, Stages, interleave, overlap_microbatches

Reported = tuple[jax.Array, MoEStats]  # latents and statistics


def layer_stages(
    attend: Callable,
    config: ModelConfig,
    *,
    mesh: Mesh,
    fp8: bool,
    capacity_factor: float | None = None,
) -> Stages:
    """A MoE layer cut where tokens travel.

    Its p is a pair: the layer's weights, and the placement of its experts or None.

    Args:
      attend: `(p, x, angles) -> (x, latents)`, the first half of a layer.
      config: of the model.
      mesh: with several ranks of the `expert` axis.
      fp8: multiply by the experts' weights in FP8.
      capacity_factor: of the experts' rows, see `moe`.
    """
    options = {"mesh": mesh, "fp8": fp8}

    def send(placed, x, angles, hold):
        p, placement = placed
        x, latents = attend(p, x, angles)
        normed = rms_norm(x, p.post_attention_layernorm, config.rms_norm_eps)
        limits = {"placement": placement, "capacity_factor": capacity_factor}
        sent, held, stats = send_tokens(p.mlp, normed, hold, config.moe, **options, **limits)
        return (x, normed), sent, held, (latents, stats)

    def compute(placed, kept, sent):
        (p, _), (x, normed) = placed, kept
        shared, outputs = run_experts(p.mlp, normed, sent, config.moe, **options)
        return x if shared is None else x + shared, outputs

    def receive(x, outputs):
        return receive_outputs(x, outputs, mesh=mesh)

    return Stages(send, compute, receive)


def scan_halves(
    stages: Stages,
    layers: nnx.Module,
    x: jax.Array,
    angles: Any,
    *,
    mesh: Mesh,
    policy: Callable | None,
    placement: Placement | None = None,
) -> tuple[jax.Array, Reported]:
    """Runs stacked MoE layers, as `scan_layers` with `decoder_layer` would.

    Args:
      stages: of a layer.
      layers: weights of the stacked layers.
      x: `[b, t, hidden]`.
      angles: pytree of `[b, ...]`, or of `[1, ...]` for all sequences.
      mesh: over which b is cut.
      policy: of `jax.checkpoint`, or None.
      placement: of the experts of all these layers, stacked.

    Returns:
      `[b, t, hidden]`, and the stacked latents and statistics of the layers.

    Raises:
      ValueError: a device's sequences are odd in number; prints it.
    """
    graphdef, state = nnx.split(layers)
    of_state = Stages(
        lambda p, *rest: stages.send((nnx.merge(graphdef, p[0]), p[1]), *rest),
        lambda p, *rest: stages.compute((nnx.merge(graphdef, p[0]), p[1]), *rest),
        stages.receive,
    )
    halves, constants = split_halves(x, mesh), split_halves(angles, mesh)
    options = {"constants": constants, "policy": policy}
    halves, ys = overlap_microbatches(of_state, (state, placement), halves, **options)
    (kept, stats), (kept_2nd, stats_2nd) = ys
    by_sequence = jnp.moveaxis(kept, 0, 1), jnp.moveaxis(kept_2nd, 0, 1)
    latents = jnp.moveaxis(join_halves(by_sequence, mesh), 1, 0)
    return join_halves(halves, mesh), (latents, mean_statistics(stats, stats_2nd))


def run_halves(
    stages: Stages,
    p: tuple[nnx.Module, Placement | None],
    x: jax.Array,
    angles: Any,
    *,
    mesh: Mesh,
) -> tuple[jax.Array, Reported]:
    """Runs one MoE layer, of weights and placement; else as `scan_halves`."""
    halves, constants = split_halves(x, mesh), split_halves(angles, mesh)
    halves, ((kept, stats), (kept_2nd, stats_2nd)) = interleave(stages, p, halves, constants)
    out = join_halves(tuple(stages.receive(*half) for half in halves), mesh)
    return out, (join_halves((kept, kept_2nd), mesh), mean_statistics(stats, stats_2nd))


def split_halves(tree: Any, mesh: Mesh) -> tuple[Any, Any]:
    """The first and the second half of each device's sequences.

    Half of the global batch would be the sequences of half of the devices.

    Args:
      tree: pytree of arrays `[b, ...]`; those of `[1, ...]` are in both halves.
      mesh: over whose batch axes b is cut.

    Raises:
      ValueError: a device's sequences are odd in number; prints it.
    """

    def halve(_, a):
        if a.shape[0] % 2:
            raise ValueError(
                f"overlap: a device's {a.shape[0]} sequences cannot be halved: the number must be "
                f"even"
            )
        return tuple(jnp.split(a, 2))

    leaves, structure = jax.tree.flatten(tree)
    pairs = [(a, a) if a.shape[0] == 1 else on_own_batch(halve, mesh)((), a) for a in leaves]
    first, second = zip(*pairs, strict=True)
    return structure.unflatten(first), structure.unflatten(second)


def join_halves(halves: tuple[jax.Array, jax.Array], mesh: Mesh) -> jax.Array:
    """The inverse of `split_halves`, for one array."""
    return on_own_batch(lambda _, a, b: jnp.concatenate([a, b]), mesh)((), *halves)


def mean_statistics(first: MoEStats, second: MoEStats) -> MoEStats:
    """The statistics of both halves together: counts add up, balance losses are means."""
    balance = (first.balance_loss + second.balance_loss) / 2
    return MoEStats(first.load + second.load, balance, first.overflow + second.overflow)
