"""Grouped FP8 matmuls on Hopper: the dense kernels, on tiles that know their group.

Which tiles there are depends on sizes that only the device knows: kernels find out themselves, see
`fp8_gemm.walk`.
"""

import jax
import jax.numpy as jnp

from whalejax.kernels import mosaic
from whalejax.kernels.backend import mosaic_unusable, no_gpu
from whalejax.kernels.fp8_gemm.hopper import matmul, wgrad, with_group_axis
from whalejax.kernels.fp8_gemm.tuning import Tuning, WgradTuning, pick, pick_wgrad
from whalejax.kernels.quantization import QuantizedArray


def unusable() -> str | None:
    """Says why the kernels cannot be used on this machine, None if they can."""
    return mosaic_unusable() or no_gpu()


def why_not(op: str, arrays: tuple, *static) -> str | None:
    """Says why the kernel of `op` cannot run these arguments, None if it can."""
    return mosaic_unusable()


def fp8_grouped_matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    group_sizes: jax.Array,
    out_dtype: jnp.dtype,
    tuning: Tuning | None = None,
) -> jax.Array:
    """`x[rows of g] @ w[g].T`; see `grouped_gemm.fp8.fp8_grouped_matmul`."""
    m, (groups, n, k) = x.shape[0], w.shape
    t = tuning or choose(groups, -(-m // groups), n, k, out_dtype)
    return matmul(with_group_axis(x), w, group_sizes, out_dtype, t, layout="contiguous")[0]


def fp8_masked_matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    counts: jax.Array,
    out_dtype: jnp.dtype,
    expected_rows: int | None = None,
    tuning: Tuning | None = None,
) -> jax.Array:
    """`x[g, :counts[g]] @ w[g].T`; see `grouped_gemm.fp8.fp8_masked_matmul`."""
    (groups, max_m, k), n = x.shape, w.shape[1]
    t = tuning or choose(groups, expected_rows or max_m, n, k, out_dtype)
    return matmul(x, w, counts, out_dtype, t, layout="masked")


def choose(groups: int, rows: int, n: int, k: int, out_dtype: jnp.dtype) -> Tuning:
    """The cost model's tuning for groups of so many rows; what was measured are dense matmuls."""
    return pick(
        rows,
        n,
        k,
        groups=groups,
        out_itemsize=jnp.dtype(out_dtype).itemsize,
        ctas=mosaic.num_sms(),
    )


def fp8_grouped_matmul_wgrad(
    x_t: QuantizedArray,
    dy_t: QuantizedArray,
    group_sizes: jax.Array,
    tuning: WgradTuning | None = None,
) -> jax.Array:
    """The weight gradient of each group; see `grouped_gemm.fp8.fp8_grouped_matmul_wgrad`."""
    n, (k, m), groups = dy_t.shape[0], x_t.shape, group_sizes.shape[0]
    t = tuning or pick_wgrad(n, k, m, groups=groups, ctas=mosaic.num_sms())
    return wgrad(x_t, dy_t, None, group_sizes, groups, t)
