"""A model divided into the stages of a pipeline: MoE layers in stages, all else at the ends.

The first stage embeds and runs the dense layers before its MoE layers; the last one has the final
norm, MTP modules and the head behind its own. So what stages do alike is stacked, a pytree of
`[num_stages, ...]` for each of a stage's slots, and the rest is one set of parameters that both
ends share, as MTP modules use the embedding too.
"""

import dataclasses
import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.fp8_gemm import round_weight
from whalejax.kernels.quantization import QuantizedArray
from whalejax.model.config import ModelConfig
from whalejax.model.decoder import (
    REMATERIALISATION,
    Decoder,
    Execution,
    decoder_layer,
    embed,
    positions_angles,
    scan_layers,
)
from whalejax.model.linear import RoundedWeight
from whalejax.model.moe import MoEStats
from whalejax.model.sharding import path_name

MOE_LAYERS = "moe_layers"


@dataclasses.dataclass(frozen=True)
class Division:
    """How MoE layers are shared out over stages, in their order.

    Attributes:
      layers: MoE layers of each stage.
    """

    layers: tuple[int, ...]

    @property
    def slots(self) -> int:
        """Layers that every stage has room for."""
        return max(self.layers)

    @property
    def active(self) -> np.ndarray:
        """Which slots hold a layer, `bool[stages, slots]`; the others are padding, behind them."""
        return np.arange(self.slots) < np.array(self.layers)[:, None]


class Travelling(NamedTuple):
    """What goes from stage to stage.

    Attributes:
      hidden: `[b, t, hidden]`.
      balance: `f32|f64[]`, sum of the balance losses of the MoE layers so far.
    """

    hidden: jax.Array
    balance: jax.Array


def divide(config: ModelConfig, num_stages: int) -> Division:
    """Shares the layers out, so that the stage with most of them has as few as can be.

    Dense layers count in the first stage and MTP modules in the last. Where there is a choice, the
    stages' numbers of MoE layers are as equal as can be.

    Raises:
      ValueError: the model has no MoE layers, or a stage would have no layer at all.
    """
    first, last = config.num_dense_layers, config.num_nextn_predict_layers
    if not config.num_moe_layers:
        raise ValueError(
            f"num_hidden_layers={config.num_hidden_layers} with first_k_dense_replace="
            f"{config.first_k_dense_replace}: a pipeline shares out MoE layers, and there are none"
        )
    ends = [0] * num_stages
    ends[0] += first
    ends[-1] += last
    layers = [0] * num_stages
    for _ in range(config.num_moe_layers):
        stage = min(range(num_stages), key=lambda s: (ends[s] + layers[s], layers[s]))
        layers[stage] += 1
    if not all(end + count for end, count in zip(ends, layers, strict=True)):
        raise ValueError(
            f"num_stages={num_stages} leaves stages without layers: {first} dense layers stay in "
            f"the first stage, {last} MTP modules in the last, {config.num_moe_layers} MoE layers "
            f"are shared out"
        )
    return Division(tuple(layers))


def to_stages(tree: Any, division: Division) -> tuple[Any, ...]:
    """Arrays `[layers, ...]` as `[stages, ...]` of each slot; padding is arbitrary."""
    layer = np.zeros(division.active.shape, np.int32)
    layer[division.active] = np.arange(sum(division.layers))

    def of_slot(slot):
        if division.active.all():  # a slice of what every stage holds, no gathering
            shape = division.active.shape
            return jax.tree.map(lambda a: a.reshape(*shape, *a.shape[1:])[:, slot], tree)
        return jax.tree.map(lambda a: a[layer[:, slot]], tree)

    return tuple(map(of_slot, range(division.slots)))


def from_stages(slots: tuple[Any, ...], division: Division) -> Any:
    """Arrays `[stages, ...]` of each slot as `[layers, ...]`, without the padding."""
    active = np.flatnonzero(division.active)

    def join_slots(*arrays):
        flat = jnp.stack(arrays, axis=1).reshape(-1, *arrays[0].shape[1:])
        return flat if division.active.all() else flat[active]

    return jax.tree.map(join_slots, *slots)


def split(params: nnx.State, router_bias: nnx.State, division: Division) -> tuple[Any, Any]:
    """The parameters of the stages, a tuple of slots, and those of the ends.

    A slot has parameters and routers' biases, `[stages, ...]`, as the ends do; where not all slots
    hold a layer, it has a third part, `bool[stages]`: in which stages it does.
    """
    states = params, router_bias
    layers = tuple(nnx.State(_parts(s).get(MOE_LAYERS, {})) for s in states)
    slots = to_stages(layers, division)
    if not division.active.all():
        slots = tuple((*s, jnp.asarray(division.active[:, i])) for i, s in enumerate(slots))
    ends = tuple(nnx.State({k: v for k, v in _parts(s).items() if k != MOE_LAYERS}) for s in states)
    return slots, ends


