"""Pipelines over meshes with other axes, against the same model on one device."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import AxisType, PartitionSpec

from whalejax.parallel.dualpipe import Sharding, deferrable, value_and_grad

WIDTH, VOCABULARY, ROWS, MICROBATCHES, EXPERTS = 8, 16, 8, 4, 4
P = PartitionSpec


def multiply(x, w):
    return x @ w


def enter(ends, tokens):
    return ends["embedding"][tokens]


def close(ends, x, labels):
    logits = x @ ends["embedding"].T
    scores = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[:, None], axis=1)
    return -jnp.mean(scores), {"rows": jnp.int32(len(x))}


def dense(params, x, axis=None):
    """Two linears; `axis` has parts of what lies between them."""
    hidden = jnp.tanh(deferrable(multiply, x, params["in"]) + params["bias"][None])
    y = deferrable(multiply, hidden, params["out"])
    y = y if axis is None else lax.psum(y, axis)
    return x + y, {"square": jnp.sum(x**2)}


def multiply_experts(rows, w):
    return jnp.einsum("erk,ekn->ern", rows, w)


def experts(params, x, axis=None):
    """Every row goes to one expert, which an all-to-all reaches; experts have room for all rows."""
    scores = jax.nn.softmax(x @ params["router"])
    chosen = jax.nn.one_hot(jnp.argmax(scores, axis=1), EXPERTS)
    weight = jnp.sum(scores * chosen, axis=1, keepdims=True)
    rows = chosen.T[..., None] * x[None]
    if axis is not None:
        rows = lax.all_to_all(rows, axis, split_axis=0, concat_axis=1, tiled=True)
    rows = jnp.tanh(deferrable(multiply_experts, rows, params["w"]))
    if axis is not None:
        rows = lax.all_to_all(rows, axis, split_axis=1, concat_axis=0, tiled=True)
    return x + weight * jnp.sum(rows, axis=0), {"square": jnp.sum(x**2)}


DENSE = {"in": (WIDTH, 2 * WIDTH), "bias": (2 * WIDTH,), "out": (2 * WIDTH, WIDTH)}
MOE = {"router": (WIDTH, EXPERTS), "w": (EXPERTS, WIDTH, WIDTH)}
OVER_FSDP = {"in": P(None, "fsdp"), "bias": P("fsdp"), "out": P("fsdp")}
CASES = {
    "data": ({"data": 4}, dense, DENSE, None, Sharding(batch_axes=("data",))),
    "fsdp": (
        {"fsdp": 4},
        dense,
        DENSE,
        None,
        Sharding(
            batch_axes=("fsdp",),
            stages=OVER_FSDP,
            ends=P(("stage", "fsdp")),
            gather_axes=("stage", "fsdp"),
        ),
    ),
    "data and fsdp": (
        {"data": 2, "fsdp": 2},
        dense,
        DENSE,
        None,
        Sharding(
            batch_axes=("data", "fsdp"),
            stages=OVER_FSDP,
            ends=P(None, "fsdp"),
            gather_axes=("fsdp",),
        ),
    ),
    "parts of a linear": (
        {"tensor": 2},
        dense,
        DENSE,
        "tensor",
        Sharding(
            stages={"in": P(None, "tensor"), "bias": P("tensor"), "out": P("tensor")},
        ),
    ),
    "expert": (
        {"expert": 4},
        experts,
        MOE,
        "expert",
        Sharding(batch_axes=("expert",), stages={"router": P(), "w": P("expert")}),
    ),
    "expert and fsdp": (
        {"fsdp": 2, "expert": 2},
        experts,
        MOE,
        "expert",
        Sharding(
            batch_axes=("fsdp", "expert"),
            stages={"router": P("fsdp"), "w": P("expert", "fsdp")},
            ends=P(("stage", "fsdp")),
            gather_axes=("stage", "fsdp"),
        ),
    ),
}


def draw(shapes, stages=2, microbatches=MICROBATCHES):
    """Parameters of the stages, inputs, labels, and parameters of the ends."""
    rng = np.random.default_rng(0)

    def normal(*shape):
        return jnp.asarray(rng.normal(size=shape) / 3, jnp.float32)

    params = {name: normal(stages, *shape) for name, shape in shapes.items()}
    tokens, labels = rng.integers(VOCABULARY, size=(2, microbatches * ROWS), dtype=np.int32)
    ends = {"embedding": normal(VOCABULARY, WIDTH)}
    return params, jnp.asarray(tokens), jnp.asarray(labels), ends


def sequential(stage, params, tokens, labels, ends):
    """Loss, reports and gradients of one stage after the other."""

    def of_one(params, ends, tokens, labels):
        x, report = lax.scan(lambda x, p: stage(p, x), enter(ends, tokens), params)
        loss, of_loss = close(ends, x, labels)
        return loss, (report, of_loss)

    def of_all(params, ends):
        cut = [a.reshape(MICROBATCHES, ROWS) for a in (tokens, labels)]
        losses, reports = lax.map(lambda batch: of_one(params, ends, *batch), cut)
        return jnp.mean(losses), jax.tree.map(lambda a: jnp.sum(a, axis=0), reports)

    return jax.jit(jax.value_and_grad(of_all, (0, 1), has_aux=True))(params, ends)


@pytest.mark.parametrize("name", ["dualpipe", "zb1p"])
@pytest.mark.parametrize("case", CASES)
def test_other_axes_change_nothing(case, name):
    sizes, stage, shapes, axis, sharding = CASES[case]
    devices = 2 * int(np.prod(list(sizes.values())))
    mesh = jax.make_mesh(
        (2, *sizes.values()),
        ("stage", *sizes),
        devices=jax.devices()[:devices],
        axis_types=(AxisType.Auto,) * (1 + len(sizes)),
    )
    step = value_and_grad(
        functools.partial(stage, axis=axis),
        close,
        mesh=mesh,
        num_microbatches=MICROBATCHES,
        schedule=name,
        first_fn=enter,
        has_aux=True,
        defer=lambda path, leaf: leaf.ndim >= 3 and "router" not in str(path),
        sharding=sharding,
    )
    arguments = draw(shapes)
    found = jax.jit(step)(*arguments)
    wanted = sequential(stage, *arguments)
    for a, b in zip(*map(jax.tree.leaves, (found, wanted)), strict=True):
        assert a.shape == b.shape
        a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
        assert np.linalg.norm(a - b) <= 1e-6 * np.linalg.norm(b)  # summed in another order
