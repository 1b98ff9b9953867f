"""One training step as a pure function, and its compilation over a mesh."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import nnx
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from whalejax.model.config import ModelConfig
from whalejax.model.decoder import Decoder, Execution
from whalejax.model.parameters import RouterBias
from whalejax.model.sharding import batch_sharding, shardings
from whalejax.parallel.eplb import update_estimate
from whalejax.parallel.expert import Placement
from whalejax.parallel.mesh import STAGE
from whalejax.parallel.runtime import overlap_options
from whalejax.training.experts import (
    EPLBConfig,
    global_norm,
    load_shape,
    placed,
    some_placement,
    sum_of_replicas,
)
from whalejax.training.loss import LossConfig, Losses, heldout_loss, training_loss
from whalejax.training.optimizer import OptimizerConfig, clip, learning_rate, make_optimizer
from whalejax.training.pipeline import PipelineConfig, pipelined_gradient

MAX_BAD_STEPS = 10  # in a row, before a run stops


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepConfig:
    """What a compiled step depends on beside the model.

    Attributes:
      steps: updates of the whole run, for the learning rate's schedule.
      accumulate: microbatches whose gradients make one update.
      loss: weights of the loss.
      optimizer: AdamW and the routers' bias.
      execution: precision, rematerialisation, mesh.
      eplb: slots of experts, and the estimate of their loads.
      pipeline: the schedule, where the mesh has stages.
    """

    steps: int
    accumulate: int = 1
    loss: LossConfig = LossConfig()
    optimizer: OptimizerConfig = OptimizerConfig()
    execution: Execution = Execution()
    eplb: EPLBConfig = EPLBConfig()
    pipeline: PipelineConfig = PipelineConfig()

    def __post_init__(self):
        if self.steps < 1 or self.accumulate < 1:
            raise ValueError(
                f"steps={self.steps} and accumulate={self.accumulate} must be positive"
            )
        if self.num_stages > 1 and (self.execution.overlap or self.eplb.every):
            raise ValueError(
                f"overlap={self.execution.overlap} and eplb.every={self.eplb.every} must be False "
                f"and 0 with stage={self.num_stages} of the mesh: a pipeline can do neither"
            )
        if self.num_stages > 1 and self.execution.exchange == "peer":
            raise ValueError(
                f"exchange={self.execution.exchange!r} with stage={self.num_stages} of the mesh: "
                "all devices would have to exchange at once, and stages take turns"
            )

    @property
    def num_stages(self) -> int:
        """Ranks of the pipeline, 1 without one."""
        mesh = self.execution.mesh
        return 1 if mesh is None else mesh.shape[STAGE]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that a step changes, and so everything that a checkpoint holds.

    With a placement the experts' weights and moments are those of its slots; a checkpoint has every
    expert once, and no placement.

    Attributes:
      params: float32 master weights, or float64 where the computation is.
      router_bias: the routers' correction biases.
      opt_state: of the optimiser.
      step: `i32[]`, steps done, skipped ones included.
      skipped: `i32[]`, steps whose loss or gradient was not finite.
      bad_streak: `i32[]`, such steps in a row until now.
      load_estimate: `f32[moe_layers + depths, E]`, of `update_estimate`; None without experts.
      placement: of the experts of all those layers, stacked; None if every expert is there once.
    """

    params: Any
    router_bias: Any
    opt_state: Any
    step: jax.Array
    skipped: jax.Array
    bad_streak: jax.Array
    load_estimate: jax.Array | None = None
    placement: Placement | None = None


def graphdef_of(config: ModelConfig) -> nnx.GraphDef:
    """The structure of a model without its arrays."""
    return nnx.split(nnx.eval_shape(lambda: Decoder(config, rngs=nnx.Rngs(0))))[0]


def model_of(config: ModelConfig, state: TrainState) -> Decoder:
    """The model that a state without a placement holds."""
    return nnx.merge(graphdef_of(config), state.params, state.router_bias)


