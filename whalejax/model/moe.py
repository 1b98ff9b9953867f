"""Feed-forward parts: the gated MLP, the router, and the mixture of experts."""

import functools
import math
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh, PartitionSpec

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.permutation import permute, plan_permutation, unpermute
from whalejax.kernels.quantization import QuantizedArray
from whalejax.model.config import MoEConfig
from whalejax.model.linear import grouped_linear, linear
from whalejax.model.parameters import Initializer, read
from whalejax.model.sharding import on_own_batch
from whalejax.parallel.expert import (
    Dispatched,
    Placement,
    Returning,
    dispatch,
    finish_combine,
    start_combine,
)
from whalejax.parallel.mesh import EXPERT


class MLP(nnx.Module):
    """Weights of SwiGLU, `down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, hidden_size: int, intermediate_size: int, init: Initializer):
        self.gate_proj = init.normal(intermediate_size, hidden_size)
        self.up_proj = init.normal(intermediate_size, hidden_size)
        self.down_proj = init.normal(hidden_size, intermediate_size)


class Experts(nnx.Module):
    """Weights of all routed experts, `[layers, experts, out, in]`."""

    def __init__(self, hidden_size: int, config: MoEConfig, init: Initializer):
        experts, width = config.n_routed_experts, config.moe_intermediate_size
        self.gate_proj = init.normal(experts, width, hidden_size)
        self.up_proj = init.normal(experts, width, hidden_size)
        self.down_proj = init.normal(experts, hidden_size, width)


class Router(nnx.Module):
    """Weights of the choice of experts; the bias exists where `topk_method` is `noaux_tc`."""

    def __init__(self, hidden_size: int, config: MoEConfig, init: Initializer):
        self.weight = init.normal(config.n_routed_experts, hidden_size)
        if config.topk_method == "noaux_tc":
            self.e_score_correction_bias = init.bias(config.n_routed_experts)


class MoE(nnx.Module):
    """A router, routed experts, and shared experts that every token visits."""

    def __init__(self, hidden_size: int, config: MoEConfig, init: Initializer):
        self.gate = Router(hidden_size, config, init)
        self.experts = Experts(hidden_size, config, init)
        if config.n_shared_experts:
            self.shared_experts = MLP(hidden_size, config.shared_intermediate_size, init)


class Routing(NamedTuple):
    """The router's choice for `[..., tokens]`.

    Attributes:
      topk_idx: `i32[..., k]`, experts.
      topk_weights: `f32|f64[..., k]`, their weights.
      scores: `f32|f64[..., E]`, affinities before bias and normalisation.
    """

    topk_idx: jax.Array
    topk_weights: jax.Array
    scores: jax.Array


class MoEStats(NamedTuple):
    """What a MoE layer reports.

    Attributes:
      load: `i32[E]`, tokens of each expert.
      balance_loss: `f32|f64[]`.
      overflow: `i32[]`, choices that no rank had a row for.
    """

    load: jax.Array
    balance_loss: jax.Array
    overflow: jax.Array


def mlp(p: MLP, x: jax.Array, *, fp8: bool = False) -> jax.Array:
    """SwiGLU of `[..., hidden]`."""
    gate, up = linear(x, (p.gate_proj, p.up_proj), fp8=fp8)
    return linear(jax.nn.silu(gate) * up, p.down_proj, fp8=fp8)


def route(p: Router, x: jax.Array, config: MoEConfig) -> Routing:
    """Chooses experts and weighs them, in float32 or float64.

    V3's choice (`noaux_tc`) sees scores plus bias, its weights the scores alone. V2's weights are
    normalised *or* scaled by `routed_scaling_factor`, V3's both, as published.

    Args:
      p: the router's weights.
      x: `[..., hidden]`; the choice is made in float64 where it is, else in float32.
      config: sizes and method.
    """
    logits = linear(x.astype(accumulator(x.dtype)), p.weight)
    sigmoid = config.scoring_func == "sigmoid"
    scores = jax.nn.sigmoid(logits) if sigmoid else jax.nn.softmax(logits, axis=-1)
    choice = scores
    if config.topk_method == "noaux_tc":
        bias = read(p.e_score_correction_bias).astype(scores.dtype)
        choice = scores + jnp.expand_dims(bias, tuple(range(x.ndim - 1)))
    if config.topk_method != "greedy" and config.topk_group < config.n_group:
        choice = limit_to_groups(choice, config)
    _, topk_idx = jax.lax.top_k(jax.lax.stop_gradient(choice), config.num_experts_per_tok)
    weights = jnp.take_along_axis(scores, topk_idx, axis=-1)
    normalise = config.norm_topk_prob and config.num_experts_per_tok > 1
    if normalise:
        weights = weights / (jnp.sum(weights, axis=-1, keepdims=True) + 1e-20)
    if config.topk_method == "noaux_tc" or not normalise:
        weights = weights * config.routed_scaling_factor
    return Routing(topk_idx, weights, scores)


def limit_to_groups(choice: jax.Array, config: MoEConfig) -> jax.Array:
    """Sets the scores of all experts outside a token's `topk_group` best groups to -inf."""
    grouped = choice.reshape(*choice.shape[:-1], config.n_group, -1)
    best = 2 if config.topk_method == "noaux_tc" else 1
    group_scores = jnp.sum(jax.lax.top_k(grouped, best)[0], axis=-1)
    _, groups = jax.lax.top_k(group_scores, config.topk_group)
    kept = jnp.any(jax.nn.one_hot(groups, config.n_group, dtype=jnp.bool_), axis=-2)
    return jnp.where(kept[..., None], grouped, -jnp.inf).reshape(choice.shape)


