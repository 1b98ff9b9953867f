import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.fp8_gemm import round_weight
from whalejax.kernels.grouped_gemm import (
    fp8_grouped_linear,
    fp8_grouped_matmul,
    fp8_grouped_matmul_wgrad,
    fp8_masked_matmul,
)
from whalejax.kernels.grouped_gemm.cases import (
    CASES,
    MASKED_CASES,
    Case,
    draw,
    draw_masked,
    real_rows,
)
from whalejax.kernels.quantization import (
    QuantizedArray,
    quantize,
    quantize_both,
    quantize_transposed,
)
from whalejax.kernels.quantization.array import scales_shape
from whalejax.kernels.testing import assert_rows_close, row_errors

WEIGHT = (128, 128)
# float32: sqrt(400) roundings of 2**-24; bfloat16: half a step, averaged over a row
TOLERANCE = {"float32": 20 * 2**-24, "bfloat16": 2.5e-3}
LINEAR_CASES = [Case(sizes=sizes, n=208, k=272, spare=1) for sizes in ((0, 130, 40), (0, 0))]


def float64(x):
    return np.asarray(x, np.float64)


def by_group(case, multiply, shape):
    """An array of `shape` whose rows `multiply(group, rows)` fills, and zeros elsewhere."""
    out = np.zeros(shape)
    for group, (start, size) in enumerate(zip(case.starts, case.sizes, strict=True)):
        rows = slice(start, start + size)
        out[rows] = multiply(group, rows)
    return out


def weight_gradients(case, x_t, dy_t):
    """`dy_t @ x_t.T` over the tokens of each group."""
    out = np.zeros((len(case.sizes), len(dy_t), len(x_t)))
    for group, (start, size) in enumerate(zip(case.starts, case.sizes, strict=True)):
        tokens = slice(start, start + size)
        out[group] = dy_t[:, tokens] @ x_t[:, tokens].T
    return out


def gradient_of(case, dtype="float32"):
    """A gradient of the output, NaN in the padding."""
    dy = jax.random.normal(jax.random.key(7), (case.m, case.n)).astype(dtype)
    return jnp.where(jnp.asarray(real_rows(case))[:, None], dy, jnp.nan)


@pytest.mark.parametrize("case", CASES, ids=str)
def test_contiguous_groups_equal_numpy_float64(case):
    @jax.jit
    def multiply(x, w, sizes):
        x, w = quantize(x), quantize(w, WEIGHT)
        out = fp8_grouped_matmul(x, w, sizes, out_dtype=jnp.dtype(case.out_dtype))
        return out, x.dequantize(), w.dequantize()

    out, x, w = multiply(*draw(case, jax.random.key(0)))
    x, w = float64(x), float64(w)
    expected = by_group(case, lambda g, rows: x[rows] @ w[g].T, (case.m, case.n))
    assert out.dtype == case.out_dtype
    assert_rows_close(out, expected, tolerance=TOLERANCE[case.out_dtype])