def join(slots: tuple[Any, ...], ends: Any, division: Division) -> nnx.State:
    """Gradients of all parameters from those of what `split` gave; biases have none."""
    layers = from_stages(tuple(slot[0] for slot in slots), division)
    return nnx.State({**_parts(ends[0]), MOE_LAYERS: _parts(layers)})


@functools.cache
def structures(config: ModelConfig) -> tuple[nnx.GraphDef, nnx.GraphDef]:
    """The structure of the stacked MoE layers, and of a `Decoder` without them."""
    model = nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0)))
    layers = nnx.split(model.moe_layers)[0]
    del model.moe_layers
    return layers, nnx.split(model)[0]


def ends_of(config: ModelConfig, ends: Any) -> Decoder:
    """A model without MoE layers, from the ends' parameters."""
    return nnx.merge(structures(config)[1], *ends)


def enter(model: Decoder, tokens: jax.Array, execution: Execution) -> Travelling:
    """What the first stage does before its MoE layers: embeds `i32[b, t]`, runs dense layers."""
    config = model.config
    x = embed(model, tokens, execution.precision.dtype)
    angles = positions_angles(tokens, None, config, x.dtype)
    if config.num_dense_layers:

        def layer(p, x):
            return decoder_layer(p, x, angles, config, execution)

        options = {"rematerialise": execution.rematerialise}
        x, _ = scan_layers(layer, model.dense_layers, x, **options)
    return Travelling(x, jnp.zeros_like(x, shape=(), dtype=accumulator(x.dtype)))


def round_weights(stage: tuple[Any, ...]) -> Any:
    """What FP8 makes of a stage's weights, for all of its microbatches.

    Args:
      stage: as in `run_stage`.

    Returns:
      The same pytree, with what `round_weight` gives for a weight, None for all else.
    """

    def rounded(path, leaf):
        return round_weight(leaf) if "_proj" in path_name(path) else None

    return jax.tree_util.tree_map_with_path(rounded, stage)


def with_rounded(stage: tuple[Any, ...], rounded: Any) -> tuple[Any, ...]:
    """A stage whose FP8 matmuls read what `round_weights` made of its weights."""

    def one(pair, weight):
        return weight if pair is None else RoundedWeight(weight, pair)

    def is_one(tree):
        return tree is None or (isinstance(tree, tuple) and isinstance(tree[0], QuantizedArray))

    return jax.tree.map(one, rounded, stage, is_leaf=is_one)


def run_stage(
    stage: tuple[Any, ...], x: Travelling, config: ModelConfig, execution: Execution
) -> tuple[Travelling, tuple[MoEStats, ...]]:
    """Runs the MoE layers of one stage, one after the other and not in a loop.

    Out of a loop XLA can hide a layer's transfers behind what another microbatch computes.

    Args:
      stage: of what `split` gives for the stages, the part of one.
      x: from the stage before.
      config: sizes.
      execution: how to run.

    Returns:
      What travels on, and the statistics of every slot, zeros for padding.
    """
    angles = positions_angles(x.hidden, None, config, x.hidden.dtype)

    def run(layer, hidden):
        p = nnx.merge(structures(config)[0], *layer)
        hidden, (_, stats) = decoder_layer(p, hidden, angles, config, execution)
        return hidden, stats

    def skip(_, hidden):
        return hidden, no_statistics(config, hidden)

    if execution.rematerialise != "none":
        policy = REMATERIALISATION[execution.rematerialise]
        run = jax.checkpoint(run, policy=policy, prevent_cse=False)
    hidden, balance, found = x.hidden, x.balance, []
    for params, router_bias, *active in stage:
        layer = params, router_bias
        if active:
            hidden, stats = jax.lax.cond(*active, run, skip, layer, hidden)
        else:
            hidden, stats = run(layer, hidden)
        balance = balance + stats.balance_loss
        found.append(stats)
    return Travelling(hidden, balance), tuple(found)


def no_statistics(config: ModelConfig, hidden: jax.Array) -> MoEStats:
    """What a MoE layer that is not there reports; arrays vary over mesh axes as `hidden` does."""
    zeros = functools.partial(jnp.zeros_like, hidden)
    return MoEStats(
        load=zeros(shape=(config.moe.n_routed_experts,), dtype=jnp.int32),
        balance_loss=zeros(shape=(), dtype=accumulator(hidden.dtype)),
        overflow=zeros(shape=(), dtype=jnp.int32),
    )


def _parts(state):
    """The nested dicts of a flax state."""
    return dict(state.raw_mapping)
