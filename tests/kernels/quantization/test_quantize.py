import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from whalejax.kernels.quantization import (
    QuantizedArray,
    quantize,
    quantize_both,
    quantize_transposed,
    swiglu_gradient,
    swiglu_quantize,
)
from whalejax.kernels.quantization.cases import CASES, draw
from whalejax.kernels.quantization.reference import scale_of
from whalejax.kernels.testing import assert_rows_close

MIN_AMAX, LIMIT = 1e-4, 448.0
ROUNDED = 1 + 2**-17  # x is multiplied by 1 / scale, rounded twice in float32
SIZES = jnp.array([130, 0, 1], jnp.int32)  # of groups; with their padding they are 384 rows
REAL = np.r_[np.arange(130), 256]  # their rows


def expand(scales, tile, shape):
    """The scale of each element, float64."""
    scales = np.asarray(scales, np.float64).repeat(tile[0], -2).repeat(tile[1], -1)
    return scales[..., : shape[-2], : shape[-1]]


def largest_of_tiles(x, tile):
    """The largest magnitude of each tile by a loop, float64."""
    rows, columns = x.shape[-2:]
    return np.array(
        [
            [
                np.abs(x[..., i : i + tile[0], j : j + tile[1]]).max((-2, -1))
                for j in range(0, columns, tile[1])
            ]
            for i in range(0, rows, tile[0])
        ]
    ).transpose((*range(2, x.ndim), 0, 1))


def assert_stands_for(q, x, slack=ROUNDED):
    """Asserts that every number is within half a step of e4m3, and scales fit."""
    x, scale = np.asarray(x, np.float64), expand(q.scales, q.tile, x.shape)
    assert q.shape == x.shape and q.dtype == jnp.float8_e4m3fn and q.scales.dtype == jnp.float32
    # e4m3 has 3 mantissa bits; below its normal range the step stays 2**-9
    half_step = np.maximum(np.abs(x) * 2**-4, scale * 2**-10)
    wrong = np.asarray(q.dequantize(), np.float64) - x
    assert (np.abs(wrong) <= half_step * slack).all()
    assert (np.abs(x) <= scale * LIMIT * slack).all()


def assert_same(actual, expected):
    """Asserts that two quantised arrays are equal bit by bit."""
    assert actual.tile == expected.tile
    values, wanted = (np.asarray(q.values).view(np.uint8) for q in (actual, expected))
    np.testing.assert_array_equal(values, wanted)
    np.testing.assert_array_equal(actual.scales, expected.scales)


def normal(seed, shape, dtype="float32"):
    return jax.random.normal(jax.random.key(seed), shape).astype(dtype)


def rows_with_garbage():
    x = np.full((384, 144), np.nan, np.float32)
    x[REAL] = normal(0, (len(REAL), 144))
    return jnp.asarray(x, jnp.bfloat16)


@pytest.mark.parametrize("case", CASES, ids=str)
@pytest.mark.parametrize("power_of_two", [False, True], ids=["plain", "power_of_two"])
def test_rounds_within_half_a_step(case, power_of_two):
    x = draw(case.shape, case.dtype, jax.random.key(0))
    q = jax.jit(lambda x: quantize(x, case.tile, power_of_two=power_of_two))(x)
    assert q.tile == case.tile
    assert_stands_for(q, x)


@settings(max_examples=30, derandomize=True, deadline=None)
@given(seed=st.integers(0, 2**32 - 1), exponent=st.integers(-60, 60))
@pytest.mark.parametrize("tile", [(1, 128), (128, 128)], ids=str)
def test_rounds_within_half_a_step_at_any_magnitude(tile, seed, exponent):
    x = normal(seed, (128, 256)) * 2.0**exponent
    assert_stands_for(quantize(x, tile), x)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scales_are_the_largest_of_each_tile(case):
    x = draw(case.shape, case.dtype, jax.random.key(1))
    largest = largest_of_tiles(np.asarray(x, np.float64), case.tile)
    q = quantize(x, case.tile)
    np.testing.assert_allclose(q.scales, np.maximum(largest, MIN_AMAX) / LIMIT, rtol=2**-23)
    values = largest_of_tiles(np.asarray(q.values, np.float64), case.tile)
    assert (values[largest >= MIN_AMAX] == LIMIT).all()


