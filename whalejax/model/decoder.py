"""The decoder: embedding, scanned layers, head, and the MTP modules behind it."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.mla import mla_workers, plan_mla_decode
from whalejax.model.config import ModelConfig
from whalejax.model.linear import Precision
from whalejax.model.mla import MLA, PagedCache, attend_absorbed, attend_expanded
from whalejax.model.moe import MLP, MoE, MoEStats, mlp, moe
from whalejax.model.overlapped import layer_stages, run_halves, scan_halves
from whalejax.model.parameters import Initializer, read, rms_norm
from whalejax.model.rope import Rotary, rotary
from whalejax.model.sharding import on_own_batch
from whalejax.parallel.expert import METHODS, Placement, Stages
from whalejax.parallel.mesh import EXPERT

REMATERIALISATION: dict[str, Any] = {
    "none": None,
    "full": jax.checkpoint_policies.nothing_saveable,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Execution:
    """How the forward pass runs; only `capacity_factor` changes what is computed.

    Attributes:
      precision: of the activations, and whether matmuls run in FP8.
      rematerialise: what the backward pass computes again: `"none"`, `"full"` (all but each
        layer's input), or `"dots"` (all but the matmuls of weights).
      attention: implementation of `kernels.attention`, None for the best.
      mesh: devices over which the batch is sharded.
      overlap: run the MoE layers on two halves of each device's sequences, so that one's tokens
        travel to their experts and back while the other computes; for a mesh with several ranks of
        the `expert` axis.
      capacity_factor: rows of a rank's experts, in multiples of what it gets of a balanced load;
        what is too much is left out of the model and counted. None for enough rows for any load:
        nothing is left out, at the cost of as many rows as all ranks together can send.
      exchange: method of `parallel.expert.dispatch`, None for its default.
    """

    precision: Precision = Precision()
    rematerialise: str = "none"
    attention: str | None = None
    mesh: Mesh | None = None
    overlap: bool = False
    capacity_factor: float | None = None
    exchange: str | None = None

    @property
    def fp8_mesh(self) -> Mesh | None:
        """The mesh if FP8 kernels run over it."""
        return self.mesh if self.precision.fp8 else None

    def __post_init__(self):
        if self.rematerialise not in REMATERIALISATION:
            raise ValueError(
                f"rematerialise={self.rematerialise!r} is unknown; there are "
                f"{', '.join(REMATERIALISATION)}"
            )
        # without x64 JAX would make every float64 a float32
        if self.precision.dtype == jnp.float64 and not jax.config.jax_enable_x64:
            raise ValueError(
                f"precision={self.precision} needs jax_enable_x64, which is "
                f"{jax.config.jax_enable_x64}: set it before the first array is made"
            )
        if self.capacity_factor is not None and not self.capacity_factor > 0:
            raise ValueError(f"capacity_factor={self.capacity_factor} must be positive")
        if self.overlap and (self.mesh is None or self.mesh.shape[EXPERT] == 1):
            raise ValueError(
                f"overlap={self.overlap} needs a mesh with several ranks of the {EXPERT!r} axis, "
                f"this is {None if self.mesh is None else dict(self.mesh.shape)}"
            )
        if self.overlap and self.exchange not in (None, "all_to_all"):
            raise ValueError(
                f"exchange={self.exchange!r} with overlap={self.overlap} must be 'all_to_all': "
                "nothing else runs while other methods do"
            )
        if self.exchange is not None and self.exchange not in METHODS:
            raise ValueError(f"exchange={self.exchange!r} is unknown; choose from {METHODS}")


class DecoderLayer(nnx.Module):
    """Weights of stacked layers of one kind: attention and a feed-forward part, each normed."""

    def __init__(self, config: ModelConfig, init: Initializer, *, dense: bool):
        self.input_layernorm = init.ones(config.hidden_size)
        self.self_attn = MLA(config.mla, config.hidden_size, init)
        self.post_attention_layernorm = init.ones(config.hidden_size)
        if dense:
            self.mlp = MLP(config.hidden_size, config.intermediate_size, init)
        else:
            self.mlp = MoE(config.hidden_size, config.moe, init)


class MTPLayer(nnx.Module):
    """Weights of the multi-token prediction modules (DeepSeek-V3, section 2.2), by depth."""

    def __init__(self, config: ModelConfig, init: Initializer):
        self.enorm = init.ones(config.hidden_size)
        self.hnorm = init.ones(config.hidden_size)
        self.eh_proj = init.normal(config.hidden_size, 2 * config.hidden_size)
        self.layer = DecoderLayer(config, init, dense=False)
        self.norm = init.ones(config.hidden_size)


class Decoder(nnx.Module):
    """A DeepSeek-V2 or V3 model; `model(tokens)` gives the logits of the next token.

    Attributes:
      config: sizes.
      embed_tokens, norm, lm_head: unstacked parameters.
      dense_layers, moe_layers, mtp_layers: stacked parameters; absent where the config has none.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs, dtype: Any = jnp.float32):
        init = Initializer(rngs, std=config.initializer_range, dtype=dtype)
        self.config = config
        self.embed_tokens = init.normal(config.vocab_size, config.hidden_size)
        if config.num_dense_layers:
            stacked = init.stacked(config.num_dense_layers)
            self.dense_layers = DecoderLayer(config, stacked, dense=True)
        if config.num_moe_layers:
            stacked = init.stacked(config.num_moe_layers)
            self.moe_layers = DecoderLayer(config, stacked, dense=False)
        if config.num_nextn_predict_layers:
            self.mtp_layers = MTPLayer(config, init.stacked(config.num_nextn_predict_layers))
        self.norm = init.ones(config.hidden_size)
        self.lm_head = init.normal(config.vocab_size, config.hidden_size)

    def __call__(self, tokens: jax.Array) -> jax.Array:
        """Logits `f32|f64[b, t, vocab]` of the token after each of `i32[b, t]`."""
        return logits(self, forward(self, tokens).hidden)


