"""Rows to experts and back: a plan from the router's choice, permute, and weighted unpermute."""

from whalejax.kernels.permutation.api import (
    Permutation,
    carry_gradient,
    num_rows,
    permute,
    plan_permutation,
    unpermute,
)

__all__ = [
    "Permutation",
    "carry_gradient",
    "num_rows",
    "permute",
    "plan_permutation",
    "unpermute",
]
