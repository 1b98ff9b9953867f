"""Schedules that overlap forwards with backwards, made from ones that do not."""

import dataclasses

from whalejax.parallel.dualpipe.checking import check
from whalejax.parallel.dualpipe.schedule import BACKWARD, FORWARD, Schedule, Step


def overlap_pairs(schedule: Schedule) -> Schedule:
    """Runs each whole backward beside the forward that follows it on its rank.

    In 1F1B, plain or interleaved, every rank so runs one forward more before its first backward,
    and pairs in the steady state. This is what Megatron does to hide the all-to-all of one
    microbatch behind the compute of another. Interleaved 1F1B has the warm-up for it. In plain 1F1B
    ranks wait for one another in every pair: it runs, but slower.

    Args:
      schedule: that passes `check`.

    Returns:
      The schedule with pairs, "+overlap" added to its name, and one more activation promised if a
      pair was made.

    Raises:
      ValueError: with the pairs it does not pass `check`; says why.
    """
    steps = tuple(_pair(steps) for steps in schedule.steps)
    paired = dataclasses.replace(
        schedule,
        name=f"{schedule.name}+overlap",
        steps=steps,
        activations=schedule.activations + (steps != schedule.steps),
    )
    check(paired)
    return paired


def _pair(steps: tuple[Step, ...]) -> tuple[Step, ...]:
    """A rank's steps, those with a lone B before a lone F made one."""
    paired = []
    for step in steps:
        kinds = [op.kind for op in (*(paired[-1] if paired else ()), *step)]
        if kinds == [BACKWARD, FORWARD]:
            paired[-1] = (*step, *paired[-1])
        else:
            paired.append(step)
    return tuple(paired)
