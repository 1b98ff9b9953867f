"""Front door of the grouped matmul: checks sizes, chooses a backend, calls it."""

import jax

from whalejax.kernels.backend import choose

BACKENDS = {
    "tiled": "whalejax.kernels.grouped_gemm.tiled",
    "ragged_dot": "whalejax.kernels.grouped_gemm.reference",
}


def grouped_matmul(
    x: jax.Array,
    w: jax.Array,
    group_sizes: jax.Array,
    *,
    alignment: int = 128,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies the rows of each group by the weight of that group, differentiably.

    Args:
      x: `bf16|f16|f32|f64[M, K]`. Group g's rows start at
        `sum(ceil(size_i / alignment) * alignment)` over the groups before it; the rows between are
        padding and may hold anything but NaN.
      w: `[G, N, K]` of x's dtype.
      group_sizes: `i32[G]`, rows of each group without padding.
      alignment: multiple of rows on which groups start; M is a multiple of it.
      implementation: `"tiled"`, `"ragged_dot"`, or None for the first that can run.

    Returns:
      `[M, N]` in x's dtype, accumulated in float32 or, of float64, in float64; padding rows are
      zero.

    Raises:
      ValueError: shapes or dtypes do not fit; prints them.
    """
    if x.ndim != 2 or w.ndim != 3 or group_sizes.shape != w.shape[:1]:
        raise ValueError(
            f"grouped_matmul: x.shape={x.shape} must be [M, K], w.shape={w.shape} [G, N, K] and "
            f"group_sizes.shape={group_sizes.shape} [G]"
        )
    if x.shape[1] != w.shape[2]:
        raise ValueError(
            f"grouped_matmul: K={x.shape[1]} of x and K={w.shape[2]} of w differ "
            f"(x.shape={x.shape}, w.shape={w.shape})"
        )
    if x.dtype != w.dtype:
        raise ValueError(f"grouped_matmul: x.dtype={x.dtype} and w.dtype={w.dtype} differ")
    if alignment < 1 or x.shape[0] % alignment:
        raise ValueError(
            f"grouped_matmul: M={x.shape[0]} must be a multiple of alignment={alignment}"
        )
    backend = choose("grouped_matmul", BACKENDS, implementation, x, w, group_sizes, alignment)
    return backend.grouped_matmul(x, w, group_sizes, alignment)
