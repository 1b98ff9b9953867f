"""Sums over float64 are float64: values and gradients equal a plain float64 formula's."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.accumulation import accumulator
from whalejax.kernels.attention import attention
from whalejax.kernels.grouped_gemm import grouped_matmul
from whalejax.kernels.permutation import permute, plan_permutation, unpermute

TOLERANCE = 1e-13  # float32 anywhere would leave 1e-8


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def value_and_gradients(f, arrays):
    def loss(*arrays):
        out = f(*arrays)
        return jnp.sum(jnp.sin(out)), out

    gradients, out = jax.jit(jax.grad(loss, tuple(range(len(arrays))), has_aux=True))(*arrays)
    return out, *gradients


def assert_alike(f, formula, *arrays):
    """Both give equal values and gradients, all of them float64."""
    both = (value_and_gradients(g, arrays) for g in (f, formula))
    for got, wanted in zip(*both, strict=True):
        assert got.dtype == jnp.float64
        np.testing.assert_allclose(got, wanted, rtol=TOLERANCE, atol=TOLERANCE)


def normal(seed, *shape):
    return jax.random.normal(jax.random.key(seed), shape, jnp.float64)


@pytest.mark.parametrize(
    ("dtype", "wide"),
    [("float64", "float64"), ("float32", "float32"), ("bfloat16", "float32"), ("int32", "float32")],
)
def test_the_dtype_of_sums(dtype, wide):
    assert accumulator(jnp.dtype(dtype)) == jnp.dtype(wide)


@pytest.mark.parametrize("implementation", ["chunked", "reference"])
def test_attention(implementation):
    def formula(q, k, v):
        scores = jnp.einsum("bqhd,bkhd->bhqk", q, k) * 0.3
        scores = jnp.where(jnp.tril(jnp.ones((9, 9), bool))[None, None], scores, -jnp.inf)
        return jnp.einsum("bhqk,bkhd->bqhd", jax.nn.softmax(scores), v)

    def f(q, k, v):
        return attention(q, k, v, scale=0.3, implementation=implementation)

    assert_alike(f, formula, *(normal(i, 2, 9, 2, d) for i, d in enumerate((6, 6, 4))))


@pytest.mark.parametrize("implementation", ["tiled", "ragged_dot"])
def test_grouped_matmul(implementation):
    sizes = jnp.array([4, 8], jnp.int32)

    def formula(x, w):
        return jnp.concatenate([x[:4] @ w[0].T, x[4:] @ w[1].T])

    def f(x, w):
        return grouped_matmul(x, w, sizes, alignment=4, implementation=implementation)

    assert_alike(f, formula, normal(0, 12, 5), normal(1, 2, 3, 5))


def test_permutation():
    idx = jnp.array([[0, 1], [1, 2], [2, 0]], jnp.int32)
    plan = plan_permutation(idx, 3, alignment=2)

    def f(x, weights):
        return unpermute(jnp.tanh(permute(x, plan)), weights, plan)

    def formula(x, weights):
        return jnp.tanh(x) * jnp.sum(weights, axis=1, keepdims=True)

    assert_alike(f, formula, normal(0, 3, 4), normal(1, 3, 2))


@pytest.mark.parametrize("implementation", ["mosaic_gpu", "cudnn"])
def test_gpu_kernels_refuse_float64(implementation):
    q = normal(0, 1, 8, 1, 8)
    with pytest.raises(NotImplementedError, match="float64"):
        attention(q, q, q, scale=1.0, implementation=implementation)
