"""Quantisation on Hopper: plans a pass over the input and calls the kernel."""

import jax
import jax.numpy as jnp

from whalejax.kernels import mosaic
from whalejax.kernels.backend import mosaic_unusable, no_gpu
from whalejax.kernels.groups import ALIGNMENT, rows_of_tiles
from whalejax.kernels.quantization.array import QuantizedArray

ROW, SQUARE = (1, 128), (128, 128)


def unusable() -> str | None:
    """Says why the kernels cannot be used on this machine, None if they can."""
    return mosaic_unusable() or no_gpu()


def why_not(op: str, arrays: tuple, *static) -> str | None:
    """Says why the kernel of `op` cannot run these arguments, None if it can."""
    if op == "swiglu_gradient":
        return "XLA computes it in one pass already: there is no kernel"
    transposes = op == "quantize_transposed" or (op == "quantize_both" and static[0] == ROW)
    if transposes and arrays[0].dtype != jnp.bfloat16:
        return f"the kernel transposes bfloat16, not {arrays[0].dtype}"
    return mosaic_unusable()


def quantize(x: jax.Array, tile: tuple[int, int], power_of_two: bool) -> QuantizedArray:
    """See `quantization.api.quantize`."""
    *leading, m, k = x.shape
    if tile == SQUARE:
        return _run_square(x, power_of_two)[0]
    values, scales = _run(x.reshape(-1, m, k), None, k=k, power_of_two=power_of_two)
    return _by_column(values.reshape(x.shape), scales.reshape(*leading, *scales.shape[1:]))


def quantize_transposed(
    x: jax.Array, group_sizes: jax.Array | None, power_of_two: bool
) -> QuantizedArray:
    """See `quantization.api.quantize_transposed`."""
    values, scales = _run_transposed(x, group_sizes, power_of_two, along=False)
    return _by_column(values, scales)


def quantize_both(
    x: jax.Array, group_sizes: jax.Array | None, tile: tuple[int, int], power_of_two: bool
) -> tuple[QuantizedArray, QuantizedArray]:
    """See `quantization.api.quantize_both`."""
    if tile == SQUARE:
        if x.dtype == jnp.bfloat16:
            return _run_square(x, power_of_two, transposed=True)
        [quantized] = _run_square(x, power_of_two)
        return quantized, quantized.transpose()
    values, scales, *transposed = _run_transposed(x, group_sizes, power_of_two, along=True)
    return _by_column(values[0], scales[0]), _by_column(*transposed)


def swiglu_quantize(gate_up: jax.Array, power_of_two: bool) -> QuantizedArray:
    """See `quantization.api.swiglu_quantize`."""
    values, scales = _run(
        gate_up[None],
        None,
        k=gate_up.shape[1] // 2,
        power_of_two=power_of_two,
        swiglu=True,
        warpgroups=2,  # gate and up take twice the registers
        depth=3 if gate_up.dtype == jnp.bfloat16 else 1,
    )
    return _by_column(values[0], scales[0])


def _run_square(x, power_of_two, transposed=False):
    *leading, m, k = x.shape
    depth = 2 if x.dtype == jnp.bfloat16 else 1
    options = {"square": True, "transposed": transposed, "warpgroups": 2, "depth": depth}
    found = _run(x.reshape(-1, m, k), None, k=k, power_of_two=power_of_two, **options)
    found = [part.reshape(*leading, *part.shape[1:]) for part in found]
    pairs = zip(found[::2], found[1::2], strict=True)
    return tuple(QuantizedArray(*pair, SQUARE) for pair in pairs)


def _run_transposed(x, group_sizes, power_of_two, along):
    filled = None
    if group_sizes is not None:
        filled = rows_of_tiles(group_sizes, x.shape[0] // ALIGNMENT, ALIGNMENT)
    return _run(
        x[None],
        filled,
        k=x.shape[1],
        power_of_two=power_of_two,
        along=along,
        transposed=True,
        warpgroups=2,
    )


def _run(x, filled, *, k, **options):
    from whalejax.kernels.quantization.hopper_kernel import Plan, build

    groups, m, _ = x.shape
    options = {"warpgroups": 4 if x.dtype == jnp.bfloat16 else 2} | options
    p = Plan(groups=groups, m=m, k=k, dtype=x.dtype, masked=filled is not None, **options)
    arguments = (x,) if filled is None else (x, filled)
    return mosaic.call(build, p, mosaic.num_sms(), arguments=arguments)


def _by_column(values, scales):
    return QuantizedArray(values, scales, ROW, scales_by_column=True)
