"""What a compiled pipeline needs beside its arguments.

A stage keeps several `[rows, width]` arrays and its parameters are vectors; integers go in, which
`first_fn` makes wide, so that activations are nearly all there is. XLA:CPU copies the slots of
activations once in each turn of a loop and so needs twice as many as the table has.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType

from whalejax.parallel.dualpipe import deferrable, value_and_grad
from whalejax.parallel.dualpipe.stage import Functions, trace_stage

ROWS, WIDTH = 64, 512


def shaped(*shape, dtype=jnp.float32):
    return jax.ShapeDtypeStruct(shape, dtype)


def enter(ends, tokens):
    return ends[0][None] * tokens[:, None].astype(jnp.float32)


def run_stage(params, x):
    for scale in params:
        x = jnp.tanh(x * scale[None])
    return x


def close(ends, x, labels):
    return jnp.mean((x * ends[1][None] - labels[:, None].astype(jnp.float32)) ** 2)


def functions_of(stage, number, deferred=()):
    """A stage of some parameters, as the executor calls it."""
    return Functions(
        first=enter,
        stage=lambda params, x: (stage(params, x), ()),
        loss=lambda ends, x, labels: (close(ends, x, labels), ()),
        structure=jax.tree.structure([0] * number),
        names=tuple(map(str, range(number))),
        trained=tuple(range(number)),
        deferred=deferred,
    )


def traced(stage, parameters, deferred=(), prepare=None):
    """The stage, with the shapes of all that it keeps."""
    ends = [jnp.zeros(WIDTH)] * 2
    tokens = jnp.zeros(ROWS, jnp.int32)
    functions = functions_of(stage, len(parameters), deferred)
    functions = dataclasses.replace(functions, prepare=prepare)
    functions, (leaves,) = functions.prepared([parameters])
    return trace_stage(functions, leaves, ends, tokens, tokens)


def kept_bytes():
    """One microbatch's activations."""
    kept = traced(run_stage, [jnp.zeros(WIDTH)] * 4).kept
    return sum(np.prod(a.shape) * a.dtype.itemsize for a in kept)


@functools.cache
def temporary_bytes(name, ranks, microbatches):
    mesh = jax.make_mesh(
        (ranks,), ("stage",), devices=jax.devices()[:ranks], axis_types=(AxisType.Auto,)
    )
    options = {"mesh": mesh, "num_microbatches": microbatches, "schedule": name, "first_fn": enter}
    tokens = shaped(microbatches * ROWS, dtype=jnp.int32)
    arguments = [shaped(ranks, WIDTH)] * 4, tokens, tokens, [shaped(WIDTH)] * 2
    step = jax.jit(value_and_grad(run_stage, close, **options))
    return step.lower(*arguments).compile().memory_analysis().temp_size_in_bytes


def test_a_pipelines_memory_does_not_grow_with_its_microbatches():
    growth = temporary_bytes("dualpipe", 4, 64) - temporary_bytes("dualpipe", 4, 16)
    assert growth < kept_bytes() / 50
    # slots of 5 microbatches, which older XLA:CPU copies in the loop of the steady state
    slots = 5 if jax.__version_info__ >= (0, 11) else 10
    assert temporary_bytes("dualpipe", 4, 64) < (slots + 2) * kept_bytes()


def test_it_grows_with_the_ranks():
    growth = temporary_bytes("dualpipe", 8, 64) - temporary_bytes("dualpipe", 4, 64)
    assert 4 * kept_bytes() <= growth < 2.2 * 4 * kept_bytes()


def test_that_of_gpipe_grows_with_the_microbatches():
    growth = temporary_bytes("gpipe", 4, 64) - temporary_bytes("gpipe", 4, 8)
    assert growth >= 56 * kept_bytes()


@pytest.mark.parametrize("deferred", [(), (0, 1)])
def test_parameters_lie_in_no_slot(deferred):
    def stage(params, x):
        hidden = jnp.tanh(deferrable(jnp.matmul, x, params[0]) + params[2][None])
        return x + deferrable(jnp.matmul, hidden, params[1])

    parameters = [jnp.zeros((WIDTH, 96)), jnp.zeros((96, WIDTH)), jnp.zeros(96)]
    found = traced(stage, parameters, deferred)
    kept = {a.shape for a in (*found.kept, *jax.tree.leaves(found.slots))}
    assert kept == {(ROWS, WIDTH), (ROWS, 96)}
    assert sum(source == "parameter" for source, _ in found.layout.leaves) == 2


def test_what_is_prepared_of_parameters_lies_in_no_slot():
    def stage(both, x):
        params, prepared = both
        return jnp.tanh(x @ prepared[0] + params[0][None]) * prepared[1]

    def prepare(params):
        return [jnp.outer(params[0], params[0]), params[0][None] ** 2]

    found = traced(stage, [jnp.ones(WIDTH)], prepare=prepare)
    assert {a.shape for a in found.kept} == {(ROWS, WIDTH)}
    assert sum(source == "parameter" for source, _ in found.layout.leaves) == 2
