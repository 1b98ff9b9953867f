import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.fp8_gemm import fp8_linear, round_weight
from whalejax.kernels.quantization import quantize, quantize_transposed
from whalejax.kernels.testing import assert_rows_close, row_errors

# float32: sqrt(576) roundings of 2**-24; bfloat16: half a step, averaged over a row
TOLERANCE = {"float32": 24 * 2**-24, "bfloat16": 2.5e-3}
N, K = 208, 272


def draw(m, dtypes=("float32", "float32")):
    """x, w and the output's gradient; rows differ in magnitude, some are zero."""
    rng = np.random.default_rng(m)
    x, w, dy = (rng.normal(size=size) for size in ((m, K), (N, K), (m, N)))
    magnitude = np.exp2(np.arange(m) % 13 - 6.0)[:, None]
    x, dy = x * magnitude, dy * magnitude
    x[3::7], dy[5::7] = 0, 0
    return [jnp.asarray(a, d) for a, d in zip((x, w, dy), (*dtypes, dtypes[0]), strict=True)]


def forward_and_backward(x, w, dy):
    y, pull = jax.vjp(fp8_linear, x, w)
    return y, *pull(dy)


@jax.jit
def dequantised(x, w, dy):
    """What the three products multiply, each by its own scales."""
    along = [quantize(a).dequantize() for a in (x, dy)]
    tokens = [quantize_transposed(a).dequantize() for a in (x, dy)]
    return along, quantize(w, (128, 128)).dequantize(), tokens


def float64(*arrays):
    return (np.asarray(a, np.float64) for a in arrays)


@pytest.mark.parametrize(
    ("m", "dtypes"),
    [
        (1, ("float32", "float32")),
        (130, ("float32", "float32")),
        (130, ("bfloat16", "float32")),
        (256, ("bfloat16", "bfloat16")),
    ],
    ids=str,
)
def test_all_three_products_are_fp8(m, dtypes):
    x, w, dy = draw(m, dtypes)
    results = jax.jit(forward_and_backward)(x, w, dy)
    (x_q, dy_q), w_q, (x_t, dy_t) = dequantised(x, w, dy)
    x_q, dy_q, w_q, x_t, dy_t = float64(x_q, dy_q, w_q, x_t, dy_t)
    expected = x_q @ w_q.T, dy_q @ w_q, dy_t @ x_t.T
    x64, w64, dy64 = float64(x, w, dy)
    unquantised = x64 @ w64.T, dy64 @ w64, dy64.T @ x64
    for got, wanted, other, of in zip(results, expected, unquantised, (x, x, w), strict=True):
        assert got.dtype == of.dtype
        assert_rows_close(got, wanted, tolerance=TOLERANCE[str(of.dtype)])
        # e4m3 is off by 2.6e-2 of a number, so products by 3.7e-2 of a row; a tile of one token
        # is its own largest number, and exact
        errors = row_errors(got, other)[np.any(wanted, axis=1)]
        assert np.median(errors) < 6e-2
        assert (errors > 1e-2).all() or (m == 1 and of is w)


def test_several_weights_give_what_each_gives():
    x, w, dy = draw(130)
    ws, dys = (w, w[::-1][:160]), (dy, dy[:, 48:])
    ys, pull = jax.vjp(fp8_linear, x, list(ws))
    dx, dws = pull(dys)
    alone = [forward_and_backward(x, *each) for each in zip(ws, dys, strict=True)]
    for y, dw, (y_alone, _, dw_alone) in zip(ys, dws, alone, strict=True):
        np.testing.assert_array_equal(y, y_alone)
        np.testing.assert_array_equal(dw, dw_alone)
    np.testing.assert_allclose(dx, sum(dx for _, dx, _ in alone), rtol=1e-6)


