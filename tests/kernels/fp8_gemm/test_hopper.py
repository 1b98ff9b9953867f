"""The Mosaic GPU kernels of FP8 matmuls, run as `tests/kernels/conftest.py` says, and lowered."""

import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import mosaic_gpu as plgpu

from whalejax.kernels import fp8_gemm, grouped_gemm, mosaic, quantization
from whalejax.kernels.backend import mosaic_unusable
from whalejax.kernels.fp8_gemm import hopper
from whalejax.kernels.fp8_gemm.tuning import Tuning, WgradTuning, candidates
from whalejax.kernels.grouped_gemm import cases as grouped_cases
from whalejax.kernels.grouped_gemm import fp8_reference
from whalejax.kernels.grouped_gemm import hopper as grouped_hopper
from whalejax.kernels.quantization import QuantizedArray, quantize, quantize_transposed
from whalejax.kernels.testing import assert_rows_close

pytestmark = pytest.mark.skipif(mosaic_unusable() is not None, reason=str(mosaic_unusable()))

WEIGHT = (128, 128)
ON_GPU = jax.default_backend() == "gpu"
# bfloat16: half a step, averaged over a row. float32: roundings of 2**-24 of some hundred sums; a
# tensor core sums products of FP8 in about 14 bits, which the interpreter does not.
TOLERANCE = {"bfloat16": 2.5e-3, "float32": 5e-4 if ON_GPU else 20 * 2**-24}
BF16, F32 = jnp.bfloat16, jnp.float32


def float64(q):
    return np.asarray(q.dequantize(), np.float64)


def with_garbage(q):
    """The same array, with NaN in what pads its scales."""
    q = q.with_scales_by_column()
    stored = q.stored_scales.at[..., q.shape[-2] :].set(jnp.nan)
    return QuantizedArray(q.values, stored, q.tile, scales_by_column=True)


def normal(seed, *shape, dtype=F32):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), dtype)


@jax.jit
def quantized(x, w):
    return quantize(x), quantize(w, WEIGHT)


@jax.jit
def quantized_tokens(x, dy, sizes=None):
    return [quantize_transposed(a, group_sizes=sizes) for a in (x, dy)]


def matmul_operands(m, n, k):
    """Operands whose rows differ in magnitude; some are zero."""
    x = np.array(normal(m, m, k)) * np.exp2(np.arange(m) % 13 - 6.0)[:, None].astype(np.float32)
    x[3::7] = 0
    x, w = quantized(x, normal(n, n, k))
    return with_garbage(x), w


def grouped_operands(sizes, *, tokens=False):
    """x, w and sizes of groups, x quantised along K or along the tokens."""
    x, w, sizes = grouped_cases.draw(
        grouped_cases.Case(sizes=sizes, n=136, k=144, spare=2), jax.random.key(0)
    )
    along, w = quantized(x, w)
    return quantize_transposed(x, group_sizes=sizes) if tokens else along, w, sizes


@pytest.mark.parametrize(
    ("size", "out_dtype", "tuning"),
    [
        ((130, 136, 272), "bfloat16", Tuning(tile_n=128, stages=2)),
        ((130, 136, 272), "float32", Tuning(tile_n=128, stages=3)),
        ((65, 400, 144), "bfloat16", Tuning(tile_n=176, stages=2)),  # at offsets 0, 48, 96 of 128
        ((65, 200, 144), "bfloat16", Tuning(tile_n=96, stages=2)),  # at 0, 96, 64: not in order
        ((65, 256, 144), "float32", Tuning(tile_n=192, stages=2)),
        ((70, 136, 272), "bfloat16", Tuning(tile_m=64, tile_n=56, stages=2)),  # not swizzled
        ((3, 136, 272), "float32", Tuning(tile_m=64, tile_n=64, stages=2)),  # 8 rows are loaded
        ((3, 136, 272), "bfloat16", Tuning(tile_m=64, tile_n=64, stages=2, cluster=2, share="x")),
        ((1, 16, 4240), "float32", Tuning(tile_m=64, tile_n=16, stages=4)),  # 34 scales: two loads
        ((129, 24, 16), "bfloat16", Tuning(tile_n=32, stages=4)),  # less than a K block
        ((300, 136, 144), "bfloat16", Tuning(tile_m=256, tile_n=80, stages=2)),  # two waves
        ((300, 64, 144), "bfloat16", Tuning(tile_n=64, stages=2, cluster=2, share="w")),
        ((130, 136, 144), "float32", Tuning(tile_n=64, stages=2, cluster=2, share="x")),
    ],
    ids=str,
)
def test_matmul(run, size, out_dtype, tuning):
    x, w = matmul_operands(*size)
    out = run(lambda x, w: hopper.fp8_matmul(x, w, jnp.dtype(out_dtype), tuning), x, w)
    assert out.dtype == out_dtype
    assert_rows_close(out, float64(x) @ float64(w).T, tolerance=TOLERANCE[out_dtype])


