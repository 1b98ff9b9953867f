"""Dense matmuls of FP8 arrays with a scale every 128 elements."""

from whalejax.kernels.fp8_gemm.api import fp8_matmul, fp8_matmul_wgrad
from whalejax.kernels.fp8_gemm.linear import fp8_linear, round_weight

__all__ = ["fp8_linear", "fp8_matmul", "fp8_matmul_wgrad", "round_weight"]