@pytest.mark.parametrize("case", MASKED_CASES, ids=str)
def test_masked_groups_equal_numpy_float64(case):
    @jax.jit
    def multiply(x, w, counts):
        x, w = quantize(x), quantize(w, WEIGHT)
        out = fp8_masked_matmul(x, w, counts, out_dtype=jnp.dtype(case.out_dtype))
        return out, x.dequantize(), w.dequantize()

    out, x, w = multiply(*draw_masked(case, jax.random.key(0)))
    assert out.dtype == case.out_dtype and out.shape == (len(case.counts), case.max_m, case.n)
    for group, count in enumerate(case.counts):
        written = float64(out)[group, : -(-count // 64) * 64]  # beyond may be anything
        expected = np.zeros_like(written)
        expected[:count] = float64(x)[group, :count] @ float64(w)[group].T
        assert_rows_close(written, expected, tolerance=TOLERANCE[case.out_dtype])


@pytest.mark.parametrize("case", CASES[:-1], ids=str)
def test_weight_gradients_equal_numpy_float64(case):
    @jax.jit
    def multiply(x, dy, sizes):
        x, dy = (quantize_transposed(a, group_sizes=sizes) for a in (x, dy))
        return fp8_grouped_matmul_wgrad(x, dy, sizes), x.dequantize(), dy.dequantize()

    case = Case(sizes=case.sizes, n=144, k=case.k, spare=case.spare)
    x, _, sizes = draw(case, jax.random.key(0))
    out, x, dy = multiply(x, gradient_of(case), sizes)
    assert out.dtype == jnp.float32 and out.shape == (len(case.sizes), case.n, case.k)
    expected = weight_gradients(case, float64(x), float64(dy))
    assert_rows_close(out, expected, tolerance=TOLERANCE["float32"])


def forward_and_backward(x, w, sizes, dy):
    y, pull = jax.vjp(lambda x, w: fp8_grouped_linear(x, w, sizes), x, w)
    return y, *pull(dy)


@jax.jit
def dequantised(x, w, sizes, dy):
    """What the three products multiply, each by its own scales."""
    both = [quantize_both(a, group_sizes=sizes) for a in (x, dy)]
    return jax.tree.map(
        lambda q: q.dequantize(),
        (*both, quantize(w, WEIGHT)),
        is_leaf=lambda q: isinstance(q, QuantizedArray),
    )


@pytest.mark.parametrize("case", LINEAR_CASES, ids=str)
@pytest.mark.parametrize("dtype", TOLERANCE)
def test_all_three_products_of_a_linear_layer_are_fp8(case, dtype):
    x, w, sizes = draw(case, jax.random.key(0))
    x, w, dy = x.astype(dtype), w.astype(dtype), gradient_of(case, dtype)
    results = jax.jit(forward_and_backward)(x, w, sizes, dy)

    def products(x, dy, w, x_t, dy_t):
        x, dy, w, x_t, dy_t = map(float64, (x, dy, w, x_t, dy_t))
        return (
            by_group(case, lambda g, rows: x[rows] @ w[g].T, (case.m, case.n)),
            by_group(case, lambda g, rows: dy[rows] @ w[g], (case.m, case.k)),
            weight_gradients(case, x_t, dy_t),
        )

    (x_q, x_t), (dy_q, dy_t), w_q = dequantised(x, w, sizes, dy)
    expected = products(x_q, dy_q, w_q, x_t, dy_t)
    unquantised = products(x, dy, w, x.T, dy.T)
    for got, wanted, other in zip(results, expected, unquantised, strict=True):
        assert got.dtype == dtype  # padding rows and gradients of empty groups are exactly zero
        assert_rows_close(got, wanted, tolerance=TOLERANCE[dtype])
        real = np.any(other, axis=-1)
        assert (row_errors(got, other)[real] > 1e-2).all()


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_rows_that_are_fp8_already_are_used_as_they_are(dtype):
    case = LINEAR_CASES[0]
    x, w, sizes = draw(case, jax.random.key(0))
    x_q, w, dy = quantize(x), w.astype(dtype), gradient_of(case, dtype)
    rows = x_q.dequantize(dtype)  # what both round again, along the tokens

    def forward_and_backward_of_fp8(x_q, w, sizes, dy):
        def linear(carrier, w):
            return fp8_grouped_linear(x_q, w, sizes, carrier=carrier)

        y, pull = jax.vjp(linear, jnp.full(x_q.shape, jnp.nan, dtype), w)
        return y, *pull(dy)

    y, dx, dw = jax.jit(forward_and_backward_of_fp8)(x_q, w, sizes, dy)
    w_q = float64(quantize(w, WEIGHT).dequantize())
    wanted = by_group(
        case, lambda g, at: float64(x_q.dequantize())[at] @ w_q[g].T, (case.m, case.n)
    )
    assert_rows_close(y, wanted, tolerance=TOLERANCE[dtype])
    _, dx_of_rows, dw_of_rows = jax.jit(forward_and_backward)(rows, w, sizes, dy)
    np.testing.assert_array_equal(dx, dx_of_rows)
    np.testing.assert_array_equal(dw, dw_of_rows)
    assert y.dtype == dx.dtype == dw.dtype == dtype and jnp.any(dx != 0) and jnp.any(dw != 0)


def test_fp8_rows_need_a_carrier_and_others_have_none():
    x_q, x = operand(128, 272), jax.ShapeDtypeStruct((128, 272), "bfloat16")
    w = jax.ShapeDtypeStruct((4, 208, 272), "bfloat16")
    with pytest.raises(ValueError, match=r"FP8 rows \(128, 272\) .* a carrier .* is None"):
        fp8_grouped_linear(x_q, w, sizes_of(4))
    with pytest.raises(
        ValueError, match=r"carrier .*\(128, 272\)\) is for FP8 rows, x is bfloat16"
    ):
        fp8_grouped_linear(x, w, sizes_of(4), carrier=x)


def test_a_linear_layer_of_several_weights_gives_what_each_gives():
    case = LINEAR_CASES[0]
    x, w, sizes = draw(case, jax.random.key(0))
    dy = gradient_of(case)
    ws, dys = (w, w[:, ::-1][:, :160]), (dy, dy[:, 48:])
    ys, pull = jax.vjp(lambda x, ws: fp8_grouped_linear(x, ws, sizes), x, ws)
    dx, dws = pull(dys)
    alone = [forward_and_backward(x, w, sizes, dy) for w, dy in zip(ws, dys, strict=True)]
    for y, dw, (y_alone, _, dw_alone) in zip(ys, dws, alone, strict=True):
        np.testing.assert_array_equal(y, y_alone)
        np.testing.assert_array_equal(dw, dw_alone)
    np.testing.assert_allclose(dx, sum(dx for _, dx, _ in alone), rtol=1e-6)


@pytest.mark.parametrize("quantized", [False, True])
def test_weights_that_were_rounded_before_give_the_same(quantized):
    case = LINEAR_CASES[0]
    x, w, sizes = draw(case, jax.random.key(0))
    rows = quantize(x) if quantized else x

    def linear(carrier, w, rounded=None):
        options = {"carrier": carrier, "rounded": rounded} if quantized else {"rounded": rounded}
        return fp8_grouped_linear(rows if quantized else carrier, w, sizes, **options)

    wanted, pull = jax.vjp(linear, x, w)
    once = functools.partial(linear, rounded=round_weight(w))
    got, pull_once = jax.vjp(once, x, jnp.full_like(w, jnp.nan))  # not read
    dy = gradient_of(case)
    found = (got, pull_once(dy)), (wanted, pull(dy))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)


def test_a_rematerialised_linear_layer_is_the_same():
    case = LINEAR_CASES[0]
    x, w, sizes = draw(case, jax.random.key(0))

    def gradients(linear):
        def loss(x, w):
            return jnp.sum(jnp.sin(linear(x, w, sizes)))

        return jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))(x, w)

    again = gradients(jax.checkpoint(fp8_grouped_linear))
    for got, wanted in zip(
        jax.tree.leaves(again), jax.tree.leaves(gradients(fp8_grouped_linear)), strict=True
    ):
        np.testing.assert_array_equal(got, wanted)
    assert np.isfinite(again[0]) and again[0] != 0