@pytest.mark.skipif(not ON_GPU, reason="takes the interpreter minutes")
@pytest.mark.parametrize(
    "tuning",
    [
        None,
        Tuning(tile_n=192),
        Tuning(tile_m=256, tile_n=128, stages=3),
        Tuning(tile_m=256, tile_n=128, stages=3, cluster=2, share="x"),
        Tuning(tile_m=256, tile_n=112, stages=3),
        Tuning(tile_m=64, tile_n=64, stages=8, cluster=2, share="x"),
    ],
    ids=str,
)
def test_many_tiles(run, tuning):
    """Several items for each CTA, none of the sizes a multiple of a tile's."""
    for n in (2112, 3000):
        x, w = matmul_operands(4100, n, 1104)
        out = run(lambda x, w: hopper.fp8_matmul(x, w, jnp.dtype(BF16), tuning), x, w)
        assert_rows_close(out, float64(x) @ float64(w).T, tolerance=TOLERANCE["bfloat16"])


@pytest.mark.skipif(not ON_GPU, reason="takes the interpreter minutes")
@pytest.mark.parametrize("tile_m", [128, 256])
def test_weight_gradient_of_many_tiles(run, tile_m):
    """The same, added to what the output held."""
    x_t, dy_t = map(with_garbage, quantized_tokens(normal(0, 1500, 2112), normal(1, 1500, 3008)))
    tuning, before = WgradTuning(tile_m=tile_m, stages=3), normal(2, 3008, 2112)
    out = run(lambda *a: hopper.fp8_matmul_wgrad(*a, tuning), x_t, dy_t, before)
    expected = float64(dy_t) @ float64(x_t).T + np.asarray(before, np.float64)
    assert_rows_close(out, expected, tolerance=TOLERANCE["float32"])


@pytest.mark.parametrize(
    ("rows", "columns", "as_tiles"), [(64, 128, True), (64, 64, False), (63, 128, False)], ids=str
)
def test_tma_moves_tiles_where_mosaic_keeps_their_axes(rows, columns, as_tiles):
    """A row of one tile is an axis of length 1, whose index past the array Mosaic would drop."""
    seen = []

    def body(out, staged):
        seen.append(mosaic.for_tma(staged, rows, columns) is staged)

    kernel = plgpu.kernel(
        body,
        out_type=jax.ShapeDtypeStruct((rows, columns), BF16),
        scratch_types=[plgpu.SMEM((64, 64), BF16, transforms=mosaic.transforms(64, BF16))],
    )
    jax.make_jaxpr(kernel)()
    assert seen and all(tiles == as_tiles for tiles in seen)


@pytest.mark.parametrize(
    ("size", "tuning"),
    [
        ((130, 144, 208), WgradTuning(stages=2)),
        ((300, 208, 64), WgradTuning(stages=3, tile_n=32)),
        ((1, 16, 144), WgradTuning(stages=3, tile_n=160)),
        ((300, 272, 144), WgradTuning(stages=2, tile_m=256, tile_n=64)),  # two waves
    ],
    ids=str,
)
def test_weight_gradient(run, size, tuning):
    m, n, k = size
    x_t, dy_t = map(with_garbage, quantized_tokens(normal(0, m, k), normal(1, m, n)))
    out = run(lambda *a: hopper.fp8_matmul_wgrad(*a, None, tuning), x_t, dy_t)
    assert_rows_close(out, float64(dy_t) @ float64(x_t).T, tolerance=TOLERANCE["float32"])


