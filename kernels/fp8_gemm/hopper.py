"""FP8 matmuls on Hopper: chooses tiles, lays out the work, calls the kernel."""

import jax
import jax.numpy as jnp

from whalejax.kernels import mosaic
from whalejax.kernels.backend import mosaic_unusable, no_gpu
from whalejax.kernels.fp8_gemm.tuning import BLOCK_K, Tuning, WgradTuning, pick
from whalejax.kernels.quantization import QuantizedArray

TMA_ALIGNMENT = 4  # float32: rows that TMA moves start on multiples of 16 bytes


def unusable() -> str | None:
    """Says why the kernels cannot be used on this machine, None if they can."""
    return mosaic_unusable() or no_gpu()


def why_not(op: str, arrays: tuple, *static) -> str | None:
    """Says why the kernel of `op` cannot run these arguments, None if it can."""
    return mosaic_unusable()


def tune(m: int, n: int, k: int, out_dtype: jnp.dtype) -> Tuning:
    """`tuning.pick` for the default device."""
    device = jax.devices()[0].device_kind if jax.default_backend() == "gpu" else None
    return pick(
        m,
        n,
        k,
        out_itemsize=jnp.dtype(out_dtype).itemsize,
        ctas=mosaic.num_sms(),
        device=device,
    )


def aligned_rows(scales: jax.Array) -> jax.Array:
    """w's scales, their rows padded to the 16 bytes that TMA needs."""
    padding = [(0, 0)] * (scales.ndim - 1) + [(0, -scales.shape[-1] % TMA_ALIGNMENT)]
    return jnp.pad(scales, padding)


def fp8_matmul(
    x: QuantizedArray, w: QuantizedArray, out_dtype: jnp.dtype, tuning: Tuning | None = None
) -> jax.Array:
    """`x @ w.T`; see `fp8_gemm.api.fp8_matmul`."""
    from whalejax.kernels.fp8_gemm.hopper_kernel import Problem, build

    (m, k), n = x.shape, w.shape[0]
    ctas = mosaic.num_sms()
    t = tuning or tune(m, n, k, out_dtype)
    ctas -= ctas % t.cluster
    p = Problem(x_groups=1, groups=1, m=m, n=n, k=k, out_dtype=out_dtype, masked=False)
    items = mosaic.deal(
        -(-m // t.tile_m),
        -(-n // t.tile_n),
        max_rows=-(-m // t.tile_m),
        width=t.width,
        ctas=ctas,
        group=t.group,
    )
    table = mosaic.table(items.row, items.column)
    x = x.with_scales_by_column()
    out = build(p, t, ctas)(
        x.values[None],
        x.stored_scales[None],
        w.values[None],
        aligned_rows(w.scales)[None],
        table,
        jnp.asarray(items.counts),
    )
    return out[0]


def fp8_matmul_wgrad(
    x_t: QuantizedArray,
    dy_t: QuantizedArray,
    accumulate: jax.Array | None,
    tuning: WgradTuning | None = None,
) -> jax.Array:
    """`dy_t @ x_t.T`; see `fp8_gemm.api.fp8_matmul_wgrad`."""
    t = tuning or WgradTuning()
    (k, m), n = x_t.shape, dy_t.shape[0]
    items = mosaic.deal(
        -(-n // t.tile_m),
        -(-k // t.tile_n),
        max_rows=-(-n // t.tile_m),
        width=t.width,
        ctas=mosaic.num_sms(),
        group=(1, 1),
    )
    none = items.row * 0
    table = mosaic.table(items.row, items.column, none, none, none + -(-m // BLOCK_K))
    return wgrad(x_t, dy_t, accumulate, 1, table, items.counts, t).reshape(n, k)


def wgrad(x_t, dy_t, accumulate, groups, table, counts, t):
    """Runs the weight gradient kernel on items; `[groups, n, k]`."""
    from whalejax.kernels.fp8_gemm.hopper_wgrad_kernel import Problem, build

    n, k = dy_t.shape[0], x_t.shape[0]
    p = Problem(groups=groups, n=n, k=k, accumulate=accumulate is not None)
    x_t, dy_t = x_t.with_scales_by_column(), dy_t.with_scales_by_column()
    arguments = (
        dy_t.values,
        dy_t.stored_scales,
        x_t.values,
        x_t.stored_scales,
        table,
        jnp.asarray(counts),
    )
    kernel = build(p, t, table.shape[0])
    if accumulate is None:
        return kernel(*arguments)
    out = jax.new_ref(accumulate.reshape(groups, n, k))
    kernel(*arguments, out)
    return jax.freeze(out)