def balance_loss(routing: Routing, num_experts: int) -> jax.Array:
    """The sequence-wise balance loss of DeepSeek-V3 (section 2.1.2), without its factor alpha.

    For each sequence `sum_i f_i * P_i`: f the share of choices times E (1 where balanced), P the
    mean normalised score; then the mean over sequences. 1 where all is balanced.

    Args:
      routing: of `[b, t]` tokens.
      num_experts: E.
    """
    one_hot = jax.nn.one_hot(routing.topk_idx, num_experts, dtype=routing.scores.dtype)
    chosen = jnp.sum(one_hot, axis=2)
    share = jnp.mean(chosen, axis=1) * (num_experts / routing.topk_idx.shape[-1])
    normalised = routing.scores / jnp.sum(routing.scores, axis=-1, keepdims=True)
    return jnp.mean(jnp.sum(share * jnp.mean(normalised, axis=1), axis=-1))


def routed_experts(
    p: Experts,
    x: jax.Array,
    topk_idx: jax.Array,
    topk_weights: jax.Array,
    config: MoEConfig,
    *,
    fp8: bool = False,
    placement: Placement | None = None,
    capacity_factor: float | None = None,
    exchange: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """Sends `[T, hidden]` tokens through their experts and sums the weighted outputs.

    With a placement it is called by every rank of the `expert` axis, with p its own experts. Gives
    the overflow of this rank too, `i32[]`: 0 without a factor.
    """
    alignment = rows_alignment(topk_idx.size, config, fp8)
    if placement is not None:
        with jax.named_scope("dispatch"):
            choice = x, topk_idx, topk_weights, placement
            limit = max_rows(topk_idx.size, placement, alignment, capacity_factor)
            options = {"alignment": alignment, "quantize": "fp8" if fp8 else None}
            sent = dispatch(*choice, axis=EXPERT, max_rows=limit, method=exchange, **options)
        outputs = visit_experts(p, sent, alignment=alignment, fp8=fp8)
        with jax.named_scope("combine"):
            return finish_combine(outputs), sent.overflow
    with jax.named_scope("dispatch"):
        plan = plan_permutation(topk_idx, config.n_routed_experts, alignment=alignment)
        rows = permute(x, plan)
    with jax.named_scope("experts"):
        out = grouped_mlp(p, rows, plan.group_sizes, alignment=alignment, fp8=fp8)
    with jax.named_scope("combine"):
        return unpermute(out, topk_weights, plan), plan.overflow


def visit_experts(p: Experts, sent: Dispatched, *, alignment: int, fp8: bool) -> Returning:
    """Runs this rank's experts on what was dispatched to them; the outputs are still here."""
    layout = {"alignment": alignment, "fp8": fp8}
    with jax.named_scope("experts"):
        out = grouped_mlp(p, sent.rows(), sent.group_sizes, carrier=sent.carrier, **layout)
    with jax.named_scope("combine"):
        return start_combine(out, sent.handle)


def rows_alignment(choices: int, config: MoEConfig, fp8: bool) -> int:
    """Multiple of rows on which experts start: padding is small for training, not for decode."""
    return 128 if fp8 or choices >= 64 * config.n_routed_experts else 8


def max_rows(
    choices: int, placement: Placement, alignment: int, capacity_factor: float | None
) -> int | None:
    """Rows of a rank: so many times what a balanced load brings, and the padding of its slots."""
    if capacity_factor is None:
        return None
    return math.ceil(choices * capacity_factor) + alignment * placement.slots_per_rank


def grouped_mlp(
    p: Experts,
    rows: jax.Array | QuantizedArray,
    group_sizes: jax.Array,
    *,
    alignment: int,
    fp8: bool,
    carrier: jax.Array | None = None,
) -> jax.Array:
    """SwiGLU of each row by its expert, `[rows, hidden]`; arguments as of `grouped_linear`."""
    layout = {"alignment": alignment, "fp8": fp8}
    up_weights = p.gate_proj, p.up_proj
    gate, up = grouped_linear(rows, up_weights, group_sizes, carrier=carrier, **layout)
    return grouped_linear(jax.nn.silu(gate) * up, p.down_proj, group_sizes, **layout)


def moe(
    p: MoE,
    x: jax.Array,
    config: MoEConfig,
    *,
    mesh: Mesh | None = None,
    fp8: bool = False,
    placement: Placement | None = None,
    capacity_factor: float | None = None,
    exchange: str | None = None,
) -> tuple[jax.Array, MoEStats]:
    """Routed plus shared experts.

    Args:
      p: weights of one layer.
      x: `bf16|f32|f64[b, t, hidden]`.
      config: sizes and routing.
      mesh: where the batch is sharded over `BATCH_AXES`, each device sorts its own tokens; where
        it has several ranks of the `expert` axis, they go to the ranks of their experts.
      fp8: multiply by the experts' weights in FP8.
      placement: of the experts over those ranks, uniform unless given; p then has a weight for
        each of its slots, not of the experts.
      capacity_factor: rows of a rank's experts, in multiples of what it gets of a balanced load;
        None for enough for any. What is too much is left out, and counted.
      exchange: method of `dispatch`.

    Returns:
      `[b, t, hidden]` and the layer's statistics.

    Raises:
      ValueError: a placement is given and the mesh has no ranks for it.
    """
    routing = route(p.gate, x, config)
    ranks = 1 if mesh is None else mesh.shape[EXPERT]
    if placement is None and ranks > 1:
        placement = Placement.uniform(config.n_routed_experts, ranks)
    if placement is not None and placement.num_ranks != ranks:
        raise ValueError(f"placement.num_ranks={placement.num_ranks} must be the {ranks} of {mesh}")
    spec = PartitionSpec() if placement is None else PartitionSpec(EXPERT)

    def routed(p_and_placement, x, topk_idx, topk_weights):
        p, placement = p_and_placement
        flat = [a.reshape(-1, a.shape[-1]) for a in (x, topk_idx, topk_weights)]
        options = {"fp8": fp8, "placement": placement, "capacity_factor": capacity_factor}
        out, overflow = routed_experts(p, *flat, config, **options, exchange=exchange)
        return out.reshape(x.shape), overflow[None]

    routed = on_own_batch(routed, mesh, (spec, PartitionSpec()))
    choice = x, routing.topk_idx, routing.topk_weights
    out, overflow = routed((p.experts, placement), *choice)
    if config.n_shared_experts:
        out = out + shared_expert(p, x, mesh=mesh, fp8=fp8)
    return out, statistics(routing, config, overflow)


def send_tokens(
    p: MoE,
    x: jax.Array,
    hold: Any,
    config: MoEConfig,
    *,
    mesh: Mesh,
    fp8: bool,
    placement: Placement | None = None,
    capacity_factor: float | None = None,
) -> tuple[Dispatched, Any, MoEStats]:
    """The part of `moe` up to the experts, over several ranks of the `expert` axis.

    Args:
      p, x, config, mesh, fp8, placement, capacity_factor: as in `moe`.
      hold: pytree of arrays, a part on each device along their first axes; see `dispatch`.

    Returns:
      For `run_experts`, what was dispatched, with a leading axis of all devices; what was held;
      and the layer's statistics.
    """
    routing = route(p.gate, x, config)
    if placement is None:
        placement = Placement.uniform(config.n_routed_experts, mesh.shape[EXPERT])

    def send(placement, x, topk_idx, topk_weights, hold):
        flat = [a.reshape(-1, a.shape[-1]) for a in (x, topk_idx, topk_weights)]
        alignment = rows_alignment(flat[1].size, config, fp8)
        with jax.named_scope("dispatch"):
            options = {"alignment": alignment, "quantize": "fp8" if fp8 else None, "hold": hold}
            limit = max_rows(flat[1].size, placement, alignment, capacity_factor)
            sent = dispatch(*flat, placement, axis=EXPERT, max_rows=limit, **options)
        return jax.tree.map(lambda a: a[None], sent._replace(held=None)), sent.held

    arguments = x, routing.topk_idx, routing.topk_weights, hold
    sent, held = on_own_batch(send, mesh)(placement, *arguments)
    return sent, held, statistics(routing, config, sent.overflow)


def run_experts(
    p: MoE, x: jax.Array, sent: Dispatched, config: MoEConfig, *, mesh: Mesh, fp8: bool
) -> tuple[jax.Array | None, Returning]:
    """Runs shared experts on x, and routed ones on what arrived.

    Args:
      p, x, config, mesh, fp8: as in `moe`.
      sent: from `send_tokens`.

    Returns:
      The shared experts' output `[b, t, hidden]`, None without any; and what `receive_outputs`
      takes, with a leading axis of all devices.
    """
    tokens = x.size // x.shape[-1] // mesh.size
    alignment = rows_alignment(tokens * config.num_experts_per_tok, config, fp8)

    def run(p, sent):
        sent = jax.tree.map(lambda a: a[0], sent)
        outputs = visit_experts(p, sent, alignment=alignment, fp8=fp8)
        return jax.tree.map(lambda a: a[None], outputs)

    outputs = on_own_batch(run, mesh, PartitionSpec(EXPERT))(p.experts, sent)
    shared = shared_expert(p, x, mesh=mesh, fp8=fp8) if config.n_shared_experts else None
    return shared, outputs


def receive_outputs(x: jax.Array, outputs: Returning, *, mesh: Mesh) -> jax.Array:
    """Adds the routed experts' outputs to `[b, t, hidden]` when they are back."""

    def receive(_, x, outputs):
        with jax.named_scope("combine"):
            out = finish_combine(jax.tree.map(lambda a: a[0], outputs))
        return x + out.reshape(x.shape)

    return on_own_batch(receive, mesh)((), x, outputs)


def shared_expert(p: MoE, x: jax.Array, *, mesh: Mesh | None, fp8: bool) -> jax.Array:
    """The output of the experts that every token visits."""
    with jax.named_scope("shared_experts"):
        shared = on_own_batch(functools.partial(mlp, fp8=fp8), mesh if fp8 else None)
        return shared(p.shared_experts, x)


def statistics(routing: Routing, config: MoEConfig, overflow: jax.Array) -> MoEStats:
    """What a MoE layer reports of its routing of `[b, t]` tokens; `overflow` is of each device."""
    experts = jnp.arange(config.n_routed_experts, dtype=jnp.int32)
    load = jnp.sum(routing.topk_idx[..., None] == experts[None, None, None], axis=(0, 1, 2))
    balance = balance_loss(routing, config.n_routed_experts)
    return MoEStats(load.astype(jnp.int32), balance, jnp.sum(overflow, dtype=jnp.int32))