@pytest.mark.parametrize("tile", [(1, 128), (128, 128)], ids=str)
def test_powers_of_two_are_the_next_above(tile):
    x = draw((130, 272), "float32", jax.random.key(0)).at[0].set(LIMIT)
    x = x if tile[0] == 1 else x.at[:128].set(LIMIT)
    plain, rounded = (np.asarray(quantize(x, tile, power_of_two=p).scales) for p in (False, True))
    assert plain[0, 0] == rounded[0, 0] == 1.0  # a power of two stays as it is
    assert (np.frexp(rounded)[0] == 0.5).all()
    assert (rounded >= plain).all() and (rounded < 2 * plain).all()


@pytest.mark.parametrize("power_of_two", [False, True], ids=["plain", "power_of_two"])
def test_a_scale_that_is_not_finite_stays_so(power_of_two):
    scales = scale_of(jnp.array([jnp.nan, jnp.inf]), power_of_two)
    np.testing.assert_array_equal(scales, [np.nan, np.inf])


def test_zeros_and_denormals_stay_near_zero():
    """Rows: zeros, float32 denormals, 1e-30; then e4m3's own denormals beside a large number."""
    x = jnp.zeros((4, 128)).at[1].set(1e-40).at[2].set(1e-30)
    x = x.at[3].set(jnp.linspace(0, 2**-6, 128)).at[3, 0].set(LIMIT)
    q = quantize(x)
    np.testing.assert_allclose(q.scales[:3], MIN_AMAX / LIMIT, rtol=2**-23)
    assert (np.asarray(q.dequantize()[:3]) == 0).all()
    steps = np.rint(np.asarray(x[3, 1:], np.float64) * 2**9)
    np.testing.assert_array_equal(np.asarray(q.dequantize()[3, 1:]) * 2**9, steps)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tile", [(1, 128), (128, 128)], ids=str)
