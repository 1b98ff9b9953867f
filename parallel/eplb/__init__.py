"""Balances experts over GPUs: which experts get replicas, and which GPU holds which replica."""

from whalejax.parallel.eplb.planning import gpu_loads, rebalance_experts

__all__ = ["gpu_loads", "rebalance_experts"]
