"""Matmuls of a compiled pipeline, counted in the HLO after all of XLA's optimisations.

A stage has two linears. Each costs one dot forward, one for the gradient of its input and one for
that of its weight. So a forward has 2, a whole backward 4, an input gradient alone 2 and the weight
gradients that it left 2. An input gradient that was computed again with the weight's would make 4
of the last 2; a forward that was computed again would add 2 to a backward.
"""

import collections
import re

import jax
import jax.numpy as jnp
import pytest
from jax import lax
from jax.sharding import AxisType

from whalejax.parallel.dualpipe import deferrable, value_and_grad

ROWS, WIDTH, INNER, LAYERS = 8, 16, 32, 3
# a rank that is busy takes branch 1; of backwards, branch 1 are those that let the weights wait
FORWARD, WEIGHT = "turn0 forward branch_1", "turn0 weight branch_1"
BACKWARD = "turn0 backward branch_1"
WHOLE, ALONE = f"{BACKWARD} branch_0", f"{BACKWARD} branch_1"


def one_layer(params, x):
    hidden = jnp.tanh(deferrable(jnp.matmul, x, params["up"]))
    return x + deferrable(jnp.matmul, hidden, params["down"])


def scanned(params, x):
    return lax.scan(lambda x, p: (one_layer(p, x), None), x, params)[0]


def computed_again(params, x):
    return lax.scan(jax.checkpoint(lambda x, p: (one_layer(p, x), None)), x, params)[0]


def close(x, labels):
    return jnp.mean((x - labels) ** 2)


def dots(stage, name, microbatches, **options):
    """Of each segment how many dots there are in each pass and branch, on 4 ranks."""
    mesh = jax.make_mesh((4,), ("stage",), devices=jax.devices()[:4], axis_types=(AxisType.Auto,))
    layers = () if stage is one_layer else (LAYERS,)
    params = {
        "up": jax.ShapeDtypeStruct((4, *layers, WIDTH, INNER), jnp.float32),
        "down": jax.ShapeDtypeStruct((4, *layers, INNER, WIDTH), jnp.float32),
    }
    x = jax.ShapeDtypeStruct((microbatches * ROWS, WIDTH), jnp.float32)
    options = {"mesh": mesh, "num_microbatches": microbatches, "schedule": name, **options}
    step = jax.jit(value_and_grad(stage, close, **options))
    found = collections.defaultdict(collections.Counter)
    for line in step.lower(params, x, x).compile().as_text().splitlines():
        if " dot(" in line:
            path = re.search('op_name="([^"]*)"', line).group(1)
            words = re.findall(r"(?<=/)(?:ticks|turn|forward|backward|weight|branch)[_\d]*", path)
            found[words[0]][" ".join(word.rstrip("_") for word in words[1:])] += 1
    return [found[segment] for segment in sorted(found, key=lambda name: int(name.split("_")[1]))]


def waits(path, leaf):
    return True


def test_no_matmul_is_made_twice():
    warm_up, steady, cool_down = dots(one_layer, "dualpipe", 12, defer=waits)
    assert warm_up == cool_down == {FORWARD: 2, WHOLE: 4, ALONE: 2, WEIGHT: 2}
    both = {f"turn{turn} {kind}": n for turn in (0, 1) for kind, n in
            (("forward", 2), ("backward", 4))}  # fmt: skip
    assert steady == both


def test_a_schedule_that_defers_all_gradients_makes_no_more():
    assert dots(one_layer, "zb1p", 8, defer=waits) == [{FORWARD: 2, WHOLE: 4, ALONE: 2, WEIGHT: 2}]


@pytest.mark.parametrize("stage", [one_layer, scanned], ids=lambda stage: stage.__name__)
def test_whole_backwards_cost_what_they_would_without_deferrable(stage):
    assert (
        dots(stage, "gpipe", 8, defer=waits)
        == dots(stage, "gpipe", 8)
        == [{FORWARD: 2, BACKWARD: 4}]
    )
    assert dots(stage, "zb1p", 8, defer=waits, split_backward=False) == [{FORWARD: 2, BACKWARD: 4}]


def test_no_layer_of_a_scan_makes_a_matmul_twice():
    assert dots(scanned, "zb1p", 8, defer=waits) == [{FORWARD: 2, WHOLE: 4, ALONE: 2, WEIGHT: 2}]


def test_a_checkpoint_computes_again_once_and_not_for_the_weights():
    # what the second linear gives is only added, so the first alone is computed again
    assert dots(computed_again, "zb1p", 8, defer=waits) == [
        {FORWARD: 2, WHOLE: 1 + 4, ALONE: 1 + 2, WEIGHT: 2}
    ]


def test_weights_that_do_not_wait_have_their_gradient_with_the_inputs():
    def only_up(path, leaf):
        return leaf.shape[-1] == INNER

    assert dots(one_layer, "zb1p", 8, defer=only_up) == [
        {FORWARD: 2, WHOLE: 4, ALONE: 3, WEIGHT: 1}
    ]
