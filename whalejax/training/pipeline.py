"""Training through a pipeline: its settings, what cannot run, and the gradient of a batch."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from whalejax.model.config import ModelConfig
from whalejax.model.decoder import Execution
from whalejax.model.parameters import rms_norm
from whalejax.model.pipelined import (
    Division,
    Travelling,
    divide,
    ends_of,
    enter,
    from_stages,
    join,
    round_weights,
    run_stage,
    split,
    with_rounded,
)
from whalejax.model.sharding import partition_spec, path_name, stage_spec
from whalejax.parallel import dualpipe
from whalejax.parallel.mesh import BATCH_AXES, FSDP, STAGE, batch_devices
from whalejax.training.loss import LossConfig, Losses, loss_behind


@dataclasses.dataclass(frozen=True, kw_only=True)
class PipelineConfig:
    """The pipeline over the mesh axis `stage`; without effect where that has one rank.

    Attributes:
      schedule: gpipe, 1f1b, interleaved, zb1p, dualpipe or dualpipev.
      microbatches: into which a batch (of accumulate, each) is cut; two for each rank if not given.
      chunks_per_rank: parts of the model on each rank, for interleaved.
      split_backward: compute the gradients of weights apart from those of activations, and later.
    """

    schedule: str = "dualpipe"
    microbatches: int | None = None
    chunks_per_rank: int = 1
    split_backward: bool = True

    def num_microbatches(self, mesh: Mesh) -> int:
        """Microbatches of a batch on `mesh`."""
        return 2 * mesh.shape[STAGE] if self.microbatches is None else self.microbatches

    def steps(self, mesh: Mesh) -> dualpipe.Schedule:
        """What each rank does.

        Raises:
          ValueError: there is no such schedule of these numbers; prints them.
        """
        return dualpipe.make_schedule(
            self.schedule,
            mesh.shape[STAGE],
            self.num_microbatches(mesh),
            chunks_per_rank=self.chunks_per_rank,
            split_backward=self.split_backward,
        )


def check_pipeline(
    model: ModelConfig, pipeline: PipelineConfig, mesh: Mesh, sequences: int
) -> None:
    """Checks that a model can train through a pipeline on a mesh.

    Args:
      model: sizes.
      pipeline: settings.
      mesh: devices.
      sequences: of a batch that the pipeline is given.

    Raises:
      ValueError: it cannot; prints what does not fit.
    """
    if mesh.shape[STAGE] == 1:
        if pipeline != PipelineConfig():
            raise ValueError(f"{pipeline} needs several ranks of the mesh axis {STAGE!r}")
        return
    divide(model, pipeline.steps(mesh).num_stages)
    count, devices = pipeline.num_microbatches(mesh), batch_devices(mesh)
    if sequences % (count * devices):
        raise ValueError(
            f"{sequences} sequences must be a multiple of microbatches={count} times the {devices} "
            f"devices that share one"
        )


def pipelined_gradient(
    model: ModelConfig,
    loss: LossConfig,
    execution: Execution,
    pipeline: PipelineConfig,
    router_bias: Any,
) -> Callable:
    """The gradient of `training_loss`, as `jax.value_and_grad(has_aux=True)` gives it.

    Args:
      model: sizes.
      loss: weights of its parts.
      execution: how to run; its mesh has several ranks of the `stage` axis.
      pipeline: settings.
      router_bias: of all layers.

    Returns:
      A function of the parameters and `i32[b, t + 1]` tokens.
    """
    mesh, number = execution.mesh, pipeline.num_microbatches(execution.mesh)
    schedule = pipeline.steps(mesh)
    division = divide(model, schedule.num_stages)
    first, inner, last = stage_functions(model, loss, execution)
    fp8 = execution.precision.fp8

    def inner_of_rounded(stage, rounded, x):
        return inner(with_rounded(stage, rounded), x)

    def gradient(params, tokens):
        stages, ends = split(params, router_bias, division)
        step = dualpipe.value_and_grad(
            inner_of_rounded if fp8 else inner,
            last,
            mesh=mesh,
            num_microbatches=number,
            schedule=schedule,
            stage_axis=STAGE,
            first_fn=first,
            prepare_fn=round_weights if fp8 else None,
            has_aux=True,
            defer=can_wait if pipeline.split_backward else None,
            sharding=sharding_of(stages, ends, mesh),
        )
        (total, aux), grads = step(stages, tokens[:, :-1], tokens, ends)
        parts = whole_parts(*aux, division, number * batch_devices(mesh))
        return (total, parts), join(*grads, division)

    return gradient


def stage_functions(
    model: ModelConfig, loss: LossConfig, execution: Execution
) -> tuple[Callable, Callable, Callable]:
    """What the pipeline runs, each on a device's part of one microbatch.

    Returns:
      `first_fn(ends, inputs)`, `stage_fn(stage, x)` and `loss_fn(ends, x, tokens)`; arguments are
      the parts of what `split` gives, and `i32[b, t]`, `Travelling` and `i32[b, t + 1]`.
    """

    def first(ends, inputs):
        return enter(ends_of(model, ends), inputs, execution)

    def inner(stage, x):
        x, stats = run_stage(stage, x, model, execution)
        return x, tuple((of_slot.load, of_slot.overflow) for of_slot in stats)

    def last(ends, x: Travelling, tokens):
        decoder = ends_of(model, ends)
        hidden = rms_norm(x.hidden, decoder.norm, model.rms_norm_eps)
        balance = x.balance / model.num_moe_layers
        return loss_behind(decoder, hidden, balance, tokens, loss, execution)

    return first, inner, last


def can_wait(path: Any, _: Any) -> bool:
    """Whether a stage's weight is used by one call of `linear` or `grouped_linear` in its layer."""
    name = path_name(path)
    return "_proj" in name or name.endswith("gate.weight")


def whole_parts(stats: Any, parts: Losses, division: Division, count: int) -> Losses:
    """The parts of a batch's loss from sums over its `count` parts, and from the stages' loads."""
    load, overflow = from_stages(stats, division)
    mean = {name: getattr(parts, name) / count for name in ("main", "mtp", "balance")}
    lost = jnp.sum(overflow, dtype=jnp.int32) + parts.overflow
    return parts._replace(load=load, overflow=lost, **mean)


def sharding_of(stages: Any, ends: Any, mesh: Mesh) -> dualpipe.Sharding:
    """How the parameters that `split` gives are cut: by the table of shardings."""

    def of_stages(path, leaf):
        return stage_spec(path_name(path), leaf.shape[1:], mesh)

    def of_ends(path, leaf):
        return partition_spec(path_name(path), leaf.shape, mesh)

    return dualpipe.Sharding(
        batch_axes=BATCH_AXES,
        stages=jax.tree_util.tree_map_with_path(of_stages, stages),
        ends=jax.tree_util.tree_map_with_path(of_ends, ends),
        gather_axes=(STAGE, FSDP),
    )
