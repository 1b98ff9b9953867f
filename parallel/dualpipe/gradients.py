"""The front door: from a stage and a loss to a function that gives loss and gradients."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, PartitionSpec

from whalejax.parallel.dualpipe.checking import check
from whalejax.parallel.dualpipe.pipeline import Pipeline, run_pipeline
from whalejax.parallel.dualpipe.schedule import Schedule
from whalejax.parallel.dualpipe.schedules import make_schedule
from whalejax.parallel.dualpipe.segments import align_chunks
from whalejax.parallel.dualpipe.stage import Functions
from whalejax.parallel.dualpipe.table import tabulate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sharding:
    """How arrays are cut over the axes of a mesh that are not that of the stages.

    Attributes:
      batch_axes: axes over which every microbatch is cut.
      stages: of a stage's parameters, a pytree prefix of PartitionSpecs, without the stages' axis.
      ends: of the parameters of `first_fn` and `loss_fn`; these may name the stages' axis.
      gather_axes: parameters that are cut over these are gathered before the first tick, and their
        gradients scattered after the last; over other axes a device works on its part.
    """

    batch_axes: tuple[str, ...] = ()
    stages: Any = PartitionSpec()
    ends: Any = PartitionSpec()
    gather_axes: tuple[str, ...] = ()


def value_and_grad(
    stage_fn: Callable,
    loss_fn: Callable,
    *,
    mesh: Mesh,
    num_microbatches: int,
    schedule: str | Schedule = "dualpipe",
    stage_axis: str = "stage",
    split_backward: bool = True,
    chunks_per_rank: int = 1,
    first_fn: Callable | None = None,
    prepare_fn: Callable | None = None,
    has_aux: bool = False,
    defer: Callable | None = None,
    sharding: Sharding = Sharding(),
) -> Callable:
    """A function that runs a pipeline and gives loss and gradients.

    `step(stage_params, inputs, labels, ends=None)` gives `(loss, gradients)`, under `jax.jit` too.
    All runs in one `jax.shard_map` over all axes of the mesh: the functions see what one device
    has, may use collectives over all axes but `stage_axis`, and the loss is the mean over all
    devices of a stage and over the microbatches.

    Args:
      stage_fn: `(params, x) -> x`, a stage; x is a pytree of float arrays and keeps its structure,
        shapes and dtypes. With `has_aux` it gives `(x, aux)`. Parameters are not kept with every
        microbatch, but what is made of one is, a cast or a slice: make it in `prepare_fn`.
      loss_fn: `(x, labels) -> scalar`, or where ends are given `(ends, x, labels) -> scalar`; with
        `has_aux` it gives `(scalar, aux)`.
      mesh: with `stage_axis`.
      num_microbatches: into which a batch is cut.
      schedule: one of `SCHEDULES`, or a schedule of your own.
      stage_axis: the axis of the ranks of the pipeline.
      split_backward: let weight gradients wait where the schedule says so.
      chunks_per_rank: for `interleaved`.
      first_fn: `(ends, inputs) -> x`, what comes before the first stage (an embedding, say); None
        where inputs are x. It is computed again for its gradient.
      prepare_fn: `params -> prepared`, what all microbatches need of a stage's parameters, weights
        in FP8, say; once a step, without gradient. Then `stage_fn` is `(params, prepared, x) -> x`.
      has_aux: whether stages and loss report more; it is summed over microbatches and over the
        devices of a stage.
      defer: `(path, leaf) -> bool`, the weights among the stages' parameters whose gradients can
        wait: each must be used in one call of `deferrable`, or in one for each layer of a scan.
        Gradients of all others come with the input's.
      sharding: over the other axes.

    Returns:
      `step`: `stage_params` is a pytree of `[num_stages, ...]`, the stages in order; inputs and
      labels are pytrees of `[batch, ...]`, cut into equal contiguous microbatches; `ends` are
      parameters of `first_fn` and `loss_fn`. Gradients are those of `stage_params`, or of
      `(stage_params, ends)`, in float32, or float64 of float64; of integers they are `float0`.
      With `has_aux` the loss is `(loss, (stage_aux, loss_aux))`; `stage_aux` is
      `[num_stages, ...]`.

    Raises:
      ValueError: the schedule cannot have these numbers; the mesh lacks an axis; when it is called,
        or traced, what is given does not fit; prints the numbers.

    Source: DualPipe: DeepSeek-V3 (arXiv 2412.19437), section 3.2.1; others: see `make_schedule`.
    """
    _check_axes(mesh, stage_axis, sharding)
    if isinstance(schedule, str):
        options = {"chunks_per_rank": chunks_per_rank, "split_backward": split_backward}
        schedule = make_schedule(schedule, mesh.shape[stage_axis], num_microbatches, **options)
    _check_schedule(schedule, mesh.shape[stage_axis], num_microbatches)
    pipeline = Pipeline(
        mesh=mesh,
        table=align_chunks(tabulate(schedule)),
        num_microbatches=num_microbatches,
        stage_axis=stage_axis,
        batch_axes=sharding.batch_axes,
        gather_axes=sharding.gather_axes,
    )
    functions = first_fn, prepare_fn, stage_fn, loss_fn, has_aux
    call = pipeline, functions, defer if split_backward else None, sharding

    def step(stage_params, inputs, labels, ends=None):
        return _step(*call, stage_params, inputs, labels, ends)

    return step


def _check_schedule(schedule, ranks, microbatches):
    """A schedule of one's own may be wrong, or of other numbers."""
    check(schedule)
    if (schedule.num_ranks, schedule.num_microbatches) != (ranks, microbatches):
        raise ValueError(
            f"schedule {schedule.name!r} is of {schedule.num_ranks} ranks and "
            f"{schedule.num_microbatches} microbatches, but there are {ranks} and {microbatches}"
        )
    if schedule.num_stages % ranks:
        raise ValueError(
            f"schedule {schedule.name!r} has {schedule.num_stages} stages, which must be a "
            f"multiple of its {ranks} ranks: each stores as many"
        )


