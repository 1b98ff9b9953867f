"""What a tick makes a rank do that skips a pass, read from the traced program."""

import jax
import jax.numpy as jnp
import pytest
from jax.extend.core import jaxprs_in_params
from jax.sharding import AxisType

from whalejax.parallel.dualpipe import deferrable, value_and_grad

ROWS, WIDTH, INNER = 8, 16, 32
# what hands arrays on, without work that takes longer for larger ones
HANDS_ON = {"cond", "optimization_barrier"}


def stage(params, x):
    return x + deferrable(jnp.matmul, jnp.tanh(x @ params["up"]), params["down"])


def loss(x, labels):
    return jnp.mean((x - labels) ** 2)


def ticks(schedule, *, chunks=1, microbatches=8):
    """The bodies of the loops over ticks, each a list of equations, on 4 ranks."""
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    options = {"schedule": schedule, "defer": lambda path, leaf: "down" in str(path)}
    step = value_and_grad(stage, loss, mesh=mesh, num_microbatches=microbatches, **options)
    params = {
        "up": jax.ShapeDtypeStruct((4 * chunks, WIDTH, INNER), jnp.float32),
        "down": jax.ShapeDtypeStruct((4 * chunks, INNER, WIDTH), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((microbatches * ROWS, WIDTH), jnp.float32)
    found = []

    def search(jaxpr):
        for equation in jaxpr.eqns:
            if equation.primitive.name == "scan":
                found.append(equation.params["jaxpr"].jaxpr.eqns)
            else:
                for inner in jaxprs_in_params(equation.params):
                    search(inner)

    search(jax.make_jaxpr(step)(params, x, x).jaxpr)
    return found


@pytest.mark.parametrize(("schedule", "chunks"), [("1f1b", 1), ("zb1p", 1), ("dualpipev", 2)])
def test_it_touches_no_sums_and_no_activations(schedule, chunks):
    """Outside of conditionals there is no equation whose result has the inner width."""
    for body in ticks(schedule, chunks=chunks):
        large = {
            equation.primitive.name
            for equation in body
            for result in equation.outvars
            if INNER in result.aval.shape
        }
        assert large, "a pass keeps arrays of the inner width"
        assert large <= HANDS_ON


@pytest.mark.parametrize("schedule", ["1f1b", "zb1p"])
def test_nothing_travels_before_all_passes_of_a_tick(schedule):
    """A transfer between two passes makes ranks take turns that could run at the same time."""
    (body,) = ticks(schedule)
    names = [equation.primitive.name for equation in body]
    passes = [at for at, name in enumerate(names) if name == "cond"]
    transfers = [at for at, name in enumerate(names) if name == "ppermute"]
    assert len(passes) == (2 if schedule == "1f1b" else 3)
    assert len(transfers) == 2
    assert max(passes) < min(transfers)
