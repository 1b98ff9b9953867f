import jax
import jax.numpy as jnp
import numpy as np
import pytest

from whalejax.kernels.grouped_gemm import grouped_matmul
from whalejax.kernels.grouped_gemm.api import BACKENDS
from whalejax.kernels.testing import assert_rows_close

SIZES = ([5, 0, 16, 1], [0, 0, 0, 0], [32, 0, 0, 0], [8, 8, 8, 8])
ALIGNMENT, K, N = 8, 20, 12
TOLERANCE = {"float32": 1e-6, "bfloat16": 2**-8}  # bfloat16: rounded once, at the end


def draw(sizes, dtype="float32"):
    """Rows with garbage in the padding, and weights."""
    rows = sum(-(-n // ALIGNMENT) * ALIGNMENT for n in sizes) + ALIGNMENT
    keys = jax.random.split(jax.random.key(0), 2)
    x = jax.random.normal(keys[0], (rows, K)).astype(dtype)
    w = jax.random.normal(keys[1], (len(sizes), N, K)).astype(dtype)
    return x, w, jnp.asarray(sizes, jnp.int32)


def truth(x, w, sizes):
    out, start = np.zeros((len(x), N)), 0
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        out[rows] = np.asarray(x, np.float64)[rows] @ np.asarray(w, np.float64)[group].T
        start += -(-size // ALIGNMENT) * ALIGNMENT
    return out


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_numpy_float64(sizes, dtype, implementation):
    x, w, groups = draw(sizes, dtype)
    out = grouped_matmul(x, w, groups, alignment=ALIGNMENT, implementation=implementation)
    assert out.dtype == x.dtype
    assert_rows_close(out, truth(x, w, sizes), tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("implementation", BACKENDS)
@pytest.mark.parametrize("sizes", SIZES[:3], ids=str)
def test_gradients(sizes, implementation):
    x, w, groups = draw(sizes)
    d_out = jax.random.normal(jax.random.key(3), (len(x), N))

    def value(x, w):
        out = grouped_matmul(x, w, groups, alignment=ALIGNMENT, implementation=implementation)
        return jnp.sum(out * d_out)

    d_x, d_w = jax.grad(value, argnums=(0, 1))(x, w)
    start = 0
    expected_x, expected_w = np.zeros(x.shape), np.zeros(w.shape)
    for group, size in enumerate(sizes):
        rows = slice(start, start + size)
        expected_x[rows] = np.asarray(d_out, np.float64)[rows] @ np.asarray(w[group], np.float64)
        expected_w[group] = np.asarray(d_out, np.float64)[rows].T @ np.asarray(x, np.float64)[rows]
        start += -(-size // ALIGNMENT) * ALIGNMENT
    np.testing.assert_allclose(d_x, expected_x, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(d_w, expected_w, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda x, w, g: (x[:, :-1], w, g), "K=19 of x and K=20 of w"),
        (lambda x, w, g: (x[:-1], w, g), "must be a multiple of alignment=8"),
        (lambda x, w, g: (x, w, g[:-1]), r"group_sizes.shape=\(3,\)"),
        (lambda x, w, g: (x, w.astype(jnp.bfloat16), g), "w.dtype=bfloat16"),
    ],
)
def test_what_does_not_fit_is_printed(change, says):
    with pytest.raises(ValueError, match=says):
        grouped_matmul(*change(*draw(SIZES[0])), alignment=ALIGNMENT)
