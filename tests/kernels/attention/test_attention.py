import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.attention import attention, cudnn, hopper
from whalejax.kernels.attention.cases import CASES, Case, draw
from whalejax.kernels.attention.tuning import pick
from whalejax.kernels.testing import assert_rows_close

RUNNABLE = ("chunked", "reference")
LONGEST_SUM = 192  # products in a score
# What a score may be off by at most in float32, or half a step of the dtype, which the weights are
# rounded to and then the output
TOLERANCE = {"float32": LONGEST_SUM * 2**-24, "bfloat16": 2 * 2**-8, "float16": 2 * 2**-11}
MLA = [(2, 256, 4, d) for d in (192, 192, 128)]


def truth(q, k, v, d_out, scale, causal):
    """Output and gradients by NumPy in float64."""
    q, k, v, d_out = (np.asarray(x, np.float64) for x in (q, k, v, d_out))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if causal:
        seen = np.tril(np.ones(scores.shape[-2:], bool), k.shape[1] - q.shape[1])
        scores = np.where(seen, scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    d_weights = np.einsum("bqhd,bkhd->bhqk", d_out, v)
    mean = (weights * d_weights).sum(-1, keepdims=True)
    d_scores = weights * (d_weights - mean) * scale
    return np.einsum("bhqk,bkhd->bqhd", weights, v), (
        np.einsum("bhqk,bkhd->bqhd", d_scores, k),
        np.einsum("bhqk,bqhd->bkhd", d_scores, q),
        np.einsum("bhqk,bqhd->bkhd", weights, d_out),
    )


def shapes(dtype, sizes=MLA):
    return [jax.ShapeDtypeStruct(size, dtype) for size in sizes]


def custom_calls(function, arguments, platform="cuda"):
    """Names of the custom calls of a function lowered for a platform, on any machine."""
    lowered = jax.jit(function).trace(*arguments).lower(lowering_platforms=(platform,))
    return re.findall(r"custom_call @([\w$]+)", lowered.as_text())


def attend_and_differentiate(q, k, v, **options):
    out, pull = jax.vjp(functools.partial(attention, scale=0.1, **options), q, k, v)
    return out, pull(out)


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_output_and_gradients_equal_numpy_float64(case, implementation):
    q, k, v, d_out = draw(case, jax.random.key(case.length))

    @jax.jit
    def both(q, k, v, d_out):
        attend = functools.partial(
            attention, scale=case.scale, causal=case.causal, implementation=implementation
        )
        out, pull = jax.vjp(attend, q, k, v)
        return out, pull(d_out)

    out, gradients = both(q, k, v, d_out)
    expected, expected_gradients = truth(q, k, v, d_out, case.scale, case.causal)
    assert out.dtype == q.dtype
    assert_rows_close(out, expected, tolerance=TOLERANCE[case.dtype])
    for x, got, wanted in zip((q, k, v), gradients, expected_gradients, strict=True):
        assert got.dtype == x.dtype and got.shape == x.shape
        # d_weights - delta cancels, wholly so where a query sees one key: an error is judged by
        # the largest row. Rounded are the output in delta, weights or d_scores, and the gradient.
        errors = np.linalg.norm(np.asarray(got, np.float64) - wanted, axis=-1)
        largest = np.linalg.norm(wanted, axis=-1).max()
        assert errors.max() <= 2 * TOLERANCE[case.dtype] * max(largest, 1.0)


def test_never_holds_all_scores():
    """At s = 2048 the largest buffer of the gradient is far below s x s for one head."""
    arguments = shapes(jnp.float32, [(1, 2048, 1, 16)] * 3)
    both = functools.partial(attend_and_differentiate, implementation="chunked")
    compiled = jax.jit(both).lower(*arguments).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 2048 * 4 / 2
    sizes = [
        np.prod([int(n) for n in dims.split(",")])
        for dims in re.findall(r"\w\d*\[([\d,]+)\]", compiled.as_text())
    ]
    assert 2048 * 16 <= max(sizes) < 2048 * 2048 / 8


def test_the_future_is_not_seen():
    case = Case(length=300, batch=2)
    q, k, v, _ = draw(case, jax.random.key(0))
    half = case.length // 2
    attend = jax.jit(functools.partial(attention, scale=1.0))
    out, later = attend(q, k, v), attend(q, k.at[:, half:].set(9.0), v.at[:, half:].set(9.0))
    np.testing.assert_array_equal(out[:, :half], later[:, :half])
    assert np.abs(np.asarray(out[:, half:] - later[:, half:])).max() > 0.1


def test_large_scores_do_not_overflow():
    q = jnp.full((1, 20, 1, 8), 60.0)
    out, gradients = attend_and_differentiate(q, q, jnp.ones((1, 20, 1, 8)))
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)
    assert all(jnp.isfinite(x).all() for x in gradients)


