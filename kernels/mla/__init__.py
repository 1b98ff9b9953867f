"""Decode of multi-head latent attention over a paged cache, and appending to that cache."""

from whalejax.kernels.mla.api import append, mla_decode

__all__ = ["append", "mla_decode"]
