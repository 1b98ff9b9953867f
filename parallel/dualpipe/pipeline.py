"""A pipeline over a mesh: cuts the batch, brings parameters to their ranks, and gradients back."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import Mesh, PartitionSpec

from whalejax.parallel.dualpipe.executor import Data, run_table
from whalejax.parallel.dualpipe.moving import from_chunks, plan_moves, to_chunks
from whalejax.parallel.dualpipe.segments import segments
from whalejax.parallel.dualpipe.stage import Functions, trace_stage
from whalejax.parallel.dualpipe.table import Table


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pipeline:
    """How a pipeline lies on a mesh; see `value_and_grad`.

    Attributes:
      mesh: devices.
      table: of the schedule.
      num_microbatches: into which a batch is cut.
      stage_axis, batch_axes, gather_axes: of the mesh.
    """

    mesh: Mesh
    table: Table
    num_microbatches: int
    stage_axis: str
    batch_axes: tuple[str, ...]
    gather_axes: tuple[str, ...]

    @property
    def num_stages(self) -> int:
        """Stages of the model."""
        return int(self.table.stages.max()) + 1

    @property
    def other_axes(self) -> tuple[str, ...]:
        """The axes of the devices that share a stage."""
        return tuple(axis for axis in self.mesh.axis_names if axis != self.stage_axis)

    def size(self, axes: Sequence[str]) -> int:
        """Devices along some axes."""
        return math.prod(self.mesh.shape[axis] for axis in axes)


def run_pipeline(
    pipeline: Pipeline,
    functions: Functions,
    leaves: list[jax.Array],
    ends: Any,
    inputs: Any,
    labels: Any,
    specs: tuple[list[PartitionSpec], list[PartitionSpec]],
) -> tuple[jax.Array, tuple[Any, Any], list[jax.Array], Any]:
    """Loss, reports, gradients of the trained leaves, and those of the ends.

    Args:
      pipeline: the devices and the table.
      functions: of the user.
      leaves: parameters of the stages, `[num_stages, ...]`.
      ends, inputs, labels: as in `value_and_grad`.
      specs: of every leaf of a stage and of the ends.

    Raises:
      ValueError: sizes do not fit; prints them.
    """
    _check_leaves(pipeline, functions, leaves)
    _check_batch(inputs, labels)
    cut = functools.partial(cut_microbatches, pipeline)
    of_stages = [PartitionSpec(pipeline.stage_axis, *spec) for spec in specs[0]]
    of_ends = jax.tree.unflatten(jax.tree.structure(ends), specs[1])
    of_batch = PartitionSpec(None, pipeline.batch_axes)
    stacked, whole = PartitionSpec(pipeline.stage_axis), PartitionSpec()

    def run_rank(*arguments):  # a partial would print the whole table in JAX's errors
        return _run_rank(pipeline, functions, specs, *arguments)

    run = jax.shard_map(
        run_rank,
        mesh=pipeline.mesh,
        in_specs=(of_stages, of_ends, of_batch, of_batch),
        out_specs=(whole, (stacked, whole), [of_stages[i] for i in functions.trained], of_ends),
        check_vma=False,  # what a rank has is its own; sums over ranks are made once, in the end
    )
    return run(leaves, ends, cut(inputs), cut(labels))


def cut_microbatches(pipeline: Pipeline, batch: Any) -> Any:
    """A pytree of `[batch, ...]` as `[microbatches, ...]`.

    Raises:
      ValueError: a batch is no multiple of the microbatches and their devices; prints all three.
    """
    number, devices = pipeline.num_microbatches, pipeline.size(pipeline.batch_axes)

    def cut(array):
        if array.shape[0] % (number * devices):
            raise ValueError(
                f"a batch of {array.shape[0]} must be a multiple of num_microbatches={number} "
                f"times the {devices} devices of batch_axes={pipeline.batch_axes}"
            )
        return array.reshape(number, array.shape[0] // number, *array.shape[1:])

    return jax.tree.map(cut, batch)


def _check_batch(inputs, labels):
    sizes = {leaf.shape[:1] for leaf in jax.tree.leaves((inputs, labels))}
    if len(sizes) != 1 or sizes == {()} or not jax.tree.leaves(inputs):
        shapes = [[list(leaf.shape) for leaf in jax.tree.leaves(tree)] for tree in (inputs, labels)]
        raise ValueError(
            f"inputs and labels must be arrays [batch, ...] of one batch, but inputs are "
            f"{shapes[0]} and labels {shapes[1]}"
        )


def _check_leaves(pipeline, functions, leaves):
    stages = pipeline.num_stages
    wrong = [
        f"{name}{list(leaf.shape)}"
        for name, leaf in zip(functions.names, leaves, strict=True)
        if leaf.shape[:1] != (stages,)
    ]
    if wrong:
        raise ValueError(
            f"stage_params must be stacked on a leading axis of {stages} stages, but there are "
            f"{', '.join(wrong)}"
        )


def _run_rank(pipeline, functions, specs, leaves, ends, inputs, labels):
    """What one device does, inside of `shard_map`."""
    table, axis = pipeline.table, pipeline.stage_axis
    stage_specs, end_specs = specs
    structure = jax.tree.structure(ends)
    rounds = plan_moves(table.stages)
    gather = functools.partial(_gather, pipeline.gather_axes)
    with jax.named_scope("parameters"):
        moved = to_chunks(leaves, rounds, axis, table.stages.shape[1])
        whole = [list(map(gather, stage_specs, chunk)) for chunk in moved]
        functions, chunks = functions.prepared(whole)
        ends = structure.unflatten(map(gather, end_specs, jax.tree.leaves(ends)))
    of_one = jax.tree.map(lambda a: a[0], (inputs, labels))
    stage = trace_stage(functions, chunks[0], ends, *of_one)
    data = Data(
        chunks=chunks,
        ends=ends,
        inputs=inputs,
        labels=labels,
        stages=jnp.asarray(table.stages)[lax.axis_index(axis)],
    )
    state = run_table(table, segments(table), stage, data, axis)
    others = pipeline.other_axes
    mean = 1.0 / (pipeline.num_microbatches * pipeline.size(others))
    with jax.named_scope("gradients"):
        trained_specs = [stage_specs[i] for i in functions.trained]
        reduce = functools.partial(_reduce, pipeline.gather_axes, others)
        sums = [list(map(reduce, trained_specs, chunk)) for chunk in state.sums]
        stored = pipeline.num_stages // lax.axis_size(axis)
        gradients = [total * mean for total in from_chunks(sums, rounds, axis, stored)]
        reduce = functools.partial(_reduce, pipeline.gather_axes, (axis, *others))
        flat = map(reduce, end_specs, jax.tree.leaves(state.end_sums))
        end_gradients = structure.unflatten(total * mean for total in flat)
    losses = lax.pmean(lax.psum(state.losses, axis), others)
    aux = _reports(pipeline, rounds, state, stored)
    return jnp.mean(losses), aux, gradients, end_gradients


def _reports(pipeline, rounds, state, stored):
    """What stages and losses report, summed over all devices of a stage."""
    axis, batch_axes = pipeline.stage_axis, pipeline.batch_axes
    structure = jax.tree.structure(state.aux[0])
    per_chunk = [jax.tree.leaves(lax.psum(aux, batch_axes)) for aux in state.aux]
    aux = structure.unflatten(from_chunks(per_chunk, rounds, axis, stored))
    return aux, lax.psum(state.loss_aux, (axis, *batch_axes))


def _gathered(gather_axes, spec):
    """Dimensions of a parameter that are gathered, and over which axes."""
    for dimension, axes in enumerate(spec):
        axes = (axes,) if isinstance(axes, str) else tuple(axes or ())
        chosen = tuple(axis for axis in axes if axis in gather_axes)
        if chosen and chosen != axes:
            raise ValueError(
                f"{spec}: dimension {dimension} is cut over {axes}, of which {gather_axes=} has "
                f"{chosen}: all of them, or none"
            )
        if chosen:
            yield dimension, chosen


def _gather(gather_axes, spec, leaf):
    for dimension, axes in _gathered(gather_axes, spec):
        leaf = lax.all_gather(leaf, axes, axis=dimension, tiled=True)
    return leaf


def _reduce(gather_axes, over, spec, total):
    """A gradient summed over all devices that have the parameter, each left with its part."""
    for dimension, axes in _gathered(gather_axes, spec):
        total = lax.psum_scatter(total, axes, scatter_dimension=dimension, tiled=True)
    cut = {axis for axes in spec for axis in ((axes,) if isinstance(axes, str) else axes or ())}
    rest = tuple(axis for axis in over if axis not in cut)
    return lax.psum(total, rest) if rest else total
