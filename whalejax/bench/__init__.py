"""Benchmarks: a module per area, run as `python -m whalejax.bench.<area>`."""
