"""Ops on arrays: nothing here knows a model or a mesh.

Public names are loaded on first use, so that importing starts no device.
"""

import importlib
from typing import Any

MODULES = {
    "QuantizedArray": "quantization",
    "fp8_grouped_linear": "grouped_gemm",
    "fp8_grouped_matmul": "grouped_gemm",
    "fp8_grouped_matmul_wgrad": "grouped_gemm",
    "fp8_linear": "fp8_gemm",
    "fp8_masked_matmul": "grouped_gemm",
    "fp8_matmul": "fp8_gemm",
    "fp8_matmul_wgrad": "fp8_gemm",
    "grouped_matmul": "grouped_gemm",
    "mla_decode": "mla",
    "quantize": "quantization",
    "quantize_both": "quantization",
    "quantize_transposed": "quantization",
    "round_weight": "fp8_gemm",
    "swiglu_gradient": "quantization",
    "swiglu_quantize": "quantization",
}

__all__ = list(MODULES)


def __getattr__(name: str) -> Any:
    """Loads a public name from its op when it is first asked for."""
    if name not in MODULES:
        raise AttributeError(f"module 'whalejax.kernels' has no attribute {name!r}")
    return getattr(importlib.import_module(f"whalejax.kernels.{MODULES[name]}"), name)
