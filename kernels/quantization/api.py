"""Front doors of quantisation: check sizes, choose a backend, call it."""

import jax
import jax.numpy as jnp

from whalejax.kernels.backend import run
from whalejax.kernels.quantization.array import QuantizedArray

BACKENDS = {
    "mosaic_gpu": "whalejax.kernels.quantization.hopper",
    "xla": "whalejax.kernels.quantization.reference",
}
TILES = ((1, 128), (128, 128))
TMA_BYTES = 16  # rows that TMA moves are multiples of this


def quantize(
    x: jax.Array,
    tile: tuple[int, int] = (1, 128),
    *,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> QuantizedArray:
    """Rounds an array to FP8 (e4m3) with one float32 scale a tile.

    A tile's scale is `max(|tile|, 1e-4) / 448`: its largest element becomes the largest FP8 number,
    and a tile of zeros stays zero. A NaN or an infinity spoils its own tile and no other.

    Args:
      x: `bf16|f32[..., M, K]`, K a multiple of 16 (a TMA row).
      tile: `(1, 128)` for activations, `(128, 128)` for weights; the last tiles may be partial
        (DeepSeek-V3's `kv_a_proj` has 576 rows, V2-Lite's MLP 10944 columns).
      power_of_two: round scales up to powers of two, as some checkpoints' recipes do.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      Values `e4m3[..., M, K]`, scales `f32[..., ceil(M / tile[0]), ceil(K / tile[1])]`.

    Raises:
      ValueError: shape, dtype, tile or implementation do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run `x`; says why.

    Source: DeepSeek-V3 (arXiv 2412.19437), section 3.3.2; the floor 1e-4 is DeepGEMM's.
    """
    _check("quantize", x, ndim=None)
    _check_tile("quantize", tuple(tile))
    return run("quantize", BACKENDS, implementation, (x,), tuple(tile), power_of_two)


def quantize_transposed(
    x: jax.Array,
    *,
    group_sizes: jax.Array | None = None,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> QuantizedArray:
    """Transposes `[M, K]` and quantises it with a scale every 128 tokens, for weight gradients.

    Args:
      x: `bf16|f32[M, K]`, a token a row; K is a multiple of 16.
      group_sizes: `i32[G]` where the rows are groups that start on multiples of 128: their padding
        becomes zero, and M is a multiple of 128.
      power_of_two: round scales up to powers of two.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      `[K, ceil(M / 128) * 128]` with tile `(1, 128)`; tokens past M are zero.

    Raises:
      ValueError: shapes or dtypes do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run `x`; says why.
    """
    _check("quantize_transposed", x, ndim=2)
    _check_groups("quantize_transposed", x, group_sizes)
    return run("quantize_transposed", BACKENDS, implementation, (x, group_sizes), power_of_two)


def quantize_both(
    x: jax.Array,
    tile: tuple[int, int] = (1, 128),
    *,
    group_sizes: jax.Array | None = None,
    power_of_two: bool = False,
    implementation: str | None = None,
) -> tuple[QuantizedArray, QuantizedArray]:
    """Quantises an array and its transpose in one pass, for both directions of training.

    Args:
      x: with tile `(1, 128)` as in `quantize_transposed`, `bf16|f32[M, K]`; with `(128, 128)`
        `bf16|f32[..., M, K]`, M and K multiples of 16.
      tile: `(1, 128)` for activations, `(128, 128)` for weights.
      group_sizes: as in `quantize_transposed`; of activations alone.
      power_of_two: round scales up to powers of two.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      `quantize(x, tile)`; and of activations `quantize_transposed(x)`, of weights
      `quantize(x, tile).transpose()`.

    Raises:
      ValueError: shapes, dtypes or tile do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run `x`; says why.
    """
    tile = tuple(tile)
    _check_tile("quantize_both", tile)
    _check("quantize_both", x, ndim=None if tile[0] > 1 else 2)
    if tile[0] > 1 and (x.shape[-2] % TMA_BYTES or group_sizes is not None):
        raise ValueError(
            f"quantize_both: with tile={tile} M={x.shape[-2]} must be a multiple of {TMA_BYTES} "
            f"(x.shape={x.shape}), and group_sizes None"
        )
    _check_groups("quantize_both", x, group_sizes)
    return run("quantize_both", BACKENDS, implementation, (x, group_sizes), tile, power_of_two)


def swiglu_quantize(
    gate_up: jax.Array, *, power_of_two: bool = False, implementation: str | None = None
) -> QuantizedArray:
    """`quantize(silu(gate) * up)` in one pass (SwiGLU, arXiv 2002.05202).

    Args:
      gate_up: `bf16|f32[M, 2 I]`, the gate's columns before those of up; I is a multiple of 16.
      power_of_two: round scales up to powers of two.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      Values `e4m3[M, I]` and scales `f32[M, ceil(I / 128)]`; SwiGLU is computed in float32.

    Raises:
      ValueError: shape or dtype do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    _check_gate_up("swiglu_quantize", gate_up)
    return run("swiglu_quantize", BACKENDS, implementation, (gate_up,), power_of_two)


def swiglu_gradient(
    gate_up: jax.Array, d_hidden: jax.Array, *, implementation: str | None = None
) -> jax.Array:
    """The gradient of `silu(gate) * up` for `gate_up`, recomputed from it.

    Args:
      gate_up: `bf16|f32[M, 2 I]`.
      d_hidden: `[M, I]` of gate_up's dtype, the gradient of SwiGLU's output.
      implementation: `"mosaic_gpu"`, `"xla"`, or None for the best where it runs.

    Returns:
      `[M, 2 I]` in gate_up's dtype, computed in float32.

    Raises:
      ValueError: shapes or dtypes do not fit; prints them.
      NotImplementedError: the implementation that was named cannot run; says why.
    """
    _check_gate_up("swiglu_gradient", gate_up)
    m, width = gate_up.shape
    if d_hidden.shape != (m, width // 2) or d_hidden.dtype != gate_up.dtype:
        raise ValueError(
            f"swiglu_gradient: d_hidden is {d_hidden.dtype}{list(d_hidden.shape)}, must be "
            f"{gate_up.dtype}{[m, width // 2]} for gate_up.shape={gate_up.shape}"
        )
    return run("swiglu_gradient", BACKENDS, implementation, (gate_up, d_hidden))


def _check(op, x, ndim):
    if x.ndim < 2 or (ndim is not None and x.ndim != ndim):
        axes = "at least two axes" if ndim is None else f"{ndim} axes"
        raise ValueError(f"{op}: x.shape={x.shape} must have {axes}")
    if x.dtype not in (jnp.bfloat16, jnp.float32):
        raise ValueError(f"{op}: x.dtype={x.dtype} must be bfloat16 or float32")
    if 0 in x.shape:
        raise ValueError(f"{op}: x.shape={x.shape} must have no empty axis")
    k = x.shape[-1]
    if k % TMA_BYTES:
        raise ValueError(
            f"{op}: K={k} must be a multiple of {TMA_BYTES}, the bytes that a TMA row needs "
            f"(x.shape={x.shape}); pad K to {-(-k // TMA_BYTES) * TMA_BYTES}"
        )


def _check_tile(op, tile):
    if tile not in TILES:
        raise ValueError(f"{op}: tile={tile} must be one of {TILES}")


def _check_gate_up(op, gate_up):
    _check(op, gate_up, ndim=2)
    if gate_up.shape[1] % (2 * TMA_BYTES):
        raise ValueError(
            f"{op}: gate_up.shape={gate_up.shape} must be [M, 2 I] with I a multiple of {TMA_BYTES}"
        )


def _check_groups(op, x, group_sizes):
    if group_sizes is None:
        return
    if group_sizes.ndim != 1 or group_sizes.dtype != jnp.int32:
        raise ValueError(
            f"{op}: group_sizes is {group_sizes.dtype}{list(group_sizes.shape)}, must be int32[G]"
        )
    if x.shape[0] % 128:
        raise ValueError(
            f"{op}: M={x.shape[0]} must be a multiple of 128 where rows are groups "
            f"(x.shape={x.shape})"
        )
