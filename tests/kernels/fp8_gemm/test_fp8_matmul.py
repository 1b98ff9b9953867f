import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.fp8_gemm import fp8_matmul, fp8_matmul_wgrad
from whalejax.kernels.fp8_gemm.cases import CASES, WGRAD_CASES, Case, draw, draw_wgrad
from whalejax.kernels.fp8_gemm.tuning import Tuning
from whalejax.kernels.mosaic import SMEM_BYTES
from whalejax.kernels.quantization import QuantizedArray, quantize, quantize_transposed
from whalejax.kernels.quantization.array import scales_shape
from whalejax.kernels.testing import assert_rows_close, row_errors

WEIGHT = (128, 128)
F32_TOLERANCE = 2**-17  # sqrt(16384) roundings of 2**-24, half a step of float32


def tolerance(case):
    """Of the worst row: what rounding the output once costs."""
    if case.out_dtype == "float32":
        return F32_TOLERANCE
    # half a bf16 step is 2**-8 just above a power of two, and half of that just below: over a row
    # of some numbers it is 1.7e-3 and seldom 2.5e-3, over eight it can be nearly all of it
    return 2.5e-3 if case.n >= 24 else 2**-8


def difference(actual, expected):
    """DeepGEMM's measure, half the squared relative error of the whole matrix."""
    x, y = np.asarray(actual, np.float64), np.asarray(expected, np.float64)
    return 1 - 2 * (x * y).sum() / (x * x + y * y).sum()


def float64(x):
    return np.asarray(x.dequantize() if isinstance(x, QuantizedArray) else x, np.float64)


@jax.jit
def quantized(x, w):
    return quantize(x), quantize(w, WEIGHT)


def operand(*shape, tile=(1, 128), dtype=jnp.float8_e4m3fn, scales=None, scales_dtype="float32"):
    """A quantised array of which there are only shapes; scales of another shape than they must."""
    values = jax.ShapeDtypeStruct(shape, dtype)
    scales = jax.ShapeDtypeStruct(scales or scales_shape(shape, tile), scales_dtype)
    return QuantizedArray(values, scales, tile)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_numpy_float64(case):
    @jax.jit
    def multiply(x, w):
        x, w = quantize(x), quantize(w, WEIGHT)
        out = fp8_matmul(x, w, out_dtype=jnp.dtype(case.out_dtype))
        return out, x.dequantize(), w.dequantize()

    x, w = draw(case, jax.random.key(0))
    out, x_q, w_q = multiply(x, w)
    assert out.dtype == case.out_dtype
    assert_rows_close(out, float64(x_q) @ float64(w_q).T, tolerance=tolerance(case))
    # e4m3 is off by 2.6e-2 of a number, so products by 3.7e-2: half its square is 6.9e-4
    assert 1e-5 < difference(out, float64(x) @ float64(w).T) < 1e-3


@pytest.mark.parametrize("case", WGRAD_CASES, ids=str)
def test_weight_gradient_equals_numpy_float64(case):
    @jax.jit
    def multiply(x, dy, total):
        x_t, dy_t = quantize_transposed(x), quantize_transposed(dy)
        return fp8_matmul_wgrad(x_t, dy_t, total), x_t.dequantize(), dy_t.dequantize()

    x, dy, total = draw_wgrad(case, jax.random.key(0))
    out, x_t, dy_t = multiply(x, dy, total)
    before = 0 if total is None else float64(total)
    assert out.dtype == jnp.float32 and out.shape == (case.n, case.k)
    assert_rows_close(out, before + float64(dy_t) @ float64(x_t).T, tolerance=F32_TOLERANCE)
    assert difference(out, before + float64(dy).T @ float64(x)) < 1e-3


def test_the_definition_multiplies_in_full_float32():
    """On a CPU any precision does; on a GPU the default would round operands to TF32."""
    x, w = operand(130, 272), operand(136, 272, tile=WEIGHT)
    lowered = jax.jit(functools.partial(fp8_matmul, implementation="xla")).lower(x, w).as_text()
    assert lowered.count("precision = [HIGHEST, HIGHEST]") == 1


def test_scales_may_lie_either_way_and_their_padding_is_not_read():
    x, w = quantized(*draw(Case(m=130, n=24, k=272), jax.random.key(0)))
    by_row = QuantizedArray(x.values, x.scales, x.tile)
    garbage = x.stored_scales.at[:, 130:].set(jnp.nan)
    by_column = QuantizedArray(x.values, garbage, x.tile, scales_by_column=True)
    np.testing.assert_array_equal(fp8_matmul(by_row, w), fp8_matmul(by_column, w))


@pytest.mark.parametrize("out_dtype", [jnp.bfloat16, jnp.float32])
def test_a_row_that_is_not_finite_spoils_no_other(out_dtype):
    x, w = draw(Case(m=3, n=16, k=144), jax.random.key(0))
    spoiled = quantize(x.at[1, 5].set(jnp.nan))
    product = functools.partial(fp8_matmul, w=quantize(w, WEIGHT), out_dtype=out_dtype)
    out, clean = product(spoiled), product(quantize(x))
    assert np.isnan(out[1]).all()
    np.testing.assert_array_equal(out[::2], clean[::2])


def sum_in_14_bits(products, promote_every):
    """Sums `[K / 32, N]`, rounding the accumulator to 14 bits at each step of a wgmma.

    Every `promote_every` steps the accumulator is added to the total and starts anew.
    """
    total = np.zeros(products.shape[1])
    for start in range(0, len(products), promote_every):
        accumulator = np.zeros_like(total)
        for step in products[start : start + promote_every]:
            mantissa, exponent = np.frexp(accumulator + step)
            accumulator = np.ldexp(np.rint(mantissa * 2**14), exponent - 14)
        total += accumulator
    return total


