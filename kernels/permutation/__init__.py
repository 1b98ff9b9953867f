"""Rows to experts and back: a plan from the router's choice, permute, and weighted unpermute."""

from whalejax.kernels.permutation.api import (
    Permutation,
    num_rows,
    permute,
    plan_permutation,
    unpermute,
)

__all__ = [
    "Permutation",
    "num_rows",
    "permute",
    "plan_permutation",
    "unpermute",
]
