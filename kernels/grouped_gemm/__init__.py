"""One matmul per expert over rows sorted by expert."""

from whalejax.kernels.grouped_gemm.api import grouped_matmul

__all__ = ["grouped_matmul"]
