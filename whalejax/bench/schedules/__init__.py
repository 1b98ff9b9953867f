"""Whole steps through pipelines, timed over all devices: see `running`."""

from whalejax.bench.schedules.running import main

__all__ = ["main"]
