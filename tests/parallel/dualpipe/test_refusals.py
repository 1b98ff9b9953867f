"""What a pipeline refuses, before anything runs."""

import dataclasses

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, PartitionSpec

from whalejax.parallel.dualpipe import Schedule, Sharding, deferrable, make_schedule, value_and_grad
from whalejax.parallel.dualpipe.schedule import Op

GPIPE = make_schedule("gpipe", 2, 4)
WITHOUT_STEP = dataclasses.replace(GPIPE, steps=(GPIPE.steps[0][1:], GPIPE.steps[1]))
BOTH_DO_ALL = Schedule(
    name="mine",
    routes=(((0, 0),), ((1, 0),)),
    route_of=(0, 1),
    steps=tuple(((Op("F", 0, rank),), (Op("B", 0, rank),)) for rank in (0, 1)),
    activations=1,
    deferred=0,
)


def stage(params, x):
    return jnp.tanh(x @ params["w"])


def loss(ends, x, labels):
    return jnp.mean((x - labels) ** 2)


def call(
    batch=8, labels=8, stages=2, ends=8, dtype=jnp.float32, stage_fn=stage, loss_fn=loss, **options
):
    """Traces a pipeline of two ranks and a data axis of two."""
    mesh = jax.make_mesh(
        (2, 2), ("stage", "data"), devices=jax.devices()[:4], axis_types=(AxisType.Auto,) * 2
    )
    options = {"num_microbatches": 4, "schedule": "dualpipe", **options}
    step = value_and_grad(stage_fn, loss_fn, mesh=mesh, **options)
    x, targets = jnp.ones((batch, 6), dtype), jnp.ones((labels, 6) if labels else ())
    jax.eval_shape(step, {"w": jnp.ones((stages, 6, 6))}, x, targets, jnp.ones(ends))


def test_what_fits_is_traced():
    call()
    call(sharding=Sharding(batch_axes=("data",)))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_microbatches": 5}, "num_ranks=2, num_microbatches=5 .* must be even"),
        ({"num_microbatches": 2}, "num_microbatches=2 .* at least 2 . num_ranks = 4"),
        ({"chunks_per_rank": 3}, "chunks_per_rank=3: only 'interleaved'"),
        ({"schedule": "zbv"}, "'zbv' with num_ranks=2, .* the schedules are"),
        ({"stage_axis": "pipe"}, "stage_axis='pipe', .* mesh, {'stage': 2, 'data': 2}"),
        ({"sharding": Sharding(batch_axes=("rows",))}, r"batch_axes=\('rows',\) .* {'stage': 2"),
        ({"sharding": Sharding(gather_axes=("rows",))}, r"gather_axes=\('rows',\) .* {'stage': 2"),
        ({"sharding": Sharding(batch_axes=("stage",))}, r"\('stage',\) .* no microbatch is cut"),
        (
            {"schedule": make_schedule("gpipe", 4, 6)},
            "'gpipe' is of 4 ranks and 6 microbatches, but there are 2 and 4",
        ),
        ({"schedule": WITHOUT_STEP}, "rank 0 .* microbatch 0"),
        (
            {"schedule": BOTH_DO_ALL, "num_microbatches": 2},
            "'mine' has 1 stages, which must be a multiple of its 2 ranks",
        ),
        (
            {"batch": 10, "labels": 10},
            r"a batch of 10 must be a multiple of num_microbatches=4 times the 1 devices",
        ),
        (
            {"batch": 12, "labels": 12, "sharding": Sharding(batch_axes=("data",))},
            r"a batch of 12 .* num_microbatches=4 times the 2 devices of batch_axes=\('data',\)",
        ),
        (
            {"labels": 16},
            r"of one batch, but inputs are \[\[8, 6\]\] and labels \[\[16, 6\]\]",
        ),
        ({"labels": ()}, r"of one batch, but inputs are \[\[8, 6\]\] and labels \[\[\]\]"),
        (
            {"ends": 7, "sharding": Sharding(ends=PartitionSpec("data"))},
            r"(?s)^shard_map applied to the function 'run_rank' was given .{,300}\[7\], where .*P",
        ),
        ({"stages": 3}, r"leading axis of 2 stages, but there are \['w'\]\[3, 6, 6\]"),
        (
            {"schedule": "dualpipev", "stages": 2},
            r"leading axis of 4 stages, but there are \['w'\]\[2, 6, 6\]",
        ),
        (
            {"sharding": Sharding(ends=PartitionSpec(("stage", "data")), gather_axes=("data",))},
            r"cut over \('stage', 'data'\), of which gather_axes=\('data',\) has \('data',\)",
        ),
        (
            {"stage_fn": lambda params, x: stage(params, x)[:, :5]},
            r"a stage gives float32\[2,5\], the next one takes float32\[2,6\]",
        ),
        (
            {"stage_fn": lambda params, x: stage(params, x).astype(jnp.bfloat16)},
            r"a stage gives bfloat16\[2,6\], the next one takes float32\[2,6\]",
        ),
        (
            {"stage_fn": lambda params, x: {"y": stage(params, x)}},
            r"a stage gives \['y'\]float32\[2,6\], the next one takes float32\[2,6\]",
        ),
        ({"dtype": jnp.int32}, r"must be floats, is int32\[2,6\]: give first_fn"),
        ({"loss_fn": lambda ends, x, labels: x - labels}, r"a scalar float, gives float32\[2,6\]"),
        ({"loss_fn": lambda ends, x, labels: jnp.int32(3)}, r"a scalar float, gives int32\[\]"),
        (
            {"defer": lambda path, leaf: True},
            r"defer: \['w'\] \[6, 6\] is used outside of deferrable",
        ),
        (
            {"defer": lambda path, leaf: True, "stage_fn": lambda params, x: x},
            r"defer: .* a stage uses \['w'\] in 0",
        ),
        (
            {
                "defer": lambda path, leaf: True,
                "stage_fn": lambda params, x: sum(
                    deferrable(lambda x, w: x @ w, x, params["w"]) for _ in range(3)
                ),
            },
            r"defer: .* a stage uses \['w'\] in 3",
        ),
    ],
)
def test_what_does_not_fit_is_told_with_its_numbers(arguments, message):
    with pytest.raises(ValueError, match=message):
        call(**arguments)