def test_a_linear_layer_is_the_same_inside_shard_map():
    """Each device has experts and tokens of its own."""
    case = LINEAR_CASES[0]
    x, w, sizes = draw(case, jax.random.key(0))
    arguments = [jnp.stack([a, a[::-1]]) for a in (w, sizes)]
    x, dy = (jnp.stack([a, 2 * a]) for a in (jnp.nan_to_num(x), jnp.nan_to_num(gradient_of(case))))
    arguments = (x, *arguments, dy)
    spec = jax.sharding.PartitionSpec("expert")
    placed = jax.shard_map(
        lambda *a: tuple(r[None] for r in forward_and_backward(*(x[0] for x in a))),
        mesh=jax.make_mesh((2,), ("expert",), axis_types=(jax.sharding.AxisType.Auto,)),
        in_specs=(spec,) * 4,
        out_specs=(spec,) * 3,
    )
    results = jax.jit(placed)(*arguments)
    for device in range(2):
        expected = jax.jit(forward_and_backward)(*(a[device] for a in arguments))
        for got, wanted in zip(results, expected, strict=True):
            np.testing.assert_array_equal(got[device], wanted)


def operand(*shape, tile=(1, 128)):
    """A quantised array of which there are only shapes."""
    scales = jax.ShapeDtypeStruct(scales_shape(shape, tile), "float32")
    return QuantizedArray(jax.ShapeDtypeStruct(shape, jnp.float8_e4m3fn), scales, tile)