class Forward(NamedTuple):
    """The result of a forward pass.

    Attributes:
      hidden: `[b, t, hidden]`, after the final norm.
      latents: `[layers, b, t, cache_dim]`, what decode needs of these tokens.
      load: `i32[moe_layers, E]`, tokens of each expert.
      balance_loss: `f32|f64[]`, mean over the MoE layers; 0 without any.
      overflow: `i32[]`, choices of experts that were left out, see `Execution.capacity_factor`.
    """

    hidden: jax.Array
    latents: jax.Array
    load: jax.Array
    balance_loss: jax.Array
    overflow: jax.Array


def embed(model: Decoder, tokens: jax.Array, dtype: Any = None) -> jax.Array:
    """Embeds `i32[b, t]` as `[b, t, hidden]` in `dtype`, or in that of the parameters."""
    table = read(model.embed_tokens)
    return table[tokens].astype(table.dtype if dtype is None else dtype)


def logits(model: Decoder, hidden: jax.Array) -> jax.Array:
    """Scores of every token of the vocabulary, `f32|f64[..., vocab]`."""
    head = read(model.lm_head).astype(hidden.dtype)
    wide = accumulator(hidden.dtype)
    return jnp.einsum("...h,vh->...v", hidden, head, preferred_element_type=wide)


