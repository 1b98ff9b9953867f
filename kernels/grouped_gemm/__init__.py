"""One matmul per expert over rows sorted by expert: in bf16 or f32, and in FP8."""

from whalejax.kernels.grouped_gemm.api import grouped_matmul
from whalejax.kernels.grouped_gemm.fp8 import (
    fp8_grouped_matmul,
    fp8_grouped_matmul_wgrad,
    fp8_masked_matmul,
)
from whalejax.kernels.grouped_gemm.linear import fp8_grouped_linear

__all__ = [
    "fp8_grouped_linear",
    "fp8_grouped_matmul",
    "fp8_grouped_matmul_wgrad",
    "fp8_masked_matmul",
    "grouped_matmul",
]