def state_of(model: Decoder, config: StepConfig) -> TrainState:
    """The first state of a run that starts from a model's weights."""
    _, params, router_bias = nnx.split(model, nnx.Param, RouterBias)
    optimizer = make_optimizer(config.optimizer, config.steps)
    zero = jnp.int32(0)
    shape = load_shape(model.config)
    estimate = None if shape is None else jnp.zeros(shape, jnp.float32)
    return TrainState(params, router_bias, optimizer.init(params), zero, zero, zero, estimate)


def abstract_state(
    model: ModelConfig, config: StepConfig, mesh: Mesh, *, logical: bool = False
) -> TrainState:
    """Shapes, dtypes and shardings of the state, without its arrays.

    Where experts are balanced it is in slots, unless every expert shall be there once.
    """
    state = jax.eval_shape(lambda: state_of(draw(model, config, jax.random.key(0)), config))
    if config.eplb.every and not logical:
        state = jax.eval_shape(placed, state, some_placement(model, config.eplb, mesh))
    return jax.tree.map(
        lambda leaf, sharding: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=sharding),
        state,
        shardings(state, mesh),
    )


def init_state(model: ModelConfig, config: StepConfig, mesh: Mesh, seed: int) -> TrainState:
    """Draws the weights, each device its own shards; every expert is there once."""
    abstract = abstract_state(model, config, mesh, logical=True)
    out = jax.tree.map(lambda leaf: leaf.sharding, abstract)
    make = jax.jit(lambda key: state_of(draw(model, config, key), config), out_shardings=out)
    return make(jax.random.key(seed))


def draw(model: ModelConfig, config: StepConfig, key: jax.Array) -> Decoder:
    """Fresh weights, in the dtype that the optimiser keeps them in."""
    dtype = config.execution.precision.master
    return Decoder(model, rngs=nnx.Rngs(params=key), dtype=dtype)


def train_step(
    model: ModelConfig, config: StepConfig, state: TrainState, batch: jax.Array
) -> tuple[TrainState, dict[str, jax.Array]]:
    """One update, or none where the loss or the gradient is not finite.

    Args:
      model: sizes.
      config: of the step.
      state: before the step.
      batch: `i32[accumulate, b, t + 1]`.

    Returns:
      The state after the step, and metrics: losses in nats a token, `grad_norm`, `lr`, `load`
      (`f32[moe_layers + depths, E]`, share of the choices), `overflow` (choices that were left
      out), `skipped`, `bad_streak`.
    """
    loss, parts, grads = mean_gradients(model, config, state, batch)
    if state.placement is not None:
        grads = sum_of_replicas(grads, state.placement, config.execution.mesh)
    grad_norm = global_norm(grads, state.placement)
    good = jnp.isfinite(loss) & jnp.isfinite(grad_norm)
    grads = clip(grads, grad_norm, config.optimizer.clip_norm)
    load = jnp.concatenate([x for x in (parts.load, parts.mtp_load) if x.size] or [parts.load])
    optimizer = make_optimizer(config.optimizer, config.steps)
    with jax.numpy_dtype_promotion("standard"):  # optax raises floats to integer powers
        updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
        lr = learning_rate(config.optimizer, config.steps)(state.step)
    params = optax.apply_updates(state.params, updates)
    speed = config.optimizer.bias_update_speed
    router_bias = balance_routers(state.router_bias, parts, speed)
    estimate = state.load_estimate
    if estimate is not None:
        estimate = update_estimate(estimate, load, config.eplb.decay)
    *kept, estimate = jax.tree.map(
        lambda new, old: jnp.where(good, new, old),
        (params, router_bias, opt_state, estimate),
        (state.params, state.router_bias, state.opt_state, state.load_estimate),
    )
    bad = jnp.int32(~good)
    counters = state.step + 1, state.skipped + bad, (state.bad_streak + 1) * bad
    state = TrainState(*kept, *counters, estimate, state.placement)
    load = load.astype(jnp.float32)
    metrics = {
        "loss": loss,
        "loss_main": parts.main,
        "loss_mtp": parts.mtp,
        "balance_loss": parts.balance,
        "grad_norm": grad_norm,
        "lr": jnp.asarray(lr, jnp.float32),
        "load": load / jnp.maximum(jnp.sum(load, axis=-1, keepdims=True), 1.0),
        "overflow": parts.overflow,
        "skipped": state.skipped,
        "bad_streak": state.bad_streak,
    }
    return state, metrics


