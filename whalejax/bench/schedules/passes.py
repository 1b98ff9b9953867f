"""Times what `predict` needs: the passes of a pipeline's stage and a transfer, on all devices.

Times are of the wall: kernels of several devices, and of several streams of each, overlap.
"""

import statistics
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from whalejax.bench.pipeline import PARTS, weight_time
from whalejax.bench.report import Bench
from whalejax.bench.schedules.programs import Case
from whalejax.bench.schedules.ranks import TRANSFERS
from whalejax.parallel.dualpipe import StageTimes
from whalejax.parallel.mesh import AXES


def time_passes(bench: Bench, case: Case, programs: dict) -> StageTimes:
    """Times what `predict` needs, and keeps a row of each."""
    leaves = programs["leaves"](jax.device_put(jnp.int32(0), case.everywhere))
    keys = jax.random.split(jax.random.key(1), 2)
    given = {name: travelling(case, key) for name, key in zip(("x", "dy"), keys, strict=True)}
    kept = number_of(programs["backward"]) - len(leaves) - len(given["dy"])
    given["kept"] = programs["forward"](*leaves, *given["x"])[:kept]
    slots = number_of(programs["weight"]) - len(leaves)
    given["slots"] = programs["input"](*leaves, *given["kept"], *given["dy"])[:slots]
    found = {}
    for part, names in PARTS.items():
        arguments = *leaves, *(array for name in names for array in given[name])
        found[part] = time_calls(bench, case, part, programs[part], arguments)
    arguments = given["x"][:1]
    options = {"calls": 1, "turns": TRANSFERS}
    found["transfer"] = time_calls(
        bench, case, "transfer", programs["transfer"], arguments, **options
    )
    del found["input"]  # `predict` takes it to be what is left of the backward pass
    return StageTimes(**found | {"weight": weight_time(found)})


def number_of(program: jax.stages.Compiled) -> int:
    """Arrays that a program takes."""
    return len(jax.tree.leaves(program.in_avals))


def travelling(case: Case, key: jax.Array) -> list[jax.Array]:
    """What travels into a stage, or its gradient, at random on every device: hidden and balance."""
    mesh = case.mesh
    place = NamedSharding(mesh, PartitionSpec(AXES))
    shape = (mesh.size, 1, case.length, case.model.hidden_size)
    dtype = case.execution.precision.dtype
    draw = jax.jit(lambda key: jax.random.normal(key, shape, dtype), out_shardings=place)
    return [draw(key), jax.device_put(jnp.zeros(mesh.size, jnp.float32), place)]


def time_calls(
    bench: Bench, case: Case, name: str, f: Any, arguments: tuple, *, calls: int = 3, turns: int = 1
) -> float:
    """Seconds of a turn of a program, called some times in a row; keeps a row of the median.

    Of more calls in a row the results would not find room.
    """
    jax.block_until_ready(f(*arguments))
    rounds = []
    for _ in range(bench.arguments.rounds):
        begin = time.perf_counter()
        for _ in range(calls):
            result = f(*arguments)
        jax.block_until_ready(result)
        rounds.append((time.perf_counter() - begin) / (calls * turns))
        del result
    median = statistics.median(rounds)
    bench.keep({"op": name, "case": str(case)} | in_ms(took=median, spread=np.ptp(rounds)))
    return median


def in_ms(**seconds: float) -> dict[str, float]:
    """Milliseconds, for a JSON row."""
    return {f"{name}_ms": round(1e3 * float(value), 3) for name, value in seconds.items()}