def test_the_same_inside_shard_map():
    mesh = jax.make_mesh((4,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    q, k, v, _ = draw(Case(length=150, batch=4), jax.random.key(0))
    spec = jax.sharding.PartitionSpec("data")
    placed = jax.shard_map(
        attend_and_differentiate,
        mesh=mesh,
        in_specs=(spec,) * 3,
        out_specs=(spec, (spec,) * 3),
    )
    expected = jax.tree.leaves(jax.jit(attend_and_differentiate)(q, k, v))
    for got, wanted in zip(jax.tree.leaves(jax.jit(placed)(q, k, v)), expected, strict=True):
        np.testing.assert_allclose(got, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("platform", "dtype", "expected"),
    [
        ("cuda", "bfloat16", ["__cudnn$fmhaSoftmax", "__cudnn$fmhaSoftmaxBackward"]),
        ("cuda", "float32", []),
        ("cpu", "bfloat16", []),
    ],
)
def test_chosen_for_the_platform_lowered_for(platform, dtype, expected):
    assert custom_calls(attend_and_differentiate, shapes(dtype), platform) == expected


@pytest.mark.parametrize(("causal", "mask"), [(True, "CAUSAL"), (False, "NO_MASK")])
def test_cudnn_is_told_mask_and_scale(causal, mask):
    both = functools.partial(attend_and_differentiate, causal=causal)
    lowered = jax.jit(both).trace(*shapes("bfloat16")).lower(lowering_platforms=("cuda",))
    text = lowered.as_text().replace("\\22", '"')
    assert re.findall(r'"mask_type": "(\w+)"', text) == [mask, mask]
    assert re.findall(r'"fmha_scale": ([\d.]+)', text) == ["0.1", "0.1"]


def test_fewer_queries_than_keys_are_not_left_to_cudnn():
    arguments = shapes("bfloat16", [(1, 8, 1, 64), (1, 16, 1, 64), (1, 16, 1, 64)])
    assert custom_calls(attend_and_differentiate, arguments) == []
    full = functools.partial(attend_and_differentiate, causal=False)
    assert len(custom_calls(full, arguments)) == 2


def test_saves_no_more_than_one_backend_needs():
    q, k, v = shapes("bfloat16")
    _, pull = jax.eval_shape(functools.partial(jax.vjp, functools.partial(attention, scale=1.0)),
                             q, k, v)  # fmt: skip
    saved = sorted(str(x.shape) for x in jax.tree.leaves(pull))
    assert saved == sorted(map(str, [q.shape, k.shape, v.shape, v.shape, (2, 4, 256)]))


@pytest.mark.parametrize(
    ("names", "num_forward"), [((), 2), (("attention_out", "attention_lse"), 1)]
)
def test_rematerialisation_can_keep_the_named_residuals(names, num_forward):
    policy = jax.checkpoint_policies.save_only_these_names(*names)

    @functools.partial(jax.checkpoint, policy=policy)
    def attend(q, k, v):
        return jnp.sin(attention(jnp.sin(q), k, v, scale=1.0))

    def gradient(q, k, v):
        return jax.value_and_grad(lambda q: attend(q, k, v).astype(jnp.float32).sum())(q)

    assert custom_calls(gradient, shapes("bfloat16")).count("__cudnn$fmhaSoftmax") == num_forward


if hopper.why_not_lowered(*shapes("float16"), True) is None:  # not collected on an older jax

    @pytest.mark.parametrize("length", [256, 300])
    def test_the_mosaic_kernel_lowers_at_the_head_dimensions_of_mla(length):
        sizes = [(2, length, 4, d) for d in (192, 192, 128)]
        forward = functools.partial(hopper.forward, scale=0.1, causal=True)
        assert custom_calls(forward, shapes("float16", sizes)) == ["mosaic_gpu_v2"]
        out, lse = jax.eval_shape(forward, *shapes("float16", sizes))
        assert out.shape == sizes[2] and lse.shape == (2, 4, length)


@pytest.mark.parametrize("longest", [1, 8, 100, 129, 256, 1000, 2048, 2049, 8192])
def test_blocks_waste_little(longest):
    block = pick(1, longest).block
    num_blocks = -(-longest // block)
    assert block % 8 == 0 and block <= 256
    assert num_blocks * block - longest < 8 * num_blocks


@pytest.mark.parametrize(
    ("q", "k", "v", "causal", "says"),
    [
        ((1, 4, 2, 8), (1, 4, 2, 9), (1, 4, 2, 8), True, r"k.shape=\(1, 4, 2, 9\)"),
        ((1, 4, 2, 8), (1, 4, 2, 8), (1, 4, 3, 8), True, r"v.shape=\(1, 4, 3, 8\)"),
        ((1, 4, 2, 8), (1, 4, 8), (1, 4, 2, 8), True, r"k.shape=\(1, 4, 8\)"),
        ((1, 5, 2, 8), (1, 4, 2, 8), (1, 4, 2, 8), True, "s=5 queries and s_k=4 keys"),
        ((1, 5, 2, 8), (1, 0, 2, 8), (1, 0, 2, 8), False, "s_k=0 keys"),
    ],
)
def test_shapes_that_do_not_fit_are_printed(q, k, v, causal, says):
    with pytest.raises(ValueError, match=says):
        attention(jnp.zeros(q), jnp.zeros(k), jnp.zeros(v), scale=1.0, causal=causal)


@pytest.mark.parametrize(
    ("dtypes", "says"),
    [(("float32", "bfloat16"), "v.dtype=bfloat16"), (("int8", "int8"), "q.dtype=int8")],
)
def test_dtypes_that_do_not_fit_are_printed(dtypes, says):
    q, v = (jnp.zeros((1, 4, 2, 8), dtype) for dtype in dtypes)
    with pytest.raises(ValueError, match=says):
        attention(q, q, v, scale=1.0)


@pytest.mark.parametrize(
    ("implementation", "dtype", "dim", "lengths", "causal", "says"),
    [
        ("cudnn", "bfloat16", 64, (4, 4), True, "needs a CUDA GPU"),
        ("cudnn", "float32", 64, (4, 4), True, "not float32"),
        ("cudnn", "bfloat16", 260, (4, 4), True, "d_qk=260"),
        ("cudnn", "bfloat16", 64, (1, 1), True, "s=1 and s_k=1"),
        ("cudnn", "bfloat16", 64, (4, 6), True, "s=4 and s_k=6"),
        ("mosaic_gpu", "bfloat16", 64, (4, 4), True, "the arguments bfloat16"),
        ("mosaic_gpu", "float16", 260, (4, 4), True, "d_qk=260"),
        ("mosaic_gpu", "float16", 64, (4, 6), True, "s=4 and s_k=6"),
        ("mosaic_gpu", "float16", 64, (4, 4), False, "multiple of 128"),
        ("mosaic_gpu", "float16", 64, (4, 4), True, "CUDA|jax>=0.11.2"),
    ],
)
def test_a_named_backend_says_why_not(implementation, dtype, dim, lengths, causal, says):
    q, k = (jnp.zeros((1, length, 2, dim), dtype) for length in lengths)
    with pytest.raises(NotImplementedError, match=says):
        attention(q, k, k, scale=1.0, causal=causal, implementation=implementation)


@pytest.mark.skipif(jax.default_backend() == "gpu", reason="there is a GPU")
@pytest.mark.parametrize("backend", [cudnn, hopper])
def test_a_machine_without_a_gpu_is_not_usable(backend):
    assert "GPU" in backend.unusable()