def feed_forward(
    p: DecoderLayer,
    x: jax.Array,
    config: ModelConfig,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[jax.Array, MoEStats | None]:
    """The second half of a layer with its residual, and the statistics of a MoE layer."""
    normed = rms_norm(x, p.post_attention_layernorm, config.rms_norm_eps)
    if isinstance(p.mlp, MLP):
        dense = on_own_batch(
            functools.partial(mlp, fp8=execution.precision.fp8), execution.fp8_mesh
        )
        return x + dense(p.mlp, normed), None
    options = {"mesh": execution.mesh, "fp8": execution.precision.fp8}
    options |= {"placement": placement, "capacity_factor": execution.capacity_factor}
    out, stats = moe(p.mlp, normed, config.moe, **options, exchange=execution.exchange)
    return x + out, stats


def attend(
    p: DecoderLayer, x: jax.Array, angles: Rotary, config: ModelConfig, execution: Execution
) -> tuple[jax.Array, jax.Array]:
    """The first half of a layer with its residual, `[b, t, hidden]`, and the tokens' latents."""
    normed = rms_norm(x, p.input_layernorm, config.rms_norm_eps)
    expanded = functools.partial(
        attend_expanded,
        config=config.mla,
        implementation=execution.attention,
        fp8=execution.precision.fp8,
    )
    out, kept = on_own_batch(expanded, execution.fp8_mesh)(p.self_attn, normed, angles)
    return x + out, kept


def decoder_layer(
    p: DecoderLayer,
    x: jax.Array,
    angles: Rotary,
    config: ModelConfig,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[jax.Array, tuple[jax.Array, MoEStats | None]]:
    """One layer in the expanded form; gives `[b, t, hidden]`, the latents and the statistics."""
    if execution.overlap and isinstance(p.mlp, MoE):
        stages = moe_stages(config, execution)
        return run_halves(stages, (p, placement), x, angles, mesh=execution.mesh)
    x, kept = attend(p, x, angles, config, execution)
    x, stats = feed_forward(p, x, config, execution, placement)
    return x, (kept, stats)


def scan_layers(
    layer: Callable, layers: nnx.Module, x: Any, *extra: Any, rematerialise: str = "none"
) -> tuple[Any, Any]:
    """Runs `layer(p, x, *slice of extra) -> (x, y)` over stacked layers; stacks the ys."""
    graphdef, state = nnx.split(layers)

    def body(x, xs):
        state, *rest = xs
        return layer(nnx.merge(graphdef, state), x, *rest)

    if rematerialise != "none":
        body = jax.checkpoint(body, policy=REMATERIALISATION[rematerialise], prevent_cse=False)
    return jax.lax.scan(body, x, (state, *extra))


def forward(
    model: Decoder,
    tokens: jax.Array,
    execution: Execution = Execution(),
    *,
    positions: jax.Array | None = None,
    placement: Placement | None = None,
) -> Forward:
    """Runs all layers over whole sequences.

    Args:
      model: the parameters.
      tokens: `i32[b, t]`.
      execution: how to run.
      positions: `i32[b, t]`, 0 to t-1 unless given.
      placement: of the experts of all MoE layers, stacked; `model` then has a weight for each slot.
    """
    config = model.config
    x = embed(model, tokens, execution.precision.dtype)
    angles = positions_angles(tokens, positions, config, x.dtype)

    def layer(p, x):
        return decoder_layer(p, x, angles, config, execution)

    kept, load = [], jnp.zeros((0, 0), jnp.int32)
    balance, overflow = jnp.zeros((), accumulator(x.dtype)), jnp.int32(0)
    if config.num_dense_layers:
        x, (latent, _) = scan_layers(
            layer, model.dense_layers, x, rematerialise=execution.rematerialise
        )
        kept.append(latent)
    if config.num_moe_layers:
        layers = model.moe_layers, x, angles, config, execution, placement
        x, (latent, stats) = run_moe_layers(*layers)
        kept.append(latent)
        load, balance = stats.load, jnp.mean(stats.balance_loss)
        overflow = jnp.sum(stats.overflow, dtype=jnp.int32)
    hidden = rms_norm(x, model.norm, config.rms_norm_eps)
    return Forward(hidden, jnp.concatenate(kept), load, balance, overflow)


def run_moe_layers(
    layers: DecoderLayer,
    x: jax.Array,
    angles: Rotary,
    config: ModelConfig,
    execution: Execution,
    placement: Placement | None = None,
) -> tuple[jax.Array, tuple[jax.Array, MoEStats]]:
    """Runs the stacked MoE layers; gives `[b, t, hidden]`, their latents and statistics."""
    if not execution.overlap:

        def layer(p, x, placement):
            return decoder_layer(p, x, angles, config, execution, placement)

        return scan_layers(layer, layers, x, placement, rematerialise=execution.rematerialise)
    stages, policy = moe_stages(config, execution), REMATERIALISATION[execution.rematerialise]
    options = {"mesh": execution.mesh, "policy": policy, "placement": placement}
    return scan_halves(stages, layers, x, angles, **options)


def moe_stages(config: ModelConfig, execution: Execution) -> Stages:
    """A MoE layer cut where its tokens travel."""

    def attend_here(p, x, angles):
        return attend(p, x, angles, config, execution)

    options = {"mesh": execution.mesh, "fp8": execution.precision.fp8}
    return layer_stages(attend_here, config, **options, capacity_factor=execution.capacity_factor)


def positions_angles(
    tokens: jax.Array, positions: jax.Array | None, config: ModelConfig, dtype: Any
) -> Rotary:
    """Rotary angles of `positions`, or of 0 to t-1, for activations of `dtype`."""
    if positions is None:
        positions = jnp.arange(tokens.shape[1], dtype=jnp.int32)[None]
    return rotary(positions, config.mla, dtype)


def decode(
    model: Decoder,
    tokens: jax.Array,
    pages: jax.Array,
    page_table: jax.Array,
    lengths: jax.Array,
    execution: Execution = Execution(),
) -> tuple[jax.Array, jax.Array]:
    """Runs the newest tokens of each sequence through all layers in the absorbed form.

    Args:
      model: the parameters.
      tokens: `i32[b, t]`, t new tokens of each sequence.
      pages: `[layers, pages, page_size, cache_dim]`.
      page_table: `i32[b, max_pages]`, shared by the layers.
      lengths: `i32[b]`, tokens of each sequence, the new ones included; 0 for an empty slot.
      execution: how to run.

    Returns:
      `[b, t, hidden]` after the final norm, and the updated pages.
    """
    config = model.config
    x = embed(model, tokens, execution.precision.dtype)
    new = jnp.arange(-tokens.shape[1], 0, dtype=jnp.int32)
    angles = rotary(jnp.maximum(lengths[:, None] + new[None], 0), config.mla, x.dtype)

    # the cache is one array of all layers' pages, which each layer's table points into: so that it
    # is written where it lies, and no layer's part is copied
    num_layers, num_pages, *page = pages.shape
    heads = config.mla.num_attention_heads
    plan = plan_mla_decode(lengths, workers=mla_workers(tokens.shape[1], heads))

    def layer(p, carry, first_page):
        x, all_pages = carry
        normed = rms_norm(x, p.input_layernorm, config.rms_norm_eps)
        cache = PagedCache(all_pages, page_table + first_page, lengths, plan)
        out, all_pages = attend_absorbed(
            p.self_attn, normed, angles, config.mla, cache, fp8=execution.precision.fp8
        )
        return (feed_forward(p, x + out, config, execution)[0], all_pages), None

    carry = x, pages.reshape(num_layers * num_pages, *page)
    first_pages = jnp.arange(num_layers, dtype=jnp.int32) * num_pages
    dense = config.num_dense_layers
    if dense:
        carry, _ = scan_layers(layer, model.dense_layers, carry, first_pages[:dense])
    if config.num_moe_layers:
        carry, _ = scan_layers(layer, model.moe_layers, carry, first_pages[dense:])
    x, all_pages = carry
    return rms_norm(x, model.norm, config.rms_norm_eps), all_pages.reshape(pages.shape)