@pytest.mark.parametrize(
    "tuning",
    [
        Tuning(tile_n=128, stages=2),
        Tuning(tile_m=64, tile_n=64, stages=2),
        Tuning(tile_n=64, stages=2, cluster=2, share="x"),
        Tuning(tile_n=48, stages=2, cluster=2),  # tiles left over share x
        Tuning(tile_m=64, tile_n=64, stages=2, cluster=2),
        Tuning(tile_m=256, tile_n=64, stages=2),  # tiles that end in the middle of another group
        Tuning(tile_m=256, tile_n=64, stages=2, cluster=2, share="x", bands="columns", width=2),
    ],
    ids=str,
)
@pytest.mark.parametrize("rows", [(130, 0, 1), (100, 200, 300)], ids=str)
def test_contiguous_groups(run, tuning, rows):
    case = grouped_cases.Case(sizes=rows, n=136, k=144, spare=3)
    x, w, sizes = grouped_cases.draw(case, jax.random.key(0))
    arguments = *quantized(x, w), sizes
    out = run(lambda *a: grouped_hopper.fp8_grouped_matmul(*a, F32, tuning), *arguments)
    expected = fp8_reference.fp8_grouped_matmul(*arguments, F32)
    assert_rows_close(out, expected, tolerance=TOLERANCE["float32"])


def test_a_tall_tile_leaves_the_next_group_alone(run, monkeypatch):
    """One CTA, which comes to a group's last tile after the next group's first in its second band.

    Bands of columns are walked down and up again.
    """
    monkeypatch.setattr(mosaic, "num_sms", lambda: 1)
    case = grouped_cases.Case(sizes=(100, 200, 128), n=72, k=144)
    x, w, sizes = grouped_cases.draw(case, jax.random.key(0))
    arguments = *quantized(x, w), sizes
    tuning = Tuning(tile_m=256, tile_n=64, stages=2, bands="columns", width=1)
    out = run(lambda *a: grouped_hopper.fp8_grouped_matmul(*a, F32, tuning), *arguments)
    expected = fp8_reference.fp8_grouped_matmul(*arguments, F32)
    assert_rows_close(out, expected, tolerance=TOLERANCE["float32"])


@pytest.mark.parametrize("sizes", [(0, 0, 0), (0, 256, 0)], ids=str)
def test_extreme_groups(run, sizes):
    case = grouped_cases.Case(sizes=sizes, n=64, k=144, spare=1)
    x, w, sizes = grouped_cases.draw(case, jax.random.key(0))
    arguments = *quantized(x, w), sizes
    dtype, tuning = jnp.dtype(BF16), Tuning(tile_n=64, stages=2)
    out = run(lambda *a: grouped_hopper.fp8_grouped_matmul(*a, dtype, tuning), *arguments)
    expected = fp8_reference.fp8_grouped_matmul(*arguments, F32)
    assert_rows_close(out, expected, tolerance=TOLERANCE["bfloat16"])


def test_half_empty_tiles_in_clusters_again_and_again(run):
    """On a GPU often enough for a warp to be late: one that others leave behind waits for ever."""
    groups, calls = (256, 10_000) if ON_GPU else (2, 1)
    case = grouped_cases.Case(sizes=(60,) * groups, n=200, k=768)
    x, w, sizes = grouped_cases.draw(case, jax.random.key(0))
    arguments = *quantized(x, w), sizes
    tuning, dtype = Tuning(tile_n=192, stages=4, cluster=2), jnp.dtype(BF16)

    def repeat(x, w, sizes):
        def call(_, out):
            again = sizes + (out[0, 0] != out[0, 0]).astype(jnp.int32)  # after the call before
            return grouped_hopper.fp8_grouped_matmul(x, w, again, dtype, tuning)

        first = grouped_hopper.fp8_grouped_matmul(x, w, sizes, dtype, tuning)
        return jax.lax.fori_loop(1, calls, call, first)

    expected = fp8_reference.fp8_grouped_matmul(*arguments, F32)
    assert_rows_close(run(repeat, *arguments), expected, tolerance=TOLERANCE["bfloat16"])