def test_weights_that_were_rounded_before_give_the_same():
    x, w, dy = draw(130)
    ws, dys = [w, w[::-1][:160]], [dy, dy[:, 48:]]
    rounded = list(map(round_weight, ws))

    def once(x, ws):
        return fp8_linear(x, ws, rounded=rounded)

    wanted, pull = jax.vjp(fp8_linear, x, ws)
    got, pull_once = jax.vjp(once, x, [jnp.full_like(w, jnp.nan) for w in ws])  # not read
    found = (got, pull_once(tuple(dys))), (wanted, pull(tuple(dys)))
    for one, other in zip(*map(jax.tree.leaves, found), strict=True):
        np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize(
    ("rounded", "says"),
    [
        (lambda w: round_weight(w[16:]), rf"but is .*\({N - 16}, {K}\), \(128, 128\)"),
        (lambda w: round_weight(w)[::-1], rf"but is \[\[\(\({K}, {N}\)"),
        (lambda w: round_weight(w)[0], rf"but is \[\[\(\({N}, {K}\), \(128, 128\)\)\]\]"),
        (lambda w: (quantize(w), round_weight(w)[1]), rf"but is .*\({N}, {K}\), \(1, 128\)"),
    ],
    ids=["another weight", "exchanged", "one way alone", "another tile"],
)
def test_what_is_no_rounding_of_the_weight_is_refused(rounded, says):
    x, w, _ = draw(16)
    with pytest.raises(ValueError, match=f"fp8_linear: rounded must be .*{says}"):
        fp8_linear(x, w, rounded=rounded(w))


def test_no_weight_at_all_is_refused():
    with pytest.raises(ValueError, match=r"fp8_linear: w=\(\) must hold at least one weight"):
        fp8_linear(draw(1)[0], ())


def test_rematerialised_is_the_same():
    arguments = draw(130)
    remat = jax.checkpoint(fp8_linear)

    def again(x, w, dy):
        y, pull = jax.vjp(lambda x, w: jnp.sin(remat(jnp.sin(x), w)), x, w)
        return y, *pull(dy)

    def once(x, w, dy):
        y, pull = jax.vjp(lambda x, w: jnp.sin(fp8_linear(jnp.sin(x), w)), x, w)
        return y, *pull(dy)

    for got, wanted in zip(jax.jit(again)(*arguments), jax.jit(once)(*arguments), strict=True):
        np.testing.assert_array_equal(got, wanted)


def test_saves_x_and_w_as_fp8_alone():
    x, w = (jax.ShapeDtypeStruct(shape, "bfloat16") for shape in ((130, K), (N, K)))
    _, pull = jax.eval_shape(lambda x, w: jax.vjp(fp8_linear, x, w), x, w)
    wide = [leaf for leaf in jax.tree.leaves(pull) if leaf.dtype != jnp.float8_e4m3fn]
    fp8 = [leaf.shape for leaf in jax.tree.leaves(pull) if leaf.dtype == jnp.float8_e4m3fn]
    assert sorted(fp8) == sorted([(K, N), (K, 256)])
    assert sum(leaf.size for leaf in wide) < 2 * (K + N) * 256 // 128 * 2  # scales


def test_the_same_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    rows, whole = jax.sharding.PartitionSpec("data"), jax.sharding.PartitionSpec()
    placed = jax.shard_map(
        forward_and_backward,
        mesh=mesh,
        in_specs=(rows, whole, rows),
        out_specs=(rows, rows, whole),
    )
    x, w, dy = draw(512)
    y, dx, dw = jax.jit(placed)(x, w, dy)
    expected = jax.jit(forward_and_backward)(x, w, dy)
    for got, wanted in zip((y, dx, dw), expected, strict=True):
        # each device sums over its own tokens first
        assert_rows_close(got, wanted, tolerance=2 * TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("x", "w", "says"),
    [
        ((4, 272), (208, 288), r"x.shape=\(4, 272\) and w.shape=\(208, 288\)"),
        ((2, 4, 272), (208, 272), r"x.shape=\(2, 4, 272\)"),
        ((4, 272), (1, 208, 272), r"w.shape=\(1, 208, 272\)"),
        ((4, 272), (200, 272), "N=200 and K=272 must be multiples of 16"),
        ((4, 264), (208, 264), "N=208 and K=264 must be multiples of 16"),
    ],
)
def test_shapes_that_do_not_fit_are_printed(x, w, says):
    with pytest.raises(ValueError, match=f"fp8_linear: .*{says}"):
        fp8_linear(*(jax.ShapeDtypeStruct(shape, "bfloat16") for shape in (x, w)))


def test_a_named_kernel_says_why_it_cannot_run():
    with pytest.raises(NotImplementedError, match="CUDA GPU|jax>="):
        fp8_linear(
            jnp.ones((4, 272), jnp.bfloat16), jnp.ones((16, 272)), implementation="mosaic_gpu"
        )
    with pytest.raises(ValueError, match="'fast' is unknown"):
        fp8_linear(jnp.ones((4, 272)), jnp.ones((16, 272)), implementation="fast")
