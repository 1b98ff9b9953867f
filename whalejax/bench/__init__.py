"""Benchmarks: one module an area; `SHARED` names those that benchmarks are made of."""

SHARED = ("peers", "report", "timing")
