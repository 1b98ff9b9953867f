"""Decode of multi-head latent attention over a paged cache, and appending to that cache."""

from whalejax.kernels.mla.api import append, mla_decode
from whalejax.kernels.mla.hopper import mla_workers
from whalejax.kernels.mla.pages import FP8Pages
from whalejax.kernels.mla.plan import Plan, plan_mla_decode

__all__ = ["FP8Pages", "Plan", "append", "mla_decode", "mla_workers", "plan_mla_decode"]
