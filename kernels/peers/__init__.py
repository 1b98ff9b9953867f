"""Rows straight out of, and into, the memory of other GPUs of a host."""

from whalejax.kernels.peers.api import gather_rows, sum_rows, why_not

__all__ = ["gather_rows", "sum_rows", "why_not"]
