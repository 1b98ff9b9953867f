import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.attention import attention
from whalejax.kernels.attention.cases import CASES, draw
from whalejax.kernels.testing import assert_rows_close

RUNNABLE = ("chunked", "reference")
# float32: sums of up to 700 terms; bfloat16: 2**-8 is half a step, of inputs and output both
TOLERANCE = {"float32": 1e-5, "bfloat16": 2e-2}


def truth(q, k, v, scale, causal):
    q, k, v = (np.asarray(x, np.float64) for x in (q, k, v))
    scores = np.einsum("bqhd,bkhd->bhqk", q, k) * scale
    if causal:
        scores = np.where(np.tril(np.ones(scores.shape[-2:], bool)), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    return np.einsum("bhqk,bkhd->bqhd", weights / weights.sum(-1, keepdims=True), v)


@pytest.mark.parametrize("implementation", RUNNABLE)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_equals_numpy_float64(case, implementation):
    q, k, v = draw(case, jax.random.key(case.length))
    out = attention(q, k, v, scale=case.scale, causal=case.causal, implementation=implementation)
    assert out.dtype == q.dtype and out.shape == v.shape
    assert_rows_close(out, truth(q, k, v, case.scale, case.causal),
                      tolerance=TOLERANCE[case.dtype])  # fmt: skip


@pytest.mark.parametrize("case", [c for c in CASES if c.dtype == "float32"], ids=str)
def test_gradients_equal_those_of_the_definition(case):
    q, k, v = draw(case, jax.random.key(1))
    d_out = jax.random.normal(jax.random.key(2), v.shape)

    def gradients(implementation):
        def value(q, k, v):
            out = attention(q, k, v, scale=case.scale, causal=case.causal,
                            implementation=implementation)  # fmt: skip
            return jnp.sum(out * d_out)

        return jax.jit(jax.grad(value, argnums=(0, 1, 2)))(q, k, v)

    for got, expected in zip(gradients("chunked"), gradients("reference"), strict=True):
        largest = np.abs(expected).max()
        # dW - delta cancels: a few float32 steps of its terms, about 10, stay where all is zero
        np.testing.assert_allclose(got, expected, rtol=0, atol=2e-5 * largest + 1e-6)


def test_never_holds_all_scores():
    """At s = 2048 the largest buffer of the gradient is far below s x s for one head."""
    shape = jax.ShapeDtypeStruct((1, 2048, 1, 16), jnp.float32)

    def value(q, k, v):
        return jnp.sum(attention(q, k, v, scale=0.25, implementation="chunked"))

    compiled = jax.jit(jax.grad(value, argnums=(0, 1, 2))).lower(shape, shape, shape).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 2048 * 2048 * 4 / 2


def test_the_future_is_not_seen():
    case = CASES[-1]
    q, k, v = draw(case, jax.random.key(0))
    out = attention(q, k, v, scale=1.0)
    half = case.length // 2
    later = attention(q, k.at[:, half:].set(9.0), v.at[:, half:].set(9.0), scale=1.0)
    np.testing.assert_array_equal(out[:, :half], later[:, :half])
    assert np.abs(np.asarray(out[:, half:] - later[:, half:])).max() > 0.1


def test_large_scores_do_not_overflow():
    q = jnp.full((1, 20, 1, 8), 60.0)
    out = attention(q, q, jnp.ones((1, 20, 1, 8)), scale=1.0)
    np.testing.assert_allclose(out, 1.0, rtol=1e-6)


def test_shapes_and_dtypes_that_do_not_fit_are_printed():
    q = jnp.zeros((1, 4, 2, 8))
    with pytest.raises(ValueError, match=r"k.shape=\(1, 5, 2, 8\)"):
        attention(q, jnp.zeros((1, 5, 2, 8)), q, scale=1.0)
    with pytest.raises(ValueError, match=r"v.shape=\(1, 4, 3, 8\)"):
        attention(q, q, jnp.zeros((1, 4, 3, 8)), scale=1.0)
    with pytest.raises(ValueError, match="v.dtype=bfloat16"):
        attention(q, q, q.astype(jnp.bfloat16), scale=1.0)


@pytest.mark.parametrize(
    ("dtype", "dim", "says"),
    [
        ("bfloat16", 64, "needs a CUDA GPU"),
        ("float32", 64, "not float32"),
        ("bfloat16", 260, "d_qk=260"),
    ],
)
def test_cudnn_says_why_not(dtype, dim, says):
    q = jnp.zeros((1, 4, 2, dim), dtype)
    with pytest.raises(NotImplementedError, match=says):
        attention(q, q, q, scale=1.0, implementation="cudnn")
