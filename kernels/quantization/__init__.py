"""FP8 arrays with one float32 scale a tile, and what makes them from bf16 or f32 arrays."""

from whalejax.kernels.quantization.api import (
    quantize,
    quantize_both,
    quantize_transposed,
    swiglu_gradient,
    swiglu_quantize,
)
from whalejax.kernels.quantization.array import QuantizedArray

__all__ = [
    "QuantizedArray",
    "quantize",
    "quantize_both",
    "quantize_transposed",
    "swiglu_gradient",
    "swiglu_quantize",
]
