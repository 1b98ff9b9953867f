"""Attention for training and prefill, without ever holding all scores."""

from whalejax.kernels.attention.api import attention

__all__ = ["attention"]
