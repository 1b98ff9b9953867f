"""Front doors of the dense FP8 matmuls: check sizes, choose a backend, call it."""

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import run
from whalejax.kernels.quantization import QuantizedArray
from whalejax.kernels.quantization.array import stored_scales_shape

BACKENDS = {
    "mosaic_gpu": "whalejax.kernels.fp8_gemm.hopper",
    "xla": "whalejax.kernels.fp8_gemm.reference",
}
OUT_DTYPES = (jnp.bfloat16, jnp.float32)
ACTIVATION_TILE, WEIGHT_TILE = (1, 128), (128, 128)


def fp8_matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    *,
    out_dtype: jnp.dtype = jnp.bfloat16,
    implementation: str | None = None,
) -> jax.Array:
    """Multiplies FP8 activations by an FP8 weight: the forward pass and the input gradient.

    Hopper's tensor cores sum FP8 products in about 14 bits, so the partial sum of every 128 of K
    is scaled and added to a float32 accumulator outside of them.

    Args:
      x: `e4m3[M, K]` with tile `(1, 128)`; any M, K a multiple of 16.
      w: `e4m3[N, K]` with tile `(128, 128)`; N a multiple of 8.
      out_dtype: `bfloat16` or `float32`.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      `x @ w.T`, `out_dtype[M, N]`.

    Raises:
      ValueError: shapes, dtypes or tiles do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2; DeepGEMM.
    """
    check_operand("fp8_matmul", "x", x, ACTIVATION_TILE, ndim=2)
    check_operand("fp8_matmul", "w", w, WEIGHT_TILE, ndim=2)
    check_product("fp8_matmul", x, w, out_dtype)
    return run("fp8_matmul", BACKENDS, implementation, (x, w), jnp.dtype(out_dtype))


def fp8_matmul_wgrad(
    x_t: QuantizedArray,
    dy_t: QuantizedArray,
    accumulate: jax.Array | None = None,
    *,
    implementation: str | None = None,
) -> jax.Array:
    """The weight gradient `dy.T @ x` of FP8 operands that are scaled along the tokens.

    Args:
      x_t: `e4m3[K, M]` with tile `(1, 128)`, from `quantize_transposed(x)`; M, the tokens, is a
        multiple of 16, K a multiple of 8.
      dy_t: `e4m3[N, M]` with tile `(1, 128)`; any N.
      accumulate: `f32[N, K]` that the product is added to, or None.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      `f32[N, K]`.

    Raises:
      ValueError: shapes, dtypes or tiles do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    op = "fp8_matmul_wgrad"
    check_operand(op, "x_t", x_t, ACTIVATION_TILE, ndim=2)
    check_operand(op, "dy_t", dy_t, ACTIVATION_TILE, ndim=2)
    check_wgrad(op, x_t, dy_t)
    shape = (dy_t.shape[0], x_t.shape[0])
    if accumulate is not None and (accumulate.shape != shape or accumulate.dtype != jnp.float32):
        raise ValueError(
            f"{op}: accumulate is {accumulate.dtype}{list(accumulate.shape)}, must be "
            f"float32{list(shape)}"
        )
    return run(op, BACKENDS, implementation, (x_t, dy_t, accumulate))


def check_operand(
    op: str, name: str, operand: QuantizedArray, tile: tuple[int, int], *, ndim: int
) -> None:
    """Raises ValueError if `operand` is not an e4m3 QuantizedArray of `tile` and `ndim` axes."""
    if not isinstance(operand, QuantizedArray):
        raise ValueError(f"{op}: {name} must be a QuantizedArray, is {type(operand).__name__}")
    if operand.dtype != jnp.float8_e4m3fn or operand.ndim != ndim or 0 in operand.shape:
        raise ValueError(
            f"{op}: {name} is {operand.dtype}{list(operand.shape)}, must be float8_e4m3fn with "
            f"{ndim} axes, none of them empty"
        )
    if operand.tile != tile:
        raise ValueError(f"{op}: {name}.tile={operand.tile} must be {tile}")
    wanted = stored_scales_shape(operand.shape, tile, operand.scales_by_column)
    scales = operand.stored_scales
    if scales.shape != wanted or scales.dtype != jnp.float32:
        raise ValueError(
            f"{op}: {name}'s stored scales are {scales.dtype}{list(scales.shape)}, must be "
            f"float32{list(wanted)} for {name}.shape={operand.shape}, tile={tile} and "
            f"scales_by_column={operand.scales_by_column}"
        )


def check_product(op: str, x: QuantizedArray, w: QuantizedArray, out_dtype: jnp.dtype) -> None:
    """Raises ValueError if `x [..., K]` and `w [..., N, K]` cannot be multiplied."""
    k, n = x.shape[-1], w.shape[-2]
    if k != w.shape[-1]:
        raise ValueError(
            f"{op}: K={k} of x and K={w.shape[-1]} of w differ (x.shape={x.shape}, "
            f"w.shape={w.shape})"
        )
    if k % 16 or n % 8:
        raise ValueError(
            f"{op}: K={k} must be a multiple of 16 and N={n} of 8 (x.shape={x.shape}, "
            f"w.shape={w.shape})"
        )
    if jnp.dtype(out_dtype) not in OUT_DTYPES:
        raise ValueError(f"{op}: out_dtype={out_dtype} must be bfloat16 or float32")


def check_wgrad(op: str, x_t: QuantizedArray, dy_t: QuantizedArray) -> None:
    """Raises ValueError if `x_t [K, M]` and `dy_t [N, M]` do not share M, or sizes are odd."""
    (k, m), tokens = x_t.shape, dy_t.shape[1]
    if m != tokens:
        raise ValueError(
            f"{op}: M={m} of x_t and M={tokens} of dy_t differ (x_t.shape={x_t.shape}, "
            f"dy_t.shape={dy_t.shape})"
        )
    if m % 16 or k % 8:
        raise ValueError(
            f"{op}: M={m} must be a multiple of 16 and K={k} of 8 (x_t.shape={x_t.shape}, "
            f"dy_t.shape={dy_t.shape})"
        )
