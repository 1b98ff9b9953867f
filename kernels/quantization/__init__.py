"""FP8 arrays with one float32 scale a tile."""

from whalejax.kernels.quantization.array import QuantizedArray

__all__ = ["QuantizedArray"]
