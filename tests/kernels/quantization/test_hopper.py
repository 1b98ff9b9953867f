"""The Mosaic GPU quantisers, run as `tests/kernels/conftest.py` says."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.backend import mosaic_unusable
from whalejax.kernels.quantization import QuantizedArray, reference
from whalejax.kernels.quantization import hopper as quantization_hopper

pytestmark = pytest.mark.skipif(mosaic_unusable() is not None, reason=str(mosaic_unusable()))

WEIGHT = (128, 128)
BF16, F32 = jnp.bfloat16, jnp.float32


def float64(q):
    return np.asarray(q.dequantize(), np.float64)


def normal(seed, *shape, dtype=F32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


def assert_same(actual, expected):
    """Asserts that quantised arrays are equal bit by bit."""
    actual, expected = (
        jax.tree.leaves(tree, is_leaf=lambda q: isinstance(q, QuantizedArray))
        for tree in (actual, expected)
    )
    for got, wanted in zip(actual, expected, strict=True):
        assert got.tile == wanted.tile and got.shape == wanted.shape
        values = [np.asarray(q.values).view(np.uint8) for q in (got, wanted)]
        np.testing.assert_array_equal(*values)
        np.testing.assert_array_equal(got.scales, wanted.scales)


SIZES = jnp.array([100, 0, 1], jnp.int32)


def rows(m=200, k=272, dtype=BF16):
    """Rows of many magnitudes; one is zero, and one has an infinity."""
    x = np.array(normal(0, m, k)) * np.exp2(np.arange(m) % 23 - 11)[:, None]
    x[9], x[7, 3] = 0, np.inf
    return jnp.asarray(x, dtype)


@pytest.mark.parametrize(
    ("op", "arguments", "static"),
    [
        ("quantize", lambda: [rows()], [(1, 128), False]),
        ("quantize", lambda: [rows()], [(1, 128), True]),
        ("quantize", lambda: [rows(130, dtype=F32).reshape(2, 65, 272)], [(1, 128), True]),
        ("quantize", lambda: [rows(10, 16)], [(1, 128), False]),
        ("quantize", lambda: [rows()], [WEIGHT, False]),
        ("quantize", lambda: [rows(390, 144, F32).reshape(2, 195, 144)], [WEIGHT, True]),
        ("quantize_transposed", lambda: [rows(), None], [True]),
        ("quantize_transposed", lambda: [rows(256, 144), SIZES], [False]),
        ("quantize_both", lambda: [rows(129, 144), None], [(1, 128), False]),
        ("quantize_both", lambda: [rows(256, 144), SIZES], [(1, 128), True]),
        ("quantize_both", lambda: [rows(416, 144).reshape(2, 208, 144), None], [WEIGHT, False]),
        ("quantize_both", lambda: [rows(208, 144, F32), None], [WEIGHT, True]),
    ],
    ids=[
        "rows",
        "power_of_two",
        "float32",
        "narrow",
        "weight",
        "weight-float32",
        "transposed",
        "transposed-masked",
        "both",
        "both-masked",
        "both-weight",
        "both-weight-float32",
    ],
)
def test_quantisers(run, op, arguments, static):
    arguments = arguments()

    def of(backend):
        return lambda *a: getattr(backend, op)(*a, *static)

    assert_same(run(of(quantization_hopper), *arguments), jax.jit(of(reference))(*arguments))


def test_what_no_quantiser_may_read_is_not_read(run):
    """NaN in padding, and in one tile of another row."""
    x = np.array(normal(0, 256, 144))
    clean = np.where(np.arange(256)[:, None] < 100, x, 0)
    x[100:], x[5, 130] = np.nan, np.nan
    sizes = jnp.array([100], jnp.int32)
    along, across = run(
        lambda x: quantization_hopper.quantize_both(x, sizes, (1, 128), False), jnp.asarray(x, BF16)
    )
    expected = reference.quantize_both(jnp.asarray(clean, BF16), None, (1, 128), False)
    spoiled = np.zeros((256, 144), bool)  # row 5's second tile, and column 130's first
    spoiled[5, 128:], spoiled[:128, 130] = True, True
    elsewhere = ~spoiled & (np.arange(256)[:, None] < 100)
    np.testing.assert_array_equal(float64(along)[elsewhere], float64(expected[0])[elsewhere])
    np.testing.assert_array_equal(float64(across).T[~spoiled], float64(expected[1]).T[~spoiled])
    assert np.isnan(float64(along)[5, 130]) and np.isnan(float64(across)[130, 5])


@pytest.mark.parametrize(
    ("dtype", "power_of_two"), [(BF16, False), (F32, True)], ids=["bfloat16", "float32"]
)
def test_swiglu(run, dtype, power_of_two):
    gate_up = normal(0, 130, 2 * 144, dtype=dtype) * 4
    got = run(lambda x: quantization_hopper.swiglu_quantize(x, power_of_two), gate_up)
    wanted = jax.jit(lambda x: reference.swiglu_quantize(x, power_of_two))(gate_up)
    # the sigmoid may be rounded differently, and a number then fall to the other side: a step
    np.testing.assert_allclose(got.scales, wanted.scales, rtol=2**-20)
    scale = np.repeat(np.asarray(wanted.scales), 128, axis=1)[:, :144]
    step = np.maximum(np.abs(float64(wanted)) * 2**-3, scale * 2**-9)
    assert (np.abs(float64(got) - float64(wanted)) <= step * (1 + 2**-16)).all()
    assert np.mean(float64(got) != float64(wanted)) < 1e-3


@pytest.mark.parametrize(
    ("function", "shape"),
    [
        (lambda x: quantization_hopper.quantize(x, (1, 128), False), (130, 272)),
        (lambda x: quantization_hopper.quantize_both(x, None, WEIGHT, False), (304, 272)),
        (lambda x: quantization_hopper.quantize_both(x, None, (1, 128), False), (130, 272)),
    ],
    ids=["quantize", "quantize_both-weight", "quantize_both"],
)
def test_there_are_no_races(assert_no_races, function, shape):
    assert_no_races(function, normal(0, *shape, dtype=BF16))
