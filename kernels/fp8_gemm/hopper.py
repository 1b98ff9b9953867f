"""FP8 matmuls on Hopper: chooses tiles, lays out the work, calls the kernel."""

import functools

import jax
import jax.numpy as jnp

from whalejax.kernels import mosaic
from whalejax.kernels.backend import mosaic_unusable, no_gpu
from whalejax.kernels.fp8_gemm.tuning import Tuning, WgradTuning, pick, pick_wgrad
from whalejax.kernels.mosaic import SMEM_BYTES
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


def fp8_matmul(
    x: QuantizedArray, w: QuantizedArray, out_dtype: jnp.dtype, tuning: Tuning | None = None
) -> jax.Array:
    """`x @ w.T`; see `fp8_gemm.api.fp8_matmul`."""
    (m, k), n = x.shape, w.shape[0]
    t = tuning or tune(m, n, k, out_dtype)
    x, w = with_group_axis(x), with_group_axis(w)
    return matmul(x, w, None, out_dtype, t, layout="dense")[0]


def with_group_axis(q: QuantizedArray) -> QuantizedArray:
    """The same array as the only one of its groups."""
    return jax.tree.map(lambda a: a[None], q)


def matmul(
    x: QuantizedArray,
    w: QuantizedArray,
    sizes: jax.Array | None,
    out_dtype: jnp.dtype,
    t: Tuning,
    *,
    layout: str,
) -> jax.Array:
    """Runs the matmul kernel: x `[x's groups, m, k]`, w `[groups, n, k]`; see `Problem`."""
    from whalejax.kernels.fp8_gemm.hopper_kernel import Problem, build

    (x_groups, m, k), (groups, n, _) = x.shape, w.shape
    check_smem(t, t.smem_bytes(jnp.dtype(out_dtype).itemsize, groups))
    p = Problem(x_groups=x_groups, groups=groups, m=m, n=n, k=k, out_dtype=out_dtype, layout=layout)
    scales = w.scales
    scales = jnp.pad(scales, ((0, 0), (0, 0), (0, -scales.shape[-1] % TMA_ALIGNMENT)))
    operands = x.values, x.with_scales_by_column().stored_scales, w.values, scales
    arguments = operands if sizes is None else (*operands, sizes)
    ctas = mosaic.num_sms() // t.cluster * t.cluster
    return mosaic.call(build, p, t, ctas, arguments=mosaic.unvarying(arguments))


def check_smem(t: Tuning | WgradTuning, num_bytes: int) -> None:
    """Raises a ValueError where a CTA of this tuning needs more SMEM than it can have."""
    if num_bytes > SMEM_BYTES:
        raise ValueError(f"{t} needs {num_bytes} bytes of SMEM, a CTA has {SMEM_BYTES}")


def fp8_matmul_wgrad(
    x_t: QuantizedArray,
    dy_t: QuantizedArray,
    accumulate: jax.Array | None,
    tuning: WgradTuning | None = None,
) -> jax.Array:
    """`dy_t @ x_t.T`; see `fp8_gemm.api.fp8_matmul_wgrad`."""
    (k, m), n = x_t.shape, dy_t.shape[0]
    t = tuning or pick_wgrad(n, k, m, ctas=mosaic.num_sms())
    return wgrad(x_t, dy_t, accumulate, None, 1, t).reshape(n, k)


def wgrad(
    x_t: QuantizedArray,
    dy_t: QuantizedArray,
    accumulate: jax.Array | None,
    sizes: jax.Array | None,
    groups: int,
    t: WgradTuning,
) -> jax.Array:
    """Runs the weight gradient kernel, on groups of tokens if there are sizes; `[groups, n, k]`."""
    from whalejax.kernels.fp8_gemm.hopper_wgrad_kernel import Problem, build

    n, (k, m) = dy_t.shape[0], x_t.shape
    check_smem(t, t.smem_bytes(groups))
    p = Problem(
        groups=groups,
        n=n,
        k=k,
        m=m,
        grouped=sizes is not None,
        accumulate=accumulate is not None,
    )
    x_t, dy_t = x_t.with_scales_by_column(), dy_t.with_scales_by_column()
    operands = dy_t.values, dy_t.stored_scales, x_t.values, x_t.stored_scales
    arguments = operands if sizes is None else (*operands, sizes)
    arguments, accumulate = mosaic.unvarying((arguments, accumulate))
    call = functools.partial(mosaic.call, build, p, t, mosaic.num_sms())
    if accumulate is None:
        return call(arguments=arguments)
    out = jax.new_ref(accumulate.reshape(groups, n, k))
    call(arguments=(*arguments, out))
    return jax.freeze(out)