def _step(pipeline, functions, waits, sharding, stage_params, inputs, labels, ends):
    flat, structure = jax.tree_util.tree_flatten_with_path(stage_params)
    leaves = [leaf for _, leaf in flat]
    listed = _list_functions(functions, waits, flat, structure, without_ends=ends is None)
    cuts = _spec_list(sharding.stages, stage_params), _spec_list(sharding.ends, ends)
    loss, aux, found, of_ends = run_pipeline(pipeline, listed, leaves, ends, inputs, labels, cuts)
    found = dict(zip(listed.trained, found, strict=True))
    no_gradient = (np.zeros(leaf.shape, jax.dtypes.float0) for leaf in leaves)
    gradients = structure.unflatten(found.get(i, none) for i, none in enumerate(no_gradient))
    value = (loss, aux) if functions[-1] else loss
    return value, gradients if ends is None else (gradients, of_ends)


def _list_functions(functions, waits, flat, structure, *, without_ends):
    """The user's functions as `Functions`, with what the parameters' leaves are."""
    first_fn, prepare_fn, stage_fn, loss_fn, has_aux = functions

    def stage(params, x):
        given = (params,) if prepare_fn is None else params
        found = stage_fn(*given, x)
        return found if has_aux else (found, ())

    def loss(ends, x, labels):
        found = loss_fn(x, labels) if without_ends else loss_fn(ends, x, labels)
        return found if has_aux else (found, ())

    return Functions(
        first=first_fn,
        stage=stage,
        loss=loss,
        prepare=prepare_fn,
        structure=structure,
        names=tuple(jax.tree_util.keystr(path) for path, _ in flat),
        trained=tuple(i for i, (_, leaf) in enumerate(flat) if _is_float(leaf)),
        deferred=tuple(i for i, (path, leaf) in enumerate(flat) if waits and waits(path, leaf)),
    )


def _is_float(leaf):
    return jnp.issubdtype(leaf.dtype, jnp.floating)


def _spec_list(prefix, tree):
    """The PartitionSpec of every leaf of a pytree, of a prefix of them."""
    is_spec = {"is_leaf": lambda leaf: isinstance(leaf, PartitionSpec)}
    return jax.tree.leaves(
        jax.tree.map(
            lambda spec, part: jax.tree.map(lambda _: spec, part), prefix, tree, **is_spec
        ),
        **is_spec,
    )


def _check_axes(mesh, stage_axis, sharding):
    named = (stage_axis, *sharding.batch_axes, *sharding.gather_axes)
    if not set(named) <= set(mesh.shape) or stage_axis in sharding.batch_axes:
        raise ValueError(
            f"{stage_axis=}, batch_axes={sharding.batch_axes} and gather_axes="
            f"{sharding.gather_axes} must be axes of the mesh, {dict(mesh.shape)}, and no "
            f"microbatch is cut over the stages"
        )
