import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from whalejax.kernels.grouped_gemm import fp8_grouped_linear
from whalejax.kernels.quantization import quantize
from whalejax.parallel.dualpipe import deferrable
from whalejax.parallel.dualpipe.deferral import find_calls


def normal(*shape):
    return jnp.asarray(np.random.default_rng(shape).normal(size=shape), jnp.float32)


def multiply(x, w):
    return x @ w


def multiply_both(x, ws):
    return tuple(x @ w for w in ws)


def multiply_groups(rows, w):
    x, group_sizes = rows
    return lax.ragged_dot(x, w, group_sizes)


def multiply_quantized(rows, w):
    q, carrier = rows
    # the product of what is stored, with the carrier's gradient for that of the rows
    return (q.dequantize() + carrier - lax.stop_gradient(carrier)) @ w


def one_matmul(params, x):
    return jnp.tanh(deferrable(multiply, x, params["w"]))


def layers(params, x):
    def layer(x, of_layer):
        return jnp.tanh(deferrable(multiply, x, of_layer["w"])) * of_layer["scale"][None], None

    return lax.scan(layer, x, params)[0]


def checkpointed_layers(params, x):
    def layer(x, w):
        return jnp.tanh(deferrable(multiply, x, w)), None

    return lax.scan(jax.checkpoint(layer), x, params["w"])[0]


def layers_of_layers(params, x):
    def outer(x, of_layer):
        return layers(of_layer, x), None

    return lax.scan(outer, x, params)[0]


def side_by_side(params, x):
    return jax.vmap(functools.partial(deferrable, multiply))(x[None] * 2.0, params["w"])[0]


def gated(params, x):
    gate, up = deferrable(multiply_both, x, (params["gate"], params["up"]))
    return jax.nn.silu(gate) * up


def groups(params, x):
    return jnp.tanh(deferrable(multiply_groups, (x, jnp.asarray([3, 0, 5])), params["w"]))


def quantized(params, x):
    rows = quantize(lax.stop_gradient(x)), x
    return jnp.tanh(deferrable(multiply_quantized, rows, params["w"]))


CASES = {
    one_matmul: {"w": normal(16, 16)},
    layers: {"w": normal(3, 16, 16), "scale": normal(3, 16)},
    checkpointed_layers: {"w": normal(3, 16, 16)},
    layers_of_layers: {"w": normal(2, 3, 16, 16), "scale": normal(2, 3, 16)},
    side_by_side: {"w": normal(1, 16, 16)},
    gated: {"gate": normal(16, 16), "up": normal(16, 16)},
    groups: {"w": normal(3, 16, 16)},
    quantized: {"w": normal(16, 16)},
}


def waiting(stage, params, x, names):
    """Output, gradients and weight gradients as a pipeline makes them, of a stage that defers."""
    leaves, structure = jax.tree.flatten(params)
    chosen = [i for i, name in enumerate(sorted(params)) if name in names]

    def run(leaves, x):
        return stage(structure.unflatten(leaves), x)

    deferral = find_calls(lambda leaves: run(leaves, x), leaves, sorted(params), chosen)

    def deferred(leaves, slots, x):
        return run(deferral.defer(leaves, slots), x)

    y, vjp = jax.vjp(deferred, leaves, deferral.slots(), x)
    now, slots, dx = vjp(jnp.cos(y))
    later = deferral.weight_gradients(leaves, slots)
    assert sorted(later) == chosen
    both = [later.get(i, gradient) for i, gradient in enumerate(now)]
    return y, structure.unflatten(now), structure.unflatten(both), dx


@pytest.mark.parametrize("stage", CASES, ids=lambda stage: stage.__name__)
def test_without_a_pipeline_a_call_is_the_function(stage):
    params, x = CASES[stage], normal(8, 16)
    with_calls = jax.jit(stage)(params, x)
    plain = pytest.MonkeyPatch()
    plain.setitem(globals(), "deferrable", lambda f, x, w: f(x, w))
    without = jax.jit(lambda *arguments: stage(*arguments))(params, x)
    plain.undo()
    np.testing.assert_array_equal(with_calls, without)


@pytest.mark.parametrize("stage", CASES, ids=lambda stage: stage.__name__)
def test_gradients_that_waited_are_the_gradients(stage):
    params, x = CASES[stage], normal(8, 16)
    names = set(params) - {"scale"}
    y, vjp = jax.vjp(jax.jit(stage), params, x)
    wanted, wanted_dx = vjp(jnp.cos(y))
    found_y, now, later, dx = jax.jit(functools.partial(waiting, stage, names=names))(params, x)
    for found in ((found_y, later, dx), (found_y, now, dx)):
        pairs = zip(*map(jax.tree.leaves, (found, (y, wanted, wanted_dx))), strict=True)
        for a, b in pairs:
            # the same products of the same arrays; XLA may fuse what is around them
            assert jnp.linalg.norm(a - b) <= 1e-6 * jnp.linalg.norm(b)