@pytest.mark.parametrize(
    ("case", "tuning"),
    [
        (grouped_cases.MASKED_CASES[0], None),
        (grouped_cases.MASKED_CASES[0], Tuning(tile_m=64, tile_n=64, stages=2)),
        (grouped_cases.MASKED_CASES[0], Tuning(tile_m=256, tile_n=64, stages=2)),
        (grouped_cases.MASKED_CASES[1], Tuning(tile_n=64, stages=2)),
        (grouped_cases.MASKED_CASES[2], Tuning(tile_n=56, stages=2, cluster=2, share="x")),
        (grouped_cases.MASKED_CASES[0], Tuning(tile_n=64, stages=2, cluster=2, share="w")),
    ],
    ids=str,
)
def test_masked_groups(run, case, tuning):
    x, w, counts = grouped_cases.draw_masked(case, jax.random.key(0))
    arguments = *quantized(x, w), counts
    dtype = jnp.dtype(case.out_dtype)
    out = run(lambda *a: grouped_hopper.fp8_masked_matmul(*a, dtype, tuning=tuning), *arguments)
    expected = fp8_reference.fp8_masked_matmul(*arguments, F32)
    for group, count in enumerate(case.counts):
        written = -(-count // 64) * 64  # what lies beyond may be anything
        got, wanted = (np.asarray(a, np.float64)[group, :written] for a in (out, expected))
        assert_rows_close(got, wanted, tolerance=TOLERANCE[case.out_dtype])


@pytest.mark.parametrize("tile_m", [128, 256])
def test_weight_gradients_of_groups(run, tile_m):
    tuning = WgradTuning(tile_m=tile_m, tile_n=96, stages=2)
    case = grouped_cases.Case(sizes=(130, 0, 127, 0), n=144, k=208, spare=1)
    x, _, sizes = grouped_cases.draw(case, jax.random.key(0))
    # operands of their own: the tensor core cuts off most where products are of one sign
    dy, _, _ = grouped_cases.draw(case, jax.random.key(1))
    arguments = quantized_tokens(x, dy[:, : case.n], sizes)
    out = run(lambda *a: grouped_hopper.fp8_grouped_matmul_wgrad(*a, tuning), *arguments, sizes)
    expected = fp8_reference.fp8_grouped_matmul_wgrad(*arguments, sizes)
    assert_rows_close(out, expected, tolerance=TOLERANCE["float32"])


def test_runs_are_identical(run):
    x, w = matmul_operands(130, 136, 272)
    tuning = Tuning(tile_n=64, stages=2, cluster=2)
    runs = [run(lambda x, w: hopper.fp8_matmul(x, w, F32, tuning), x, w) for _ in range(2)]
    np.testing.assert_array_equal(*runs)


@pytest.mark.parametrize(
    ("function", "arguments"),
    [
        (
            lambda x, w: hopper.fp8_matmul(x, w, F32, Tuning(tile_n=64, stages=2, cluster=2)),
            lambda: matmul_operands(130, 136, 272),
        ),
        (
            lambda x, w: hopper.fp8_matmul(x, w, F32, Tuning(tile_m=256, tile_n=64, stages=2)),
            lambda: matmul_operands(130, 136, 272),
        ),
        (
            lambda x, w: hopper.fp8_matmul_wgrad(x, w, None, WgradTuning(stages=2, tile_n=64)),
            lambda: quantized_tokens(normal(0, 300, 144), normal(1, 300, 144)),
        ),
        (
            lambda x, w: hopper.fp8_matmul_wgrad(
                x, w, None, WgradTuning(stages=2, tile_m=256, tile_n=32)
            ),
            lambda: quantized_tokens(normal(0, 300, 144), normal(1, 300, 272)),
        ),
        (
            lambda x, w, sizes: grouped_hopper.fp8_grouped_matmul(
                x, w, sizes, F32, Tuning(tile_m=256, tile_n=64, stages=2)
            ),
            lambda: grouped_operands((130, 0, 1)),
        ),
        (
            lambda x, _, sizes: grouped_hopper.fp8_grouped_matmul_wgrad(
                x, x, sizes, WgradTuning(stages=2, tile_n=64)
            ),
            lambda: grouped_operands((130, 0, 1), tokens=True),
        ),
    ],
    ids=[
        "matmul-cluster",
        "matmul-waves",
        "weight-gradient",
        "weight-gradient-waves",
        "groups",
        "weight-gradients-of-groups",
    ],
)
def test_there_are_no_races(assert_no_races, function, arguments):
    assert_no_races(function, *arguments())


def shapes(*sizes, dtype=BF16):
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def fp8(*size, tile=(1, 128)):
    return jax.eval_shape(lambda x: quantize(x, tile), *shapes(size))


def num_kernels(function, arguments, platform):
    """How many Mosaic GPU kernels there are in a function lowered for a platform."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    calls = re.findall(r"custom_call @([\w$]+)", lowered.as_text())
    assert all(call.startswith("mosaic_gpu") for call in calls)
    return len(calls)


def value_and_gradient(layer):
    def both(x, w, *sizes):
        y, pull = jax.vjp(lambda x, w: layer(x, w, *sizes), x, w)
        return y, pull(y)

    return both


GROUPS = jax.ShapeDtypeStruct((4,), jnp.int32)
LOWERED = {  # the function, its arguments, and how many kernels it takes
    "quantize": (quantize, shapes((257, 272)), 1),
    "quantize-one-row": (quantize, shapes((1, 16)), 1),
    "quantize-float32": (quantize, shapes((257, 272), dtype=F32), 1),
    "quantize-leading-axes": (quantize, shapes((2, 3, 65, 272)), 1),
    "quantize-weight": (functools.partial(quantize, tile=WEIGHT), shapes((200, 272)), 1),
    "quantize-both-weight": (
        functools.partial(quantization.quantize_both, tile=WEIGHT),
        shapes((2, 208, 272)),
        1,
    ),
    "quantize-transposed": (quantize_transposed, shapes((257, 272)), 1),
    "quantize-transposed-float32": (quantize_transposed, shapes((257, 272), dtype=F32), 0),
    "quantize-both": (quantization.quantize_both, shapes((257, 272)), 1),
    "quantize-both-grouped": (
        lambda x, sizes: quantization.quantize_both(x, group_sizes=sizes),
        [*shapes((512, 272)), GROUPS],
        1,
    ),
    "swiglu-quantize": (quantization.swiglu_quantize, shapes((257, 544)), 1),
    "swiglu-quantize-float32": (quantization.swiglu_quantize, shapes((257, 544), dtype=F32), 1),
    "swiglu-gradient": (quantization.swiglu_gradient, shapes((257, 544), (257, 272)), 0),
    "matmul": (
        fp8_gemm.fp8_matmul,
        [fp8(257, 272), fp8(200, 272, tile=WEIGHT)],
        1,
    ),
    "matmul-one-row": (
        functools.partial(fp8_gemm.fp8_matmul, out_dtype=F32),
        [fp8(1, 272), fp8(200, 272, tile=WEIGHT)],
        1,
    ),
    "matmul-kv_a_proj": (
        fp8_gemm.fp8_matmul,
        [fp8(4096, 7168), fp8(576, 7168, tile=WEIGHT)],
        1,
    ),
    "weight-gradient": (fp8_gemm.fp8_matmul_wgrad, [fp8(200, 272), fp8(257, 272)], 1),
    "weight-gradient-accumulated": (
        fp8_gemm.fp8_matmul_wgrad,
        [fp8(200, 272), fp8(257, 272), *shapes((257, 200), dtype=F32)],
        1,
    ),
    "contiguous": (
        grouped_gemm.fp8_grouped_matmul,
        [fp8(512, 272), fp8(4, 200, 272, tile=WEIGHT), GROUPS],
        1,
    ),
    "masked": (
        grouped_gemm.fp8_masked_matmul,
        [fp8(4, 65, 272), fp8(4, 200, 272, tile=WEIGHT), GROUPS],
        1,
    ),
    "weight-gradients-of-groups": (
        grouped_gemm.fp8_grouped_matmul_wgrad,
        [fp8(200, 512), fp8(257, 512), GROUPS],
        1,
    ),
    "linear": (value_and_gradient(fp8_gemm.fp8_linear), shapes((257, 272), (208, 272)), 6),
    "linear-of-two": (
        lambda x, *ws: value_and_gradient(fp8_gemm.fp8_linear)(x, ws),
        shapes((257, 272), (208, 272), (96, 272)),
        11,  # x is quantised once
    ),
    "grouped-linear": (
        value_and_gradient(grouped_gemm.fp8_grouped_linear),
        [*shapes((512, 272), (4, 208, 272)), GROUPS],
        6,
    ),
}


@pytest.mark.parametrize("name", LOWERED)
def test_kernels_are_lowered_for_cuda_alone(name):
    function, arguments, expected = LOWERED[name]
    assert num_kernels(function, arguments, "cuda") == expected
    assert num_kernels(function, arguments, "cpu") == 0


def test_calls_that_are_alike_are_lowered_once():
    """A training step has hundreds of kernels, most of them alike."""

    def twice(x, y, w):
        return fp8_gemm.fp8_matmul(x, w), fp8_gemm.fp8_matmul(y, w)

    x, w = fp8(257, 272), fp8(200, 272, tile=WEIGHT)
    assert num_kernels(twice, [x, x, w], "cuda") == 1
    assert num_kernels(twice, [x, fp8(300, 272), w], "cuda") == 2


@pytest.mark.parametrize("m", [64, 128, 4096])
def test_every_tiling_is_lowered_for_cuda(m):
    for tuning in candidates(m, 4096, 2048, 2):
        matmul = functools.partial(hopper.fp8_matmul, out_dtype=BF16, tuning=tuning)
        assert num_kernels(matmul, [fp8(m, 2048), fp8(4096, 2048, tile=WEIGHT)], "cuda") == 1


@pytest.mark.parametrize(
    ("tuning", "out_dtype"),
    [
        (Tuning(tile_m=64, tile_n=16, stages=8), BF16),
        (Tuning(tile_m=64, tile_n=56, stages=3), F32),
        (Tuning(tile_n=192, stages=4, cluster=2), BF16),
        (Tuning(tile_n=128, stages=4, cluster=2, share="x"), F32),
    ],
    ids=str,
)
def test_smem_bytes_are_enough(tuning, out_dtype):
    from jax.experimental.mosaic.gpu import core

    arguments = fp8(257, 272), fp8(584, 272, tile=WEIGHT)

    def lower(limit):
        with core.artificial_shared_memory_limit(limit):
            num_kernels(lambda x, w: hopper.fp8_matmul(x, w, out_dtype, tuning), arguments, "cuda")

    needed = tuning.smem_bytes(jnp.dtype(out_dtype).itemsize)
    lower(needed)
    with pytest.raises(ValueError, match="exceeds available shared memory"):
        lower(needed * 3 // 4)


def test_a_tuning_that_does_not_fit_says_by_how_much():
    arguments, deep = [fp8(257, 272), fp8(584, 272, tile=WEIGHT)], Tuning(stages=12)
    with pytest.raises(
        ValueError, match=r"stages=12.* needs \d{6} bytes of SMEM, a CTA has 232448"
    ):
        num_kernels(lambda x, w: hopper.fp8_matmul(x, w, BF16, deep), arguments, "cuda")
    arguments, deep = [fp8(272, 256), fp8(584, 256)], WgradTuning(stages=9)
    with pytest.raises(ValueError, match=r"stages=9.* needs \d{6} bytes of SMEM, a CTA has 232448"):
        num_kernels(lambda x, d: hopper.fp8_matmul_wgrad(x, d, None, deep), arguments, "cuda")
