"""Benchmarks: one module an area; `SHARED` names those that benchmarks are made of."""

SHARED = (
    "compiling",
    "hiding",
    "lockstep",
    "passes",
    "peers",
    "pipelined",
    "ranks",
    "report",
    "timing",
)