def test_what_is_not_finite_spoils_its_own_tile_alone(tile, bad):
    x = normal(0, (140, 272))
    clean, spoiled = quantize(x, tile), quantize(x.at[5, 200].set(bad), tile)
    elsewhere = np.ones(x.shape, bool)
    elsewhere[5 // tile[0] * tile[0] : 5 // tile[0] * tile[0] + tile[0], 128:256] = False
    assert not np.isfinite(spoiled.dequantize()[5, 200])
    np.testing.assert_array_equal(
        np.asarray(spoiled.dequantize())[elsewhere], np.asarray(clean.dequantize())[elsewhere]
    )


@pytest.mark.parametrize(("m", "dtype"), [(1, "float32"), (128, "bfloat16"), (130, "bfloat16")])
def test_transposed_is_padded_with_zero_tokens(m, dtype):
    x = draw((m, 144), dtype, jax.random.key(0))
    q = jax.jit(quantize_transposed)(x)
    padded = -(-m // 128) * 128
    assert q.shape == (144, padded) and q.tile == (1, 128)
    assert_stands_for(q, np.pad(np.asarray(x, np.float64).T, ((0, 0), (0, padded - m))))


def test_transposed_zeroes_the_padding_of_groups():
    x = rows_with_garbage()
    clean = np.nan_to_num(np.asarray(x, np.float64))
    assert_stands_for(quantize_transposed(x, group_sizes=SIZES), clean.T)


@pytest.mark.parametrize("grouped", [False, True], ids=["plain", "grouped"])
@pytest.mark.parametrize("power_of_two", [False, True], ids=["plain", "power_of_two"])
def test_both_are_each(power_of_two, grouped):
    x = rows_with_garbage() if grouped else normal(0, (130, 144), "bfloat16")
    sizes = SIZES if grouped else None
    along, across = quantize_both(x, group_sizes=sizes, power_of_two=power_of_two)
    assert_same(along, quantize(x, power_of_two=power_of_two))
    expected = quantize_transposed(x, group_sizes=sizes, power_of_two=power_of_two)
    assert_same(across, expected)


def test_a_weight_and_its_transpose_hold_the_same():
    w = normal(0, (2, 208, 144))
    along, across = jax.jit(lambda w: quantize_both(w, (128, 128)))(w)
    assert_same(along, quantize(w, (128, 128)))
    assert across.shape == (2, 144, 208) and across.scales.shape == (2, 2, 2)
    np.testing.assert_array_equal(
        across.dequantize(), np.asarray(along.dequantize()).swapaxes(1, 2)
    )


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("power_of_two", [False, True], ids=["plain", "power_of_two"])
def test_swiglu_is_quantised_from_float32(power_of_two, dtype):
    gate_up = normal(0, (130, 2 * 272), dtype) * 4
    gate, up = np.split(np.asarray(gate_up, np.float64), 2, axis=1)
    q = jax.jit(lambda x: swiglu_quantize(x, power_of_two=power_of_two))(gate_up)
    # float32's exp is right to some 2**-20
    assert_stands_for(q, gate / (1 + np.exp(-gate)) * up, slack=1 + 2**-16)


@pytest.mark.parametrize(("dtype", "tolerance"), [("float32", 2**-20), ("bfloat16", 2**-8)])
def test_gradient_of_swiglu_equals_float64(dtype, tolerance):
    gate_up, d_hidden = normal(0, (130, 2 * 48), dtype) * 4, normal(1, (130, 48), dtype)
    with jax.enable_x64(True):

        def swiglu(gate_up):
            gate, up = jnp.split(gate_up, 2, axis=1)
            return jax.nn.silu(gate) * up

        _, pull = jax.vjp(swiglu, jnp.asarray(gate_up, jnp.float64))
        (expected,) = pull(jnp.asarray(d_hidden, jnp.float64))
        assert expected.dtype == jnp.float64
    got = jax.jit(swiglu_gradient)(gate_up, d_hidden)
    assert got.dtype == gate_up.dtype
    assert_rows_close(got, expected, tolerance=tolerance)


def test_scales_are_read_alike_however_they_lie():
    x = normal(0, (2, 130, 272))
    scales = jax.random.uniform(jax.random.key(1), (2, 130, 3))
    by_row = QuantizedArray(x.astype(jnp.float8_e4m3fn), scales, (1, 128))
    by_column = by_row.with_scales_by_column()
    assert by_column.stored_scales.shape == (2, 3, 256)
    assert by_column.with_scales_by_column() is by_column
    assert_same(by_column, by_row)
    np.testing.assert_array_equal(by_column.dequantize(), by_row.dequantize())
    garbage = by_column.stored_scales.at[..., 130:].set(jnp.nan)
    spoiled = QuantizedArray(by_row.values, garbage, (1, 128), scales_by_column=True)
    np.testing.assert_array_equal(spoiled.dequantize(), by_row.dequantize())


@pytest.mark.parametrize("tile", [(1, 128), (128, 128)], ids=str)
def test_transposed_values_scales_and_tile(tile):
    q = quantize(normal(0, (2, 130, 272)), tile)
    assert q.transpose().tile == tile[::-1] and q.transpose().shape == (2, 272, 130)
    np.testing.assert_array_equal(q.transpose().dequantize(), q.dequantize().swapaxes(1, 2))
    assert_same(q.transpose().transpose(), q)


@pytest.mark.parametrize("tile", [(1, 128), (128, 128)], ids=str)
def test_passes_through_jit_and_scan(tile):
    q = quantize(normal(0, (3, 130, 272)), tile)
    whole = q.dequantize()

    def body(carry, layer):
        assert layer.tile == tile and layer.scales_by_column == q.scales_by_column
        assert layer.scales.shape == q.scales.shape[1:]
        return carry, layer.dequantize()

    np.testing.assert_array_equal(jax.jit(lambda q: jax.lax.scan(body, 0, q)[1])(q), whole)
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_leaves_with_path(q)]
    assert paths == [".values", ".scales"]


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: quantize(jnp.ones((4, 24))), r"K=24 must be a multiple of 16.*\(4, 24\).*to 32"),
        (lambda: quantize(jnp.ones((4, 16), jnp.float16)), "x.dtype=float16"),
        (lambda: quantize(jnp.ones((0, 16))), r"x.shape=\(0, 16\)"),
        (lambda: quantize(jnp.ones(16)), r"x.shape=\(16,\) must have at least two axes"),
        (lambda: quantize(jnp.ones((4, 16)), (128, 1)), r"tile=\(128, 1\) must be one of"),
        (lambda: quantize(jnp.ones((4, 16)), implementation="fast"), "'fast' is unknown.*xla"),
        (lambda: quantize_transposed(jnp.ones((2, 4, 16))), r"\(2, 4, 16\) must have 2 axes"),
        (lambda: quantize_both(jnp.ones((4, 24))), "quantize_both: K=24"),
        (lambda: quantize_both(jnp.ones((2, 4, 16))), r"\(2, 4, 16\) must have 2 axes"),
        (lambda: quantize_both(jnp.ones((4, 16)), (1, 16)), r"quantize_both: tile=\(1, 16\)"),
        (
            lambda: quantize_both(jnp.ones((2, 24, 16)), (128, 128)),
            r"M=24 must be a multiple of 16 \(x.shape=\(2, 24, 16\)\)",
        ),
        (
            lambda: quantize_both(jnp.ones((128, 16)), (128, 128), group_sizes=SIZES),
            "group_sizes None",
        ),
        (
            lambda: quantize_both(jnp.ones((128, 16)), group_sizes=jnp.ones(2)),
            r"group_sizes is float32\[2\], must be int32\[G\]",
        ),
        (
            lambda: quantize_transposed(jnp.ones((128, 16)), group_sizes=SIZES[None]),
            r"group_sizes is int32\[1, 3\]",
        ),
        (
            lambda: quantize_transposed(jnp.ones((130, 16)), group_sizes=SIZES),
            r"M=130 must be a multiple of 128.*\(130, 16\)",
        ),
        (lambda: swiglu_quantize(jnp.ones((4, 48))), r"gate_up.shape=\(4, 48\).*I a multiple"),
        (
            lambda: swiglu_gradient(jnp.ones((4, 64)), jnp.ones((4, 64))),
            r"d_hidden is float32\[4, 64\], must be float32\[4, 32\]",
        ),
        (
            lambda: swiglu_gradient(jnp.ones((4, 64)), jnp.ones((4, 32), jnp.bfloat16)),
            r"d_hidden is bfloat16\[4, 32\], must be float32\[4, 32\]",
        ),
    ],
)
def test_arguments_that_do_not_fit_are_printed(call, says):
    with pytest.raises(ValueError, match=says):
        call()


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda how: quantize(jnp.ones((4, 16)), implementation=how), "CUDA GPU|jax>="),
        (lambda how: quantize_both(jnp.ones((4, 16)), implementation=how), "not float32"),
        (lambda how: swiglu_gradient(jnp.ones((4, 64)), jnp.ones((4, 32)), implementation=how),
         "there is no kernel"),
    ],
)  # fmt: skip
def test_a_named_kernel_says_why_not(call, says):
    with pytest.raises(NotImplementedError, match=says):
        call("mosaic_gpu")