def sizes_of(groups, dtype="int32"):
    return jax.ShapeDtypeStruct((groups,), dtype)


W = operand(4, 136, 272, tile=WEIGHT)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((operand(130, 272), W, sizes_of(4)), "M=130 must be a multiple of 128"),
        ((operand(128, 272), W, sizes_of(3)), r"group_sizes is int32\[3\], must be int32\[4\]"),
        ((operand(128, 272), W, sizes_of(4, "float32")), r"group_sizes is float32\[4\]"),
        ((operand(128, 288), W, sizes_of(4)), r"K=288 of x and K=272 of w differ"),
        ((operand(1, 128, 272), W, sizes_of(4)), r"x is float8_e4m3fn\[1, 128, 272\]"),
        ((operand(128, 272), operand(136, 272, tile=WEIGHT), sizes_of(4)), "w is .*3 axes"),
    ],
)
def test_contiguous_operands_that_do_not_fit_are_printed(arguments, says):
    with pytest.raises(ValueError, match=f"fp8_grouped_matmul: .*{says}"):
        fp8_grouped_matmul(*arguments)


@pytest.mark.parametrize("rows", [0, 65])
def test_more_expected_rows_than_there_are_is_refused(rows):
    with pytest.raises(ValueError, match=f"expected_rows={rows} must be 1 to max_m=64"):
        fp8_masked_matmul(operand(4, 64, 272), W, sizes_of(4), expected_rows=rows)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((operand(3, 64, 272), W, sizes_of(4)), r"G=3 of x and G=4 of w differ"),
        ((operand(4, 64, 272), W, sizes_of(5)), r"counts is int32\[5\], must be int32\[4\]"),
        ((operand(64, 272), W, sizes_of(4)), r"x is float8_e4m3fn\[64, 272\].*3 axes"),
    ],
)
def test_masked_operands_that_do_not_fit_are_printed(arguments, says):
    with pytest.raises(ValueError, match=f"fp8_masked_matmul: .*{says}"):
        fp8_masked_matmul(*arguments)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((operand(272, 144), operand(136, 144), sizes_of(4)), "M=144 must be a multiple of 128"),
        ((operand(272, 128), operand(136, 256), sizes_of(4)), "M=128 of x_t and M=256 of dy_t"),
        ((operand(272, 128), operand(136, 128), sizes_of(0)), r"group_sizes is int32\[0\]"),
    ],
)
def test_operands_of_weight_gradients_that_do_not_fit_are_printed(arguments, says):
    with pytest.raises(ValueError, match=f"fp8_grouped_matmul_wgrad: .*{says}"):
        fp8_grouped_matmul_wgrad(*arguments)


@pytest.mark.parametrize(
    ("x", "w", "says"),
    [
        ((128, 272), (4, 208, 288), r"x.shape=\(128, 272\) and w.shape=\(4, 208, 288\)"),
        ((128, 272), (208, 272), r"w.shape=\(208, 272\)"),
        ((128, 272), (4, 200, 272), "N=200 and K=272 must be multiples of 16"),
        ((130, 272), (4, 208, 272), "M=130 of 128"),
    ],
)
def test_shapes_of_a_linear_layer_that_do_not_fit_are_printed(x, w, says):
    x, w = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in (x, w))
    with pytest.raises(ValueError, match=f"fp8_grouped_linear: .*{says}"):
        fp8_grouped_linear(x, w, sizes_of(4))


@pytest.mark.parametrize(
    "call",
    [
        functools.partial(fp8_grouped_matmul, operand(128, 272), W, sizes_of(4)),
        functools.partial(fp8_masked_matmul, operand(4, 64, 272), W, sizes_of(4)),
        functools.partial(
            fp8_grouped_matmul_wgrad, operand(272, 128), operand(136, 128), sizes_of(4)
        ),
    ],
    ids=lambda call: call.func.__name__,
)
def test_a_named_kernel_says_why_it_cannot_run(call):
    with pytest.raises(NotImplementedError, match="CUDA GPU|jax>="):
        call(implementation="mosaic_gpu")
    with pytest.raises(ValueError, match=r"'fast' is unknown; choose from \['mosaic_gpu', 'xla'\]"):
        call(implementation="fast")