def test_promotion_every_128_keeps_what_14_bits_lose():
    """Why the kernels leave the tensor core's accumulator: it loses bits as the sum grows."""
    x, w = quantized(*draw(Case(m=1, n=64, k=16384), jax.random.key(0)))
    products = float64(x) * float64(w)
    truth = products.sum(1)
    steps = products.reshape(64, -1, 32).sum(2).T
    without, promoted = (row_errors(sum_in_14_bits(steps, n), truth) for n in (len(steps), 4))
    assert without > 4 * promoted
    # float64 is not what the errors come from
    np.testing.assert_allclose(steps.sum(0), truth, rtol=1e-9, atol=1e-9)


X = operand(130, 272)
X_T = operand(8, 272)
W = operand(136, 272, tile=WEIGHT)
FLOAT = jax.ShapeDtypeStruct((130, 272), "bfloat16")


@pytest.mark.parametrize(
    ("x", "w", "says"),
    [
        (X, operand(136, 288, tile=WEIGHT), r"K=272 of x and K=288 of w differ.*\(136, 288\)"),
        (X, X, r"w.tile=\(1, 128\) must be \(128, 128\)"),
        (W, W, r"x.tile=\(128, 128\) must be \(1, 128\)"),
        (FLOAT, W, "x must be a QuantizedArray, is ShapeDtypeStruct"),
        (X, FLOAT, "w must be a QuantizedArray, is ShapeDtypeStruct"),
        (operand(130, 272, dtype=jnp.float8_e5m2), W, r"x is float8_e5m2\[130, 272\]"),
        (operand(1, 130, 272), W, r"x is float8_e4m3fn\[1, 130, 272\].*2 axes"),
        (operand(0, 272), W, r"x is float8_e4m3fn\[0, 272\].*none of them empty"),
        (operand(130, 272, scales=(130, 2)), W, r"x's .* float32\[130, 2\].*float32\[130, 3\]"),
        (X, operand(136, 272, tile=WEIGHT, scales=(2, 2)), r"w's .*\[2, 2\].*float32\[2, 3\]"),
        (operand(130, 272, scales_dtype="bfloat16"), W, r"x's .* bfloat16\[130, 3\]"),
        (X, operand(132, 272, tile=WEIGHT), r"N=132 of 8 .*w.shape=\(132, 272\)"),
        (operand(130, 264), operand(136, 264, tile=WEIGHT), r"K=264 must be a multiple of 16"),
    ],
)
def test_operands_that_do_not_fit_are_printed(x, w, says):
    with pytest.raises(ValueError, match=f"fp8_matmul: .*{says}"):
        fp8_matmul(x, w)


def test_scales_by_column_must_have_their_padding():
    scales = jax.ShapeDtypeStruct((3, 130), "float32")
    x = QuantizedArray(X.values, scales, X.tile, scales_by_column=True)
    with pytest.raises(ValueError, match=r"float32\[3, 130\], must be float32\[3, 256\]"):
        fp8_matmul(x, W)


@pytest.mark.parametrize(
    ("x_t", "dy_t", "total", "says"),
    [
        (X_T, operand(130, 288), None, "M=272 of x_t and M=288 of dy_t differ"),
        (X, X, None, r"K=130 of 8 \(x_t.shape=\(130, 272\)"),
        (operand(8, 264), operand(16, 264), None, "M=264 must be a multiple of 16"),
        (W, X, None, r"x_t.tile=\(128, 128\)"),
        (X_T, W, None, r"dy_t.tile=\(128, 128\)"),
        (
            X_T,
            X,
            jax.ShapeDtypeStruct((8, 130), "float32"),
            r"accumulate is float32\[8, 130\], must be float32\[130, 8\]",
        ),
        (X_T, X, jax.ShapeDtypeStruct((130, 8), "bfloat16"), r"accumulate is bfloat16\[130, 8\]"),
    ],
)
def test_operands_of_weight_gradients_that_do_not_fit_are_printed(x_t, dy_t, total, says):
    with pytest.raises(ValueError, match=f"fp8_matmul_wgrad: .*{says}"):
        fp8_matmul_wgrad(x_t, dy_t, total)


def test_options_that_do_not_fit_are_printed():
    with pytest.raises(ValueError, match="out_dtype=.*float16.* must be bfloat16 or float32"):
        fp8_matmul(X, W, out_dtype=jnp.float16)
    with pytest.raises(ValueError, match=r"'triton' is unknown; choose from \['mosaic_gpu', 'xla'"):
        fp8_matmul(X, W, implementation="triton")


def test_a_named_kernel_says_why_it_cannot_run():
    with pytest.raises(NotImplementedError, match="fp8_matmul: .*(CUDA GPU|jax>=)"):
        fp8_matmul(X, W, implementation="mosaic_gpu")
    with pytest.raises(NotImplementedError, match="fp8_matmul_wgrad: .*(CUDA GPU|jax>=)"):
        fp8_matmul_wgrad(X_T, X, implementation="mosaic_gpu")


@pytest.mark.parametrize("out_itemsize", [2, 4])
def test_tunings_that_need_too_much_smem_do_not_fit(out_itemsize):
    tunings = [Tuning(tile_n=192, stages=stages) for stages in range(2, 9)]
    sizes = [t.smem_bytes(out_itemsize) for t in tunings]
    stage = (128 + 192) * 128 + 128 * 4  # a K block of both operands, and x's scales
    tile = 128 * 192 * out_itemsize
    assert all(t.stages * stage + tile < s for t, s in zip(tunings, sizes, strict=True))
    fit = [t.fits(out_itemsize) for t in tunings]
    assert fit == [size <= SMEM_BYTES for size in sizes]
    assert fit[0] and not fit[-1]