def test_one_matmul_that_waits_is_bitwise_the_same():
    params, x = CASES[one_matmul], normal(8, 16)
    y, vjp = jax.vjp(one_matmul, params, x)
    _, _, later, dx = waiting(one_matmul, params, x, {"w"})
    wanted, wanted_dx = vjp(jnp.cos(y))
    np.testing.assert_array_equal(later["w"], wanted["w"])
    np.testing.assert_array_equal(dx, wanted_dx)


@jax.jit
def multiply_traced_once(w, x):
    return deferrable(multiply, x, w)


def twice(p, x):
    return deferrable(multiply, deferrable(multiply, x, p["w"]), p["w"])


def twice_in_one(p, x):
    return sum(deferrable(multiply_both, x, (p["w"], p["w"])))


def twice_traced_once(p, x):
    return multiply_traced_once(p["w"], multiply_traced_once(p["w"], x))


def in_each_turn(p, x):
    return lax.scan(lambda x, _: (deferrable(multiply, x, p["w"]), None), x, length=3)[0]


def for_each_row(p, x):
    return jax.vmap(lambda row: deferrable(multiply, row[None], p["w"])[0])(x)


def in_both_branches(p, x):
    return lax.cond(x[0, 0] > 0, one_matmul, lambda p, x: 2.0 * one_matmul(p, x), p, x)


def never(p, x):
    return x


@pytest.mark.parametrize(
    ("stage", "uses"),
    [
        (twice, 2),
        (twice_in_one, 2),
        (twice_traced_once, 2),
        (in_each_turn, 3),
        (for_each_row, 8),
        (in_both_branches, 2),
        (never, 0),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_weight_that_is_not_used_once_is_refused(stage, uses):
    run = functools.partial(stage, x=normal(8, 16))
    with pytest.raises(ValueError, match=rf"exactly one call .* a stage uses \['w'\] in {uses}$"):
        find_calls(lambda leaves: run({"w": leaves[0]}), [normal(16, 16)], ["['w']"], [0])


def test_a_call_with_some_weights_that_wait_is_refused():
    def run(leaves):
        return deferrable(multiply_both, normal(8, 16), tuple(leaves))

    with pytest.raises(ValueError, match="1 of the 2 weights of one call are deferred"):
        find_calls(run, [normal(16, 16)] * 2, ["a", "b"], [1])


def test_a_weight_that_is_cut_elsewhere_is_refused():
    def run(leaves):
        weights = jax.vmap(lambda w: deferrable(multiply, normal(8, 5), w), in_axes=1)
        return weights(leaves[0])

    with pytest.raises(ValueError, match=r"\[\(5, 16\)\], but they are \[\(5, 3, 16\)\]: only"):
        find_calls(run, [normal(5, 3, 16)], ["w"], [0])


def test_a_loop_that_is_traced_twice_is_one_call():
    traced = []

    def run(leaves):
        def layer(total, w):
            traced.append(total.dtype)
            return total + jnp.sum(deferrable(multiply, normal(8, 16), w)), None

        return lax.scan(layer, 0, leaves[0])[0]  # the first sum is an int, all others floats

    deferral = find_calls(run, [normal(3, 16, 16)], ["w"], [0])
    assert len(traced) == 2
    assert (len(deferral.calls), deferral.stacks) == (1, ((3,),))


def multiply_experts(rows, w):
    x, group_sizes, carrier = rows
    return fp8_grouped_linear(x, w, group_sizes, carrier=carrier)


def test_what_a_weight_gradient_does_not_need_is_not_kept():
    """A carrier of FP8 rows' gradients is as large as the rows, and of no use for the weights."""
    x, w = normal(256, 32), normal(2, 16, 32)
    rows = quantize(x), jnp.asarray([128, 128], jnp.int32), x
    deferral = find_calls(
        lambda leaves: deferrable(multiply_experts, rows, leaves[0]), [w], ["w"], [0]
    )
    kept = [None if slot is None else slot.shape for slot in deferral.slots()[0]]
    # rows and their scales, group sizes, no carrier; the output's gradient
    assert (256, 32) in kept and (2,) in kept and kept[-2:] == [None, (256, 16)]