def mean_gradients(
    model: ModelConfig, config: StepConfig, state: TrainState, batch: jax.Array
) -> tuple[jax.Array, Losses, Any]:
    """Loss, its parts and the gradient, means over the microbatches; loads are sums."""
    gradient = gradient_of_loss(model, config, state)
    if config.accumulate == 1:
        (loss, parts), grads = gradient(state.params, batch[0])
        return loss, parts, grads

    def add(total, tokens):
        return jax.tree.map(jnp.add, total, gradient(state.params, tokens)), None

    shapes = jax.eval_shape(gradient, state.params, batch[0])
    zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), shapes)
    ((loss, parts), grads), _ = jax.lax.scan(add, zeros, batch)
    scale = 1.0 / config.accumulate
    mean = parts._replace(
        main=parts.main * scale, mtp=parts.mtp * scale, balance=parts.balance * scale
    )
    return loss * scale, mean, jax.tree.map(lambda g: g * scale, grads)


def gradient_of_loss(model: ModelConfig, config: StepConfig, state: TrainState) -> Callable:
    """The gradient of `training_loss` for parameters and `i32[b, t + 1]`, through stages or not."""
    graphdef = graphdef_of(model)
    if config.num_stages > 1:
        options = config.loss, config.execution, config.pipeline
        return pipelined_gradient(model, *options, state.router_bias)

    def loss_of(params, tokens):
        decoder = nnx.merge(graphdef, params, state.router_bias)
        return training_loss(decoder, tokens, config.loss, config.execution, state.placement)

    return jax.value_and_grad(loss_of, has_aux=True)


def balance_routers(router_bias: Any, parts: Losses, speed: float) -> Any:
    """Moves each bias by `speed` toward its expert's fair share of the load (section 2.1.2)."""

    def move(path, bias):
        load = parts.mtp_load if "mtp_layers" in jax.tree_util.keystr(path) else parts.load
        load = load.astype(bias.dtype)
        return bias + speed * jnp.sign(jnp.mean(load, axis=-1, keepdims=True) - load)

    return jax.tree_util.tree_map_with_path(move, router_bias)


@functools.lru_cache(maxsize=8)
def compile_step(model: ModelConfig, config: StepConfig, mesh: Mesh) -> Callable:
    """`train_step` jitted with the shardings of the table; the state is donated.

    Cached, so that a run that stops and goes on in one process compiles once.
    """
    state = jax.tree.map(lambda leaf: leaf.sharding, abstract_state(model, config, mesh))
    overlaps = config.execution.overlap or config.num_stages > 1
    return jax.jit(
        functools.partial(train_step, model, config),
        in_shardings=(state, batch_sharding(mesh, leading=1)),
        out_shardings=(state, NamedSharding(mesh, PartitionSpec())),
        donate_argnums=0,
        compiler_options=overlap_options(mesh) if overlaps else None,
    )


@functools.lru_cache(maxsize=8)
def compile_heldout(model: ModelConfig, execution: Execution, mesh: Mesh) -> Callable:
    """`heldout_loss` of a state, jitted; no choice of experts is left out.

    Takes `(params, router_bias, placement, tokens, weights)`, the first three of the state.
    """
    graphdef = graphdef_of(model)
    execution = dataclasses.replace(execution, capacity_factor=None)

    def loss(params, router_bias, placement, tokens, weights):
        decoder = nnx.merge(graphdef, params, router_bias)
        return heldout_loss(decoder, tokens, weights, execution, placement)

    batch = batch_sharding(mesh)
    return jax.jit(loss, in_shardings=(None, None, None, batch, batch))
